"""Rotary position embedding (Su et al., 2021) over one or more axes, in the conventions that the systems use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def axial_angles(coordinates: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Angles of cells with integer ``coordinates`` ``(S, axes)``: each axis takes an equal run of pairs, first axis first.

    With ``a`` axes every axis has ``head_dim / (2 a)`` pairs with frequencies ``base ** (-2 i / (head_dim / a))``; one axis is
    plain 1D rotary, (row, column) is LlamaGen's and xAR's 2D table.

    Returns:
        float32 ``(S, head_dim / 2)``.
    """
    axes = coordinates.shape[1]
    width = head_dim // axes
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float32)[: width // 2] / width)
    return (coordinates.float().unsqueeze(-1) * frequencies).flatten(1)


def sectioned_angles(positions: Tensor, head_dim: int, sections: Sequence[int], base: float = 10000.0) -> Tensor:
    """Multimodal rotary (Qwen2-VL): one spectrum of frequencies, whose runs of ``sections`` pairs take one stream each.

    Args:
        positions: ``(streams, S)``; ``sections`` has one entry per stream and sums to ``head_dim / 2``.

    Returns:
        float32 ``(S, head_dim / 2)``.
    """
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies
    stream = torch.arange(len(sections)).repeat_interleave(torch.tensor(sections))
    return angles.gather(0, stream.expand(1, angles.shape[1], -1)).squeeze(0)


def rotary_table(angles: Tensor, zero: Tensor | None = None) -> Tensor:
    """(cos, sin) of ``angles`` ``(S, P)`` as float32 ``(S, P, 2)``.

    Args:
        zero: bool ``(S,)``, slots whose row is all zeros, cos included, so that their queries and keys vanish (LlamaGen's and NAR's
            condition tokens).
    """
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return table if zero is None else table * (~zero).float()[:, None, None]


def apply_rotary(x: Tensor, table: Tensor, interleaved: bool = True) -> Tensor:
    """Rotates channel pairs of ``x`` ``(B, H, N, D)`` by rows ``table`` ``(N, D/2, 2)`` or ``(B, N, D/2, 2)``, in float32.

    Pairs are adjacent channels (2i, 2i+1) if ``interleaved``, else (i, i + D/2) as Llama's half-split convention.
    """
    cos, sin = table[..., 0], table[..., 1]
    if table.dim() == 4:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)
