"""Exponential moving average of parameters, warmed up so that early averages are never noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vargen.errors import ConfigError


class EMA:
    """Average of the trainable parameters of a module; buffers are not averaged.

    Update ``t`` (from 0) uses the decay ``min(decay, (1 + t) / (10 + t))``: the first averages forget the initial weights within a
    few steps, and the full decay rules once it makes sense (``decay = 0.9999`` from update 89,990 on).

    Args:
        parameters: what is averaged, as ``module.parameters()`` gives them. Sharded parameters are averaged shard by shard.
        decay: in [0, 1).
        warmup: False for the full decay from the first update on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema_decay {decay}: expected a number in [0, 1)")
        self.parameters = [p for p in parameters if p.requires_grad]
        self.averages = [_local(p).detach().clone() for p in self.parameters]
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @property
    def current_decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters; call it after each optimizer step."""
        torch._foreach_lerp_(self.averages, [_local(p).detach() for p in self.parameters], 1 - self.current_decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the module holds the averages (and this object the raw weights): sample, save or load them there."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            weight = _local(parameter)
            raw = weight.clone()
            weight.copy_(average)
            average.copy_(raw)


def _local(parameter: Any) -> Tensor:
    """This process's part of a parameter: the shard of a distributed one, else the whole."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
