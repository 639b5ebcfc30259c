"""Scikit-learn's 1,797 handwritten digits (UCI optdigits, 8x8 grey levels), smoothly enlarged: dark ink on white."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from vargen.data.base import Item, VisualDataset, check_size, check_split
from vargen.noise import Noise

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(VisualDataset):
    """Real handwritten digits in ten classes.

    Every class is split 80/20 into train (1,438 images) and test (359).

    Args:
        size: image side in pixels.
        split: ``train`` or ``test``.
        augment: turn, move and zoom the digits a little, in each epoch anew; in epoch 0, and through ``dataset[i]``, they are as
            they were written.
    """

    has_captions = True

    def __init__(self, size: int = 32, split: str = "train", augment: bool = False) -> None:
        self.sample_shape = (check_size(size), size)
        self.augment = augment
        self.classes = [str(digit) for digit in range(10)]
        source = load_digits()
        targets = torch.from_numpy(source.target).long()
        rows = stratified_split(targets, check_split(split))
        ink = torch.from_numpy(source.images[rows.numpy()]).float().unsqueeze(1) / 16
        self._labels = targets[rows]
        self._pixels = enlarge(ink, size)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def get(self, index: int, epoch: int = 0) -> Item:
        label = int(self._labels[index])
        pixels = self._pixels[index]
        if self.augment and epoch:
            pixels = jitter(pixels, Noise(0, [index]).uniform("digits/jitter", (4,), at=(epoch,))[0])
        return {
            "pixels": pixels.expand(3, -1, -1).clone(),
            "class_label": label,
            "caption": f"a handwritten digit {NAMES[label]}",
        }


def jitter(pixels: Tensor, u: Tensor) -> Tensor:
    """A picture ``(C, H, W)`` turned by up to 8 degrees, zoomed by up to 7 % and moved by up to 3 % of its side.

    ``u``: four uniform draws in [0, 1) for turn, zoom and the two shifts; 0.5 changes nothing.
    """
    turn, zoom, *shift = (2 * u - 1).tolist()
    angle, scale = math.radians(8 * turn), math.exp(0.07 * zoom)
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rows = torch.tensor([[[cos, -sin, 0.06 * shift[0]], [sin, cos, 0.06 * shift[1]]]])
    grid = F.affine_grid(rows, [1, *pixels.shape], align_corners=False)
    return F.grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)[0]


def stratified_split(targets: Tensor, split: str, test_share: float = 0.2) -> Tensor:
    """Row numbers of one side of a fixed split that takes ``test_share`` of every class for the test side, ascending."""
    order = Noise(0).permutation("digits/split", len(targets))[0]
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        members = order[targets[order] == label]
        test[members[: round(test_share * len(members))]] = True
    return (test if split == "test" else ~test).nonzero().flatten()


def enlarge(ink: Tensor, size: int) -> Tensor:
    """Ink ``(N, 1, 8, 8)`` in [0, 1] to pixels ``(N, 1, size, size)`` in [-1, 1], -1 where the ink is darkest.

    The digits fill their 8x8 frame, so a cell of paper is added on every side; bicubic interpolation leaves soft strokes, whose
    edges the smoothstep makes crisp.
    """
    smooth = F.interpolate(F.pad(ink, (1, 1, 1, 1)), size=(size, size), mode="bicubic", align_corners=False)
    t = ((smooth - 0.15) / 0.7).clamp(0, 1)
    return 1 - 2 * (t * t * (3 - 2 * t))
