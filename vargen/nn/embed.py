"""Embeddings of conditions: class labels with a null class, text features, timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vargen.nn.mlp import MLP


class ClassEmbedding(nn.Module):
    """A table of ``num_classes + 1`` rows, the last one the null class.

    ``forward(labels)``: int64 ``(B,)`` to ``(B, dim)``; any label outside 0..num_classes-1 takes the null row.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        null = (labels < 0) | (labels >= self.num_classes)
        return self.table(labels.masked_fill(null, self.num_classes))


class TextEmbedding(nn.Module):
    """Text features to ``length`` prefix tokens through a bias-free MLP, with an untrained null caption (LlamaGen, NAR).

    ``null`` is a buffer ``(length, text_dim)`` drawn once as N(0, 1)/sqrt(text_dim); it takes the place of dropped features.
    """

    def __init__(self, text_dim: int, length: int, dim: int) -> None:
        super().__init__()
        self.length = length
        self.proj = MLP(text_dim, dim, dim, act="gelu_tanh", bias=False)
        self.register_buffer("null", torch.randn(length, text_dim) / math.sqrt(text_dim))

    def forward(self, features: Tensor, drop: Tensor | None = None) -> Tensor:
        """``(B, length, text_dim)`` to ``(B, length, dim)``; rows where ``drop`` (bool ``(B,)``) is True take the null caption."""
        if drop is not None:
            features = torch.where(drop[:, None, None], self.null[: features.shape[1]].to(features.dtype), features)  # type: ignore[index]
        return self.proj(features)


def timestep_sinusoid(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """``[cos(t f), sin(t f)]`` with ``f_k = max_period ** (-k / (dim / 2))``; ``t`` ``(...)`` to float32 ``(..., dim)``."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoid of the timestep through Linear, SiLU, Linear (DiT and all its descendants)."""

    def __init__(self, dim: int, frequency_dim: int = 256, max_period: float = 10000.0, scale: float = 1.0) -> None:
        super().__init__()
        self.frequency_dim, self.max_period, self.scale = frequency_dim, max_period, scale
        self.mlp = MLP(frequency_dim, dim, dim, act="silu")

    def forward(self, t: Tensor) -> Tensor:
        """``(...)`` timesteps, times ``scale``, to ``(..., dim)``."""
        sinusoid = timestep_sinusoid(t.float() * self.scale, self.frequency_dim, self.max_period)
        return self.mlp(sinusoid.to(self.mlp.up.weight.dtype))
