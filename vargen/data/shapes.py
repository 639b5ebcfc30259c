"""Procedural colored shapes: images with a shape class, videos with a motion class, and captions that state what was drawn.

Item ``i`` of a split and seed is the same at any length, and the same scene at any size. ``vargen.data.shapes_reader`` reads the
attributes back from pixels, so that models of this set are checked against ground truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vargen.data.base import Item, VisualDataset, check_size, check_split
from vargen.errors import DataError
from vargen.noise import Noise

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "rotating", "staying still")
DIRECTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}
COLORS = {
    "red": (222, 58, 52),
    "orange": (243, 137, 38),
    "yellow": (248, 208, 58),
    "green": (66, 168, 82),
    "cyan": (70, 200, 214),
    "blue": (52, 110, 226),
    "purple": (142, 78, 200),
    "pink": (245, 140, 184),
}
BACKGROUNDS = {
    "white": (244, 241, 235),
    "gray": (158, 161, 168),
    "black": (26, 27, 31),
    "navy": (30, 44, 94),
    "teal": (18, 88, 92),
    "brown": (98, 68, 50),
}
# half of the larger side of the upright bounding box, in image widths
SIZES = {"small": (0.130, 0.155), "medium": (0.205, 0.225), "large": (0.290, 0.315)}
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
TILT = math.radians(6)
# how much a tilt can widen a bounding box, and the paper left free at the border
TILT_MARGIN, BORDER = 1.11, 0.02
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """One shape on a background.

    Attributes:
        shape: one of ``SHAPES``.
        color, background: RGB in [0, 1].
        center: ``(x, y)`` of the upright bounding box in image widths, y downwards.
        radius: half of the larger side of that box.
        angle: rotation about the center in radians, clockwise as seen.
    """

    shape: str
    color: tuple[float, ...]
    background: tuple[float, ...]
    center: tuple[float, float]
    radius: float
    angle: float = 0.0


def inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Whether points lie in the upright shape; its bounding box is centered at 0 with a larger half-side of 1, y downwards."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) <= 1
    if shape == "triangle":
        half = math.sqrt(3) / 2
        return (y <= half) & (y >= 2 * half * x.abs() - half)
    if shape == "star":
        return _inside_star(x, y)
    if shape == "cross":
        return (torch.maximum(x.abs(), y.abs()) <= 1) & (torch.minimum(x.abs(), y.abs()) <= 0.36)
    if shape == "ring":
        square = x * x + y * y
        return (square <= 1) & (square >= 0.56**2)
    if shape == "heart":
        # the curve (u^2 + v^2 - 1)^3 = u^2 v^3, which spans |u| <= 1.139 and -1 <= v <= 1.236
        u, v = 1.139 * x, 0.118 - 1.139 * y
        return (u * u + v * v - 1) ** 3 <= u * u * v**3
    if shape == "crescent":
        # the unit disc without a disc of radius 0.8 at (0.5, 0) ends at x = 0.61
        u = x - 0.195
        return (u * u + y * y <= 1) & ((u - 0.5) ** 2 + y * y >= 0.64)
    raise DataError(f"shape '{shape}': expected one of {', '.join(SHAPES)}")


def _inside_star(x: Tensor, y: Tensor, inner: float = 0.46) -> Tensor:
    """A five-pointed star, one point up, by folding the plane into one tenth of it."""
    outer = 1 / math.sin(math.radians(72))
    y = y - outer * (1 - math.cos(math.radians(36))) / 2
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    radius = torch.sqrt(x * x + y * y)
    across, along = radius * torch.sin(folded), radius * torch.cos(folded)
    notch = (inner * outer * math.sin(sector / 2), inner * outer * math.cos(sector / 2))
    return across * (outer - notch[1]) <= notch[0] * (outer - along)


def coverage(shape: str, center: tuple[float, float], radius: float, angle: float, size: int) -> Tensor:
    """Share of every pixel that the shape covers, ``(size, size)`` in [0, 1]."""
    fine = size * SUPERSAMPLING
    ticks = (torch.arange(fine) + 0.5) / fine
    x, y = (ticks - center[0])[None, :] / radius, (ticks - center[1])[:, None] / radius
    cos, sin = math.cos(angle), math.sin(angle)
    hits = inside(shape, cos * x + sin * y, cos * y - sin * x)
    return hits.view(size, SUPERSAMPLING, size, SUPERSAMPLING).float().mean((1, 3))


def draw(scene: Scene, size: int) -> Tensor:
    """An anti-aliased picture ``(3, size, size)`` in [-1, 1]; both colors darken a little towards the bottom."""
    mask = coverage(scene.shape, scene.center, scene.radius, scene.angle, size)
    height = ((torch.arange(size) + 0.5) / size).view(1, size, 1)
    ground = torch.tensor(scene.background).view(3, 1, 1) * (1.04 - 0.08 * height)
    local = ((height - scene.center[1]) / scene.radius).clamp(-1, 1)
    paint = torch.tensor(scene.color).view(3, 1, 1) * (1 - 0.07 * local)
    return 2 * torch.lerp(ground, paint, mask).clamp(0, 1) - 1


def image_caption(size: str, color: str, shape: str, position: str, background: str) -> str:
    """The caption of an image, e.g. ``a large red circle at the top left on a navy background``."""
    return f"a {size} {color} {shape} at the {position} on a {background} background"


def video_caption(color: str, shape: str, motion: str, background: str) -> str:
    """The caption of a video, e.g. ``a red star moving left on a black background``."""
    article = "an" if color[0] in "aeiou" else "a"
    return f"{article} {color} {shape} {motion} on a {background} background"


def _pick(names: tuple[str, ...], u: float) -> str:
    return names[int(u * len(names))]


def _shade(rgb: tuple[int, ...], u: list[float]) -> tuple[float, ...]:
    """The color with each channel moved by up to 3 %."""
    return tuple(min(max(c / 255 + 0.06 * (v - 0.5), 0.0), 1.0) for c, v in zip(rgb, u))


class _ShapesBase(VisualDataset):
    has_captions = True

    def __init__(self, size: int, length: int, split: str, seed: int) -> None:
        check_size(size, 16)
        if length < 1:
            raise DataError(f"length {length}: expected at least 1")
        self.size, self.length, self.split, self.seed = size, length, check_split(split), seed

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.length) % len(self.classes)

    def _draws(self, index: int) -> list[float]:
        return Noise(self.seed, [index]).uniform(f"shapes/{self.split}", (16,), dtype=torch.float64)[0].tolist()


class Shapes(_ShapesBase):
    """Images of one shape; the shape is the class (``index % 8``), the caption states size, color, position and background.

    Args:
        size: image side in pixels, at least 16 (32 and more for shapes that the eye tells apart).
        length: number of images.
        split: ``train`` or ``test``, which share no image.
        seed: chooses the scenes.
    """

    def __init__(self, size: int = 64, length: int = 8192, split: str = "train", seed: int = 0) -> None:
        super().__init__(size, length, split, seed)
        self.classes = list(SHAPES)
        self.sample_shape = (size, size)

    def get(self, index: int, epoch: int = 0) -> Item:
        scene, caption = self.scene(index)
        return {"pixels": draw(scene, self.size), "class_label": index % len(SHAPES), "caption": caption}

    def judge(self, pixels: Tensor, class_labels: Tensor | None = None, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        from vargen.data.shapes_reader import check_captions, check_classes

        return check_captions(pixels, captions) if captions is not None else check_classes(pixels, class_labels)

    def scene(self, index: int) -> tuple[Scene, str]:
        """The scene of an item and its caption."""
        u = self._draws(index)
        shape = SHAPES[index % len(SHAPES)]
        color, background = _pick(tuple(COLORS), u[0]), _pick(tuple(BACKGROUNDS), u[1])
        size, position = _pick(tuple(SIZES), u[2]), _pick(POSITIONS, u[3])
        low, high = SIZES[size]
        radius = low + (high - low) * u[4]
        room = 0.5 - TILT_MARGIN * radius - BORDER
        row, column = divmod(POSITIONS.index(position), 3)
        center = tuple(0.5 + room * (0.9 * (cell - 1) + 0.2 * (v - 0.5)) for cell, v in ((column, u[5]), (row, u[6])))
        scene = Scene(
            shape,
            _shade(COLORS[color], u[8:11]),
            _shade(BACKGROUNDS[background], u[11:14]),
            (center[0], center[1]),
            radius,
            TILT * (2 * u[7] - 1),
        )
        return scene, image_caption(size, color, shape, position, background)


class ShapesVideo(_ShapesBase):
    """Videos of one moving shape; the motion is the class (``index % 8``), the caption states color, shape, motion, background.

    Args:
        size: image side in pixels, at least 16.
        frames: number of frames, at least 3.
        length: number of videos.
        split: ``train`` or ``test``, which share no video.
        seed: chooses the scenes.
    """

    def __init__(self, size: int = 64, frames: int = 8, length: int = 4096, split: str = "train", seed: int = 0) -> None:
        super().__init__(size, length, split, seed)
        if frames < 3:
            raise DataError(f"frames {frames}: expected at least 3, fewer do not tell a rotation from a pause")
        self.frames = frames
        self.classes = list(MOTIONS)
        self.sample_shape = (frames, size, size)

    def get(self, index: int, epoch: int = 0) -> Item:
        scenes, caption = self.scenes(index)
        pixels = torch.stack([draw(scene, self.size) for scene in scenes], dim=1)
        return {"pixels": pixels, "class_label": index % len(MOTIONS), "caption": caption}

    def judge(self, pixels: Tensor, class_labels: Tensor | None = None, captions: Sequence[str] | None = None) -> dict[str, Tensor]:
        from vargen.data.shapes_reader import check_motions

        return check_motions(pixels, class_labels)

    def scenes(self, index: int) -> tuple[list[Scene], str]:
        """The scene of every frame and the caption."""
        u = self._draws(index)
        motion = MOTIONS[index % len(MOTIONS)]
        # a turning circle or ring would look still
        kinds = tuple(s for s in SHAPES if motion != "rotating" or s not in ("circle", "ring"))
        shape, color, background = _pick(kinds, u[0]), _pick(tuple(COLORS), u[1]), _pick(tuple(BACKGROUNDS), u[2])
        radius = 0.14 + 0.12 * u[3]
        room = 0.5 - TILT_MARGIN * radius - BORDER
        first = Scene(
            shape,
            _shade(COLORS[color], u[8:11]),
            _shade(BACKGROUNDS[background], u[11:14]),
            (0.5 + 0.5 * room * (2 * u[5] - 1), 0.5 + 0.5 * room * (2 * u[6] - 1)),
            radius,
            TILT * (2 * u[7] - 1),
        )
        times = [2 * t / (self.frames - 1) - 1 for t in range(self.frames)]
        return [self._moved(first, motion, t, room, u[4], u[14]) for t in times], video_caption(color, shape, motion, background)

    @staticmethod
    def _moved(scene: Scene, motion: str, time: float, room: float, amount: float, side: float) -> Scene:
        """The scene at ``time`` in [-1, 1]; ``amount`` in [0, 1] varies how far it moves, ``side`` the sense of rotation."""
        if motion in DIRECTIONS:
            dx, dy = DIRECTIONS[motion]
            reach = room * (0.75 + 0.25 * amount) * time
            return replace(scene, center=(0.5 + dx * reach if dx else scene.center[0], 0.5 + dy * reach if dy else scene.center[1]))
        if motion in ("growing", "shrinking"):
            progress = (1 + time) / 2 if motion == "growing" else (1 - time) / 2
            return replace(
                scene,
                center=(0.3 + 0.4 * scene.center[0], 0.3 + 0.4 * scene.center[1]),
                radius=0.11 + 0.02 * amount + (0.15 + 0.05 * amount) * progress,
            )
        if motion == "rotating":
            turn = math.radians(45 + 10 * amount) * time
            return replace(scene, angle=scene.angle + (turn if side < 0.5 else -turn))
        return scene
