"""The convolutional encoder and decoder of VQ-GAN and latent diffusion autoencoders.

One family serves VQ-8/16 (LlamaGen), KL-16 (MAR) and Chameleon's VQ-GAN (Orthus); they differ in widths, block counts, and where
attention stands. Sources: Esser et al. 2021 (arXiv 2012.09841) and Rombach et al. 2022 (arXiv 2112.10752).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.errors import ConfigError


def group_norm(channels: int, groups: int = 32, eps: float = 1e-6) -> nn.GroupNorm:
    """Affine group normalisation; raises ConfigError unless ``groups`` divides ``channels``."""
    if channels % groups:
        raise ConfigError(f"width {channels}: expected a multiple of the {groups} groups of the normalisation")
    return nn.GroupNorm(groups, channels, eps)


class ResBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int = 32, eps: float = 1e-6, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map, plus the input."""

    def __init__(self, channels: int, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c") for proj in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves both axes: one zero row below and one zero column to the right, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles both axes by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the level has it, then a resampling or nothing."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        attention: bool,
        resample: type[Downsample] | type[Upsample] | None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups, eps=eps, dropout=dropout)
            for i in range(num_blocks)
        )
        self.attentions = nn.ModuleList(AttnBlock(out_channels, groups=groups, eps=eps) for _ in range(num_blocks * attention))
        self.resample = resample(out_channels) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return self.resample(x)


def _middle(channels: int, attention: bool, groups: int, eps: float, dropout: float) -> nn.Sequential:
    def block() -> ResBlock:
        return ResBlock(channels, channels, groups=groups, eps=eps, dropout=dropout)

    return nn.Sequential(block(), AttnBlock(channels, groups=groups, eps=eps) if attention else nn.Identity(), block())


def _attention_levels(levels: Sequence[int], depth: int) -> set[int]:
    if any(not -depth <= level < depth for level in levels):
        raise ConfigError(
            f"attention levels {list(levels)}: expected indices of {depth} levels, 0 is full resolution, -1 the deepest"
        )
    return {level % depth for level in levels}


class Encoder(nn.Module):
    """Pixels ``(B, in_channels, H, W)`` to features ``(B, out_channels, H/s, W/s)`` with ``s = 2 ** (len(widths) - 1)``.

    Args:
        widths: channels of every level, full resolution first.
        stem_width: channels of the first convolution, by default those of the first level.
        num_blocks: residual blocks per level.
        attention_levels: levels whose blocks are each followed by attention; 0 is full resolution, -1 the deepest.
        mid_attention: attention between the two blocks after the deepest level.
        groups, eps: of every group normalisation.
    """

    def __init__(
        self,
        widths: Sequence[int],
        out_channels: int,
        *,
        in_channels: int = 3,
        stem_width: int | None = None,
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (-1,),
        mid_attention: bool = True,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        depth, attention = len(widths), _attention_levels(attention_levels, len(widths))
        incoming = [stem_width or widths[0], *widths[:-1]]
        self.stride = 2 ** (depth - 1)
        self.conv_in = nn.Conv2d(in_channels, incoming[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                incoming[i],
                widths[i],
                num_blocks,
                attention=i in attention,
                resample=Downsample if i < depth - 1 else None,
                groups=groups,
                eps=eps,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.mid = _middle(widths[-1], mid_attention, groups, eps, dropout)
        self.norm_out = group_norm(widths[-1], groups, eps)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Features ``(B, in_channels, h, w)`` to pixels ``(B, out_channels, h*s, w*s)`` with ``s = 2 ** (len(widths) - 1)``.

    ``widths`` and ``attention_levels`` count levels as the encoder does, full resolution first; ``levels`` is a module list in the
    order of the computation, deepest first. Other arguments as for :class:`Encoder`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        in_channels: int,
        *,
        out_channels: int = 3,
        num_blocks: int = 3,
        attention_levels: Sequence[int] = (-1,),
        mid_attention: bool = True,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        depth, attention = len(widths), _attention_levels(attention_levels, len(widths))
        self.stride = 2 ** (depth - 1)
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.mid = _middle(widths[-1], mid_attention, groups, eps, dropout)
        self.levels = nn.ModuleList(
            Level(
                widths[min(i + 1, depth - 1)],
                widths[i],
                num_blocks,
                attention=i in attention,
                resample=Upsample if i > 0 else None,
                groups=groups,
                eps=eps,
                dropout=dropout,
            )
            for i in reversed(range(depth))
        )
        self.norm_out = group_norm(widths[0], groups, eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
