"""A perceptual distance in the class logits of ConvNeXt, and weighted means of distances (TiTok's and TA-TiTok's objectives)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.checkpoint import load_strictly, read_file, unwrap
from vargen.errors import CheckpointError
from vargen.nn.lpips import PerceptualDistance

CONVNEXT_FILE = "convnext_small-0c510722.pth"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvNeXtDistance(PerceptualDistance):
    """Mean squared difference of class logits of pictures resized to a common size (bilinear, antialiased).

    Args:
        network: a classifier of ImageNet-normalised pixels, frozen here.
        image_size: side of its input.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, image_size: int = 224) -> None:
        super().__init__()
        self.network, self.image_size = network.requires_grad_(False).eval(), image_size
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> ConvNeXtDistance:
        # the network's stochastic depth stays off
        super().train(mode)
        self.network.eval()
        return self

    def _logits(self, pixels: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        resized = F.interpolate((pixels + 1) / 2, size, mode="bilinear", align_corners=False, antialias=True)
        return self.network((resized - self.mean) / self.std)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self._logits(x) - self._logits(y)).square().mean(1)


class MeanDistance(PerceptualDistance):
    """Weighted mean of distances, the weights divided by their sum."""

    def __init__(self, distances: Sequence[PerceptualDistance], weights: Sequence[float]) -> None:
        super().__init__()
        self.distances = nn.ModuleList(distances)
        self.weights = [w / sum(weights) for w in weights]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([w * distance(x, y) for w, distance in zip(self.weights, self.distances, strict=True)]).sum(0)


def load_convnext(source: str | os.PathLike[str]) -> ConvNeXtDistance:
    """The distance in torchvision's ConvNeXt-S.

    Args:
        source: torchvision's weight file, the directory that holds it, or ``"cache"`` for torch hub's directory.

    Raises:
        CheckpointError: the weights are absent or do not fit.
    """
    from torchvision.models import convnext_small

    path = Path(torch.hub.get_dir()) / "checkpoints" if str(source) == "cache" else Path(source)
    file = path / CONVNEXT_FILE if path.is_dir() or str(source) == "cache" else path
    if not file.is_file():
        raise CheckpointError(
            f"ConvNeXt weights '{file}' do not exist: fetch torchvision's {CONVNEXT_FILE}, or switch the perceptual loss off"
        )
    network = convnext_small()
    load_strictly(network, unwrap(read_file(file), ()), source=str(file))
    return ConvNeXtDistance(network)
