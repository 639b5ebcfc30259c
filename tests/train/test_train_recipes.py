"""Recipes end to end on tiny models: tokenizer, then generators by class and by caption, resumed exactly and exported."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from vargen.cli.train import train as command
from vargen.config import RECIPES, load_config
from vargen.errors import ConfigError, VargenError
from vargen.pipeline import VisualARPipeline
from vargen.tokenizers.vq import VQTokenizer
from vargen.train import generator, tokenizer
from vargen.train.generator import GeneratorTask
from vargen.train.loop import Trainer
from vargen.train.run import KINDS, train
from vargen.train.tokenizer import TokenizerTask

TRAINING = {
    "batch_size": 4,
    "max_train_steps": 3,
    "log_steps": 1,
    "checkpointing_steps": 2,
    "preview_steps": 0,
    "validation_steps": 0,
    "device": "cpu",
}
VQ = {
    "sample_size": 16,
    "encoder_widths": [8, 8],
    "decoder_widths": [8, 8],
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "attention_levels": [],
    "latent_channels": 8,
    "codebook_size": 16,
    "codebook_dim": 4,
    "revive_after": 2,
    "usage_window": 64,
    "norm_groups": 4,
}
GPT = {"dim": 16, "depth": 2, "heads": 2, "mlp_hidden": 16}
DATASET = {"name": "shapes", "size": 16, "length": 24}
VALIDATION = {"samples": 8, "pictures": 4, "dataset": {"split": "test", "length": 8}}


def tokenizer_recipe(**training: Any) -> dict[str, Any]:
    return {
        "kind": "tokenizer",
        "dataset": DATASET,
        "validation": VALIDATION,
        "model": {"system": "llamagen-vq", "config": VQ},
        "objective": {
            "perceptual": None,
            "discriminator": "patchgan",
            "discriminator_options": {"width": 8, "num_layers": 1},
            "discriminator_start": 2,
            "use_adaptive_weight": True,
        },
        "optimizer": {"learning_rate": 1e-3},
        "discriminator_optimizer": {"learning_rate": 5e-4},
        "training": {**TRAINING, **training},
    }


def generator_recipe(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "generator",
        "dataset": DATASET,
        "validation": VALIDATION,
        "tokenizer": str(path),
        "model": {"system": "llamagen", "config": GPT},
        "sampling": {"guidance_scale": 2.0, "top_k": 8},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.05},
        "training": TRAINING,
        **changes,
    }


def same_weights(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    final = train(tokenizer_recipe(preview_steps=3, validation_steps=3), output_dir=folder)
    assert final == folder / "final"
    return folder


def test_tokenizer_run(trained: Path):
    model = VQTokenizer.from_pretrained(trained / "final")
    assert model.space.shape == (8, 8)
    finished, state = (
        load_file(trained / f / "diffusion_pytorch_model.safetensors") for f in ("final", "checkpoint-00000003/ema/tokenizer")
    )
    assert all(torch.equal(finished[key], state[key]) for key in finished)
    assert state.keys() - finished.keys() == {"quantizer.recent", "quantizer.idle_steps"}
    card = (trained / "final" / "README.md").read_text()
    assert "3 steps, 12 samples" in card
    assert "validation/psnr" in card
    assert "codebook_usage" in card
    for picture in ("loss.png", "pictures.png"):
        assert f"]({picture})" in card
        assert Image.open(trained / "final" / picture).width > 50
    assert (trained / "pictures" / "00000003.png").is_file()


def test_tokenizer_resumes_exactly(trained: Path, tmp_path: Path):
    for steps, resume in ((2, None), (3, "latest")):
        train(tokenizer_recipe(max_train_steps=steps), output_dir=tmp_path, resume=resume)
    for name in ("training.safetensors", "tokenizer/diffusion_pytorch_model.safetensors"):
        assert same_weights(*(folder / "checkpoint-00000003" / name for folder in (trained, tmp_path))), name


def test_a_tokenizer_is_trained_further(trained: Path, tmp_path: Path):
    recipe = tokenizer_recipe(max_train_steps=1)
    recipe["model"] = {"path": str(trained / "final")}
    assert train(recipe, output_dir=tmp_path)


@pytest.mark.parametrize("cache", [True, False])
def test_class_conditional_generator(trained: Path, tmp_path: Path, cache: bool):
    recipe = generator_recipe(trained / "final", tokens={"cache": cache, "views": 1 + cache}, export={"dtype": "float16"})
    final = train(recipe, ["training.preview_steps=3"], output_dir=tmp_path)
    pipe = VisualARPipeline.from_pretrained(final)
    assert pipe.config.defaults["guidance_scale"] == 2.0
    assert pipe.config.defaults["top_k"] == 8
    assert pipe.model.dtype == torch.float32
    pictures = pipe(class_labels=["heart", 0], generator=0, output_type="pt").images
    assert pictures.shape == (2, 3, 16, 16)


def test_cached_tokens_train_as_those_made_on_the_fly(trained: Path, tmp_path: Path):
    for cache in (True, False):
        train(generator_recipe(trained / "final", tokens={"cache": cache}), output_dir=tmp_path / str(cache))
    file = "checkpoint-00000003/model/diffusion_pytorch_model.safetensors"
    assert same_weights(tmp_path / "True" / file, tmp_path / "False" / file)


def test_text_conditional_generator_with_its_word_encoder(trained: Path, tmp_path: Path):
    recipe = generator_recipe(trained / "final", text_encoder={"words": {"dim": 8, "heads": 2}, "max_length": 14})
    final = train(recipe, output_dir=tmp_path)
    before = VisualARPipeline.from_pretrained(final)
    assert "crescent" in before.text_encoder.config.words
    untrained = GeneratorTask(load_config(recipe, schema=generator.SCHEMA)).network.text_encoder
    assert not torch.equal(before.text_encoder.embedding.weight, untrained.embedding.weight)
    pictures = before("a large red circle at the top left", generator=1, output_type="pt").images
    assert pictures.shape == (1, 3, 16, 16)


def test_a_generator_is_trained_further(trained: Path, tmp_path: Path):
    final = train(generator_recipe(trained / "final"), output_dir=tmp_path / "first")
    recipe = generator_recipe(trained / "final", model={"path": str(final), "config": {"condition_dropout": 0.5}})
    assert train(recipe, ["training.max_train_steps=1"], output_dir=tmp_path / "second")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dataset": {"size": 32}}, "sample_size"),
        ({"model": {"system": "llamagen"}}, "is a generator"),
        ({"model": {"system": "llamagen-vp"}}, "llamagen-vq"),
        ({"model": {"config": {"codebook_sise": 4}}}, "codebook_size"),
        ({"model": {"path": "x"}}, "exactly one"),
        ({"objective": {"perceptal": None}}, "perceptual"),
        ({"dataset": {"name": "shape"}}, "shapes"),
        ({"kind": "tokeniser"}, "tokenizer"),
        ({"training": {"mixed_precison": "no"}}, "mixed_precision"),
    ],
)
def test_mistakes_in_tokenizer_recipes(tmp_path: Path, change: dict[str, Any], words: str):
    recipe = OmegaConf.to_container(OmegaConf.merge(tokenizer_recipe(), change))
    with pytest.raises(VargenError, match=words):
        train(recipe, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokenizer": None}, "tokenizer: expected"),
        ({"tokenizer": "no/such/place"}, "no model"),
        ({"model": {"config": {"num_classes": 3}}}, "8 classes, the model 3"),
        ({"model": {"config": {"codebook_size": 32}}}, "codebook_size"),
        ({"model": {"config": {"num_classes": None, "text_dim": 8}}}, "text_encoder"),
        ({"model": {"system": "llamagen-vq"}}, "is a tokenizer"),
        ({"text_encoder": {"words": {}, "path": "t5"}}, "not both"),
        ({"tokens": {"cache": True, "views": 0}}, "views"),
    ],
)
def test_mistakes_in_generator_recipes(trained: Path, tmp_path: Path, change: dict[str, Any], words: str):
    recipe = OmegaConf.to_container(OmegaConf.merge(generator_recipe(trained / "final"), change))
    with pytest.raises(VargenError, match=words):
        train(recipe, output_dir=tmp_path)


def test_an_output_directory_is_needed():
    with pytest.raises(ConfigError, match="output"):
        train(tokenizer_recipe())


def test_what_a_recipe_leaves_to_the_user_is_asked_for(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"add dataset.root="):
        train("folder/tokenizer", output_dir=tmp_path)


def test_missing_perceptual_weights_must_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    recipe = tokenizer_recipe()
    del recipe["objective"]["perceptual"]
    with pytest.raises(VargenError, match="perceptual"):
        train(recipe, output_dir=tmp_path / "run")


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: str(p.relative_to(RECIPES)))
def test_recipes_that_ship_are_known_to_the_schema(path: Path):
    kind = OmegaConf.load(path).kind
    config = load_config(path, schema=importlib.import_module(KINDS[kind][0]).SCHEMA)
    assert config.output_dir
    assert config.optimizer.learning_rate or config.optimizer.blr


def test_the_command(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    OmegaConf.save(tokenizer_recipe(max_train_steps=1), file)
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(file), "seed=3", "--output", str(tmp_path / "run")])
    assert result.output.strip().endswith(str(tmp_path / "run" / "final"))
    assert "seed=3" in (tmp_path / "run" / "final" / "README.md").read_text()
    assert OmegaConf.load(tmp_path / "run" / "checkpoint-00000001" / "recipe.yaml").seed == 3


@pytest.mark.parametrize("name", ["digits/tokenizer", "shapes/tokenizer"])
def test_tokenizer_recipes_that_ship_can_start(tmp_path: Path, name: str):
    small = {"dataset": {"length": 8}, "validation": {"samples": 4, "pictures": 4}} if name.startswith("shapes") else {}
    config = OmegaConf.merge(load_config(name, ["training.batch_size=2", "training.device=cpu"], tokenizer.SCHEMA), small)
    trainer = Trainer(TokenizerTask(config), config, tmp_path)
    assert trainer.task.tokenizer.space.num_tokens == 64
