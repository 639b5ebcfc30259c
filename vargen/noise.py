"""Addressed noise: every draw is a function of (sample key, name, index), never of the order of calls.

Sample ``i`` of seed ``s`` therefore gets the same draws in any batch, shard or restart, and a recorded run is replayed by passing
a :class:`Noise` whose methods read the record. Bits come from the SplitMix64 finaliser (Steele, Lea and Flood, 2014), used as a
counter-based hash in wrapping int64 arithmetic, so that CPU and GPU agree bit for bit on every uniform.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vargen.errors import VargenError
from vargen.kernels.sample import inverse_cdf

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB

Index: TypeAlias = int | Tensor


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


class Noise:
    """Draws for a batch, addressed by name and index.

    Args:
        seed: job or run seed.
        index: one integer per sample, its number within the job; an int ``n`` stands for ``range(n)``.
        device: where draws are made.

    Every method takes ``at``, a tuple of integers or integer tensors that addresses the draw. A tensor in ``at`` of shape
    ``(B, ...)`` or ``(1, ...)`` addresses several draws at once, and its trailing axes come between the batch axis and ``shape``.
    """

    def __init__(self, seed: int, index: int | Sequence[int] | Tensor = 1, device: torch.device | str = "cpu") -> None:
        samples = torch.arange(index) if isinstance(index, int) else torch.as_tensor(index, dtype=torch.int64)
        keys = _mix(torch.as_tensor(_wrap(seed), dtype=torch.int64) * _GOLDEN + _MIX2)
        self.keys = _mix(keys ^ _mix(samples * _GOLDEN + _MIX1)).to(device)

    @classmethod
    def fresh(cls, batch_size: int, device: torch.device | str = "cpu") -> Noise:
        """Noise of a seed from the operating system, which leaves torch's generators alone."""
        return cls(int.from_bytes(os.urandom(8), "little"), batch_size, device)

    @classmethod
    def from_keys(cls, keys: Tensor) -> Noise:
        """Noise of explicit int64 sample keys, shape ``(B,)``."""
        noise = cls.__new__(cls)
        noise.keys = keys
        return noise

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def to(self, device: torch.device | str) -> Noise:
        return Noise.from_keys(self.keys.to(device))

    def at(self, *index: Index) -> Noise:
        """The noise of a sub-address, e.g. ``noise.at(step)`` for a training step; a tensor gives each sample its own."""
        return Noise.from_keys(self._fold(self.keys, index))

    def select(self, rows: slice | Tensor) -> Noise:
        """The noise of some of the samples."""
        return Noise.from_keys(self.keys[rows])

    @staticmethod
    def _fold(key: Tensor, at: Sequence[Index]) -> Tensor:
        for a in at:
            address = torch.as_tensor(a, dtype=torch.int64, device=key.device)
            while key.dim() < address.dim():
                key = key.unsqueeze(-1)
            key = _mix(key * _GOLDEN ^ _mix((address + 1) * _MIX1))
        return key

    def _bits(self, name: str, shape: Sequence[int], at: Sequence[Index]) -> Tensor:
        key = self._fold(_mix(self.keys ^ _name_key(name)), at)
        count = math.prod(shape)
        flat = torch.arange(1, count + 1, device=key.device, dtype=torch.int64)
        bits = _mix(key.unsqueeze(-1) + flat * _GOLDEN)
        return bits.reshape(*key.shape, *shape)

    def uniform(self, name: str, shape: Sequence[int] = (), at: Sequence[Index] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws in [0, 1): 24 bits in float32, 53 in float64. Shape ``(B, *shape)``."""
        digits = 53 if dtype == torch.float64 else 24
        bits = self._bits(name, shape, at) >> (64 - digits)
        return (bits & ((1 << digits) - 1)).to(dtype) / (1 << digits)

    def normal(self, name: str, shape: Sequence[int] = (), at: Sequence[Index] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws by the inverse CDF of one uniform each, evaluated in float64. Shape ``(B, *shape)``."""
        u = self.uniform(name, shape, at, torch.float64)
        return torch.special.ndtri(u + 2.0**-54).to(dtype)

    def integers(self, name: str, high: int, shape: Sequence[int] = (), at: Sequence[Index] = ()) -> Tensor:
        """Uniform integers in [0, high), int64, shape ``(B, *shape)``."""
        return (self.uniform(name, shape, at, torch.float64) * high).long()

    def bernoulli(self, name: str, p: float, shape: Sequence[int] = (), at: Sequence[Index] = ()) -> Tensor:
        """True with probability ``p``, shape ``(B, *shape)``."""
        return self.uniform(name, shape, at) < p

    def permutation(self, name: str, n: int, at: Sequence[Index] = ()) -> Tensor:
        """One uniform permutation of 0..n-1 per sample, int64, shape ``(B, n)``."""
        return self.uniform(name, (n,), at, torch.float64).argsort(dim=-1, stable=True)

    def categorical(self, name: str, probs: Tensor, at: Sequence[Index] = ()) -> Tensor:
        """One index per distribution of ``probs`` ``(B, ..., V)`` (unnormalised), shape ``(B, ...)``."""
        return inverse_cdf(probs, self.uniform(name, probs.shape[1:-1], at, torch.float64))


class ModalNoise(Noise):
    """Draws nothing: normals are zero and categoricals the most probable index, so that a tokenizer that draws gives its mode."""

    def __init__(self, batch_size: int, device: torch.device | str = "cpu") -> None:
        super().__init__(0, batch_size, device)

    def normal(self, name: str, shape: Sequence[int] = (), at: Sequence[Index] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros_like(super().uniform(name, shape, at, dtype))

    def categorical(self, name: str, probs: Tensor, at: Sequence[Index] = ()) -> Tensor:
        return probs.argmax(-1)

    def to(self, device: torch.device | str) -> Noise:
        return ModalNoise(self.batch_size, device)

    def at(self, *index: Index) -> Noise:
        return self

    def select(self, rows: slice | Tensor) -> Noise:
        return ModalNoise(len(self.keys[rows]), self.device)


def as_noise(
    generator: Noise | torch.Generator | Sequence[torch.Generator] | int | None,
    batch_size: int,
    device: torch.device | str,
) -> Noise:
    """The noise behind the public ``generator=`` argument.

    A ``Noise`` is used as it is (and must have ``batch_size`` samples); an int is a seed, with sample numbers 0..B-1; a
    ``torch.Generator`` gives one key per sample in turn; a list gives each sample its own; None draws a fresh seed.
    """
    if isinstance(generator, Noise):
        if generator.batch_size != batch_size:
            raise VargenError(f"noise for {generator.batch_size} samples: expected {batch_size}, one key per sample")
        return generator.to(device) if generator.device != torch.device(device) else generator
    if isinstance(generator, int):
        return Noise(generator, batch_size, device)
    if generator is None:
        return Noise.fresh(batch_size, device)
    generators = [generator] * batch_size if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != batch_size:
        raise VargenError(f"{len(generators)} generators for {batch_size} samples: expected one for each, or a single one")
    draws = [torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=g, device=g.device) for g in generators]
    return Noise.from_keys(torch.stack([d.to(device) for d in draws]))


def _wrap(seed: int) -> int:
    """A Python integer of any size as a signed 64-bit one."""
    return (seed + 2**63) % 2**64 - 2**63
