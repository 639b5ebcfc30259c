"""``vargen tokenize``: token or latent caches of data sets, in shards that are written whole or not at all.

A shard's bytes are a function of the job's settings and the data alone: shards run one fixed batch shape, and draws are addressed
by the sample's number. So a job that was killed goes on where it was and ends as if it had not been, and processes may share one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vargen import __version__
from vargen.checkpoint import atomic_write
from vargen.condition import TextFeatures
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.cache import file_digest, fingerprint, weights_digest
from vargen.data.shards import FORMATS, Sample, index_path, write_index, write_shard
from vargen.errors import ConfigError, DataError, VargenError, nearest
from vargen.model import VisualTokenizer
from vargen.noise import ModalNoise, Noise
from vargen.sample.load import load_tokenizer, pick_device, resolve
from vargen.sample.manifest import Manifest
from vargen.text import load_text_encoder
from vargen.tokenizers.frames import FrameTokenizer
from vargen.tokenizers.pyramid import PyramidTokenizer

SCHEMES = ("center", "moments", "moments-flip", "ten-crop", "random")
# how the test split of a data set is written whose train split has several views
PLAIN = {"moments-flip": "moments", "ten-crop": "center", "random": "center"}
BROKEN = ("skip", "stop")
VIDEOS = ("video", "shapes-video")


@dataclass(frozen=True)
class Scheme:
    """Which views of a picture are stored, and what of them.

    Attributes:
        name: ``center``: tokens of the picture as the data set gives it. ``moments``: mean and log-variance of its posterior, from
            which training draws anew. ``moments-flip``: those of the picture and of its mirror image (MAR). ``ten-crop``: tokens of
            the corners and the middle of a larger picture and of its mirror image (LlamaGen). ``random``: tokens of the picture as
            the data set's own augmentation gives it in so many epochs.
        epochs: of ``random``.
        crop_ranges: of ``ten-crop``, sides of the larger pictures in sides of the crops; LlamaGen's are 1.1, or 1.1 and 1.05.
    """

    name: str = "center"
    epochs: int = 1
    crop_ranges: tuple[float, ...] = (1.1,)

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise ConfigError(f"scheme '{self.name}'{nearest(self.name, SCHEMES)}")
        if self.epochs < 1 or not self.crop_ranges or min(self.crop_ranges) < 1:
            raise ConfigError(
                f"{self.epochs} views, crop ranges {self.crop_ranges}: expected a positive number, and ranges of 1 or more"
            )

    @property
    def views(self) -> int:
        return {"moments-flip": 2, "ten-crop": 10 * len(self.crop_ranges), "random": self.epochs}.get(self.name, 1)

    @property
    def stored(self) -> str:
        return "moments" if self.name.startswith("moments") else "tokens"


@dataclass(frozen=True)
class Result:
    """One cache after a run.

    Attributes:
        folder: of the cache.
        samples, shards, done: samples written, shards of the whole cache, and those that are there.
        skipped: broken files, name -> reason.
    """

    folder: Path
    samples: int
    shards: int
    done: int
    skipped: dict[str, str]


@torch.inference_mode()
def tokenize(
    model: str,
    dataset: str,
    output: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    splits: Sequence[str] = ("train", "test"),
    scheme: Scheme | None = None,
    format: str = "safetensors",
    half: bool = False,
    coarse: Sequence[Sequence[int]] = (),
    sample: bool = True,
    text_encoder: str | None = None,
    text_features: bool = False,
    shard_size: int = 1024,
    batch_size: int = 32,
    seed: int = 0,
    broken: str = "skip",
    check: bool = False,
    workers: int = 0,
    shard: tuple[int, int] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> list[Result]:
    """Encodes the splits of a data set into caches ``output/SPLIT``, which ``dataset.name=cache`` trains from.

    Args:
        model: tokenizer or pipeline, see :func:`vargen.sample.load.load_tokenizer`.
        dataset: name of a data set or path of an image folder; ``options``: its arguments. The size is the tokenizer's.
        splits: every other split than the first is written plainly: one view, not mirrored.
        half: continuous values and text features in half precision.
        coarse: coarser grids of tokens that are encoded from the resized picture as well, coarse first (Hi-MAR's pivots).
        sample: draw where the tokenizer draws; else take its most probable tokens.
        text_encoder: for captions, where the tokenizer takes them or ``text_features`` asks for their features to be stored.
        batch_size: pictures per pass, rounded to whole samples; part of the settings, as rounding errors depend on it.
        broken: ``skip`` leaves broken files out and reports them, ``stop`` raises at the first.
        check: read the shards that are there, and make those anew whose SHA-256 is not the manifest's.
        shard: ``(k, n)``: write the shards k, k + n, ...; by default as the launcher's rank says.

    Raises:
        VargenError: a tokenizer, data set or scheme that do not fit; a folder that holds another cache; a full disk.
    """
    if format not in FORMATS:
        raise ConfigError(f"format '{format}'{nearest(format, FORMATS)}")
    if broken not in BROKEN:
        raise ConfigError(f"broken '{broken}'{nearest(broken, BROKEN)}")
    if shard_size < 1 or batch_size < 1:
        raise ConfigError(f"shard_size {shard_size}, batch_size {batch_size}: expected positive numbers")
    scheme = scheme or Scheme()
    rank, world = shard or (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    tokenizer = load_tokenizer(model, device, dtype)
    if coarse:
        tokenizer = PyramidTokenizer.of(tokenizer, [*coarse, tokenizer.space.shape], "pixels").to(pick_device(device)).eval()
    if scheme.stored == "moments" and tokenizer.moments_shape is None:
        raise VargenError(
            f"scheme '{scheme.name}' stores moments of a posterior, which {type(tokenizer).__name__} has none of: choose center, "
            "ten-crop or random"
        )
    tokenizer = _for_clips(tokenizer, dataset, dict(options or {}), splits[0])
    encoder = _text_encoder(tokenizer, model, text_encoder, text_features)
    results = []
    for split in splits:
        views = scheme if split == splits[0] else replace(scheme, name=PLAIN.get(scheme.name, scheme.name))
        pictures = _Pictures(dataset, dict(options or {}), split, tokenizer.sample_shape, views, broken)
        folder = Path(output) / split
        job = {
            **_describe_tokens(model, tokenizer, views, half, sample, seed),
            **pictures.describe(),
            "text_encoder": _describe_encoder(encoder, text_features),
            "format": format,
            "shards": -(-len(pictures) // shard_size),
            "shard_size": shard_size,
            "batch_size": batch_size,
            "precision": dtype,
            "device": tokenizer.device.type,
        }
        if encoder is not None and not pictures.data.has_captions:
            raise DataError(f"captions are needed, and data set '{dataset}' has none")
        writer = _Writer(tokenizer, views, encoder[1] if encoder else None, text_features, half, sample, seed, batch_size)
        results.append(_write(folder, job, pictures, writer, (rank, world), check, workers, progress and rank == 0))
    return results


class _Pictures(Dataset):
    """The views of every item: ``(views (V, 3, ...), class label, caption)``, or why it cannot be read."""

    def __init__(self, name: str, options: dict[str, Any], split: str, shape: tuple[int, ...], scheme: Scheme, broken: str) -> None:
        if name == "cache":
            raise ConfigError("data set 'cache' holds tokens already: name the pictures that it was made of")
        self.name, self.options, self.split, self.scheme, self.broken = name, options, split, scheme, broken
        self.shape = shape
        frames = {"frames": shape[0]} if len(shape) == 3 else {}
        _refuse_arguments(options)
        ranges = scheme.crop_ranges if scheme.name == "ten-crop" else (1.0,)
        self.sets = [build_dataset(name, **{**frames, **options, "split": split, "size": int(shape[-1] * r)}) for r in ranges]
        self.data: VisualDataset = self.sets[0]
        if scheme.name != "ten-crop" and tuple(self.data.sample_shape) != tuple(shape):
            raise DataError(f"data set '{name}' gives samples of {self.data.sample_shape}: the tokenizer expects {tuple(shape)}")

    def __len__(self) -> int:
        return len(self.data)

    def describe(self) -> dict[str, Any]:
        data = self.data
        content = hashlib.blake2b(data.labels.numpy().tobytes(), digest_size=8)
        for index in range(len(data)):
            content.update(data.item_name(index).encode())
        return {
            "dataset": {"name": self.name, **self.options},
            "split": self.split,
            "items": len(data),
            "content": content.hexdigest(),
            "sample_shape": list(self.shape),
            "captions": data.has_captions,
            "broken": self.broken,
            "classes": data.classes,
        }

    def __getitem__(self, index: int) -> tuple[Tensor, int, str | None] | str:
        try:
            items = [data.exact(index) for data in self.sets]
            if self.scheme.name == "random":
                items += [self.data.exact(index, epoch) for epoch in range(1, self.scheme.epochs)]
        except DataError as error:
            if self.broken == "stop":
                raise
            return str(error)
        pixels = [item["pixels"] for item in items]
        if self.scheme.name == "moments-flip":
            pixels.append(pixels[0].flip(-1))
        if self.scheme.name == "ten-crop":
            pixels = [crop for picture in pixels for crop in ten_crop(picture, self.shape[-2], self.shape[-1])]
        return torch.stack(pixels), items[0]["class_label"], items[0].get("caption")


def _refuse_arguments(options: Mapping[str, Any]) -> None:
    for key in ("split", "size"):
        if key in options:
            raise ConfigError(f"data set option {key}={options[key]}: the size is the tokenizer's, splits are given by --split")


def _for_clips(tokenizer: VisualTokenizer, dataset: str, options: dict[str, Any], split: str) -> VisualTokenizer:
    """The tokenizer, frame by frame if it is one of images and the data set has videos."""
    if tokenizer.video or dataset not in VIDEOS:
        return tokenizer
    _refuse_arguments(options)
    frames = build_dataset(dataset, **{**options, "split": split, "size": tokenizer.sample_shape[-1]}).sample_shape[0]
    return FrameTokenizer.of(tokenizer, frames).to(tokenizer.device).eval()


def ten_crop(pixels: Tensor, height: int, width: int) -> list[Tensor]:
    """Crops of ``pixels`` ``(..., H, W)``: its four corners and its middle, then those of its mirror image."""
    bottom, right = pixels.shape[-2] - height, pixels.shape[-1] - width
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [image[..., y : y + height, x : x + width] for image in (pixels, pixels.flip(-1)) for y, x in corners]


class _Writer:
    """From pictures to samples, at one batch shape."""

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        scheme: Scheme,
        encoder: Any,
        store_text: bool,
        half: bool,
        sample: bool,
        seed: int,
        batch_size: int,
    ) -> None:
        self.tokenizer, self.scheme, self.encoder, self.store_text = tokenizer, scheme, encoder, store_text
        self.sample, self.seed = sample, seed
        self.group = max(batch_size // scheme.views, 1)
        self.dtype = _stored_dtype(tokenizer, half)
        self.text_dtype = torch.float16 if half else torch.float32

    def samples(self, items: Iterable[tuple[int, tuple[Tensor, int, str | None]]]) -> Iterator[Sample]:
        stream = iter(items)
        while group := list(islice(stream, self.group)):
            padded = [*group, *[group[-1]] * (self.group - len(group))]
            features = self.encoder.encode([caption or "" for _, (_, _, caption) in padded]) if self.encoder else None
            values = self._encode(torch.stack([views for _, (views, _, _) in padded]), [index for index, _ in padded], features)
            for row, (index, (_, label, caption)) in enumerate(group):
                text = None
                if self.store_text and features is not None:
                    # valid tokens alone, which the encoders put first
                    text = features.features[row][features.mask[row]].to("cpu", self.text_dtype)
                yield Sample(index, values[row], label, caption, text)

    def _encode(self, pixels: Tensor, indices: list[int], features: TextFeatures | None) -> Tensor:
        views, tokenizer = self.scheme.views, self.tokenizer
        device = tokenizer.device
        numbers = torch.tensor(indices).repeat_interleave(views) * views + torch.arange(views).repeat(len(indices))
        text = None
        if tokenizer.takes_text and features is not None:
            text = features.select(torch.arange(len(indices)).repeat_interleave(views)).to(device, tokenizer.dtype)
        images = pixels.flatten(0, 1).to(device, tokenizer.dtype)
        if self.scheme.stored == "moments":
            values = tokenizer.moments(images, text).float()
            if not torch.isfinite(values).all():
                raise VargenError(f"{type(tokenizer).__name__} gives moments with NaN or infinity: check its weights and --dtype")
        else:
            noise = Noise(self.seed, numbers, device) if self.sample else ModalNoise(len(numbers), device)
            values = tokenizer.space.check(tokenizer.encode(images, text, noise))
        return values.to("cpu", self.dtype).unflatten(0, (len(indices), views))


def _write(
    folder: Path,
    job: dict[str, Any],
    pictures: _Pictures,
    writer: _Writer,
    part: tuple[int, int],
    check: bool,
    workers: int,
    progress: bool,
) -> Result:
    manifest, size = Manifest(folder, job), job["shard_size"]
    names = {number: f"shard-{number:05d}{FORMATS[job['format']]}" for number in range(job["shards"])}

    def done(number: int) -> bool:
        file, record = folder / names[number], manifest.records.get(number)
        if record is None or not manifest.done(number) or file.stat().st_size != record["bytes"]:
            return False
        return not check or file_digest(file) == record["sha256"]

    ranges = {number: range(number * size, min((number + 1) * size, len(pictures))) for number in names}
    mine = [number for number in names if number % part[1] == part[0]]
    pending = [number for number in mine if not done(number)]
    indices = [index for number in pending for index in ranges[number]]
    stream = iter(DataLoader(pictures, batch_size=None, sampler=indices, num_workers=workers))  # type: ignore[arg-type]
    manifest.start()
    total = sum(len(ranges[number]) for number in mine)
    with tqdm(
        total=total, initial=total - len(indices), unit="sample", desc=job["split"], disable=None if progress else True
    ) as bar:
        for number in pending:
            skipped: dict[str, str] = {}

            def readable(number: int = number, skipped: dict[str, str] = skipped) -> Iterator[Any]:
                for index, entry in zip(ranges[number], islice(stream, len(ranges[number]))):
                    bar.update()
                    if isinstance(entry, str):
                        skipped[pictures.data.item_name(index)] = entry
                    else:
                        yield index, (entry[0], int(entry[1]), entry[2])

            samples = list(writer.samples(readable()))
            _write_shard(manifest, number, folder / names[number], samples, skipped)
    manifest.refresh()
    records = [manifest.records[number] for number in names if number in manifest.records]
    found = {name: reason for record in records for name, reason in record["skipped"].items()}
    return Result(folder, sum(record["samples"] for record in records), job["shards"], len(records), found)


def _write_shard(manifest: Manifest, number: int, file: Path, samples: list[Sample], skipped: dict[str, str]) -> None:
    """Writes a shard, renames it into place and records it."""
    for stale in file.parent.glob(f".{file.stem}.*"):
        # of a process that was killed while it wrote this shard
        stale.unlink(missing_ok=True)
    try:
        atomic_write(file, lambda temporary: write_shard(temporary, samples) if samples else temporary.touch())
        if samples and file.suffix == FORMATS["webdataset"]:
            atomic_write(index_path(file), lambda temporary: write_index(temporary, file))
        record = {"index": number, "file": file.name, "samples": len(samples), "bytes": file.stat().st_size}
        versions = {"vargen": __version__, "torch": version("torch")}
        manifest.append([{**record, "sha256": file_digest(file), "skipped": skipped, "versions": versions}])
    except (VargenError, OSError) as error:
        raise VargenError(f"{error}; all shards before it are safe: make room and run the same command again") from error


def _describe_tokens(model: str, tokenizer: VisualTokenizer, scheme: Scheme, half: bool, sample: bool, seed: int) -> dict[str, Any]:
    moments = scheme.stored == "moments"
    return {
        "tokenizer": model,
        "fingerprint": fingerprint(tokenizer),
        "space": tokenizer.space.to_dict(),
        "scheme": scheme.name,
        "views": scheme.views,
        "crop_ranges": list(scheme.crop_ranges) if scheme.name == "ten-crop" else [],
        "stored": scheme.stored,
        "shape": list(tokenizer.moments_shape or () if moments else tokenizer.space.token_shape),
        "dtype": str(_stored_dtype(tokenizer, half)).removeprefix("torch."),
        "sample": sample,
        "seed": seed,
    }


def _stored_dtype(tokenizer: VisualTokenizer, half: bool) -> torch.dtype:
    """The smallest type that holds every id, or the wanted float."""
    codes = tokenizer.space.codebook_size
    if codes is None:
        return torch.float16 if half else torch.float32
    return torch.uint8 if codes <= 2**8 else torch.int16 if codes <= 2**15 else torch.int32


def _text_encoder(tokenizer: VisualTokenizer, model: str, given: str | None, store: bool) -> tuple[str, Any] | None:
    """Name and text encoder for the captions, None where none is needed."""
    if not tokenizer.takes_text and not store:
        if given is not None:
            raise ConfigError(f"{type(tokenizer).__name__} takes no captions: leave --text-encoder out, or add --text-features")
        return None
    beside = Path(resolve(model)) / "text_encoder"
    if given is None and tokenizer.text_encoder is not None:
        return model, tokenizer.text_encoder
    if given is None and not beside.is_dir():
        raise VargenError("captions are to be encoded: give the text encoder by --text-encoder")
    return given or model, load_text_encoder(given or beside).to(tokenizer.device).eval()


def _describe_encoder(encoder: tuple[str, Any] | None, stored: bool) -> dict[str, Any] | None:
    if encoder is None:
        return None
    name, network = encoder
    return {
        "name": name,
        "fingerprint": weights_digest(network),
        "length": network.max_length,
        "dim": network.dim,
        "stored": stored,
    }
