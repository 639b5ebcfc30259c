"""Decoding orders: which cells of a token space are generated in which step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vargen.errors import SpaceError, VargenError, nearest

Shape = Sequence[int]
Levels = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Order:
    """A partition of the cells of one or more grids into groups, one group per step.

    Cells are numbered flat in raster order, level after level, coarse first. Within a group cells follow their numbers.

    Attributes:
        levels: grid shape of every level.
        step_of: int64 ``(num_cells,)``, the step that generates each cell; steps are 0..num_steps-1 without gaps.
    """

    levels: Levels
    step_of: Tensor

    def __post_init__(self) -> None:
        count = sum(math.prod(level) for level in self.levels)
        if self.step_of.shape != (count,):
            raise SpaceError(f"order over {count} cells got step_of of shape {tuple(self.step_of.shape)}")
        if count and not torch.equal(self.step_of.unique(), torch.arange(int(self.step_of.max()) + 1)):
            raise SpaceError("order: steps must be 0, 1, 2, ... without gaps")

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid of the finest level."""
        return self.levels[-1]

    @property
    def num_cells(self) -> int:
        return self.step_of.numel()

    @cached_property
    def num_steps(self) -> int:
        return int(self.step_of.max()) + 1

    @cached_property
    def cells(self) -> Tensor:
        """All cells in order of generation, int64 ``(num_cells,)``."""
        return self.step_of.argsort(stable=True)

    @cached_property
    def groups(self) -> tuple[Tensor, ...]:
        """The cells of each step."""
        return tuple(self.cells.split(self.step_of.bincount().tolist()))

    @cached_property
    def level_of(self) -> Tensor:
        """Level of each cell, int64 ``(num_cells,)``."""
        sizes = torch.tensor([math.prod(level) for level in self.levels])
        return torch.arange(len(self.levels)).repeat_interleave(sizes)

    def then(self, other: Order) -> Order:
        """This order's levels, then those of ``other`` (Hi-MAR: pivots, then the dense grid)."""
        return Order(self.levels + other.levels, torch.cat([self.step_of, other.step_of + self.num_steps]))

    @classmethod
    def raster(cls, shape: Shape) -> Order:
        """One cell per step, last axis fastest; over a 1D shape the order of a 1D tokenizer."""
        return cls((tuple(shape),), torch.arange(math.prod(shape)))

    @classmethod
    def neighbors(cls, shape: Shape) -> Order:
        """Cells at Manhattan distance k from the first corner in step k (NAR)."""
        return cls((tuple(shape),), _coordinates(shape).sum(0))

    @classmethod
    def blocks(cls, shape: Shape, size: int) -> Order:
        """Contiguous raster runs of ``size`` cells (Next Block Prediction)."""
        count = math.prod(shape)
        if size < 1 or count % size:
            raise VargenError(f"block of {size} tokens: expected a divisor of the {count} tokens of grid {tuple(shape)}")
        return cls((tuple(shape),), torch.arange(count) // size)

    @classmethod
    def rows(cls, shape: Shape) -> Order:
        """One line along the last axis per step."""
        return cls.blocks(shape, tuple(shape)[-1])

    @classmethod
    def frames(cls, shape: Shape) -> Order:
        """One index of the first axis per step: a frame of video, a row of an image."""
        return cls.blocks(shape, math.prod(tuple(shape)[1:]))

    @classmethod
    def cells_of(cls, shape: Shape, cell: Shape) -> Order:
        """Contiguous cells of size ``cell``, in raster order of cells (xAR)."""
        if len(cell) != len(tuple(shape)) or any(c < 1 or n % c for n, c in zip(shape, cell)):
            raise VargenError(f"cell {tuple(cell)}: expected a size that divides the grid {tuple(shape)} on every axis")
        size = torch.tensor(tuple(cell)).unsqueeze(1)
        return cls((tuple(shape),), _ravel(_coordinates(shape) // size, [n // c for n, c in zip(shape, cell)]))

    @classmethod
    def subsamples(cls, shape: Shape, stride: Shape) -> Order:
        """All cells with equal coordinates modulo ``stride``, in raster order of offsets (xAR's subsample entity)."""
        if len(stride) != len(tuple(shape)) or any(s < 1 or n % s for n, s in zip(shape, stride)):
            raise VargenError(f"stride {tuple(stride)}: expected one that divides the grid {tuple(shape)} on every axis")
        period = torch.tensor(tuple(stride)).unsqueeze(1)
        return cls((tuple(shape),), _ravel(_coordinates(shape) % period, list(stride)))

    @classmethod
    def scales(cls, levels: Sequence[Shape]) -> Order:
        """One level per step, coarse to fine (ECAR's stages, xAR's scale entity)."""
        sizes = torch.tensor([math.prod(level) for level in levels])
        return cls(tuple(tuple(level) for level in levels), torch.arange(len(levels)).repeat_interleave(sizes))

    @classmethod
    def image(cls, shape: Shape) -> Order:
        """Everything in one step (xAR's image entity: plain flow matching)."""
        return cls((tuple(shape),), torch.zeros(math.prod(shape), dtype=torch.int64))

    @classmethod
    def random_masked(cls, shape: Shape, permutation: Tensor, masked_after: Sequence[int]) -> Order:
        """Random order in groups (MAR, MaskGIT's counts).

        Args:
            permutation: int64 ``(num_cells,)``; after step k its first ``masked_after[k]`` entries are still masked, so that it is
                consumed from its end.
            masked_after: decreasing counts, the last one 0; see :func:`cosine_schedule`.
        """
        counts = torch.tensor([math.prod(shape), *masked_after])
        if counts[-1] != 0 or (counts.diff() >= 0).any():
            raise VargenError(
                f"masked_after {list(masked_after)}: expected decreasing counts below {math.prod(shape)} that end in 0"
            )
        step_at = torch.arange(len(masked_after)).repeat_interleave(-counts.diff()).flip(0)
        return cls((tuple(shape),), torch.empty_like(permutation).scatter_(0, permutation, step_at))


def cosine_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens still masked after each of ``steps`` steps: floor(L cos(pi/2 (k+1)/n)), at least one revealed per step, 0 at the end.

    MaskGIT (Chang et al., 2022) as MAR and Hi-MAR compute it.

    Raises:
        VargenError: not 1 <= steps <= tokens.
    """
    if not 1 <= steps <= tokens:
        raise VargenError(f"{steps} decoding steps for {tokens} tokens: expected 1..{tokens}")
    masked, after = tokens, []
    for k in range(steps - 1):
        masked = max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * (k + 1) / steps))))
        after.append(masked)
    return [*after, 0]


def make_order(name: str, levels: Levels, **options: int | Sequence[int]) -> Order:
    """An order by name, for configurations: ``raster, neighbors, rows, frames, blocks(size), cells(cell), subsamples(stride),
    scales, image``.

    Raises:
        VargenError: unknown name, or an order that this space cannot have.
    """
    single = {
        "raster": Order.raster,
        "neighbors": Order.neighbors,
        "rows": Order.rows,
        "frames": Order.frames,
        "blocks": Order.blocks,
        "cells": Order.cells_of,
        "subsamples": Order.subsamples,
        "image": Order.image,
    }
    if name == "scales":
        return Order.scales(levels)
    if name not in single:
        raise VargenError(f"unknown order '{name}'{nearest(name, [*single, 'scales'])}")
    if len(levels) > 1:
        raise VargenError(f"order '{name}' runs over one grid, but the space has {len(levels)} levels; use 'scales'")
    return single[name](levels[0], **options)  # type: ignore[arg-type, operator]


def _coordinates(shape: Shape) -> Tensor:
    """Coordinates of every cell, int64 ``(axes, num_cells)``."""
    axes = torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij")
    return torch.stack([a.flatten() for a in axes])


def _ravel(coordinates: Tensor, shape: Sequence[int]) -> Tensor:
    flat = torch.zeros_like(coordinates[0])
    for axis, size in zip(coordinates, shape):
        flat = flat * size + axis
    return flat
