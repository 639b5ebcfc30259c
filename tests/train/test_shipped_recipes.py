"""Every recipe that ships builds what it describes: models on the meta device, data sets and objectives by their arguments."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

from vargen.config import RECIPES, load_config
from vargen.data.base import DATASETS
from vargen.guidance import Guidance
from vargen.losses.objective import TokenizerObjective
from vargen.model import Sampling, VisualTokenizer
from vargen.registry import SYSTEMS, load_public, system
from vargen.sample.load import load_tokenizer
from vargen.sample.tokenize import SCHEMES
from vargen.train.build import build_generator, build_model, for_videos, plain, with_levels
from vargen.train.optim import base_learning_rate, learning_rate
from vargen.train.run import KINDS

FILES = {str(p.relative_to(RECIPES).with_suffix("")): p for p in sorted(RECIPES.rglob("*.yaml"))}
RAW: dict[str, dict[str, Any]] = {name: yaml.safe_load(path.read_text()) for name, path in FILES.items()}


def named(kind: str) -> list[str]:
    return [name for name, recipe in RAW.items() if recipe["kind"] == kind]


# tokenizers that recipes take from `vargen convert`
CONVERTED = {
    "outputs/convert/kl16": ("kl16", "KL-16"),
    "outputs/convert/larp-tokenizer": ("larp-tokenizer", "larp-l-long"),
    "outputs/convert/nbp-tokenizer-ucf101": ("nbp-tokenizer", "magvit2"),
    "outputs/convert/nbp-tokenizer-k600": ("nbp-tokenizer", "magvit2"),
    "outputs/convert/vq16-t2i": ("llamagen-vq", "VQ-16"),
    "outputs/convert/vq16-t2i-512": ("llamagen-vq", "VQ-16"),
}

TEXT_WIDTHS = {"google/flan-t5-xl": 2048}
# generators whose constructors count cells, which the meta device cannot: small ones on the CPU
SMALL = {
    "ecar": {"dim": 64, "depth": 1, "heads": 4, "head_width": 32, "head_depth": 1},
    "xar": {"dim": 64, "encoder_depth": 1, "decoder_depth": 1, "heads": 4},
}


def load(name: str) -> DictConfig:
    # what a recipe leaves to the user
    root = ["dataset.root=DATA"] if RAW[name]["dataset"].get("root") == "???" else []
    return load_config(FILES[name], root, importlib.import_module(KINDS[RAW[name]["kind"]][0]).SCHEMA)


def build_tokenizer(model: dict[str, Any]) -> VisualTokenizer:
    """On the meta device; captions of a word or two."""
    found = system(model["system"]).load_class()
    takes_words = "words" in found._get_init_keys(found) and "words" not in model["config"]
    # directories of earlier stages
    config = {key: value for key, value in model["config"].items() if key not in ("embedder", "unclip")}
    with torch.device("meta"):
        return build_model({**model, "config": config}, "tokenizer", **({"words": ["red"]} if takes_words else {}))


def tokenizer_at(path: str) -> VisualTokenizer:
    """The tokenizer that a recipe names: converted, bundled, or what another recipe makes."""
    if path in CONVERTED:
        name, preset = CONVERTED[path]
        size = {"sample_size": 512} if path.endswith("512") else {}
        return build_tokenizer({"system": name, "preset": preset, "config": size})
    maker = next((name for name, recipe in RAW.items() if f"{recipe['output_dir']}/final" == path), None)
    if maker is None:
        return load_tokenizer(path, device="cpu")
    return build_tokenizer(plain(load(maker).model))


def sizes(config: DictConfig) -> tuple[int, ...]:
    data = plain(config.dataset)
    return (data["frames"], data["size"], data["size"]) if "frames" in data else (data["size"], data["size"])


def commands(name: str) -> list[list[str]]:
    """The commands in a recipe's header."""
    lines = FILES[name].read_text().splitlines()
    return [shlex.split(line[1:]) for line in lines if re.match(r"#   (vargen|torchrun) ", line)]


@pytest.mark.parametrize("name", RAW)
def test_data_sets_and_rates(name: str):
    config = load(name)
    for block in (config.dataset, config.validation.dataset):
        arguments = plain(block)
        module, attribute = DATASETS[arguments.pop("name", config.dataset.name)]
        known = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters
        assert arguments.keys() <= known.keys()
    base = base_learning_rate(config.optimizer, config.training.batch_size)
    assert learning_rate(config.lr_scheduler, base, 1000, 100)(1000) >= 0
    assert (config.training.max_train_steps is None) != (config.training.num_train_epochs is None)


@pytest.mark.parametrize("name", named("tokenizer"))
def test_tokenizers(name: str):
    config = load(name)
    if config.model.path is None:
        tokenizer = build_tokenizer(plain(config.model))
        assert tuple(tokenizer.sample_shape) == sizes(config)
        assert all(hasattr(tokenizer, part) for part in config.model.parts)
    objective = {**plain(config.objective), "perceptual": None, "teachers": ()}
    with torch.device("meta"):
        TokenizerObjective(**objective)


@pytest.mark.parametrize("name", named("generator"))
def test_generators(name: str):
    config = load(name)
    tokenizer = tokenizer_at(config.tokenizer)
    cached = config.dataset.name == "cache"
    shape = tuple(tokenizer.sample_shape) if cached else sizes(config)
    data: Any = SimpleNamespace(num_classes=1000, sample_shape=shape)
    text = config.text_encoder
    width = text.words["dim"] if text.words is not None else TEXT_WIDTHS.get(text.path)
    encoder = None if width is None else SimpleNamespace(dim=width, max_length=text.max_length)
    model = plain(config.model)
    if model["path"] is not None:
        # goes on from what another recipe makes
        maker = next(name for name, recipe in RAW.items() if f"{recipe['output_dir']}/final" == model["path"])
        first = plain(load(maker).model)
        model = {**first, "config": {**first["config"], **model["config"]}}
    small = SMALL.get(model["system"], {})
    model["config"] = {**model["config"], **small}
    with torch.device(tokenizer.device):
        tokenizer = for_videos(tokenizer, data)
    with torch.device("cpu" if small else "meta"):
        generator = build_generator(model, tokenizer, data, encoder)
    with torch.device(tokenizer.device):
        generator.space.require(with_levels(tokenizer, generator).space)
    assert tuple(tokenizer.sample_shape) == shape
    settings = plain(config.sampling)
    Guidance(settings["guidance_scale"], schedule=settings["guidance_schedule"])
    Sampling(settings["temperature"], settings["top_k"], settings["top_p"])
    known = inspect.signature(generator.generate).parameters
    assert all(key in known or f'"{key}"' in inspect.getsource(type(generator).generate) for key in settings["options"])
    if cached:
        (made,) = [c for c in commands(name) if c[1] == "tokenize"]
        assert made[2] == config.tokenizer
        assert made[made.index("--output") + 1] == config.dataset.path
        if "--scheme" in made:
            assert made[made.index("--scheme") + 1] in SCHEMES


@pytest.mark.parametrize("name", named("drafter"))
def test_drafters(name: str):
    config = load(name)
    known = load_public("EagleDrafter")._get_init_keys(load_public("EagleDrafter"))
    assert plain(config.model.config).keys() <= known
    assert config.target


@pytest.mark.parametrize("name", RAW)
def test_headers_name_their_recipe(name: str):
    for command in commands(name):
        if "train" in command:
            assert command[command.index("train") + 1] == name
    assert FILES[name].read_text().startswith("# ")


def test_systems_have_recipes():
    """Tokenizers and generators of the table are trained by some recipe that ships; a few come converted, or wrap another."""
    trained = {str(recipe.get("model", {}).get("system")) for recipe in RAW.values()} | {"lantern", "seed-embedder"}
    assert SYSTEMS.keys() - trained <= {"frames", "maskgit", "maskgit-vqgan", "nbp-tokenizer"}
