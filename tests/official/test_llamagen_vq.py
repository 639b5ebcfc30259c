"""The loader of LlamaGen's tokenizer checkpoints."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from vargen import VQTokenizer
from vargen.errors import CheckpointError, ConfigError
from vargen.official.llamagen_vq import load, official_key, to_official

SIZES = {
    "encoder_widths": [16, 8, 8],
    "decoder_widths": [8, 24, 16],
    "stem_width": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 2,
    "latent_channels": 4,
    "codebook_size": 12,
    "codebook_dim": 4,
    "usage_window": 50,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQTokenizer(sample_size=16, norm_groups=4, **SIZES).eval()


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items() if k != "quantizer.recent")


def test_published_names_of_vq16():
    with torch.device("meta"):
        keys = {official_key(k) for k in VQTokenizer.from_preset("VQ-16").state_dict()}
    assert len(keys) == 344
    assert {
        "encoder.conv_in.weight",
        "encoder.conv_blocks.2.res.0.nin_shortcut.bias",
        "encoder.conv_blocks.4.attn.1.proj_out.weight",
        "encoder.conv_blocks.3.downsample.conv.weight",
        "encoder.mid.1.q.weight",
        "decoder.conv_blocks.0.attn.2.norm.weight",
        "decoder.conv_blocks.0.upsample.conv.bias",
        "decoder.conv_blocks.4.res.2.conv2.weight",
        "decoder.norm_out.weight",
        "quantize.embedding.weight",
        "quantize.codebook_used",
        "post_quant_conv.bias",
    } <= keys


def test_sizes_are_read_from_the_tensors(model, tmp_path):
    torch.save({"model": to_official(model)}, tmp_path / "vq.pt")
    loaded = load(tmp_path / "vq.pt", sample_size=16, norm_groups=4)
    assert same(model, loaded)
    assert not loaded.training
    assert {k: loaded.config_dict()[k] for k in SIZES} == SIZES
    # the published window starts with zeros, which count as index 0
    assert loaded.quantizer.recent.tolist() == [0] * 50


def test_training_files_and_mirrors(model, tmp_path):
    torch.manual_seed(1)
    average = VQTokenizer(sample_size=16, norm_groups=4, **SIZES)
    rest = {"steps": 7, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}}}
    torch.save({"model": to_official(model), "ema": to_official(average), **rest}, tmp_path / "training.pt")
    options = {"sample_size": 16, "norm_groups": 4}
    assert same(model, load(tmp_path / "training.pt", **options))
    assert same(average, load(tmp_path / "training.pt", ema=True, **options))
    state = to_official(model)
    del state["quantize.codebook_used"]
    save_file(state, tmp_path / "mirror.safetensors")
    mirrored = load(tmp_path / "mirror.safetensors", **options)
    assert same(model, mirrored)
    assert len(mirrored.quantizer.recent) == 65536
    assert same(model, load(tmp_path / "mirror.safetensors", usage_window=0, **options))
    torch.save({"model": to_official(model)}, tmp_path / "vq.pt")
    assert same(model, load(tmp_path / "vq.pt", usage_window=0, **options))


def test_wrong_files_are_refused(model, tmp_path):
    path = tmp_path / "vq.safetensors"
    state = to_official(model)

    def attempt(changes):
        save_file({k: v for k, v in {**state, **changes}.items() if v is not None}, path)
        return load(path, norm_groups=4)

    for changes, match in (
        ({"encoder.mid.0.conv1.weight": None}, "missing keys: encoder.mid.0.conv1.weight"),
        ({"encoder.extra": torch.zeros(1)}, "unknown keys: encoder.extra"),
        ({"quant_conv.bias": torch.zeros(5)}, r"shapes that differ: quant_conv.bias \(5,\) for \(4,\)"),
        ({"quantize.embedding.weight": None}, "not a LlamaGen VQ tokenizer, it has no 'quantize.embedding.weight'"),
        ({"encoder.conv_in.weight": torch.zeros(3)}, r"not a LlamaGen VQ tokenizer, shape \(3,\) of 'encoder.conv_in.weight'"),
    ):
        with pytest.raises(CheckpointError, match=match):
            attempt(changes)
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="not a LlamaGen VQ tokenizer"):
        load(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load(tmp_path / "absent.pt")
    torch.save({"model": state}, tmp_path / "vq.pt")
    with pytest.raises(ConfigError, match="did you mean 'sample_size'"):
        load(tmp_path / "vq.pt", samplesize=8)
