"""What a finished sampling job leaves besides its images: the labelled grid and the npz batch of FID evaluators."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vargen.checkpoint import atomic_write
from vargen.errors import DataError
from vargen.noise import Noise
from vargen.sample.files import read_video
from vargen.sample.manifest import Manifest
from vargen.sample.motion import save_gif
from vargen.sample.picture import film, grid, save_image, side_by_side

GRID_LIMIT = 100
MAX_COLUMNS = 12
SHEET_LIMIT, SHEET_WIDTH = 16, 640


def write_grid(manifest: Manifest, num: int, class_names: Sequence[str] | None = None, fps: float = 8.0) -> list[Path]:
    """The first images (at most 100) on one labelled sheet, ``grid.png``.

    Of videos: a moving ``grid.gif``, and ``sheet.png`` with the frames of the first clips (at most 16) beside each other.
    """
    records = [manifest.records[index] for index in range(min(num, GRID_LIMIT))]
    labels = [_label(record, class_names) for record in records]
    titles = labels if any(labels) else None
    # conditions take turns: where a few of them fill more than a row, each gets a column
    distinct = len(set(labels))
    columns = distinct if 1 < distinct <= MAX_COLUMNS and len(labels) > distinct else None
    files = [manifest.folder / record["file"] for record in records]
    if files[0].suffix == ".png":
        path = manifest.folder / "grid.png"
        save_image(grid([_open(file) for file in files], titles, columns), path)
        return [path]
    videos = [[Image.fromarray(frame) for frame in read_video(file)] for file in files]
    moving, sheet = manifest.folder / "grid.gif", manifest.folder / "sheet.png"
    steps = range(min(len(video) for video in videos))
    save_gif([grid([video[t] for video in videos], titles, columns) for t in steps], moving, fps, hold=0)
    strips = [[film(video)] for video in videos[:SHEET_LIMIT]]
    save_image(side_by_side(strips, [""], labels[:SHEET_LIMIT], SHEET_WIDTH), sheet)
    return [moving, sheet]


def write_npz(manifest: Manifest, num: int, seed: int) -> Path:
    """``samples.npz``: ``arr_0`` uint8 ``(num, H, W, 3)`` and ``arr_1``, its labels or prompts where the model takes them.

    The order is a permutation fixed by the seed: the ADM evaluator computes Inception Scores over blocks of the file, and a
    class-sorted file would ruin them. Images are streamed, so that memory does not grow with their number.
    """
    order = Noise(seed).permutation("npz", num)[0].tolist()
    records = [manifest.records[index] for index in order]
    first = np.asarray(_open(manifest.folder / records[0]["file"]))
    path = manifest.folder / "samples.npz"

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                header = {"descr": "|u1", "fortran_order": False, "shape": (num, *first.shape)}
                np.lib.format.write_array_header_1_0(entry, header)
                for record in records:
                    image = np.asarray(_open(manifest.folder / record["file"]))
                    if image.shape != first.shape:
                        raise DataError(f"'{record['file']}' is {image.shape}, other images {first.shape}: delete it and run again")
                    entry.write(image.tobytes())
            for key in ("class_label", "prompt"):
                if key in records[0]:
                    with archive.open("arr_1.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.array([record[key] for record in records]), allow_pickle=False)

    atomic_write(path, write)
    return path


def _label(record: dict, class_names: Sequence[str] | None) -> str:
    if "class_label" in record:
        return class_names[record["class_label"]] if class_names else str(record["class_label"])
    return record.get("prompt", "")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"'{path}' is not a readable image ({error}): delete it and run again") from error
