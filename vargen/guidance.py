"""Classifier-free guidance (Ho and Salimans, 2022) over two or three rows, with a schedule over the decoding steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.errors import VargenError


@dataclass(frozen=True)
class Progress:
    """Where decoding stands when a scale is asked for.

    Attributes:
        index, total: number of this step and of all steps.
        known, tokens: tokens generated before this step, and of all.
        known_after: tokens generated once this step is done.
        entity, entities: number of this level, entity or stage, and of all.
    """

    index: int = 0
    total: int = 1
    known: int = 0
    known_after: int = 0
    tokens: int = 1
    entity: int = 0
    entities: int = 1


Schedule = Callable[[float, Progress], float]


def constant(scale: float, progress: Progress) -> float:
    return scale


def until(known: int) -> Schedule:
    """The scale while at most ``known`` tokens have been generated, then none (LlamaGen and NAR's ``cfg_interval``)."""
    return lambda scale, progress: scale if progress.known <= known else 1.0


def interval(start: float, stop: float) -> Schedule:
    """The scale while the generated share lies in [start, stop), else none (Kynkaanniemi et al., 2024)."""
    return lambda scale, progress: scale if start <= progress.known / progress.tokens < stop else 1.0


def linear(scale: float, progress: Progress) -> float:
    """``1 + (s - 1) * known_after / tokens`` (MAR, Hi-MAR)."""
    return 1.0 + (scale - 1.0) * progress.known_after / progress.tokens


def linear_index(scale: float, progress: Progress) -> float:
    """``1 + (s - 1) * index / total`` over the steps: none in the first (TiTok's masked generator)."""
    return 1.0 + (scale - 1.0) * progress.index / progress.total


def linear_entity(scale: float, progress: Progress) -> float:
    """``1 + (s - 1) * k / (K - 1)`` over entities (xAR); the scale itself for a single entity."""
    return scale if progress.entities == 1 else 1.0 + (scale - 1.0) * progress.entity / (progress.entities - 1)


def power_cosine(power: float) -> Schedule:
    """``1 + (s - 1) * (1 - cos(pi * (index / total) ** power)) / 2`` (MaskGIT of TiTok, RAR)."""
    return lambda s, p: 1.0 + (s - 1.0) * (1.0 - math.cos(math.pi * (p.index / p.total) ** power)) / 2.0


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "linear-index": linear_index,
    "linear-entity": linear_entity,
    "power-cosine": power_cosine(1.0),
}


@dataclass(frozen=True)
class Guidance:
    """How rows of one batch, stacked as [full condition, (partial condition,) null], become one prediction.

    With rows r_0 (full) ... r_n (null) and scales s_1 (text) ... the result telescopes from the null row:
    ``r_n + s_n (r_{n-1} - r_n) + ... + s_1 (r_0 - r_1)``; for two rows ``null + s (cond - null)``.

    Attributes:
        scale: guidance scale of the full condition over the next row; 1 means no guidance.
        partial_scale: for three rows, the scale of the partial condition over the null row.
        schedule: a name in ``SCHEDULES`` or a callable ``(scale, Progress) -> scale``.
    """

    scale: float = 1.0
    partial_scale: float | None = None
    schedule: str | Schedule = "constant"

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise VargenError(f"guidance schedule '{self.schedule}': expected one of {', '.join(SCHEDULES)}")
        if not math.isfinite(self.scale):
            raise VargenError(f"guidance scale {self.scale}: expected a finite number")

    @property
    def rows(self) -> int:
        """Rows per sample that the model must run: 1 (no guidance), 2 or 3."""
        if self.partial_scale is not None:
            return 3
        return 1 if self.scale == 1.0 else 2

    def at(self, progress: Progress) -> float:
        """The scale of this step."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return schedule(self.scale, progress)

    def combine(self, stacked: Tensor, scale: float) -> Tensor:
        """``(rows * B, ...)`` predictions to ``(B, ...)``, with ``scale`` from :meth:`at`."""
        rows = stacked.chunk(self.rows)
        if self.rows == 1:
            return stacked
        if self.rows == 2:
            full, null = rows
            return full if scale == 1.0 else null + (full - null) * scale
        full, partial, null = rows
        assert self.partial_scale is not None
        return null + self.partial_scale * (partial - null) + scale * (full - partial)


def normalized_difference(
    full: Tensor, null: Tensor, average: Tensor | None, momentum: float = -0.5, limit: float = 2.5
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al., 2024): the guiding direction and the running average of the differences.

    The difference is averaged with ``momentum`` over steps, limited in norm, and freed of its part parallel to ``full``; a sampler
    adds ``(scale - 1)`` times the direction to ``full``. Norms run over all axes but the batch; the projection is in float64.
    """
    difference = full - null
    if average is not None:
        difference = difference + momentum * average
    axes = tuple(range(1, full.dim()))
    norm = torch.linalg.vector_norm(difference, dim=axes, keepdim=True)
    direction = (difference * (limit / norm.clamp(min=1e-12)).clamp(max=1.0)).double()
    unit = full.double() / torch.linalg.vector_norm(full.double(), dim=axes, keepdim=True).clamp(min=1e-12)
    parallel = (direction * unit).sum(axes, keepdim=True) * unit
    return (direction - parallel).to(full.dtype), difference


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Rows of a guided batch, in the order that :meth:`Guidance.combine` expects."""
    return torch.cat(list(rows), dim=0)
