"""Generators and drafters trained from token caches, as from the pictures; finished tokenizers and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from vargen.backbones.larp import LARPGenerator
from vargen.errors import ConfigError, VargenError
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.sample.load import load_pipeline, load_tokenizer
from vargen.sample.tokenize import Scheme, tokenize
from vargen.text import WordEncoder
from vargen.tokenizers.kl import KLTokenizer
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.vq import VQTokenizer
from vargen.train.build import finished, load_part, rebuilt
from vargen.train.run import train

TRAINING = {"batch_size": 4, "max_train_steps": 3, "log_steps": 1, "checkpointing_steps": 2, "preview_steps": 0}
TRAINING |= {"validation_steps": 3, "device": "cpu"}
VQ = {"sample_size": 16, "encoder_widths": [8, 8], "decoder_widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1}
VQ |= {"attention_levels": [], "latent_channels": 8, "codebook_size": 16, "codebook_dim": 4, "norm_groups": 4}
KL = {"sample_size": 16, "widths": [8, 8, 8], "encoder_blocks": 1, "decoder_blocks": 1, "encoder_attention_levels": []}
KL |= {"latent_channels": 2, "norm_groups": 4}
GPT = {"system": "llamagen", "config": {"dim": 16, "depth": 2, "heads": 2, "mlp_hidden": 16}}
MAR = {"encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MAR |= {"buffer_size": 2, "head_width": 16, "head_depth": 1, "head_steps": "5"}
PIXELS = {"name": "shapes", "size": 16, "length": 24}
VALIDATION = {"samples": 8, "pictures": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, and caches of the first 24 shapes."""
    root = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    VQTokenizer(**VQ).save_pretrained(root / "vq")
    KLTokenizer(**KL).save_pretrained(root / "kl")
    WordEncoder(["a", "red", "blue", "circle"], dim=8, max_length=14, heads=2).save_pretrained(root / "words")
    common = {"options": {"length": 24}, "shard_size": 10, "batch_size": 4, "progress": False, "device": "cpu"}
    for format in ("safetensors", "webdataset"):
        tokenize(str(root / "vq"), "shapes", root / f"vq-{format}", format=format, **common)
    tokenize(str(root / "kl"), "shapes", root / "kl-moments", scheme=Scheme("moments"), **common)
    tokenize(str(root / "kl"), "shapes", root / "kl-flip", scheme=Scheme("moments-flip"), **common)
    tokenize(str(root / "kl"), "shapes", root / "kl-pivots", scheme=Scheme("moments"), coarse=[(2, 2)], **common)
    features = {"text_encoder": str(root / "words"), "text_features": True}
    tokenize(str(root / "vq"), "shapes", root / "vq-text", **features, **common)
    return root


def recipe(home: Path, tokenizer: str, dataset: Any, model: Any = GPT, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "generator",
        "dataset": {"name": "cache", "path": str(home / dataset)} if isinstance(dataset, str) else dataset,
        "validation": VALIDATION,
        "tokenizer": str(home / tokenizer),
        "model": model,
        "optimizer": {"learning_rate": 1e-3},
        "training": TRAINING,
        **changes,
    }


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "validation/loss") if key in line]


def weights(folder: Path, name: str = "checkpoint-00000003/model") -> dict[str, torch.Tensor]:
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_ids_from_a_cache_train_as_pictures_do(home: Path, tmp_path: Path, format: str):
    train(recipe(home, "vq", PIXELS), output_dir=tmp_path / "pixels")
    final = train(recipe(home, "vq", f"vq-{format}"), ["training.num_workers=1"], output_dir=tmp_path / "cache")
    assert losses(tmp_path / "cache") == losses(tmp_path / "pixels")
    assert len(losses(tmp_path / "cache")) == 4
    one, two = weights(tmp_path / "pixels"), weights(tmp_path / "cache")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert final is not None
    pipe = VisualARPipeline.from_pretrained(final)
    assert pipe(class_labels=["heart"], generator=0, output_type="pt").images.shape == (1, 3, 16, 16)


def test_posteriors_from_a_cache_train_as_pictures_do(home: Path, tmp_path: Path):
    for name, dataset in (("pixels", PIXELS), ("cache", "kl-moments")):
        train(recipe(home, "kl", dataset, {"system": "mar", "config": MAR}), output_dir=tmp_path / name)
    # rounding only: batches of other sizes went through the tokenizer
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-4)


def test_resuming_from_a_cache_is_exact(home: Path, tmp_path: Path):
    given = recipe(home, "kl", "kl-flip", {"system": "mar", "config": MAR})
    train(given, output_dir=tmp_path / "straight")
    for steps, resume in ((2, None), (3, "latest")):
        train(given, [f"training.max_train_steps={steps}"], output_dir=tmp_path / "resumed", resume=resume)
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_levels_averaged_from_a_plain_cache(home: Path, tmp_path: Path):
    config = {"stages": 2, "dim": 16, "depth": 1, "heads": 2, "head_width": 16, "head_depth": 1, "sampling_steps": 2}
    for name, dataset in (("pixels", PIXELS), ("cache", "kl-moments")):
        train(recipe(home, "kl", dataset, {"system": "ecar", "config": config}), output_dir=tmp_path / name)
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-4)


def test_pivots_from_a_cache_of_two_levels(home: Path, tmp_path: Path):
    config = {**MAR, "pivots": [2, 2], "dim": 16, "heads": 2, "dense_head_width": 16, "dense_head_depth": 1, "dense_head_heads": 2}
    config = {key: value for key, value in config.items() if key.split("_")[1:] not in (["dim"], ["heads"])}
    config |= {"dense_head_steps": "5", "encoder_depth": 1, "decoder_depth": 1}
    model = {"system": "himar", "config": config}
    for name, dataset in (("pixels", PIXELS), ("cache", "kl-pivots")):
        train(recipe(home, "kl", dataset, model), output_dir=tmp_path / name)
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-4)
    with pytest.raises(VargenError, match="do not share a token space: levels"):
        train(recipe(home, "kl", "kl-moments", model), output_dir=tmp_path / "plain")


def test_text_features_from_a_cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = {"text_encoder": {"path": str(home / "words")}}
    train(recipe(home, "vq", PIXELS, **text), output_dir=tmp_path / "pixels")
    with monkeypatch.context() as patch:
        patch.setattr(WordEncoder, "encode", lambda *_: pytest.fail("the text encoder was run"))
        train(recipe(home, "vq", "vq-text", **text), output_dir=tmp_path / "cache")
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "pixels"), rel=1e-5)


def test_a_cache_of_another_tokenizer(home: Path, tmp_path: Path):
    torch.manual_seed(7)
    VQTokenizer(**VQ).save_pretrained(tmp_path / "other")
    for dataset, words in (("vq-safetensors", "was made by tokenizer"), ("kl-moments", "do not share a token space")):
        given = {**recipe(home, "vq", dataset), "tokenizer": str(tmp_path / "other")}
        with pytest.raises(VargenError, match=words):
            train(given, output_dir=tmp_path / "run")
    torch.manual_seed(8)
    WordEncoder(["a"], dim=8, max_length=14, heads=2).save_pretrained(tmp_path / "words")
    with pytest.raises(VargenError, match="was made with text encoder"):
        train(recipe(home, "vq", "vq-text", text_encoder={"path": str(tmp_path / "words")}), output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tokens": {"cache": True}}, "is a cache already"),
        ({"dataset": {"name": "cache", "path": "nowhere"}}, "there is no token cache"),
        ({"dataset": {"name": "cache", "pat": "x"}}, "path"),
    ],
)
def test_mistakes(home: Path, tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(VargenError, match=words):
        train({**recipe(home, "vq", "vq-safetensors"), **change}, output_dir=tmp_path)


def test_tokenizers_learn_from_pictures(home: Path, tmp_path: Path):
    given = {"kind": "tokenizer", "dataset": {"name": "cache", "path": str(home / "vq-safetensors")}, "training": TRAINING}
    given |= {"model": {"system": "llamagen-vq", "config": VQ}, "objective": {"perceptual": None}}
    with pytest.raises(ConfigError, match="learns from pictures"):
        train(given, output_dir=tmp_path)


def test_validation_on_pictures_beside_a_cache(home: Path, tmp_path: Path):
    validation = {**VALIDATION, "dataset": {"name": "shapes", "size": 16, "length": 24}}
    for name, dataset in (("cache", "vq-safetensors"), ("pixels", PIXELS)):
        train(recipe(home, "vq", dataset, validation=validation), output_dir=tmp_path / name)
    assert losses(tmp_path / "cache") == losses(tmp_path / "pixels")


def test_a_recipe_of_pictures_is_pointed_to_a_cache(home: Path, tmp_path: Path):
    given = recipe(home, "vq", PIXELS, tokens={"cache": True, "views": 2})
    path = home / "vq-safetensors"
    final = train(given, [f"dataset={{name: cache, path: {path}}}", "tokens.cache=false"], output_dir=tmp_path / "cache")
    train(recipe(home, "vq", "vq-safetensors"), output_dir=tmp_path / "plain")
    assert final is not None
    assert losses(tmp_path / "cache") == losses(tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no argument 'size'"):
        train(given, [f"dataset.path={path}", "dataset.name=cache", "tokens.cache=false"], output_dir=tmp_path / "merged")


def test_drafters_learn_from_caches(home: Path, tmp_path: Path):
    target = train(recipe(home, "vq", "vq-safetensors"), output_dir=tmp_path / "target")
    drafter = {"kind": "drafter", "validation": {"samples": 8}, "target": str(target), "optimizer": {"learning_rate": 1e-3}}
    drafter["training"] = {**TRAINING, "use_ema": False}
    for name, dataset in (("pixels", PIXELS), ("cache", {"name": "cache", "path": str(home / "vq-webdataset")})):
        train({**drafter, "dataset": dataset}, output_dir=tmp_path / name)
    assert losses(tmp_path / "cache") == losses(tmp_path / "pixels")


def test_the_bundled_digits_end_to_end(tmp_path: Path):
    """20 steps on the held-out digits, the smaller set."""
    for format in ("safetensors", "webdataset"):
        tokenize("digits", "digits", tmp_path / format, format=format, splits=("test",), progress=False, device="cpu")
    base = {
        "kind": "generator",
        "tokenizer": "digits",
        "model": GPT,
        "optimizer": {"learning_rate": 1e-3},
        "validation": VALIDATION,
    }
    base["training"] = {**TRAINING, "max_train_steps": 20, "log_steps": 5, "validation_steps": 20, "checkpointing_steps": 20}
    sets = {name: {"name": "cache", "path": str(tmp_path / name), "split": "test"} for name in ("safetensors", "webdataset")}
    sets["pixels"] = {"name": "digits", "size": 32, "split": "test"}
    for name, dataset in sets.items():
        train({**base, "dataset": dataset}, output_dir=tmp_path / f"run-{name}")
    runs = {name: losses(tmp_path / f"run-{name}") for name in sets}
    assert len(runs["pixels"]) == 5
    assert runs["safetensors"] == runs["webdataset"] == runs["pixels"]
    pipe = load_pipeline(str(tmp_path / "run-safetensors" / "final"), device="cpu")
    assert pipe(class_labels=[3], generator=0, output_type="pt").images.shape == (1, 3, 32, 32)


def test_finished_tokenizers_keep_nothing_of_their_training(tmp_path: Path):
    training = {"revive_after": 3, "usage_window": 32, "ema_decay": 0.9}
    trained = VQTokenizer(**VQ, **training)
    pixels, noise = torch.rand(4, 3, 16, 16), Noise(0, 4)
    trained(pixels, noise=noise)
    trained.eval()
    done = finished(trained, trained.state_dict())
    assert done.state_dict().keys() == trained.state_dict().keys() - {
        f"quantizer.{name}" for name in ("recent", "idle_steps", "ema_counts", "ema_sums")
    }
    done.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), device="cpu")
    tokens = trained.encode(pixels)
    assert torch.equal(loaded.encode(pixels), tokens)
    assert torch.equal(loaded.decode(tokens), trained.decode(tokens))
    again = rebuilt(loaded, training)
    assert again.state_dict().keys() == trained.state_dict().keys()
    assert torch.equal(again.quantizer.ema_sums, again.quantizer.codes)
    assert torch.equal(again.eval().encode(pixels), tokens)
    again.train()(pixels, noise=noise)
    assert rebuilt(loaded, {}) is loaded
    with pytest.raises(VargenError, match="revive_after"):
        rebuilt(loaded, {"revive_afer": 3})
    with pytest.raises(VargenError, match="shapes that differ"):
        rebuilt(loaded, {"codebook_size": 8})


def test_frame_prediction_from_a_context(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "frames": 4, "temporal_patch_size": 2, "num_tokens": 6, "encoder_dim": 32, "encoder_depth": 1}
    sizes |= {"encoder_heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "codebook_size": 32, "code_dim": 4}
    LARPTokenizer(**sizes, prior=None).save_pretrained(tmp_path / "larp")
    clips = {"name": "shapes-video", "size": 16, "frames": 4, "length": 8}
    model = {"system": "larp", "config": {"length": 6, "dim": 16, "depth": 1, "heads": 2, "mlp_hidden": 16, "num_classes": None}}
    given = recipe(tmp_path, "larp", clips, model, given_frames=2, tokens={"sample": False})
    final = train(given, ["training.preview_steps=3"], output_dir=tmp_path / "run")
    assert (tmp_path / "run" / "pictures" / "00000003.png").is_file()
    pipe = load_pipeline(str(final), device="cpu")
    assert isinstance(pipe.model, LARPGenerator)
    assert pipe(video=torch.rand(3, 2, 16, 16) * 2 - 1, generator=0, output_type="pt").images.shape == (1, 3, 4, 16, 16)
    with pytest.raises(VargenError, match="4 given frames"):
        train({**given, "given_frames": 4}, output_dir=tmp_path / "bad")
    with pytest.raises(ConfigError, match="train it from videos"):
        train(OmegaConf.to_container(OmegaConf.merge(given, {"tokens": {"cache": True}})), output_dir=tmp_path / "bad")


def test_parts_start_from_weights_of_their_own(tmp_path: Path):
    torch.manual_seed(1)
    source = VQTokenizer(**VQ)
    state = source.decoder.state_dict()
    (tmp_path / "released").mkdir()
    save_file({f"vae.{key}": value for key, value in state.items()}, tmp_path / "released" / "weights.safetensors")
    torch.manual_seed(2)
    model = VQTokenizer(**VQ)
    load_part(model, "decoder", str(tmp_path / "released"))
    assert all(torch.equal(value, state[key]) for key, value in model.decoder.state_dict().items())
    assert not torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)
    for name, path, words in (
        ("decoders", "released", "did you mean 'decoder'"),
        ("encoder", "released", "as model.parts.encoder: shapes that differ"),
        ("decoder", "nowhere.safetensors", "does not exist"),
        ("decoder", ".", "holds 0 .safetensors files"),
    ):
        with pytest.raises(VargenError, match=words):
            load_part(model, name, str(tmp_path / path))
