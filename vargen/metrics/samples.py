"""Generated images or videos and what they were asked to show: a sampling job's folder, any folder, an .npz batch, or tensors."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vargen.data.folder import EXTENSIONS, read_image
from vargen.data.video import read_video, video_files
from vargen.errors import DataError

MANIFEST_FILE = "manifest.jsonl"


@dataclass
class SampleSet:
    """Generated images, or videos, in the order of their index.

    Attributes:
        pixels: files (of a video also folders of frames), or pixels; uint8 ones are channels first.
        class_labels: int64 ``(N,)``, or None.
        prompts: one for each image, or None.
        source: in reports.
    """

    pixels: list[Path] | Tensor
    class_labels: Tensor | None = None
    prompts: list[str] | None = None
    source: str = "tensors"
    video: bool = False

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Pixels ``(B, 3, (T,) H, W)`` in [-1, 1], rounded to 8 bits as files are."""
        for start in range(0, len(self), batch_size):
            part = self.pixels[start : start + batch_size]
            if isinstance(part, Tensor):
                yield from_uint8(part) if part.dtype == torch.uint8 else round_to_8_bits(part)
                continue
            images = [self._read(path) for path in part]
            if len({image.shape for image in images}) > 1:
                what = "videos of different lengths or sizes" if self.video else "images of different sizes"
                raise DataError(f"{self.source}: {what}: {sorted({i.shape[:-1] for i in images})}")
            yield from_uint8(torch.from_numpy(np.stack(images)).movedim(-1, 1))

    def _read(self, path: Path) -> np.ndarray:
        try:
            return read_video(path) if self.video else np.array(read_image(path))
        except DataError as error:
            raise DataError(f"'{path}' {error}") from error


def round_to_8_bits(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as they come back from an image file."""
    return (((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5) - 1


def from_uint8(pixels: Tensor) -> Tensor:
    return pixels.float().contiguous() / 127.5 - 1


def read_samples(
    source: str | os.PathLike[str] | Tensor | Iterable[Tensor], limit: int | None = None, video: bool = False
) -> SampleSet:
    """Samples of a job's folder (with its ``manifest.jsonl``), any folder, an ``.npz`` batch, or tensors.

    Args:
        source: path, pixels ``(N, 3, (T,) H, W)`` in [-1, 1], or batches of such pixels.
        limit: number of samples to keep, the first ones.
        video: the samples are videos: files and folders of frames are read as clips.

    Raises:
        DataError: nothing there, missing files, or not a batch of images.
    """
    if isinstance(source, Tensor):
        samples = SampleSet(source)
    elif not isinstance(source, str | os.PathLike):
        batches = list(source)
        samples = SampleSet(torch.cat(batches) if batches else torch.empty(0, 3, *([1] * (3 if video else 2))))
    elif Path(source).suffix == ".npz":
        samples = _read_npz(Path(source), video)
    elif Path(source).is_dir():
        folder = Path(source)
        samples = _read_job(folder) if (folder / MANIFEST_FILE).is_file() else _read_folder(folder, video)
    else:
        raise DataError(f"samples '{source}': expected a folder of {'videos' if video else 'images'} or an .npz batch")
    axes = 5 if video else 4
    if isinstance(samples.pixels, Tensor) and (samples.pixels.dim() != axes or samples.pixels.shape[1] != 3):
        raise DataError(f"samples of shape {tuple(samples.pixels.shape)}: expected (N, 3, {'T, ' if video else ''}H, W)")
    if not len(samples):
        raise DataError(f"samples '{samples.source}' hold no {'videos' if video else 'images'}")
    keep = slice(limit)
    return SampleSet(
        samples.pixels[keep],
        None if samples.class_labels is None else samples.class_labels[keep],
        None if samples.prompts is None else samples.prompts[keep],
        samples.source,
        video,
    )


def _read_folder(folder: Path, video: bool) -> SampleSet:
    if video:
        return SampleSet(video_files(folder), source=str(folder))
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    return SampleSet(paths, source=str(folder))


def _read_job(folder: Path) -> SampleSet:
    records = {}
    lines = (folder / MANIFEST_FILE).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is the torn line of a killed writer
        try:
            record = json.loads(line)
            records[int(record["index"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"'{folder / MANIFEST_FILE}' line {number}: expected a JSON object with index and file") from error
    ordered = [records[index] for index in sorted(records)]
    paths = [folder / str(record.get("file")) for record in ordered]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise DataError(f"'{folder}' lacks {len(missing)} of {len(paths)} samples of its manifest: {', '.join(missing[:5])}")
    labels = torch.tensor([int(r["class_label"]) for r in ordered]) if all("class_label" in r for r in ordered) else None
    prompts = [str(r["prompt"]) for r in ordered] if all("prompt" in r for r in ordered) else None
    return SampleSet(paths, labels, prompts, str(folder))


def _read_npz(path: Path, video: bool) -> SampleSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["arr_0"]
            conditions = archive.get("arr_1")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' is not an .npz batch with uint8 {'videos' if video else 'images'} under arr_0") from error
    if images.dtype != np.uint8 or images.ndim != (5 if video else 4) or images.shape[-1] != 3:
        axes = "(N, T, H, W, 3)" if video else "(N, H, W, 3)"
        raise DataError(f"'{path}': arr_0 is {images.dtype} {images.shape}, expected uint8 {axes}")
    if conditions is not None and len(conditions) != len(images):
        raise DataError(f"'{path}': {len(conditions)} conditions under arr_1 for {len(images)} images")
    pixels = torch.from_numpy(images).movedim(-1, 1)
    if conditions is not None and conditions.dtype.kind in "iu":
        return SampleSet(pixels, torch.from_numpy(conditions.astype(np.int64)), source=str(path))
    return SampleSet(pixels, prompts=None if conditions is None else [str(c) for c in conditions], source=str(path))
