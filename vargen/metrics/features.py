"""Feature extractors: what turns pixels into the vectors that distances between sets of images or videos are measured on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.errors import ConfigError, VargenError, nearest
from vargen.model import VargenModel

ASSETS = Path(__file__).parent.parent / "assets"
FEATURE_NETS = ("digits", "shapes", "shapes-video")


@dataclass(frozen=True)
class Features:
    """Features of a batch.

    Attributes:
        features: float32 ``(B, D)``.
        logits: for each property that the network tells, ``(B, K)``; the class is called ``class``. May be empty.
    """

    features: Tensor
    logits: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class FeatureExtractor(Protocol):
    """Pixels ``(B, 3, H, W)``, or ``(B, 3, T, H, W)`` of videos, in [-1, 1] to :class:`Features`.

    Attributes:
        name: goes into reports, since distances of different networks do not compare.
    """

    name: str

    def __call__(self, pixels: Tensor) -> Features: ...


class FeatureNet(VargenModel):
    """A small convolutional classifier; its penultimate layer gives the features.

    Args:
        properties: what it tells of an image, name -> names of the values; that of the class is ``class``.
        image_size: side that pixels are resized to (bilinear with antialiasing), a multiple of 8.
        widths: channels of the four convolutions; the first three halve the image.
        dim: width of the features.
        name: in reports.
        frames: frames of a clip, for a network of videos: they enter the first convolution side by side as channels, so that all
            layers see motion; None for images.
    """

    @register_to_config
    def __init__(
        self,
        properties: dict[str, list[str]],
        image_size: int = 32,
        widths: tuple[int, ...] = (16, 32, 48, 48),
        dim: int = 64,
        name: str = "feature-net",
        frames: int | None = None,
    ) -> None:
        super().__init__()
        if image_size % 8 or len(widths) != 4 or not properties:
            raise ConfigError(
                f"feature network of {len(properties)} properties, image size {image_size} and widths {widths}: expected at least "
                "one property, a multiple of 8 and four widths"
            )
        self.name, self.image_size, self.frames = name, image_size, frames
        channels = (3 * (frames or 1), *widths)
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(zip(channels, widths)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2 if i < 3 else 1, padding=1), nn.GroupNorm(4, c_out), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], dim))
        self.heads = nn.ModuleDict({key: nn.Linear(dim, len(values)) for key, values in properties.items()})

    @property
    def _time(self) -> tuple[int, ...]:
        return () if self.frames is None else (self.frames,)

    def forward(self, pixels: Tensor) -> Features:
        """``(B, 3, H, W)``, or ``(B, 3, frames, H, W)``, in [-1, 1] to features ``(B, dim)`` and logits."""
        if pixels.dim() != (4 if self.frames is None else 5) or pixels.shape[1] != 3 or pixels.shape[2:-2] != self._time:
            axes = "(B, 3, H, W)" if self.frames is None else f"(B, 3, {self.frames}, H, W)"
            raise VargenError(f"{self.name}: pixels of shape {tuple(pixels.shape)}, expected {axes}")
        pixels = pixels.flatten(1, -3)
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        features = self.body(pixels)
        hidden = F.silu(features)
        return Features(features, {key: head(hidden) for key, head in self.heads.items()})


def load_feature_net(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> FeatureNet:
    """A trained network: ``digits``, ``shapes`` or ``shapes-video``, which ship, or a directory.

    Raises:
        ConfigError: neither a directory nor one that ships.
        CheckpointError: the directory does not hold one.
    """
    folder = ASSETS / f"features-{source}" if str(source) in FEATURE_NETS else Path(source)
    if not folder.is_dir():
        raise ConfigError(
            f"feature network '{source}' is neither a directory nor one that ships{nearest(str(source), FEATURE_NETS)}"
        )
    return FeatureNet.from_pretrained(folder).eval().requires_grad_(False).to(device)


@torch.no_grad()
def extract(extractor: FeatureExtractor, batches: Iterable[Tensor], device: torch.device | str = "cpu") -> Features:
    """Features of all batches of pixels, on the CPU.

    Raises:
        VargenError: there is no batch.
    """
    outputs = [extractor(pixels.to(device)) for pixels in batches]
    if not outputs:
        raise VargenError("no images to take features of")
    logits = {key: torch.cat([o.logits[key] for o in outputs]).cpu() for key in outputs[0].logits}
    return Features(torch.cat([o.features for o in outputs]).float().cpu(), logits)
