"""Adapters of MAR, Hi-MAR, xAR and KL-16: wrappers, sizes read from tensors, and what is refused."""

from pathlib import Path

import pytest
import torch

from tests.parity.case import Case
from vargen.errors import CheckpointError, ConfigError
from vargen.official import himar, mar, xar
from vargen.official.shared import ldm_autoencoder, ldm_sizes, square, token_mlp

CASES = Path(__file__).parent.parent / "parity" / "cases"
SYSTEMS = {
    "mar": (mar, "mar-forward", {"encoder_heads": 4, "decoder_heads": 5}),
    "himar": (himar, "himar-train", {"heads": 4, "dense_head_heads": 4}),
    "xar": (xar, "xar-cellsize", {}),
}
ALL = pytest.mark.parametrize("name", SYSTEMS)


def state_of(name):
    return Case.read(CASES / f"{SYSTEMS[name][1]}.safetensors").state32()


def save(content, folder):
    path = folder / "checkpoint-last.pth"
    torch.save(content, path)
    return path


@ALL
def test_training_files_hold_averaged_and_raw_weights(name, tmp_path):
    adapter, _, options = SYSTEMS[name]
    state = state_of(name)
    raw = {k: v + 1 if k == "z_proj.bias" else v for k, v in state.items()}
    path = save({"model": raw, "model_ema": state, "epoch": 3, "optimizer": {}}, tmp_path)
    averaged, plain = adapter.load(path, **options), adapter.load(path, ema=False, **options)
    assert torch.equal(averaged.input.bias + 1, plain.input.bias)
    assert not averaged.training


@ALL
def test_keys_must_fit(name, tmp_path):
    adapter, _, options = SYSTEMS[name]
    state = state_of(name)
    with pytest.raises(CheckpointError, match="unknown keys: extra"):
        adapter.load(save({**state, "extra": torch.zeros(1)}, tmp_path), **options)
    with pytest.raises(CheckpointError, match=r"missing keys: .*input\.bias"):
        adapter.load(save({k: v for k, v in state.items() if k != "z_proj.bias"}, tmp_path), **options)
    with pytest.raises(CheckpointError, match="is missing: this is not a checkpoint of this system"):
        adapter.load(save({"weight": torch.zeros(2, 2)}, tmp_path), **options)
    with pytest.raises(ConfigError, match="has no 'encoder_head'"):
        adapter.load(save(state, tmp_path), encoder_head=3, **options)


def test_unreleased_widths_need_their_heads(tmp_path):
    for name, heads in (("mar", "encoder_heads"), ("himar", "heads")):
        with pytest.raises(CheckpointError, match=rf"pass {heads}="):
            SYSTEMS[name][0].load(save(state_of(name), tmp_path))


def test_xar_reads_its_cells_from_the_mask(tmp_path):
    model = xar.load(save(state_of("xar"), tmp_path))
    assert (tuple(model.config.grid), tuple(model.config.entity_size)) == ((8, 8), (2, 2))
    assert model.num_classes == 1000


def test_derived_tables_must_be_ours(tmp_path):
    state = state_of("xar")
    mask = state["mask"].clone()
    mask[0, 0, 40, 0] = float("-inf")
    with pytest.raises(CheckpointError, match="'mask' is not the table"):
        xar.load(save({**state, "mask": mask}, tmp_path))
    key = "decoder_blocks.0.attn.rope.freqs_sin"
    with pytest.raises(CheckpointError, match="freqs_sin"):
        xar.load(save({**state, key: state[key].flip(0)}, tmp_path))
    key = "cond_diffloss.net.pos_embed"
    state = state_of("himar")
    with pytest.raises(CheckpointError, match="fixed positions"):
        himar.load(save({**state, key: state[key] + 0.1}, tmp_path), heads=4, dense_head_heads=4)


def test_gated_token_mlps():
    state = {
        "res_blocks.0.adaLN_modulation.1.weight": torch.zeros(12, 4),
        "res_blocks.0.adaLN_modulation.1.bias": torch.zeros(12),
        "final_layer.adaLN_modulation.1.weight": torch.ones(8, 4),
        "final_layer.adaLN_modulation.1.bias": torch.ones(8),
        "res_blocks.0.mlp.w12.weight": torch.cat([torch.full((6, 4), 1.0), torch.full((6, 4), 2.0)]),
        "res_blocks.0.mlp.w3.weight": torch.zeros(4, 6),
    }
    ours = token_mlp(state)
    assert (ours["blocks.0.mlp.gate.weight"] == 1).all()
    assert (ours["blocks.0.mlp.up.weight"] == 2).all()
    assert "blocks.0.mlp.down.weight" in ours
    assert ours["adaln.linear.bias"].tolist() == [0.0] * 12 + [1.0] * 8
    with pytest.raises(CheckpointError, match="no modulation layers"):
        token_mlp({})


def test_latent_diffusion_layout():
    state = {
        "encoder.down.0.block.0.conv2.weight": torch.zeros(8, 8, 3, 3),
        "encoder.down.1.block.0.conv2.weight": torch.zeros(16, 16, 3, 3),
        "encoder.down.1.attn.0.q.weight": torch.zeros(16, 16, 1, 1),
        "encoder.down.0.downsample.conv.bias": torch.zeros(8),
        "decoder.up.0.block.0.conv2.weight": torch.zeros(8, 8, 3, 3),
        "decoder.up.1.block.0.conv2.weight": torch.zeros(16, 16, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.bias": torch.zeros(16),
        "decoder.mid.attn_1.proj_out.bias": torch.zeros(16),
    }
    assert ldm_sizes(state)["encoder_widths"] == [8, 16]
    assert ldm_sizes(state)["encoder_attention"] == [1]
    ours = ldm_autoencoder(state)
    expected = ("encoder.levels.0.resample.conv.bias", "decoder.levels.0.blocks.0.shortcut.bias", "decoder.mid.1.out.bias")
    assert set(expected) <= set(ours)


def test_grids_must_be_square():
    assert square(49) == (7, 7)
    with pytest.raises(CheckpointError, match="50 positions do not form a square"):
        square(50)
