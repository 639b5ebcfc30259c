"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError, nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called ``name``."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation '{name}'{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def swiglu_hidden(dim: int, multiple_of: int = 256) -> int:
    """Llama's hidden size: two thirds of four times the width, rounded up to a multiple."""
    return -(-int(2 * (4 * dim) / 3) // multiple_of) * multiple_of


class MLP(nn.Module):
    """``down(act(up(x)))``; dropout after the activation and after the output where ``dropout`` says so."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        out_dim: int | None = None,
        act: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.act = activation(act)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, out_dim or dim, bias=bias)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.hidden_dropout(self.act(self.up(x)))))


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020): SwiGLU with SiLU, GEGLU with GELU."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        out_dim: int | None = None,
        act: str = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.act = activation(act)
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, out_dim or dim, bias=bias)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(self.hidden_dropout(self.act(self.gate(x)) * self.up(x))))
