"""Fixed sine-cosine position tables, in the axis orders that the systems use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor, base: float = 10000.0) -> Tensor:
    """``[sin(p w), cos(p w)]`` with ``w_j = base ** (-j / (dim / 2))``, all sines first; computed in float64.

    Returns:
        float64 ``(S, dim)``.
    """
    omega = base ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double().unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(dim: int, shape: Sequence[int], base: float = 10000.0, column_first: bool = True) -> Tensor:
    """Half of the channels for each axis of an (H, W) grid in raster order; the MAE convention puts the column first.

    Returns:
        float32 ``(H * W, dim)``.
    """
    height, width = shape
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    axes = (columns, rows) if column_first else (rows, columns)
    return torch.cat([sincos_1d(dim // 2, axis, base) for axis in axes], dim=-1).float()


def sincos_3d(dim: int, shape: Sequence[int], base: float = 10000.0) -> Tensor:
    """A 2D table plus a 1D table of the time index, summed (LARP), for a (T, H, W) grid in raster order.

    Returns:
        float32 ``(T * H * W, dim)``.
    """
    frames, height, width = shape
    time = sincos_1d(dim, torch.arange(frames), base).repeat_interleave(height * width, dim=0)
    return (sincos_2d(dim, (height, width), base).double().repeat(frames, 1) + time).float()
