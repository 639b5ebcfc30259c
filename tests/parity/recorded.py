"""Noise that replays recorded draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.errors import VargenError
from vargen.noise import Noise, inverse_cdf


@dataclass(frozen=True)
class Draw:
    """What a model asks for: ``kind`` is the method's name, ``shape`` excludes the batch axis, ``probs`` are a categorical's."""

    kind: str
    name: str
    shape: tuple[int, ...]
    at: tuple[int | Tensor, ...]
    probs: Tensor | None = None


Record = Tensor | Callable[[Draw], Tensor]


class RecordedNoise(Noise):
    """Serves draws from a record, by name.

    Args:
        draws: a mapping from names to records, or one function of :class:`Draw` for all names. A record is a function, or a tensor
            of shape ``(B, *shape)`` that serves every address, or one of shape ``(*addresses, B, *shape)`` that the integers of
            ``at`` index.
        batch_size: number of samples of the record.

    ``bernoulli``, ``permutation`` and ``categorical`` take either their results (bool or integer) or the uniform draws behind them.
    An unknown name or a record of another shape raises VargenError.
    """

    def __init__(
        self, draws: Mapping[str, Record] | Callable[[Draw], Tensor], batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.draws = draws
        self.address: tuple[int | Tensor, ...] = ()
        # the keys are the samples' row numbers in the record, so that `select` is an index into them
        self.keys = torch.arange(batch_size, device=device)
        self.recorded_batch = batch_size

    def _with(self, keys: Tensor, address: tuple[int | Tensor, ...]) -> RecordedNoise:
        noise = RecordedNoise(self.draws, self.recorded_batch)
        noise.keys, noise.address = keys, address
        return noise

    def to(self, device: torch.device | str) -> RecordedNoise:
        return self._with(self.keys.to(device), self.address)

    def at(self, *index: int) -> RecordedNoise:
        return self._with(self.keys, (*self.address, *index))

    def select(self, rows: slice | Tensor) -> RecordedNoise:
        return self._with(self.keys[rows], self.address)

    def _serve(self, draw: Draw) -> Tensor:
        if callable(self.draws):
            record: Record = self.draws
        elif draw.name in self.draws:
            record = self.draws[draw.name]
        else:
            raise VargenError(f"no recorded draw '{draw.name}' ({draw.kind}); recorded: {', '.join(sorted(self.draws))}")
        if not isinstance(record, Tensor):
            value = record(draw)
        else:
            expected = (self.recorded_batch, *draw.shape)
            value = record
            if tuple(value.shape) != expected and all(isinstance(a, int) for a in draw.at):
                value = record[tuple(int(a) for a in draw.at)] if draw.at else record
            if tuple(value.shape) != expected:
                raise VargenError(f"recorded draw '{draw.name}' at {draw.at}: shape {tuple(value.shape)}, expected {expected}")
        return value.to(self.device)[self.keys]

    def uniform(
        self, name: str, shape: Sequence[int] = (), at: Sequence[int | Tensor] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self._serve(Draw("uniform", name, tuple(shape), (*self.address, *at))).to(dtype)

    def normal(
        self, name: str, shape: Sequence[int] = (), at: Sequence[int | Tensor] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        return self._serve(Draw("normal", name, tuple(shape), (*self.address, *at))).to(dtype)

    def integers(self, name: str, high: int, shape: Sequence[int] = (), at: Sequence[int | Tensor] = ()) -> Tensor:
        return self._serve(Draw("integers", name, tuple(shape), (*self.address, *at))).long()

    def bernoulli(self, name: str, p: float, shape: Sequence[int] = (), at: Sequence[int | Tensor] = ()) -> Tensor:
        value = self._serve(Draw("bernoulli", name, tuple(shape), (*self.address, *at)))
        return value < p if value.is_floating_point() else value.bool()

    def permutation(self, name: str, n: int, at: Sequence[int | Tensor] = ()) -> Tensor:
        value = self._serve(Draw("permutation", name, (n,), (*self.address, *at)))
        return value.argsort(dim=-1, stable=True) if value.is_floating_point() else value.long()

    def categorical(self, name: str, probs: Tensor, at: Sequence[int | Tensor] = ()) -> Tensor:
        value = self._serve(Draw("categorical", name, tuple(probs.shape[1:-1]), (*self.address, *at), probs))
        return inverse_cdf(probs, value) if value.is_floating_point() else value.long()
