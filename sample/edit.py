"""The picture and the mask of a sampling job that edits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vargen.data.folder import read_image
from vargen.errors import DataError, VargenError


@dataclass(frozen=True)
class EditFiles:
    """What a job edits.

    Attributes:
        image, mask: picture files of the model's size; the mask is white where the picture is drawn anew.
        keep_pixels: pixels outside the mask are the picture's own.
        digest: short hash of both files' pixels, so that a job is not continued with files that have changed.
    """

    image: str
    mask: str
    keep_pixels: bool
    digest: str

    def arguments(self) -> dict[str, Any]:
        """The pipeline's arguments."""
        return {"image": _picture(self.image, "RGB"), "mask": _picture(self.mask, "L"), "keep_pixels": self.keep_pixels}


def edit_files(image: str | Path | None, mask: str | Path | None, keep_pixels: bool = False) -> EditFiles | None:
    """The files of an edit, None without any.

    Raises:
        DataError: a file that is no picture.
        VargenError: one without the other.
    """
    if image is None and mask is None and not keep_pixels:
        return None
    if image is None or mask is None:
        raise VargenError("editing needs both --image and --mask, a picture that is white where the image is drawn anew")
    digest = hashlib.blake2b(_picture(str(image), "RGB").tobytes() + _picture(str(mask), "L").tobytes(), digest_size=8)
    return EditFiles(str(image), str(mask), keep_pixels, digest.hexdigest())


@lru_cache(maxsize=4)
def _picture(file: str, mode: str) -> Image.Image:
    if not Path(file).is_file():
        raise DataError(f"'{file}' does not exist: expected a picture file")
    try:
        return read_image(file).convert(mode)
    except DataError as error:
        raise DataError(f"'{file}' {error}") from error
