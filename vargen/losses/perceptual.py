"""Perceptual terms: LPIPS from weight files, or distances in the features of any network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from vargen.config import check_keys
from vargen.errors import ConfigError
from vargen.losses.convnext import MeanDistance, load_convnext
from vargen.nn.lpips import LPIPS, PerceptualDistance, load_lpips, unit_channels

__all__ = ["LPIPS", "FeatureDistance", "PerceptualDistance", "load_lpips", "make_perceptual"]

PerceptualSource: TypeAlias = str | os.PathLike[str] | Sequence[str] | Mapping[str, Mapping[str, Any]] | nn.Module

LOADERS: dict[str, Callable[[Any], PerceptualDistance]] = {"lpips": load_lpips, "convnext": load_convnext}


class FeatureDistance(PerceptualDistance):
    """Distance of pictures in the features of a frozen teacher, as LPIPS but with all channels weighing the same.

    Args:
        teacher: maps pixels ``(B, 3, H, W)`` in [-1, 1] to a list of feature maps ``(B, C, h, w)`` or vectors ``(B, C)``.

    For each feature the squared difference of the channel-normalised values, summed over channels and averaged over positions, lies
    in [0, 4]; the distance is the mean over features.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        # the teacher's dropout and batch statistics stay off
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.teacher(x), self.teacher(y), strict=True)
        terms = [(unit_channels(a) - unit_channels(b)).square().sum(1).flatten(1).mean(1) if a.dim() > 2 else
                 (unit_channels(a) - unit_channels(b)).square().sum(1) for a, b in pairs]  # fmt: skip
        return torch.stack(terms).mean(0)


def make_perceptual(source: PerceptualSource | None) -> PerceptualDistance | None:
    """The perceptual distance that ``source`` means: files of LPIPS weights (or ``"cache"``), a distance, a teacher, or none.

    A mapping such as ``{"lpips": {"source": "cache", "weight": 1.0}, "convnext": {"source": "cache", "weight": 0.1}}`` means the
    weighted mean of distances.
    """
    if source is None or isinstance(source, PerceptualDistance):
        return source
    if isinstance(source, Mapping):
        return _mean(source)
    return FeatureDistance(source) if isinstance(source, nn.Module) else load_lpips(source)


def _mean(parts: Mapping[str, Mapping[str, Any]]) -> MeanDistance:
    check_keys(parts, sorted(LOADERS), "perceptual")
    for name, part in parts.items():
        check_keys(part, ("source", "weight"), f"perceptual.{name}")
        if "source" not in part:
            raise ConfigError(f"perceptual.{name}: give source, the weight file or 'cache'")
    weights = [float(part.get("weight", 1.0)) for part in parts.values()]
    return MeanDistance([LOADERS[name](part["source"]) for name, part in parts.items()], weights)
