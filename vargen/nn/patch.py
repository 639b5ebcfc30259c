"""Patches of images and videos: cutting, joining, embedding, and learned position tables that fit another grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.errors import VargenError

_AXES = {2: ("h", "w"), 3: ("t", "h", "w")}


def patch_grid(size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Number of patches along each axis; raises VargenError unless every size is a positive multiple of its patch."""
    if len(size) != len(patch) or any(s < p or s % p for s, p in zip(size, patch)):
        have, want = ("x".join(map(str, axis)) for axis in (size, patch))
        raise VargenError(f"size {have}: expected multiples of the patch size {want}; resize or crop first")
    return tuple(s // p for s, p in zip(size, patch))


def patchify(x: Tensor, patch: Sequence[int], channel_first: bool = False) -> Tensor:
    """``(B, C, *size)`` to patches ``(B, N, prod(patch) * C)`` in raster order, two or three axes.

    A patch is read in raster order with the channel fastest, or with the channel slowest if ``channel_first`` (the layout of a
    convolution's weight).
    """
    axes = _AXES[len(patch)]
    patch_grid(x.shape[2:], patch)
    inner = [f"p{a}" for a in axes]
    content = ["c", *inner] if channel_first else [*inner, "c"]
    split = " ".join(f"({a} p{a})" for a in axes)
    return rearrange(x, f"b c {split} -> b ({' '.join(axes)}) ({' '.join(content)})", **dict(zip(inner, patch)))


def unpatchify(patches: Tensor, grid: Sequence[int], patch: Sequence[int], channel_first: bool = False) -> Tensor:
    """Inverse of :func:`patchify`: ``(B, prod(grid), prod(patch) * C)`` to ``(B, C, *size)``."""
    axes = _AXES[len(patch)]
    inner = [f"p{a}" for a in axes]
    content = ["c", *inner] if channel_first else [*inner, "c"]
    joined = " ".join(f"({a} p{a})" for a in axes)
    sizes = {**dict(zip(axes, grid)), **dict(zip(inner, patch))}
    return rearrange(patches, f"b ({' '.join(axes)}) ({' '.join(content)}) -> b c {joined}", **sizes)


class PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride: ``(B, C, *size)`` to tokens ``(B, N, dim)`` in raster order.

    Args:
        patch: patch size along each axis; two axes for images, three for videos.
    """

    def __init__(self, channels: int, dim: int, patch: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        self.patch = tuple(patch)
        conv = nn.Conv2d if len(self.patch) == 2 else nn.Conv3d
        self.proj = conv(channels, dim, self.patch, self.patch, bias=bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        patch_grid(x.shape[2:], self.patch)
        return self.proj(x).flatten(2).transpose(1, 2)


def resize_positions(table: Tensor, grid: Sequence[int], target: Sequence[int], offset: float = 0.0) -> Tensor:
    """A learned position table for another grid, by bicubic interpolation in float32 (align_corners off, no antialiasing).

    Args:
        table: ``(prod(grid), dim)`` in raster order, without class token.
        offset: added to the target size where the sampling step is computed; 0.1 in the DINO family, which only shifts the sampled
            points a little.

    Returns:
        ``(prod(target), dim)``; the table itself if the grids agree.
    """
    if tuple(grid) == tuple(target):
        return table
    image = rearrange(table.float(), "(h w) c -> 1 c h w", h=grid[0])
    if offset:
        scale = tuple((t + offset) / g for g, t in zip(grid, target))
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    else:
        image = F.interpolate(image, tuple(target), mode="bicubic", align_corners=False)
    if tuple(image.shape[2:]) != tuple(target):
        raise VargenError(f"positions of grid {tuple(grid)} cannot be resized to {tuple(target)} with offset {offset}")
    return rearrange(image, "1 c h w -> (h w) c").to(table.dtype)
