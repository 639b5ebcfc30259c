"""Crops of the real colour photographs that scikit-learn and scikit-image carry in their wheels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from PIL import Image
from torch import Tensor

from vargen.data.base import Item, VisualDataset, check_size, check_split
from vargen.errors import DataError
from vargen.noise import Noise

# class name -> file, all read from the installed packages without any download
PHOTOGRAPHS: dict[str, Path] = {
    "temple": Path(sklearn.datasets.__file__).parent / "images" / "china.jpg",
    "flower": Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg",
    "astronaut": Path(skimage.__file__).parent / "data" / "astronaut.png",
    "cat": Path(skimage.__file__).parent / "data" / "chelsea.png",
    "coffee": Path(skimage.__file__).parent / "data" / "coffee.png",
    "rocket": Path(skimage.__file__).parent / "data" / "rocket.jpg",
    "motorcycle": Path(skimage.__file__).parent / "data" / "motorcycle_left.png",
    "galaxies": Path(skimage.__file__).parent / "data" / "hubble_deep_field.jpg",
}
DESCRIPTIONS = ("a temple", "a flower", "an astronaut", "a cat", "a cup of coffee", "a rocket", "a motorcycle", "galaxies")
TEST_SHARE = 0.3
MIN_CROP = 64


class Photos(VisualDataset):
    """Square crops of eight photographs at random places and scales; the photograph is the class.

    Test crops come from the right 30 % of each photograph, which train crops never touch.

    Args:
        size: image side in pixels.
        length: number of crops; item ``i`` is the same at any length.
        split: ``train`` or ``test``.
        seed: chooses the crops.
    """

    has_captions = True

    def __init__(self, size: int = 64, length: int = 4096, split: str = "train", seed: int = 0) -> None:
        self.sample_shape = (check_size(size), size)
        if length < 1:
            raise DataError(f"length {length}: expected at least 1")
        self.length, self.split, self.seed = length, check_split(split), seed
        self.classes = list(PHOTOGRAPHS)
        self._photographs = [self._region(path) for path in PHOTOGRAPHS.values()]

    def _region(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                whole = image.convert("RGB")
        except OSError as error:
            raise DataError(f"photograph '{path.name}' cannot be read from the installed package ({error})") from error
        border = round(whole.width * (1 - TEST_SHARE))
        return whole.crop((0, 0, border, whole.height) if self.split == "train" else (border, 0, whole.width, whole.height))

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.length) % len(self.classes)

    def get(self, index: int, epoch: int = 0) -> Item:
        label = index % len(self.classes)
        photograph = self._photographs[label]
        u = Noise(self.seed, [index]).uniform(f"photos/{self.split}", (4,), dtype=torch.float64)[0].tolist()
        side = round(MIN_CROP + u[0] * (min(photograph.size) - MIN_CROP))
        left, top = (round(u[k + 1] * (photograph.size[k] - side)) for k in (0, 1))
        box = (left, top, left + side, top + side)
        crop = photograph.resize((self.sample_shape[1], self.sample_shape[0]), Image.Resampling.BICUBIC, box=box)
        if u[3] < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixels": pixels, "class_label": label, "caption": f"a crop of a photograph of {DESCRIPTIONS[label]}"}
