"""The loaders of LANTERN's drafters and converted bases."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from vargen import EagleDrafter, LlamaGen
from vargen.errors import CheckpointError
from vargen.official.lantern import load, load_base, load_drafter


def split(state, names):
    """Our state under published names."""
    found = {}
    for key, value in state.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3)):
                found[key.replace("attn.qkv", f"self_attn.{name}_proj")] = part.clone()
        else:
            found[key.replace("attn.out", "self_attn.o_proj")] = value
    return found


LAYER = [("blocks.", "layers."), *((f"mlp.{n}.", f"mlp.{n}_proj.") for n in ("gate", "up", "down"))]
LAYER += [("norm2.", "post_attention_layernorm."), ("norm1.", "input_layernorm.")]


@pytest.fixture
def drafter():
    torch.manual_seed(0)
    return EagleDrafter((16, 16), 20, 32, 2, mlp_hidden=24)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return LlamaGen((16, 16), 20, 32, 2, 2, 24, text_dim=6, text_length=5)


def drafter_state(drafter):
    return split(drafter.state_dict(), [("tokens.", "embed_tokens."), ("join.", "fc."), *LAYER])


def base_state(base):
    renamed = split(base.state_dict(), [("tokens.", "embed_tokens."), *LAYER])
    outside = {"output_heads.0.linear.weight": "lm_head.weight"}
    inside = {
        "output_heads.0.norm.weight": "norm.weight",
        "text.proj.up.weight": "cls_embedding.cap_proj.fc1.weight",
        "text.proj.down.weight": "cls_embedding.cap_proj.fc2.weight",
        "text.null": "cls_embedding.uncond_embedding",
    }
    return {outside.get(k, f"model.{inside.get(k, k)}"): v for k, v in renamed.items()}


def write(folder, state, config=None, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def same(a, b):
    return a.config_dict() == b.config_dict() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_drafter_from_its_folder(drafter, tmp_path, name):
    state = drafter_state(drafter)
    assert {"fc.bias", "layers.0.self_attn.q_proj.weight", "layers.0.post_attention_layernorm.weight"} <= set(state)
    config = {"num_attention_heads": 2, "rms_norm_eps": 1e-6, "input_type": "t2i"}
    assert same(load(write(tmp_path / "drafter", state, config, name)), drafter)


def test_a_base_from_its_folder(base, tmp_path):
    config = {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "block_size": 256}
    loaded = load(write(tmp_path / "base", base_state(base), config))
    assert isinstance(loaded, LlamaGen)
    assert same(loaded, base)


def test_the_kind_of_model_tells_the_grid(drafter, base, tmp_path):
    config = {"num_attention_heads": 2, "input_type": "t2i2"}
    assert load_drafter(write(tmp_path / "a", drafter_state(drafter), config)).config.grid == [32, 32]
    assert load_base(write(tmp_path / "b", base_state(base), config)).config.grid == [32, 32]


def test_files_alone_need_to_be_told(drafter, tmp_path):
    file = write(tmp_path / "drafter", drafter_state(drafter)) / "model.safetensors"
    with pytest.raises(CheckpointError, match="pass grid"):
        load(file)
    with pytest.raises(CheckpointError, match="pass heads"):
        load(file, grid=[16, 16])
    assert same(load(file, grid=[16, 16], heads=2), drafter)


def test_heads_of_the_published_width(tmp_path):
    wide = EagleDrafter.from_preset("llamagen-t2i", codebook_size=2, mlp_hidden=4, grid=[2, 2])
    folder = write(tmp_path / "wide", drafter_state(wide))
    assert load_drafter(folder, grid=[2, 2]).config.heads == 20


@pytest.mark.parametrize("damage, message", [("missing", "expected all of"), ("unknown", "unknown keys: stray")])
def test_keys_must_fit(drafter, tmp_path, damage, message):
    state = drafter_state(drafter)
    if damage == "missing":
        del state["layers.0.self_attn.k_proj.weight"]
    else:
        state["stray"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=message):
        load_drafter(write(tmp_path / "drafter", state, {"num_attention_heads": 2, "input_type": "t2i"}))


def test_other_folders_and_files(drafter, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "nothing.safetensors")
    folder = write(tmp_path / "drafter", drafter_state(drafter))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' is missing"):
        load(tmp_path / "x.safetensors")
