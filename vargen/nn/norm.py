"""Norms, computed in float32 and cast back before the weight, as every system here does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError


class RMSNorm(nn.Module):
    """``x * rsqrt(mean(x^2) + eps)``, times a weight if ``affine`` (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x)
        return y if self.weight is None else y * self.weight


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with statistics in float32; ``affine`` adds weight and bias."""

    def __init__(self, dim: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        y = F.layer_norm(x.float(), (self.dim,), None, None, self.eps).type_as(x)
        return y if self.weight is None else torch.addcmul(self.bias, y, self.weight)  # type: ignore[arg-type]


def make_norm(kind: str, dim: int, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """``"rms"`` or ``"layer"``."""
    if kind == "rms":
        return RMSNorm(dim, eps, affine)
    if kind == "layer":
        return LayerNorm(dim, eps, affine)
    raise ConfigError(f"norm '{kind}': expected 'rms' or 'layer'")
