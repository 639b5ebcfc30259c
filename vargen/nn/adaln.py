"""Adaptive modulation (DiT, Peebles and Xie, 2023): shifts, scales and gates computed from a condition vector."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """``x * (1 + scale) + shift``, where either may be missing."""
    if scale is not None:
        x = x * (1 + scale)
    return x if shift is None else x + shift


class AdaLN(nn.Module):
    """``Linear(SiLU(c))`` in equal chunks. For a block the six chunks are shift, scale, gate of attention, then of the MLP; for an
    output layer two chunks are shift, scale. Checkpoints with other chunk orders are permuted by their adapters.

    Zero-initialised by default, so that gated branches start closed.
    """

    def __init__(self, condition_dim: int, dim: int, chunks: int, zero_init: bool = True) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(condition_dim, chunks * dim)
        if zero_init:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """``(..., condition_dim)`` to ``chunks`` tensors ``(..., dim)``."""
        return self.linear(F.silu(condition)).chunk(self.chunks, dim=-1)
