"""``vargen reconstruct``: a tokenizer's round trip of images or videos, beside the originals, with PSNR and SSIM."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.condition import TextFeatures
from vargen.config import check_keys
from vargen.data.base import DATASETS, build_dataset
from vargen.data.folder import read_image
from vargen.data.video import read_clip, video_files
from vargen.errors import DataError, VargenError
from vargen.metrics.frames import psnr, ssim
from vargen.model import VisualTokenizer
from vargen.noise import Noise
from vargen.sample.files import pick_format, save_sample
from vargen.sample.load import load_tokenizer, resolve
from vargen.sample.picture import film, from_image, save_image, side_by_side, to_images, to_uint8
from vargen.text import load_text_encoder

BATCH_SIZE = 8
FILM_WIDTH = 288


@dataclass(frozen=True)
class RoundTrip:
    """One column of the sheet: reconstructions from ``tokens`` tokens, with scores per sample.

    Attributes:
        pixels: 8-bit reconstructions as pixels in [-1, 1], ``(N, 3, (T,) H, W)``.
        psnr, ssim: ``(N,)``, the mean over frames for videos.
    """

    tokens: int
    pixels: Tensor
    psnr: Tensor
    ssim: Tensor

    def to_dict(self) -> dict[str, Any]:
        images = [{"index": i, "psnr": float(p), "ssim": float(s)} for i, (p, s) in enumerate(zip(self.psnr, self.ssim))]
        return {"tokens": self.tokens, "psnr": float(self.psnr.mean()), "ssim": float(self.ssim.mean()), "images": images}


def reconstruct(
    model: str,
    source: str,
    *,
    num: int = 8,
    prefixes: Sequence[int] = (),
    output: str | Path | None = None,
    text_encoder: str | None = None,
    settings: Mapping[str, Any] | None = None,
    format: str | None = None,
    fps: float = 8.0,
    seed: int = 0,
    device: str | None = None,
    dtype: str = "float32",
) -> tuple[list[RoundTrip], Path]:
    """Encodes and decodes samples, and writes ``reconstruct.png`` and ``report.json``; of videos also every clip's round trip.

    Scores are of the 8-bit pictures, as they would be read back from files.

    Args:
        model: tokenizer or pipeline, see :func:`vargen.sample.load.load_tokenizer`.
        source: name of a data set that ships (its test split), an image folder, or one image file; for video tokenizers a folder
            of videos, one video file or a folder of frames, of which a clip is read from the start.
        num: samples, spread evenly over the source.
        prefixes: also decode these numbers of leading tokens, for tokenizers with an ordered space.
        output: folder, by default ``outputs/reconstruct-<model>-<source>``.
        text_encoder: directory or hub id, for tokenizers that take captions and stand outside a pipeline.
        settings: of the tokenizer's ``decode``, such as FlexTok's ``num_inference_steps`` and ``guidance_scale``.
        format, fps: of the clips of videos: ``mp4`` (the default), ``gif`` or ``frames``, and frames per second.
        seed: addresses the draws of tokenizers that draw.

    Returns:
        One round trip for each prefix and one for all tokens, and the folder.

    Raises:
        VargenError: unusable tokenizer, data, prefixes, settings or format; SSIM needs sides of at least 11 pixels.
    """
    if num < 1:
        raise VargenError(f"num {num}: expected at least 1")
    tokenizer = load_tokenizer(model, device, dtype)
    counts = [*_check_prefixes(tokenizer, prefixes), tokenizer.space.num_tokens]
    settings, form = _check_settings(tokenizer, settings or {}), pick_format(format, tokenizer.video)
    samples, captions = read_samples(source, tokenizer.sample_shape, num)
    features = _features(tokenizer, captions, model, text_encoder, source)
    trips = round_trips(tokenizer, samples, counts, features, seed, settings)
    folder = Path(output) if output is not None else Path("outputs") / f"reconstruct-{Path(model).name}-{Path(source).name}"
    report = {"tokenizer": model, "data": source, "settings": settings, "results": [trip.to_dict() for trip in trips]}
    sheet = _sheet(samples, trips)
    atomic_write(folder / "report.json", lambda temporary: _write_json(temporary, report))
    save_image(sheet, folder / "reconstruct.png")
    if tokenizer.video:
        for index, clip in enumerate(trips[-1].pixels):
            save_sample(clip, folder / "clips", index, form, fps)
    return trips, folder


@torch.inference_mode()
def round_trips(
    tokenizer: VisualTokenizer,
    samples: Tensor,
    counts: Sequence[int],
    text: TextFeatures | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> list[RoundTrip]:
    """Round trips of ``samples`` ``(N, 3, (T,) H, W)`` in [-1, 1] from the leading ``counts`` tokens each, from the same noise."""
    decoded: list[list[Tensor]] = [[] for _ in counts]
    noise = Noise(seed, len(samples), tokenizer.device)
    for start in range(0, len(samples), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        pixels = samples[rows].to(tokenizer.device, tokenizer.dtype)
        captions = None if text is None else text.select(rows).to(tokenizer.device, tokenizer.dtype)
        tokens = tokenizer.encode(pixels, captions, noise.select(rows))
        for column, count in zip(decoded, counts):
            known = tokens if count == tokenizer.space.num_tokens else tokens[:, :count]
            column.append(_as_bytes(tokenizer.decode(known, captions, noise.select(rows), **(settings or {}))))
    originals = _as_bytes(samples)
    return [_score(count, originals, torch.cat(column)) for count, column in zip(counts, decoded)]


def read_samples(source: str, shape: tuple[int, ...], num: int) -> tuple[Tensor, list[str] | None]:
    """``num`` samples of ``shape``, evenly spread over the source, and their captions if it has them.

    Raises:
        DataError: the source cannot be used, or holds other shapes.
    """
    if len(shape) == 3 and source not in DATASETS and Path(source).exists():
        return _read_clips(source, shape, num), None
    if Path(source).is_file():
        items, has_captions = [{"pixels": _fitted(read_image(source), shape)}], False
    else:
        frames = {"frames": shape[0]} if len(shape) == 3 and source in DATASETS else {}
        data = build_dataset(source, size=shape[-1], split="test" if source in DATASETS else "all", **frames)
        chosen = [i * len(data) // min(num, len(data)) for i in range(min(num, len(data)))]
        items, has_captions = [data[i] for i in chosen], data.has_captions
    samples = torch.stack([item["pixels"] for item in items])
    if tuple(samples.shape[2:]) != tuple(shape):
        raise DataError(f"'{source}' gives samples of {tuple(samples.shape[2:])}: the tokenizer expects {tuple(shape)}")
    return samples, [item["caption"] for item in items] if has_captions else None


def _read_clips(source: str, shape: tuple[int, ...], num: int) -> Tensor:
    """Clips ``(N, 3, *shape)`` from the start of the videos below a folder, or of one video file or folder of frames."""
    path = Path(source)
    files = (video_files(path) if path.is_dir() else []) or [path]
    chosen = [files[i * len(files) // min(num, len(files))] for i in range(min(num, len(files)))]
    clips = []
    for file in chosen:
        try:
            clips.append(torch.stack([_fitted(frame, shape) for frame in read_clip(file, shape[0])], dim=1))
        except DataError as error:
            raise DataError(f"'{file}' {error}") from error
    return torch.stack(clips)


def _fitted(image: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """Pixels of an image resized on its short side and cropped to the last two sizes of ``shape``."""
    return from_image(ImageOps.fit(image, (shape[-1], shape[-2]), Image.Resampling.BICUBIC))


def _check_prefixes(tokenizer: VisualTokenizer, prefixes: Sequence[int]) -> list[int]:
    if prefixes and not tokenizer.space.ordered:
        raise VargenError(
            f"{type(tokenizer).__name__} has no ordered tokens, so that a prefix of them is no picture: leave --tokens out"
        )
    for count in prefixes:
        if not 1 <= count <= tokenizer.space.num_tokens:
            raise VargenError(f"{count} tokens: expected 1..{tokenizer.space.num_tokens}")
    return [count for count in prefixes if count < tokenizer.space.num_tokens]


def _check_settings(tokenizer: VisualTokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    options = inspect.signature(tokenizer.decode).parameters.values()
    known = [option.name for option in options if option.kind is option.KEYWORD_ONLY]
    check_keys(settings, known, f"decode of {type(tokenizer).__name__}")
    return dict(settings)


def _features(
    tokenizer: VisualTokenizer, captions: list[str] | None, model: str, text_encoder: str | None, source: str
) -> TextFeatures | None:
    """Features of the captions, where the tokenizer takes them; those that embed words themselves do so for training only."""
    if not tokenizer.takes_text or tokenizer.text_encoder is not None:
        return None
    if captions is None:
        raise DataError(f"{type(tokenizer).__name__} needs captions, and '{source}' has none")
    beside = Path(resolve(model)) / "text_encoder"
    if text_encoder is None and not beside.is_dir():
        raise VargenError(f"{type(tokenizer).__name__} needs captions: give the text encoder it was trained with by --text-encoder")
    with torch.inference_mode():
        return load_text_encoder(text_encoder or beside).to(tokenizer.device).encode(captions)


def _as_bytes(pixels: Tensor) -> Tensor:
    """Pixels rounded to the 256 levels of a picture, on the CPU."""
    axis = -3 if pixels.dim() == 4 else -4
    return torch.from_numpy(to_uint8(pixels.movedim(axis, -3))).movedim(-1, axis).float() / 127.5 - 1.0


def _score(count: int, originals: Tensor, pixels: Tensor) -> RoundTrip:
    a, b = (t if t.dim() == 4 else t.transpose(1, 2) for t in (originals, pixels))
    return RoundTrip(count, pixels, *(score.reshape(len(a), -1).mean(1) for score in (psnr(a, b), ssim(a, b))))


def _sheet(samples: Tensor, trips: Sequence[RoundTrip]) -> Image.Image:
    """Original and round trips beside each other, captioned with the scores of the last; of videos the frames in a row."""

    def still(pixels: Tensor) -> Image.Image:
        return to_images(pixels[None])[0] if pixels.dim() == 3 else film(to_images(pixels.transpose(0, 1)))

    rows = [[still(sample), *(still(trip.pixels[i]) for trip in trips)] for i, sample in enumerate(samples)]
    captions = [f"PSNR {p:.2f} dB, SSIM {s:.3f}" for p, s in zip(trips[-1].psnr.tolist(), trips[-1].ssim.tolist())]
    side = {"side": FILM_WIDTH} if samples.dim() == 5 else {}
    return side_by_side(rows, ["original", *(f"{trip.tokens} tokens" for trip in trips)], captions, **side)


def _write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
