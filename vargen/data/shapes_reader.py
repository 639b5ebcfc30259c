"""Reading shapes back from pixels: the rules that check models of the shapes sets against ground truth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vargen.data.shapes import BACKGROUNDS, COLORS, DIRECTIONS, MOTIONS, POSITIONS, SHAPES, SIZES, coverage
from vargen.errors import DataError

# a color closer than this to the background (RGB distance in [0, sqrt 3]) is no shape
MIN_CONTRAST = 0.18
# half-sides of the box between two size words, and the offset of its center between "center" and a side, in image widths
SIZE_LIMITS = (0.176, 0.256)
POSITION_LIMIT = 0.085
TEMPLATE_SIZE = 32


@dataclass(frozen=True)
class Attributes:
    """What a picture of the shapes set shows, in the words of its captions.

    Attributes:
        match: overlap (intersection over union) of the picture's shape with the best ideal one, in [0, 1]; 1 for captions.
    """

    shape: str
    color: str
    background: str
    size: str
    position: str
    match: float = 1.0


@dataclass(frozen=True)
class _Figure:
    mask: Tensor
    color: Tensor
    background: Tensor
    center: tuple[float, float]
    half: tuple[float, float]


def _find(pixels: Tensor) -> _Figure | None:
    """The figure in a picture ``(3, H, W)``: its share of each pixel and its box in image widths; None without contrast."""
    rgb = (pixels.detach().float().cpu().clamp(-1, 1) + 1) / 2
    height, width = rgb.shape[1:]
    ring = torch.cat([rgb[:, 0], rgb[:, -1], rgb[:, :, 0], rgb[:, :, -1]], dim=1)
    background = ring.median(dim=1).values
    contrast = (rgb - background.view(3, 1, 1)).norm(dim=0)
    strong = contrast > max(MIN_CONTRAST, 0.6 * float(contrast.quantile(1 - 4 / (height * width))))
    if int(strong.sum()) < 4:
        return None
    color = rgb[:, strong].median(dim=1).values
    axis = color - background
    mask = (torch.einsum("chw,c->hw", rgb - background.view(3, 1, 1), axis) / axis.dot(axis)).clamp(0, 1)
    mask = ((mask - 0.25) / 0.6).clamp(0, 1)
    (top, bottom), (left, right) = (_extent(mask.amax(dim=d)) for d in (1, 0))
    if right - left < 1 or bottom - top < 1:
        return None
    center = ((left + right) / 2 / width, (top + bottom) / 2 / height)
    return _Figure(mask, color, background, center, ((right - left) / 2 / width, (bottom - top) / 2 / height))


def _extent(profile: Tensor) -> tuple[float, float]:
    """Where a profile of coverages begins and ends, to a fraction of a pixel."""
    filled = (profile > 0.4).nonzero().flatten()
    if not len(filled):
        return 0.0, 0.0
    first, last = int(filled[0]), int(filled[-1])
    before = float(profile[first - 1]) if first > 0 else 0.0
    after = float(profile[last + 1]) if last + 1 < len(profile) else 0.0
    return first + 1 - float(profile[first]) - before, last + float(profile[last]) + after


def _nearest_color(color: Tensor, palette: Mapping[str, tuple[int, ...]]) -> str:
    names = list(palette)
    distances = (torch.tensor([palette[n] for n in names]) / 255 - color).norm(dim=1)
    return names[int(distances.argmin())]


@lru_cache(maxsize=2)
def _templates(angles: tuple[int, ...]) -> Tensor:
    """Every shape at every angle (degrees), cut to its box: ``(len(SHAPES), len(angles), 32, 32)``."""
    rows = []
    for shape in SHAPES:
        turned = (coverage(shape, (0.5, 0.5), 0.35, math.radians(a), 2 * TEMPLATE_SIZE) for a in angles)
        rows.append(torch.stack([_cut(mask, _extent(mask.amax(1)), _extent(mask.amax(0))) for mask in turned]))
    return torch.stack(rows)


def _cut(mask: Tensor, rows: tuple[float, float], columns: tuple[float, float]) -> Tensor:
    """A box of a mask (edges in pixels) scaled to ``TEMPLATE_SIZE`` on its longer side and centered."""
    height, width = mask.shape
    half = max(rows[1] - rows[0], columns[1] - columns[0]) / 2
    ticks = ((torch.arange(TEMPLATE_SIZE) + 0.5) / TEMPLATE_SIZE * 2 - 1) * half * 1.04
    y, x = sum(rows) / 2 + ticks, sum(columns) / 2 + ticks
    grid = torch.stack(torch.broadcast_tensors(2 * x[None, :] / width - 1, 2 * y[:, None] / height - 1), dim=-1)
    return torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union of masks over the last two axes."""
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp_min(1e-6)


def _pixel_cut(figure: _Figure) -> Tensor:
    height, width = figure.mask.shape
    rows = ((figure.center[1] - figure.half[1]) * height, (figure.center[1] + figure.half[1]) * height)
    columns = ((figure.center[0] - figure.half[0]) * width, (figure.center[0] + figure.half[0]) * width)
    return _cut(figure.mask, rows, columns)


def attributes_from_pixels(pixels: Tensor) -> Attributes | None:
    """What an image ``(3, H, W)`` in [-1, 1] shows, or None if nothing stands out from its background.

    The background is the median of the border; the shape is the best of ideal ones at small tilts, scaled to the figure's box.
    """
    if pixels.dim() != 3 or pixels.shape[0] != 3:
        raise DataError(f"pixels of shape {tuple(pixels.shape)}: expected one image (3, H, W)")
    figure = _find(pixels)
    if figure is None:
        return None
    matches = _overlap(_pixel_cut(figure), _templates((-6, -3, 0, 3, 6))).amax(dim=1)
    half = max(figure.half)
    column, row = (0 if c < 0.5 - POSITION_LIMIT else 2 if c > 0.5 + POSITION_LIMIT else 1 for c in figure.center)
    return Attributes(
        shape=SHAPES[int(matches.argmax())],
        color=_nearest_color(figure.color, COLORS),
        background=_nearest_color(figure.background, BACKGROUNDS),
        size=tuple(SIZES)[sum(half > limit for limit in SIZE_LIMITS)],
        position=POSITIONS[3 * row + column],
        match=float(matches.max()),
    )


def attributes_from_caption(caption: str) -> Attributes:
    """The inverse of the captions of ``Shapes``.

    Raises:
        DataError: not a caption of this set.
    """
    choice = {
        "size": "|".join(SIZES),
        "color": "|".join(COLORS),
        "shape": "|".join(SHAPES),
        "position": "|".join(sorted(POSITIONS, key=len, reverse=True)),
        "background": "|".join(BACKGROUNDS),
    }
    groups = {name: f"(?P<{name}>{words})" for name, words in choice.items()}
    pattern = "an? {size} {color} {shape} at the {position} on an? {background} background".format(**groups)
    found = re.fullmatch(pattern, caption.strip().lower())
    if found is None:
        raise DataError(f"caption '{caption}': expected e.g. 'a large red circle at the top left on a navy background'")
    return Attributes(found["shape"], found["color"], found["background"], found["size"], found["position"])


def attributes_from_video_caption(caption: str) -> dict[str, str]:
    """Color, shape, motion and background in a caption of ``ShapesVideo``.

    Raises:
        DataError: not a caption of this set.
    """
    choice = {
        "color": "|".join(COLORS),
        "shape": "|".join(SHAPES),
        "motion": "|".join(MOTIONS),
        "background": "|".join(BACKGROUNDS),
    }
    groups = {name: f"(?P<{name}>{words})" for name, words in choice.items()}
    found = re.fullmatch("an? {color} {shape} {motion} on an? {background} background".format(**groups), caption.strip().lower())
    if found is None:
        raise DataError(f"caption '{caption}': expected e.g. 'a red star moving left on a black background'")
    return found.groupdict()


def motion_from_pixels(pixels: Tensor) -> str | None:
    """The motion of a video ``(3, T, H, W)`` in [-1, 1], T >= 3, or None if its shape cannot be followed.

    A change of area by more than half, else a shift of more than 17 % of the width, else a change of form, else none.
    """
    if pixels.dim() != 4 or pixels.shape[0] != 3 or pixels.shape[1] < 3:
        raise DataError(f"pixels of shape {tuple(pixels.shape)}: expected one video (3, T, H, W) of 3 frames or more")
    found = [_find(frame) for frame in pixels.unbind(1)]
    figures = [f for f in found if f is not None]
    if len(figures) < len(found):
        return None
    first, last = figures[0], figures[-1]
    area_ratio = float(last.mask.sum() / first.mask.sum())
    if abs(math.log(area_ratio)) > math.log(1.5):
        return "growing" if area_ratio > 1 else "shrinking"
    dx, dy = (_centroid(last.mask)[k] - _centroid(first.mask)[k] for k in (0, 1))
    if max(abs(dx), abs(dy)) > 0.17:
        return _direction(dx, dy)
    cuts = torch.stack([_pixel_cut(f) for f in figures])
    return "rotating" if float(_overlap(cuts[:1], cuts[1:]).min()) < 0.8 else "staying still"


def _direction(dx: float, dy: float) -> str:
    step = ((dx > 0) - (dx < 0), 0) if abs(dx) > abs(dy) else (0, (dy > 0) - (dy < 0))
    return next(motion for motion, direction in DIRECTIONS.items() if direction == step)


def _centroid(mask: Tensor) -> tuple[float, float]:
    """Center of mass in image widths."""
    height, width = mask.shape
    total = mask.sum()
    x = (mask.sum(0) * (torch.arange(width) + 0.5)).sum() / total / width
    y = (mask.sum(1) * (torch.arange(height) + 0.5)).sum() / total / height
    return float(x), float(y)


def check_captions(pixels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Which images ``(B, 3, H, W)`` show what their captions say: bool ``(B,)`` for every attribute, and ``all`` together."""
    if len(pixels) != len(captions):
        raise DataError(f"{len(pixels)} images for {len(captions)} captions: expected one each")
    wanted = [attributes_from_caption(caption) for caption in captions]
    seen = [attributes_from_pixels(image) for image in pixels]
    right = {
        name: torch.tensor([s is not None and getattr(s, name) == getattr(w, name) for s, w in zip(seen, wanted)])
        for name in ("shape", "color", "background", "size", "position")
    }
    return {**right, "all": torch.stack(list(right.values())).all(0)}


def check_classes(pixels: Tensor, class_labels: Tensor | None) -> dict[str, Tensor]:
    """Which images ``(B, 3, H, W)`` show the shape of their class: ``shape``, bool ``(B,)``; empty without labels."""
    if class_labels is None:
        return {}
    seen = [attributes_from_pixels(image) for image in pixels]
    return {"shape": torch.tensor([s is not None and s.shape == SHAPES[c] for s, c in zip(seen, class_labels.tolist())])}


def check_motions(pixels: Tensor, class_labels: Tensor | None) -> dict[str, Tensor]:
    """Which videos ``(B, 3, T, H, W)`` move as their class says: ``motion``, bool ``(B,)``; empty without labels."""
    if class_labels is None:
        return {}
    return {"motion": torch.tensor([motion_from_pixels(v) == MOTIONS[c] for v, c in zip(pixels, class_labels.tolist())])}
