"""The drafter's recipe end to end on a tiny pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import WORDS, tiny_pipeline
from vargen import EagleDrafter, Lantern, Noise
from vargen.backbones.nar import NAR
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.pipeline import VisualARPipeline
from vargen.train.run import train

TRAINING = {
    "batch_size": 4,
    "max_train_steps": 3,
    "max_grad_norm": None,
    "max_grad_value": 0.5,
    "use_ema": False,
    "log_steps": 1,
    "checkpointing_steps": 2,
    "preview_steps": 0,
    "validation_steps": 0,
    "device": "cpu",
}


def recipe(target, dataset=None, training=None, **changes):
    return {
        "kind": "drafter",
        "dataset": dataset or {"name": "digits", "size": 16},
        "validation": {"samples": 8},
        "target": str(target),
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.01, "decay": "all"},
        "lr_scheduler": {"name": "linear", "warmup_epochs": 0.03},
        "training": {**TRAINING, **(training or {})},
        **changes,
    }


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    tiny_pipeline().save_pretrained(folder / "class")
    tiny_pipeline(text=True).save_pretrained(folder / "text")
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_drafter_is_trained_and_used(pipelines, tmp_path):
    final = train(recipe(pipelines / "class", export={"dtype": "float16"}), output_dir=tmp_path)
    drafter = EagleDrafter.from_pretrained(final)
    pipeline = VisualARPipeline.from_pretrained(pipelines / "class")
    # the table stays what it was, the target's head
    assert torch.equal(drafter.tokens.weight, pipeline.model.output_heads[0].linear.weight.half().float())
    lines = metrics(tmp_path)
    assert {"loss", "state", "probability", "agreement", "grad_norm"} <= set(lines[0])
    assert "validation/agreement" in lines[-1]
    assert "Drafter of LlamaGen on digits" in (final / "README.md").read_text()
    way = Lantern(drafter)
    images = pipeline(class_labels=[1, 2], generator=3, decoding=way, output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    assert len(way.statistics.accepted) == 2


def test_runs_resume_exactly(pipelines, tmp_path):
    whole = train(recipe(pipelines / "class"), output_dir=tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-00000002"
    resumed = train(recipe(pipelines / "class"), output_dir=tmp_path / "again", resume=str(checkpoint))
    a, b = (EagleDrafter.from_pretrained(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_captions_and_cached_tokens(pipelines, tmp_path):
    dataset = {"name": "shapes", "size": 16, "length": 12}
    changes = {"tokens": {"cache": True, "views": 2}, "validation": {"samples": 4, "dataset": {"length": 4}}}
    final = train(recipe(pipelines / "text", dataset, **changes), output_dir=tmp_path)
    pipeline = VisualARPipeline.from_pretrained(pipelines / "text")
    text = pipeline.text_encoder.encode([" ".join(WORDS[:3])])
    tokens = pipeline.model.generate(Condition(text=text), noise=Noise(0), decoding=Lantern(EagleDrafter.from_pretrained(final)))
    assert tokens.shape == (1, 4, 4)


def test_gradients_are_clipped_element_by_element(pipelines, tmp_path):
    train(recipe(pipelines / "class", training={"max_train_steps": 1, "max_grad_value": 1e-6}), output_dir=tmp_path)
    drafter = EagleDrafter.from_preset("llamagen-t2i", grid=[4, 4], codebook_size=32, dim=32, heads=2, mlp_hidden=256)
    count = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    assert 0 < metrics(tmp_path)[0]["grad_norm"] <= 1.01e-6 * count**0.5


def test_what_cannot_be_a_target_is_refused(pipelines, tmp_path):
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    nar = NAR(grid=(4, 4), codebook_size=32, dim=16, depth=1, heads=2, num_classes=10)
    VisualARPipeline(nar, pipeline.visual_tokenizer).save_pretrained(tmp_path / "nar")
    for number in range(4):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "photos" / "a" / f"{number}.png")
    photos = {"name": "folder", "root": str(tmp_path / "photos"), "size": 16}
    for target, dataset, message in (
        (tmp_path / "nar", None, "NAR cannot be decoded speculatively"),
        (pipelines / "text", photos, "the data set has no captions"),
        ("nowhere", None, "no model 'nowhere'"),
    ):
        with pytest.raises(VargenError, match=message):
            train(recipe(target, dataset), output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="target: expected"):
        train({**recipe("x"), "target": None}, output_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="a drafter has no 'layers'"):
        train(recipe(pipelines / "class", model={"config": {"layers": 2}}), output_dir=tmp_path / "run")
