"""Any folder of images: class sub-folders or flat, captions beside them or in ``metadata.jsonl``; broken files are reported."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vargen.data.base import Item, VisualDataset, check_size, check_split
from vargen.errors import DataError, nearest
from vargen.noise import Noise

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CROPS = ("center", "random", "resized", "stretch")
CAPTION_KEYS = ("text", "caption", "prompt")
FILE_KEYS = ("file_name", "file")
# folder names that hold a ready-made split
SPLIT_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation")}


class ImageFolder(VisualDataset):
    """Images below ``root``, resized on the short side and cropped to a square.

    The first level of sub-folders names the classes, sorted by name, or by number if all names are numbers; without sub-folders
    every image is of one class. A caption is the ``text`` (or ``caption``, ``prompt``) of the image's line in ``metadata.jsonl``,
    else the ``.txt`` file beside it, else empty. If ``root`` holds ``train`` and ``test`` (or ``val``) folders these are the
    splits; otherwise ``holdout`` of every class, chosen by a hash of the file names, is the test split.

    Files are checked as they are read: one that turns out broken is replaced by the next good one of its class, logged once, and
    kept in ``skipped`` (name -> reason).

    Args:
        root: the folder.
        size: image side in pixels.
        split: ``train``, ``test`` or ``all``.
        crop: ``center``, the field's (:func:`center_crop`); ``random``: the short side resized to 1 to 1.25 times ``size``, then
            cropped anywhere; ``resized``: half to all of the area, at an aspect ratio of 3/4 to 4/3, anywhere, resized (SEED); or
            ``stretch``: all of the picture, resized whatever its aspect ratio (NBP).
        flip: mirror half of the items.
        holdout: share of test images where the folder has no split of its own.
        classes: class names in the order of their labels, where the sorted order is not the wanted one.
        seed: addresses the random crops and flips, together with epoch and index.

    Raises:
        DataError: no such folder, no readable image, or folder names that are not in ``classes``.
    """

    extensions = EXTENSIONS
    noun = "image"

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 256,
        split: str = "all",
        crop: str = "center",
        flip: bool = False,
        holdout: float = 0.1,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.noun} folder '{self.root}' does not exist or is not a folder")
        if crop not in CROPS:
            raise DataError(f"crop '{crop}'{nearest(crop, CROPS)}")
        if not 0 < holdout < 1:
            raise DataError(f"holdout {holdout}: expected a share between 0 and 1")
        self.sample_shape = (check_size(size), size)
        self.size, self.crop, self.flip, self.seed = size, crop, flip, seed
        self.skipped: dict[str, str] = {}
        if split != "all":
            check_split(split)
        sides = _split_folders(self.root)
        sources = [self.root] if not sides else list(sides.values()) if split == "all" else [sides[split]]
        found: dict[str, list[Path]] = {}
        for source in sources:
            for name, files in self._scan(source).items():
                found[name] = found.get(name, []) + files
        held_out = split != "all" and not sides
        by_class = {name: _hold_out(files, split, holdout) if held_out else files for name, files in found.items()}
        self.classes = _class_names(by_class, classes, self.root)
        self.files = [f for name in self.classes for f in by_class.get(name, [])]
        if not self.files:
            raise DataError(
                f"'{self.root}' holds no readable {self.noun} for split '{split}' ({len(self.skipped)} broken files); "
                f"expected files such as {', '.join(sorted(self.extensions)[-3:])}, in class folders or flat"
            )
        self._labels = torch.tensor([i for i, name in enumerate(self.classes) for _ in by_class.get(name, [])])
        self._starts = torch.searchsorted(self._labels, torch.arange(len(self.classes) + 1)).tolist()
        self._captions = {key: text for source in sources for key, text in _read_captions(source, self.root).items()}
        self.has_captions = bool(self._captions) or any(f.with_suffix(".txt").is_file() for f in self.files)
        self._first_readable()
        known = {f.relative_to(self.root).as_posix() for files in found.values() for f in files} | self.skipped.keys()
        strangers = self._captions.keys() - known
        if strangers:
            logger.warning("%s: %d captions of files that are not there, such as %s", self.root, len(strangers), min(strangers))
        if self.skipped:
            names = ", ".join(list(self.skipped)[:10])
            logger.warning("%s: %d of %d files skipped: %s", self.root, len(self.skipped), len(self), names)

    def _scan(self, root: Path) -> dict[str, list[Path]]:
        """Non-empty files of every class; the class of a flat folder is named like the folder."""
        loose, folders = [], []
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                folders.append(entry)
            elif entry.suffix.lower() in self.extensions and not entry.name.startswith("."):
                loose.append(entry)
        by_class = {}
        for folder in folders:
            files = self._files(folder)
            if files:
                by_class[folder.name] = files
        if not by_class:
            by_class = {root.name: loose}
        else:
            for path in loose:
                self._skip(path, "lies beside class folders, so it has no class")
        return {name: [p for p in files if self._has_bytes(p)] for name, files in by_class.items()}

    def _files(self, folder: Path) -> list[Path]:
        """Files with the right endings below a class folder, sorted."""
        names = sorted(Path(place) / name for place, _, inner in os.walk(folder, followlinks=True) for name in inner)
        return [p for p in names if p.suffix.lower() in self.extensions and not p.name.startswith(".")]

    def _has_bytes(self, path: Path) -> bool:
        try:
            filled = path.is_dir() or path.stat().st_size > 0
        except OSError as error:
            self._skip(path, f"cannot be read ({error.strerror})")
            return False
        if not filled:
            self._skip(path, "is empty (zero bytes)")
        return filled

    def _skip(self, path: Path, reason: str) -> None:
        name = str(path.relative_to(self.root))
        if name not in self.skipped:
            self.skipped[name] = reason
            logger.info("%s: skipped '%s': it %s", self.root, name, reason)

    def _first_readable(self) -> None:
        """Reads up to the first good file of the folder, so that a folder of broken files is refused at once."""
        for path in self.files:
            if self._read(path) is not None:
                return
        names = ", ".join(list(self.skipped)[:5])
        raise DataError(f"'{self.root}': none of the {len(self.files)} {self.noun} files is readable (broken: {names})")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def _read(self, path: Path, index: int = 0, epoch: int = 0) -> Any:
        """What :meth:`_load` gives, or None for a file that is broken."""
        if str(path.relative_to(self.root)) in self.skipped:
            return None
        try:
            return self._load(path, index, epoch)
        except DataError as error:
            self._skip(path, str(error))
            return None

    def _load(self, path: Path, index: int, epoch: int) -> Any:
        return read_image(path)

    def _pixels(self, media: Any, index: int, epoch: int) -> Tensor:
        return self._crop(media, index, epoch)

    def get(self, index: int, epoch: int = 0) -> Item:
        label = int(self._labels[index])
        start, stop = self._starts[label], self._starts[label + 1]
        for step in range(stop - start):
            path = self.files[start + (index - start + step) % (stop - start)]
            known = len(self.skipped)
            media = self._read(path, index, epoch)
            if len(self.skipped) > known:
                reason = list(self.skipped.values())[-1]
                logger.warning("%s: skipped '%s': it %s (%d so far)", self.root, path.name, reason, len(self.skipped))
            if media is not None:
                return self._item(media, path, index, epoch)
        raise DataError(f"'{self.root}': every {self.noun} of class '{self.classes[label]}' is broken; remove it or mend its files")

    def exact(self, index: int, epoch: int = 0) -> Item:
        path = self.files[index]
        try:
            return self._item(self._load(path, index, epoch), path, index, epoch)
        except DataError as error:
            raise DataError(f"{self.noun} '{path}' {error}") from error

    def _item(self, media: Any, path: Path, index: int, epoch: int) -> Item:
        item: Item = {"pixels": self._pixels(media, index, epoch), "class_label": int(self._labels[index])}
        if self.has_captions:
            item["caption"] = self._caption(path)
        return item

    def item_name(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()

    def _caption(self, path: Path) -> str:
        key = path.relative_to(self.root).as_posix()
        if key in self._captions:
            return self._captions[key]
        text = path.with_suffix(".txt")
        return text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""

    def _crop(self, image: Image.Image, index: int, epoch: int) -> Tensor:
        u = Noise(self.seed, [index]).uniform("folder/crop", (5,), at=(epoch,))[0].tolist()
        if self.crop == "center":
            cropped = center_crop(image, self.size)
        else:
            # the crop's box in the file's own pixels, so that an extreme aspect ratio never becomes a huge intermediate image
            width, height = self._box(image.size, u)
            left, top = u[1] * (image.width - width), u[2] * (image.height - height)
            cropped = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1).float() / 127.5 - 1
        return pixels.flip(-1) if self.flip and u[3] < 0.5 else pixels

    def _box(self, size: tuple[int, int], u: list[float]) -> tuple[float, float]:
        """Width and height of the crop."""
        if self.crop == "random":
            side = min(size) * self.size / round(self.size * (1 + 0.25 * u[0]))
            return side, side
        if self.crop == "stretch":
            return size
        area, ratio = (0.5 + 0.5 * u[0]) * size[0] * size[1], (4 / 3) ** (2 * u[4] - 1)
        return min(math.sqrt(area * ratio), size[0]), min(math.sqrt(area / ratio), size[1])

    def verify(self) -> dict[str, str]:
        """Decodes every file and returns ``skipped`` complete: a slow, thorough check of the folder."""
        for path in self.files:
            self._read(path)
        return self.skipped


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """An 8-bit RGB image, upright by its EXIF tag; transparency is laid on white, 16-bit grey scaled, CMYK converted.

    Of an animation or a file of several pages the first one is read.

    Raises:
        DataError: the file is no image, is truncated, or is larger than Pillow's limit.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                raise DataError("holds floating-point values of unknown range")
            if image.mode.startswith("I"):
                values = np.asarray(image, dtype=np.int64)
                scaled = values // 257 if values.max() > 255 else values
                return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
            upright: Image.Image = ImageOps.exif_transpose(image)
            if upright.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
            return upright.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more
        raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:120] or type(error).__name__})") from error


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image whose short side is resized to ``size``, as in ADM (Dhariwal and Nichol 2021) and its heirs.

    The image is halved by box filtering as long as its short side is at least ``2 * size``, then resized by bicubic filtering.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    x, y = image.width / width, image.height / height
    left, top = (width - size) // 2 * x, (height - size) // 2 * y
    # columns, then rows, as Pillow resizes a whole image; only of the square, as the whole of a very long image may not fit into
    # memory
    margin = math.ceil(2 * max(y, 1)) + 1
    first, last = max(math.floor(top) - margin, 0), min(math.ceil(top + size * y) + margin, image.height)
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize(
        (size, strip.height), Image.Resampling.BICUBIC, box=(left, 0, min(left + size * x, strip.width), strip.height)
    )
    rows = (top - first, min(top - first + size * y, strip.height))
    return strip.resize((size, size), Image.Resampling.BICUBIC, box=(0, rows[0], size, rows[1]))


def _split_folders(root: Path) -> dict[str, Path]:
    """The sub-folders of a ready-made split; empty unless both sides are there."""
    found = {side: next((root / n for n in names if (root / n).is_dir()), None) for side, names in SPLIT_FOLDERS.items()}
    sides = {side: path for side, path in found.items() if path is not None}
    return sides if len(sides) == len(SPLIT_FOLDERS) else {}


def _hold_out(files: list[Path], split: str, share: float) -> list[Path]:
    """One side of a split that depends on the file names alone; a class of one file is all train."""
    ranked = sorted(files, key=lambda p: hashlib.blake2b(p.name.encode(), digest_size=8).digest())
    count = min(math.ceil(share * len(files)), len(files) - 1)
    test = set(ranked[: max(count, 0)])
    return [f for f in files if (f in test) == (split == "test")]


def _class_names(by_class: dict[str, list[Path]], wanted: Sequence[str] | None, root: Path) -> list[str]:
    found = list(by_class)
    if wanted is None:
        return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)
    for name in found:
        if name not in wanted:
            raise DataError(f"'{root}' has a class folder '{name}' that is not in classes{nearest(name, wanted)}")
    return list(wanted)


def _read_captions(folder: Path, root: Path) -> dict[str, str]:
    """Captions from every ``metadata.jsonl`` of the folder and its class folders, by file name relative to ``root``."""
    captions: dict[str, str] = {}
    for table in [folder / "metadata.jsonl", *sorted(folder.glob("*/metadata.jsonl"))]:
        if not table.is_file():
            continue
        for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                file = next(record[k] for k in FILE_KEYS if k in record)
                text = next((record[k] for k in CAPTION_KEYS if k in record), None)
            except (ValueError, TypeError, StopIteration) as error:
                raise DataError(f"'{table}' line {number}: expected a JSON object with {FILE_KEYS[0]} and text") from error
            if text is not None:
                captions[Path(os.path.relpath(table.parent / str(file), root)).as_posix()] = str(text)
    return captions
