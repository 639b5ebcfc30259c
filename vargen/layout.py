"""Layouts: how an order becomes a sequence of slots, who sees whom, and which slot predicts which cell.

Slots stand in the order in which they are fed: prefix slots first (class or text tokens), then each group of cells, with extra
slots (learned tokens without a cell, as NBP's hybrid start needs) among them. Loss and decoding read the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vargen.errors import VargenError
from vargen.order import Order


@dataclass(frozen=True)
class Step:
    """One forward pass of decoding.

    Attributes:
        inputs: slots fed in this pass, int64 ``(n,)``, consecutive.
        targets: cells that it predicts, int64 ``(t,)``.
        source: ``(heads, t)``, for each head the place within ``inputs`` whose logits count for the target, -1 for none.
        known: cells known before this step.
    """

    inputs: Tensor
    targets: Tensor
    source: Tensor
    known: int


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots that a pass feeds, on the model's device.

    Attributes:
        index: int64 ``(n,)``.
        prefix: how many of them, the first ones, are prefix slots.
        extra: int64 ``(n,)``, number of the learned extra token of each, -1 for none; None if no slot has one.
    """

    index: Tensor
    prefix: int = 0
    extra: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True, eq=False)
class Layout:
    """Slots of a causal or block-causal sequence.

    Attributes:
        order: the order that is laid out.
        prefix: number of prefix slots.
        rank: int64 ``(S,)``; a query sees a key iff ``rank[q] >= rank[k]`` (and the key is visible), or they are the same slot.
        cell: int64 ``(S,)``, the cell whose token the slot feeds, -1 for prefix and extra slots.
        extra: int64 ``(S,)``, number of the learned extra token that the slot feeds, -1 elsewhere.
        edges: int64 ``(heads, num_cells)``, the slot from which each head predicts each cell, -1 for none. The logits of a cell are
            the mean over its edges; a cell without any edge must be given.
    """

    order: Order
    prefix: int
    rank: Tensor
    cell: Tensor
    extra: Tensor
    edges: Tensor

    @property
    def num_slots(self) -> int:
        return self.rank.numel()

    @property
    def num_heads(self) -> int:
        return self.edges.shape[0]

    @cached_property
    def num_inputs(self) -> int:
        """Slots up to the last group that some prediction needs; later ones are never fed."""
        return self._group_end(int(self.edges.max()))

    def _group_end(self, slot: int) -> int:
        """End of the group of slots, fed in one pass, that ``slot`` belongs to."""
        return int(torch.searchsorted(self.rank, self.rank[slot], right=True))

    @cached_property
    def slot_of(self) -> Tensor:
        """Slot that feeds each cell, int64 ``(num_cells,)``."""
        slots = torch.arange(self.num_slots)[self.cell >= 0]
        return torch.empty(self.order.num_cells, dtype=torch.int64).scatter_(0, self.cell[slots], slots)

    def place(self, slots: Tensor, device: torch.device | str) -> Slots:
        """CPU ``slots`` ready for a device."""
        extra = self.extra[slots]
        return Slots(slots.to(device), int((slots < self.prefix).sum()), extra.to(device) if bool((extra >= 0).any()) else None)

    def mask(self, queries: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """Bool ``(q, k)``, True where the query slot sees the key slot; all inputs by default."""
        slots = torch.arange(self.num_inputs)
        q = slots if queries is None else queries.cpu()
        k = slots if keys is None else keys.cpu()
        return (self.rank[q].unsqueeze(1) >= self.rank[k]) | (q.unsqueeze(1) == k)

    def mask_mod(self, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rule as a FlexAttention ``mask_mod(batch, head, query, key)``."""
        rank = self.rank.to(device)
        return lambda batch, head, query, key: (rank[query] >= rank[key]) | (query == key)

    @cached_property
    def causal(self) -> bool:
        """The mask is plain lower-triangular over the inputs."""
        return bool((self.rank[: self.num_inputs].diff() > 0).all())

    def steps(self, given: int = 0) -> list[Step]:
        """The passes that generate all cells but the first ``given`` in order.

        Raises:
            VargenError: ``given`` ends inside a group, or a cell that is not given has no edge.
        """
        ends = torch.tensor([0, *[len(g) for g in self.order.groups]]).cumsum(0).tolist()
        if given not in ends:
            raise VargenError(
                f"{given} given tokens end inside a group: expected a count such as {ends[1]} or {ends[min(2, len(ends) - 1)]}"
            )
        plans: list[Step] = []
        fed = 0
        for group, known in zip(self.order.groups, ends):
            if known < given:
                continue
            used = self.edges[:, group]
            if (used < 0).all(0).any():
                raise VargenError(f"the first {known + len(group)} tokens of this layout cannot be generated: they must be given")
            if (used[used >= 0] < fed).any():
                raise VargenError("this order predicts a cell from slots of an earlier step, which cached decoding no longer has")
            stop = self._group_end(int(used.max()))
            source = torch.where(used >= 0, used - fed, used)
            plans.append(Step(torch.arange(fed, stop), group, source, known))
            fed = stop
        return plans


def _assemble(
    order: Order, prefix_rank: Tensor, extras: Sequence[tuple[int, int]], edge_rule: Callable[[Tensor], Tensor]
) -> Layout:
    """A layout with ``extras`` = (step of the cells that they are fed with, number of them)."""
    prefix = prefix_rank.numel()
    rank, cell, extra = [prefix_rank], [torch.full((prefix,), -1)], [torch.full((prefix,), -1)]
    base = int(prefix_rank.max()) + 1 if prefix else 0
    by_step = dict(extras)
    for step, group in enumerate(order.groups):
        count = by_step.get(step, 0)
        rank.append(torch.full((len(group) + count,), base + step))
        cell.append(torch.cat([group, torch.full((count,), -1)]))
        extra.append(torch.cat([torch.full((len(group),), -1), torch.arange(count)]))
    cells = torch.cat(cell)
    slots = torch.arange(cells.numel())[cells >= 0]
    slot_of = torch.empty(order.num_cells, dtype=torch.int64).scatter_(0, cells[slots], slots)
    return Layout(order, prefix, torch.cat(rank), cells, torch.cat(extra), edge_rule(slot_of))


def _prefix_rank(prefix: int, causal: bool) -> Tensor:
    return torch.arange(prefix) if causal else torch.zeros(prefix, dtype=torch.int64)


def shifted(order: Order, prefix: int, prefix_causal: bool = True) -> Layout:
    """Every token predicts the token at its place in the next group: next-token prediction, and NBP for equal groups.

    The first group is predicted from the last prefix slots, one each; where the prefix is shorter than the first group, that group
    must be given.

    Raises:
        VargenError: groups of unequal size.
    """
    sizes = [len(g) for g in order.groups]
    if len(set(sizes)) != 1:
        raise VargenError(f"shifted prediction needs groups of equal size, got sizes {min(sizes)}..{max(sizes)}; use 'neighbors'")
    size = sizes[0]

    def edges(slot_of: Tensor) -> Tensor:
        table = torch.full((1, order.num_cells), -1)
        if prefix >= size:
            table[0, order.groups[0]] = torch.arange(prefix - size, prefix)
        for previous, group in zip(order.groups, order.groups[1:]):
            table[0, group] = slot_of[previous]
        return table

    return _assemble(order, _prefix_rank(prefix, prefix_causal), (), edges)


def neighboring(order: Order, prefix: int, prefix_causal: bool = True) -> Layout:
    """Every token predicts its successor along each axis with that axis' head; the last axis is head 0 (NAR).

    A cell's logits are the mean over its known neighbours; the first cell is predicted by all heads from the last prefix slot.
    Works for any order in which the neighbours of a cell come before it and in the group just before it.

    Raises:
        VargenError: several levels, no prefix, or an order that decodes a cell before or beside one of its neighbours.
    """
    if len(order.levels) != 1 or prefix < 1:
        raise VargenError("neighbour prediction needs one grid and at least one prefix slot")
    shape = order.shape
    axes = len(shape)
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)

    def edges(slot_of: Tensor) -> Tensor:
        cells = torch.arange(order.num_cells)
        table = torch.full((axes, order.num_cells), -1)
        for head in range(axes):
            stride, size = strides[head], shape[axes - 1 - head]
            inside = cells[(cells // stride) % size > 0]
            if (order.step_of[inside - stride] >= order.step_of[inside]).any():
                raise VargenError(
                    "neighbour prediction needs an order in which every cell comes after its neighbours, such as 'neighbors'"
                )
            table[head, inside] = slot_of[inside - stride]
        table[:, 0] = prefix - 1
        return table

    return _assemble(order, _prefix_rank(prefix, prefix_causal), (), edges)


def hybrid(shape: Sequence[int], size: int, condition: int) -> Layout:
    """NBP's class-conditional layout: the first block token by token, then block by block (Ren et al., 2025, section 3).

    Slots: ``condition`` tokens that all see each other and that all see, a begin slot, the first block causally, ``size - 1`` extra
    tokens fed together with the last token of the first block, then the blocks. The begin slot is part of the prefix.
    """
    blocks = Order.blocks(shape, size)
    order = Order(blocks.levels, torch.where(blocks.step_of == 0, torch.arange(blocks.num_cells), blocks.step_of + size - 1))
    prefix_rank = torch.cat([torch.zeros(condition, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])

    def edges(slot_of: Tensor) -> Tensor:
        cells = torch.arange(order.num_cells)
        table = torch.empty(1, order.num_cells, dtype=torch.int64)
        table[0, 0] = condition
        table[0, 1:size] = slot_of[cells[: size - 1]]
        first = slot_of[size - 1]
        table[0, size : 2 * size] = torch.arange(first, first + size)[: max(0, order.num_cells - size)]
        table[0, 2 * size :] = slot_of[cells[size:-size]] if order.num_cells > 2 * size else table[0, 2 * size :]
        return table

    return _assemble(order, prefix_rank, ((size - 1, size - 1),), edges)


LAYOUTS = {"shifted": shifted, "neighboring": neighboring}
