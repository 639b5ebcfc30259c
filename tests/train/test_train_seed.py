"""SEED's recipes one after the other: the decoder of embeddings, the first stage, the second on both of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vargen.errors import ConfigError
from vargen.noise import Noise
from vargen.sample.load import load_tokenizer
from vargen.train.run import train

TRAINING = {
    "batch_size": 4,
    "max_train_steps": 2,
    "log_steps": 1,
    "checkpointing_steps": 2,
    "preview_steps": 0,
    "validation_steps": 2,
    "device": "cpu",
}
DATASET = {"name": "shapes", "size": 16, "length": 16}
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "vision_dim": 16,
    "vision_depth": 1,
    "vision_heads": 2,
    "vision_mlp": 16,
    "num_queries": 4,
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "mlp_hidden": 16,
}
UNCLIP = {"sample_size": 16, "embedding_dim": 8, "vision_dim": 16, "vision_depth": 1, "vision_heads": 2} | {
    "vae_widths": [8, 8],
    "unet_widths": [16, 16],
}


def recipe(system: str, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "kind": "tokenizer",
        "dataset": DATASET,
        "validation": {"samples": 8, "pictures": 2, "dataset": {"length": 8}},
        "model": {"system": system, "config": config},
        "optimizer": {"learning_rate": 1e-3},
        "training": TRAINING,
        "objective": {"perceptual": None},
        **more,
    }


def test_both_stages_and_their_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unclip = train(recipe("unclip", UNCLIP), output_dir=tmp_path / "unclip")
    first = train(recipe("seed-embedder", {**SIZES, "max_text": 16, "freeze_vision": False}), output_dir=tmp_path / "first")
    config = {**SIZES, "codebook_size": 8, "code_dim": 4, "decoder_depth": 1, "decoder_heads": 2, "embedding_dim": 8}
    given = {"head": "qformer", "head_depth": 1, "embedder": str(first), "unclip": str(unclip)}
    teachers = [{"features": "image_teacher", "teacher": str(unclip), "weight": 0.5, "distance": "l2"}]
    objective = {"perceptual": None, "teachers": teachers}
    second = train(recipe("seed", {**config, **given}, objective=objective), output_dir=tmp_path / "second")
    assert second is not None
    model, embedder = load_tokenizer(str(second), "cpu"), load_tokenizer(str(first), "cpu")
    assert model.config.embedder is None
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(model.causal_embeddings(pixels), embedder.encode(pixels), atol=1e-6)
    assert model.paints
    painted = model.decode(model.encode(pixels), noise=Noise(0, 2), num_inference_steps=1)
    assert painted.shape == pixels.shape


@pytest.mark.parametrize("system, config", [("seed-embedder", SIZES), ("unclip", UNCLIP)])
def test_captions_are_needed(tmp_path: Path, system: str, config: dict[str, Any]) -> None:
    for shade in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (50 * shade, 0, 0)).save(tmp_path / "images" / f"{shade}.png")
    dataset = {"name": "folder", "root": str(tmp_path / "images"), "size": 16}
    validation = {"samples": 2, "pictures": 2, "dataset": {}}
    with pytest.raises(ConfigError, match="learns from captions"):
        train(recipe(system, config, dataset=dataset, validation=validation), output_dir=tmp_path / "run")
