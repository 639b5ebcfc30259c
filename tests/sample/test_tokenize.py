"""Token caches: written whole, resumed to the same bytes, shared by processes, and read back as they were written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from vargen.cli.main import app
from vargen.data.base import build_dataset
from vargen.data.cache import CachedTokens, fingerprint
from vargen.data.loader import training_batches
from vargen.data.shards import Sample, open_shard, write_shard
from vargen.errors import ConfigError, DataError, VargenError
from vargen.noise import ModalNoise, Noise
from vargen.sample.load import load_tokenizer
from vargen.sample.tokenize import Result, Scheme, ten_crop, tokenize
from vargen.text import WordEncoder
from vargen.tokenizers.frames import FrameTokenizer
from vargen.tokenizers.kl import KLTokenizer
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.pyramid import PyramidTokenizer
from vargen.tokenizers.textok import TexTok
from vargen.tokenizers.vq import VQTokenizer

VQ = {"sample_size": 16, "encoder_widths": [8, 8], "decoder_widths": [8, 8], "encoder_blocks": 1, "decoder_blocks": 1}
VQ |= {"attention_levels": [], "latent_channels": 8, "codebook_size": 300, "codebook_dim": 4, "norm_groups": 4}
KL = {"sample_size": 16, "widths": [8, 8, 8], "encoder_blocks": 1, "decoder_blocks": 1, "encoder_attention_levels": []}
KL |= {"latent_channels": 2, "norm_groups": 4, "std": 0.5}
SHAPES = {"length": 10}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    VQTokenizer(**VQ).save_pretrained(root / "vq")
    KLTokenizer(**KL).save_pretrained(root / "kl")
    return root


def write(model: Path | str, output: Path, dataset: str = "shapes", options: Any = None, **more: Any) -> list[Result]:
    options = SHAPES if options is None else options
    settings = {"splits": ("train",), "shard_size": 4, "batch_size": 4, "progress": False, "device": "cpu", **more}
    return tokenize(str(model), dataset, output, options, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_ids_are_those_of_the_pictures(models: Path, tmp_path: Path, format: str):
    (result,) = write(models / "vq", tmp_path, format=format)
    assert (result.samples, result.shards, result.done, result.skipped) == (10, 3, 3, {})
    cache, pictures, tokenizer = (
        CachedTokens(tmp_path),
        build_dataset("shapes", size=16, **SHAPES),
        load_tokenizer(str(models / "vq")),
    )
    assert cache.labels.tolist() == pictures.labels.tolist()
    assert cache.classes == pictures.classes
    assert cache.sample_shape == (16, 16)
    assert cache.job["dtype"] == "int16"
    for index in (0, 3, 4, 9):
        item, picture = cache[index], pictures[index]
        assert torch.equal(item["tokens"].long(), tokenizer.encode(picture["pixels"][None])[0])
        assert item["caption"] == picture["caption"]
        assert item["class_label"] == picture["class_label"]
    cache.require(tokenizer)


def test_tar_shards_are_webdatasets(models: Path, tmp_path: Path):
    write(models / "vq", tmp_path, format="webdataset")
    files = [str(p) for p in sorted((tmp_path / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    cache = CachedTokens(tmp_path)
    assert [s["cls"] for s in samples] == cache.labels.tolist()
    assert [s["txt"] for s in samples] == [cache[i]["caption"] for i in range(len(cache))]
    assert all((torch.from_numpy(s["views.npy"]) == cache.sample(i).views).all() for i, s in enumerate(samples))


def test_tar_shards_need_no_index(models: Path, tmp_path: Path):
    write(models / "vq", tmp_path, format="webdataset")
    before = [CachedTokens(tmp_path).sample(i).views for i in range(10)]
    for index in (tmp_path / "train").glob("*.index.json"):
        index.unlink()
    assert all(torch.equal(CachedTokens(tmp_path).sample(i).views, views) for i, views in enumerate(before))
    (tmp_path / "train" / "shard-00000.index.json").write_text("[]")
    with pytest.raises(DataError, match="is damaged"):
        CachedTokens(tmp_path)[0]


def test_moments_and_flip(models: Path, tmp_path: Path):
    write(models / "kl", tmp_path, scheme=Scheme("moments-flip"), splits=("train", "test"))
    cache, tokenizer = CachedTokens(tmp_path, "train"), load_tokenizer(str(models / "kl"))
    pixels = build_dataset("shapes", size=16, **SHAPES)[2]["pixels"][None]
    sample = cache.sample(2)
    for view, image in enumerate((pixels, pixels.flip(-1))):
        assert torch.allclose(sample.views[view], tokenizer.moments(image)[0], atol=1e-5)
    chosen = [torch.equal(cache.get(2, epoch)["moments"], sample.views[0]) for epoch in range(12)]
    assert 0 < sum(chosen) < 12
    assert chosen == [torch.equal(CachedTokens(tmp_path, "train").get(2, e)["moments"], sample.views[0]) for e in range(12)]
    noise = Noise(5, 1)
    assert torch.allclose(tokenizer.tokens_of(sample.views[:1], noise), tokenizer.encode(pixels, noise=noise), atol=1e-5)
    plain = CachedTokens(tmp_path, "test")
    assert (plain.job["scheme"], plain.job["views"]) == ("moments", 1)


def test_ten_crops(models: Path, tmp_path: Path):
    write(models / "vq", tmp_path, scheme=Scheme("ten-crop", crop_ranges=(1.25, 1.5)))
    cache, tokenizer = CachedTokens(tmp_path), load_tokenizer(str(models / "vq"))
    large = build_dataset("shapes", size=20, **SHAPES)[1]["pixels"]
    crops = torch.stack(ten_crop(large, 16, 16))
    assert torch.equal(crops[4], large[:, 2:18, 2:18])
    assert torch.equal(crops[6], large[:, :16, :16].flip(-1))
    views = cache.sample(1).views
    assert len(views) == 20
    assert torch.equal(views[:10].long(), tokenizer.encode(crops))
    seen = {bytes(cache.get(1, epoch)["tokens"].numpy().tobytes()) for epoch in range(60)}
    assert len(seen) > 5


def test_random_views_are_the_augmentations_of_the_data_set(models: Path, tmp_path: Path):
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "x.png")
    write(
        models / "vq", tmp_path / "c", str(tmp_path), {"crop": "random", "flip": True}, scheme=Scheme("random", 3), splits=("all",)
    )
    pictures, tokenizer = build_dataset(str(tmp_path), size=16, crop="random", flip=True), load_tokenizer(str(models / "vq"))
    views = torch.stack([tokenizer.encode(pictures.get(0, epoch)["pixels"][None])[0] for epoch in range(3)])
    assert torch.equal(CachedTokens(tmp_path / "c").sample(0).views.long(), views)


def test_pivots_are_encoded_from_the_resized_picture(models: Path, tmp_path: Path):
    write(models / "kl", tmp_path, scheme=Scheme("moments-flip"), coarse=[(2, 2)])
    cache = CachedTokens(tmp_path)
    pyramid = PyramidTokenizer.of(load_tokenizer(str(models / "kl")), [(2, 2), (4, 4)], "pixels")
    cache.require(pyramid)
    pixels, noise = build_dataset("shapes", size=16, **SHAPES)[0]["pixels"][None], Noise(3, 1)
    tokens = pyramid.tokens_of(cache.sample(0).views[1:], noise)
    assert torch.allclose(tokens, pyramid.encode(pixels.flip(-1), noise=noise), atol=1e-5)


def test_averaged_levels_come_from_plain_moments(models: Path):
    pyramid = PyramidTokenizer.of(load_tokenizer(str(models / "kl")), [(1, 1), (2, 2), (4, 4)])
    pixels, noise = torch.rand(2, 3, 16, 16), Noise(0, 2)
    assert pyramid.moments_shape == (4, 4, 4)
    assert torch.equal(pyramid.tokens_of(pyramid.moments(pixels), noise), pyramid.encode(pixels, noise=noise))


def test_the_most_probable_tokens(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"sample_size": 16, "frames": 4, "temporal_patch_size": 2, "num_tokens": 6, "encoder_dim": 32, "encoder_depth": 1}
    sizes |= {"encoder_heads": 2, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "codebook_size": 32, "code_dim": 4}
    larp = LARPTokenizer(**sizes, prior=None).eval()
    pixels = torch.rand(3, 3, 4, 16, 16)
    assert torch.equal(larp.encode(pixels, noise=ModalNoise(3)), larp.encode(pixels))
    assert torch.equal(larp.encode(pixels, noise=ModalNoise(4).select(slice(1, 4)).at(7)), larp.encode(pixels))
    larp.save_pretrained(tmp_path / "larp")
    write(tmp_path / "larp", tmp_path / "c", "shapes-video", {"length": 2}, sample=False)
    clip = build_dataset("shapes-video", size=16, frames=4, length=2)[1]["pixels"]
    assert torch.equal(CachedTokens(tmp_path / "c")[1]["tokens"].long(), larp.encode(clip[None])[0])


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_captions_and_their_features(tmp_path: Path, format: str):
    torch.manual_seed(0)
    encoder = WordEncoder(["a", "red", "large", "circle", "at", "the"], dim=8, max_length=12)
    encoder.save_pretrained(tmp_path / "words")
    TexTok(
        image_size=16, patch_size=8, num_tokens=3, channels=2, dim=16, depth=1, heads=2, text_dim=8, text_length=12
    ).save_pretrained(tmp_path / "textok")
    with pytest.raises(VargenError, match="--text-encoder"):
        write(tmp_path / "textok", tmp_path / "none")
    write(tmp_path / "textok", tmp_path / "c", text_encoder=str(tmp_path / "words"), text_features=True, format=format)
    cache, pictures = CachedTokens(tmp_path / "c"), build_dataset("shapes", size=16, **SHAPES)
    text = encoder.encode([pictures[5]["caption"]])
    item = cache[5]
    assert torch.allclose(item["text_features"], text.features[0], atol=1e-6)
    assert torch.equal(item["text_mask"], text.mask[0])
    tokenizer = load_tokenizer(str(tmp_path / "textok"))
    assert torch.allclose(item["tokens"], tokenizer.encode(pictures[5]["pixels"][None], text)[0], atol=1e-5)
    cache.require(tokenizer, encoder)
    with pytest.raises(DataError, match="text encoder"):
        cache.require(tokenizer, WordEncoder(["b"], dim=8, max_length=12))


@pytest.fixture(scope="module")
def straight(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted caches of both formats."""
    folders = {format: tmp_path_factory.mktemp("straight") for format in ("safetensors", "webdataset")}
    for format, folder in folders.items():
        write(models / "kl", folder, format=format)
    return folders


class _KilledError(BaseException):
    pass


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.sampled_from(["before", "during", "after"]), st.sampled_from(["safetensors", "webdataset"]))
def test_resuming_gives_the_bytes_of_an_uninterrupted_run(
    models: Path, straight: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, at: int, moment: str, format: str
):
    import vargen.sample.tokenize as module

    folder, calls = tmp_path_factory.mktemp("resume"), [0]

    def killing(path: Path, samples: list[Sample]) -> None:
        calls[0] += 1
        if calls[0] <= at:
            return write_shard(path, samples)
        if moment == "during":
            path.write_bytes(b"half of a shar")
            # what kill -9 leaves: the temporary file stays
            shutil.copy(path, path.with_name(path.name.replace(".shard", ".shard", 1) + ".left"))
        if moment == "after":
            write_shard(path, samples)
        raise _KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_shard", killing)
        try:
            write(models / "kl", folder / "resumed", format=format)
        except _KilledError:
            assert at < 3
            with pytest.raises(DataError, match=f"not finished: {at} of 3"):
                CachedTokens(folder / "resumed")
    write(models / "kl", folder / "resumed", format=format)
    assert contents(folder / "resumed") == contents(straight[format])


def test_processes_write_disjoint_shards(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(models / "vq", tmp_path / "one")
    (first,) = write(models / "vq", tmp_path / "two", shard=(1, 2))
    assert first.done == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (second,) = write(models / "vq", tmp_path / "two", workers=1)
    assert second.done == 3
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    names = [name for name in one if "shard" in name or "job" in name]
    assert len(names) == 4
    assert all(one[name] == two[name] for name in names)
    assert sorted(one["train/manifest.jsonl"].splitlines()) == sorted(two["train/manifest.jsonl"].splitlines())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scheme": Scheme("ten-crop")}, 'scheme "center", not "ten-crop"'),
        ({"batch_size": 2}, "batch_size 4, not 2"),
        ({"options": {"length": 12}}, "items 10, not 12|dataset"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"format": "webdataset"}, 'format "safetensors"'),
    ],
)
def test_another_job_in_the_same_folder(models: Path, tmp_path: Path, change: dict[str, Any], words: str):
    write(models / "vq", tmp_path)
    before = contents(tmp_path)
    with pytest.raises(VargenError, match=words):
        write(models / "vq", tmp_path, **change)
    assert contents(tmp_path) == before
    torch.manual_seed(1)
    VQTokenizer(**VQ).save_pretrained(tmp_path / "other" / "vq")
    with pytest.raises(VargenError, match="tokenizer|fingerprint"):
        write(tmp_path / "other" / "vq", tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"scheme": Scheme("moments")}, "VQTokenizer has none"),
        ({"format": "zip"}, "safetensors"),
        ({"broken": "ignore"}, "skip"),
        ({"shard_size": 0}, "positive"),
        ({"dataset": "cache"}, "holds tokens already"),
        ({"text_features": True}, "--text-encoder"),
        ({"text_encoder": "t5"}, "takes no captions"),
        ({"coarse": [(2, 2)]}, "continuous tokens"),
        ({"options": {"lenth": 3}}, "length"),
        ({"options": {"size": 32}}, "the size is the tokenizer's"),
        ({"splits": ("trian",)}, "train"),
    ],
)
def test_mistakes(models: Path, tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(VargenError, match=words):
        write(models / "vq", tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_schemes():
    for bad in ({"name": "centre"}, {"epochs": 0}, {"crop_ranges": (0.9,)}, {"crop_ranges": ()}):
        with pytest.raises(ConfigError):
            Scheme(**bad)


def _broken_folder(root: Path) -> Path:
    for label in "ab":
        (root / label).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20), (60 * number, 10, 0)).save(root / label / f"{number}.png")
    for name in ("a/1.png", "b/0.png", "b/1.png", "b/2.png", "b/3.png"):
        (root / name).write_bytes((root / name).read_bytes()[:40])
    return root


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_broken_pictures_are_left_out_and_reported(models: Path, tmp_path: Path, format: str):
    root = _broken_folder(tmp_path / "data")
    (result,) = write(models / "vq", tmp_path / "c", str(root), {}, splits=("all",), format=format)
    assert (result.samples, result.done) == (3, 2)
    assert set(result.skipped) == {"a/1.png", "b/0.png", "b/1.png", "b/2.png", "b/3.png"}
    cache = CachedTokens(tmp_path / "c")
    assert (len(cache), cache.labels.tolist(), [cache.sample(i).index for i in range(3)]) == (3, [0, 0, 0], [0, 2, 3])
    with pytest.raises(DataError, match=r"1\.png"):
        write(models / "vq", tmp_path / "d", str(root), {}, splits=("all",), broken="stop")


def test_a_full_disk_leaves_what_can_be_gone_on_from(models: Path, tmp_path: Path):
    write(models / "kl", tmp_path / "straight", scheme=Scheme("moments"), shard_size=5)
    limit = (tmp_path / "straight" / "train" / "shard-00000.safetensors").stat().st_size - 100
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(VargenError, match="cannot write .*shard-00000.*run the same command again") as error:
            write(models / "kl", tmp_path / "full", scheme=Scheme("moments"), shard_size=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    write(models / "kl", tmp_path / "full", scheme=Scheme("moments"), shard_size=5)
    assert contents(tmp_path / "full") == contents(tmp_path / "straight")


@pytest.fixture
def cached(models: Path, tmp_path: Path) -> Iterator[Path]:
    write(models / "kl", tmp_path / "c", scheme=Scheme("moments"))
    return tmp_path / "c" / "train"


def test_a_cut_or_missing_shard(cached: Path, models: Path):
    file = cached / "shard-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(DataError, match="has .* bytes: run the same"):
        CachedTokens(cached)
    write(models / "kl", cached.parent, scheme=Scheme("moments"))
    assert file.read_bytes() == whole
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        CachedTokens(cached)


@pytest.mark.parametrize("format", ["safetensors", "webdataset"])
def test_changed_bytes_are_found_when_they_are_read(models: Path, tmp_path: Path, format: str):
    write(models / "kl", tmp_path, scheme=Scheme("moments"), format=format)
    cache = CachedTokens(tmp_path)
    place = cache.root / cache.shards[0]["file"]
    value = cache.sample(1).views.numpy().tobytes()
    content = place.read_bytes()
    at = content.index(value)
    place.write_bytes(content[: at + 5] + bytes([content[at + 5] ^ 1]) + content[at + 6 :])
    damaged = CachedTokens(tmp_path)
    assert torch.equal(damaged.sample(0).views, cache.sample(0).views)
    with pytest.raises(DataError, match="sample 1 is not as it was written"):
        damaged.sample(1)
    write(models / "kl", tmp_path, scheme=Scheme("moments"), format=format)
    assert place.read_bytes() != content
    write(models / "kl", tmp_path, scheme=Scheme("moments"), format=format, check=True)
    assert place.read_bytes() == content
    place.write_bytes(b"\0" * len(content))
    with pytest.raises(DataError, match="is damaged"):
        CachedTokens(tmp_path).sample(0)


def test_values_that_are_no_tokens(cached: Path):
    file = cached / "shard-00000.safetensors"
    samples = [open_shard(file).read(place) for place in range(4)]
    for bad, words in ((torch.full_like(samples[0].views, torch.nan), "NaN"), (samples[0].views[:, :1], "shape")):
        write_shard(file, [Sample(s.index, bad, s.class_label, s.caption) for s in samples])
        lines = [json.loads(line) for line in (cached / "manifest.jsonl").read_text().splitlines()]
        lines[0]["bytes"] = file.stat().st_size
        (cached / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(DataError, match=words):
            CachedTokens(cached)[0]


def test_no_cache(cached: Path, tmp_path: Path):
    with pytest.raises(DataError, match="there is no token cache"):
        CachedTokens(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no token cache"):
        CachedTokens(tmp_path)
    with pytest.raises(DataError, match="holds split 'train', not 'test'"):
        CachedTokens(cached, "test")
    (cached / "job.json").write_text("{}")
    with pytest.raises(DataError, match="lacks"):
        CachedTokens(cached)
    (cached / "job.json").write_text("{")
    with pytest.raises(DataError, match="not readable"):
        CachedTokens(cached)


def test_another_tokenizer(cached: Path, models: Path):
    cache, tokenizer = CachedTokens(cached), load_tokenizer(str(models / "kl"))
    cache.require(tokenizer)
    tokenizer.register_to_config(std=0.7)
    with pytest.raises(DataError, match="was made by tokenizer"):
        cache.require(tokenizer)
    with pytest.raises(VargenError, match="do not share a token space"):
        cache.require(load_tokenizer(str(models / "vq")))
    with torch.no_grad():
        tokenizer.register_to_config(std=0.5)
        tokenizer.decoder.conv_out.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(tokenizer) != cache.job["fingerprint"]


def test_batches_of_a_cache(cached: Path):
    plain, workers = (training_batches(CachedTokens(cached), 4, seed=3, num_workers=n) for n in (0, 2))
    straight = [next(plain) for _ in range(4)]
    for batch, other in zip(straight, workers):
        assert torch.equal(batch["moments"], other["moments"])
        assert batch["captions"] == other["captions"]
    resumed = next(training_batches(CachedTokens(cached), 4, seed=3, start=3))
    assert torch.equal(resumed["moments"], straight[3]["moments"])


def test_the_command(models: Path, tmp_path: Path):
    arguments = [
        "tokenize",
        str(models / "kl"),
        str(_broken_folder(tmp_path / "data")),
        "crop=center",
        "--output",
        str(tmp_path / "c"),
    ]
    arguments += ["--split", "all", "--scheme", "moments-flip", "--half", "--shard-size", "3", "--quiet", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert "3 samples in 3 of 3 shards, 5 broken files left out" in result.output
    assert "skipped a/1.png: image" in result.output
    assert CachedTokens(tmp_path / "c").sample(0).views.dtype == torch.float16
    assert "safetensors" in CliRunner().invoke(app, ["tokenize", "--help"]).output
    bad = CliRunner().invoke(app, [*arguments, "--crop-range", "x"])
    assert isinstance(bad.exception, ConfigError)


def test_clips_by_an_image_tokenizer(models: Path, tmp_path: Path):
    write(models / "vq", tmp_path, "shapes-video", {"length": 2, "frames": 3})
    cache = CachedTokens(tmp_path)
    clip = build_dataset("shapes-video", size=16, frames=3, length=2)[1]["pixels"]
    tokenizer = FrameTokenizer.of(load_tokenizer(str(models / "vq")), 3)
    assert cache.sample_shape == (3, 16, 16)
    assert torch.equal(cache[1]["tokens"].long(), tokenizer.encode(clip[None])[0])
    cache.require(tokenizer)
