"""Discriminators: pictures ``(B, 3, H, W)`` or clips ``(B, 3, T, H, W)`` in [-1, 1] to logits, high for real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError, VargenError, nearest
from vargen.nn.norm import LayerNorm
from vargen.nn.patch import PatchEmbed, patch_grid
from vargen.nn.positions import sincos_3d
from vargen.nn.vit import Transformer


class Discriminator(nn.Module):
    """Base of all discriminators.

    Attributes:
        video: it takes clips ``(B, 3, T, H, W)``; otherwise clips are judged frame by frame.
    """

    video: bool = False


class PatchGAN(Discriminator):
    """Logits ``(B, 1, h, w)`` for overlapping patches (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.2).

    Args:
        width: channels of the first convolution; they double per layer up to eight times.
        num_layers: convolutions of stride 2; two more of stride 1 follow.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, in_channels: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                # batch norm carries the bias
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        # the two last convolutions need three positions on each axis
        self.smallest = 3 * 2**num_layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        if min(pixels.shape[-2:]) < self.smallest:
            raise VargenError(
                f"pixels of {pixels.shape[-2]}x{pixels.shape[-1]} are too small for a PatchGAN that needs {self.smallest}: "
                f"give it fewer num_layers"
            )
        return self.main(pixels)


class Blur(nn.Module):
    """Depth-wise binomial filter ``[1, 3, 3, 1]``, stride 2: halves both axes without aliasing (Zhang 2019, arXiv 1904.11486)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", (taps[:, None] * taps / taps.sum() ** 2)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.to(x.dtype).expand(channels, 1, 4, 4), stride=2, padding=1, groups=channels)


class ResidualDown(nn.Module):
    """StyleGAN2's discriminator block: two 3x3 convolutions, the second blurred to half size, plus a 1x1 skip, over sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.blur = Blur()

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), 0.2)
        h = self.blur(F.leaky_relu(self.conv2(h), 0.2))
        return (h + self.skip(self.blur(x))) / math.sqrt(2)


class StyleGANDiscriminator(Discriminator):
    """One logit per picture, ``(B, 1)``, by a residual network (Karras et al. 2020, arXiv 1912.04958), without equalised rates.

    Args:
        image_size: pixels of a side, or ``(height, width)``; the pictures must have it.
        width, multipliers: channels after each halving are ``width * multiplier``; TexTok's for 256 pixels by default.
        minibatch_std: append the standard deviation over groups of up to four samples as a channel before the last layers.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4, 4, 4),
        in_channels: int = 3,
        minibatch_std: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        shrink = 2 ** len(multipliers)
        if any(side % shrink for side in self.image_size):
            raise ConfigError(f"image_size {image_size}: expected a multiple of {shrink}, two to the number of multipliers")
        widths = [width, *(width * m for m in multipliers)]
        self.stem = nn.Conv2d(in_channels, width, 1)
        self.blocks = nn.ModuleList(ResidualDown(a, b) for a, b in pairwise(widths))
        self.minibatch_std = minibatch_std
        self.conv = nn.Conv2d(widths[-1] + minibatch_std, widths[-1], 3, padding=1)
        self.hidden = nn.Linear(widths[-1] * self.image_size[0] * self.image_size[1] // shrink**2, widths[-1])
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[-2:]) != self.image_size:
            raise VargenError(
                f"pixels of {pixels.shape[-2]}x{pixels.shape[-1]}: this discriminator was built for {self.image_size}"
            )
        h = F.leaky_relu(self.stem(pixels), 0.2)
        for block in self.blocks:
            h = block(h)
        if self.minibatch_std:
            h = torch.cat([h, _minibatch_std(h)], dim=1)
        h = F.leaky_relu(self.conv(h), 0.2).flatten(1)
        return self.head(F.leaky_relu(self.hidden(h), 0.2))


def _minibatch_std(x: Tensor, most: int = 4) -> Tensor:
    """Mean standard deviation over the samples of a group, as a map ``(B, 1, h, w)``; groups interleave."""
    batch, _, height, width = x.shape
    group = max(n for n in range(1, most + 1) if batch % n == 0)
    variance = x.reshape(group, batch // group, -1).var(0, unbiased=False)
    std = (variance + 1e-8).sqrt().mean(-1)
    return std.repeat(group).reshape(batch, 1, 1, 1).expand(batch, 1, height, width)


class TransformerDiscriminator(Discriminator):
    """One logit per clip, ``(B, 1)``, from the class token of a ViT (LARP, arXiv 2410.21264); it sees values in [0, 1].

    Args:
        sample_size, frames: side and length of the clips; the latter a multiple of temporal_patch_size.
        patch_size, temporal_patch_size: of the patches.
        dim, depth, heads: of the transformer.
    """

    video = True
    positions: Tensor

    def __init__(
        self,
        sample_size: int = 128,
        frames: int = 16,
        patch_size: int = 8,
        temporal_patch_size: int = 4,
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        patch = (temporal_patch_size, patch_size, patch_size)
        grid = patch_grid((frames, sample_size, sample_size), patch)
        self.patches = PatchEmbed(3, dim, patch)
        self.class_token = nn.Parameter(torch.empty(1, dim))
        self.register_buffer("positions", sincos_3d(dim, grid), persistent=False)
        self.transformer = Transformer(depth, dim, heads, norm_eps=norm_eps, qkv_bias=False)
        self.norm = LayerNorm(dim, 1e-6)
        self.head = nn.Linear(dim, 1)
        nn.init.xavier_uniform_(self.class_token)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches((pixels + 1) / 2)
        if patches.shape[1] > len(self.positions):
            raise VargenError(f"clips of {tuple(pixels.shape[2:])}: this discriminator was built for {len(self.positions)} patches")
        x = patches + self.positions[: patches.shape[1]]
        x = self.transformer(torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1))
        return self.head(self.norm(x[:, 0]))


class BlurGAN(Discriminator):
    """Logits ``(B, 1, grid, grid)`` by convolutions that are blurred to half size (TiTok's, arXiv 2406.07550).

    Args:
        width: channels of the first convolution and stage; they double in every further one.
        num_stages: stages of 3x3 convolution, blur, group norm and leaky ReLU, between a 5x5 convolution and the two last ones.
        grid: side of the map that the features are max-pooled to.
    """

    def __init__(self, width: int = 128, num_stages: int = 3, grid: int = 16, in_channels: int = 3) -> None:
        super().__init__()
        if width % 32:
            raise ConfigError(f"discriminator width {width}: expected a multiple of the 32 groups of its normalisation")
        widths = [width, *(width * 2**i for i in range(num_stages))]
        self.stem = nn.Conv2d(in_channels, width, 5, padding=2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), Blur(), nn.GroupNorm(32, b), nn.LeakyReLU(0.1))
            for a, b in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(grid)
        self.hidden = nn.Conv2d(widths[-1], widths[-1], 1)
        self.head = nn.Conv2d(widths[-1], 1, 5, padding=2)

    def forward(self, pixels: Tensor) -> Tensor:
        # the published one sees pixels in [0, 1]
        h = F.leaky_relu(self.stem((pixels + 1) / 2), 0.1)
        for stage in self.stages:
            h = stage(h)
        return self.head(F.leaky_relu(self.hidden(self.pool(h)), 0.1))


DISCRIMINATORS: dict[str, Callable[..., Discriminator]] = {
    "blurgan": BlurGAN,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
    "transformer": TransformerDiscriminator,
}


def make_discriminator(kind: str | nn.Module | None, **options: Any) -> nn.Module | None:
    """The discriminator called ``kind`` with its constructor's ``options``; a module is taken as it is.

    Raises:
        ConfigError: an unknown kind or option.
    """
    if kind is None or isinstance(kind, nn.Module):
        return kind
    if kind not in DISCRIMINATORS:
        raise ConfigError(f"unknown discriminator '{kind}'{nearest(kind, DISCRIMINATORS)}")
    try:
        return DISCRIMINATORS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"discriminator '{kind}': {error}") from error
