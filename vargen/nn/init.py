"""Initial weights that several systems share."""

from __future__ import annotations

from torch import nn


def initialise(module: nn.Module) -> None:
    """Xavier for linear layers (a fused projection as one matrix), zero biases, N(0, 0.02^2) for tables; for ``apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
