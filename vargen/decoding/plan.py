"""The passes of a decoding run as numbers on the device: which slots each feeds, where it writes, what it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vargen.layout import Layout, Slots, Step


@dataclass(frozen=True)
class Shape:
    """What is fixed when a pass is compiled. Passes of equal shape differ only by their numbers, see :class:`Numbers`.

    Attributes:
        width: slots fed, padding included.
        targets: cells predicted, padding included.
        prefix: how many of the slots, the first ones, are prefix slots.
        extra: some slot feeds a learned extra token.
        heads: number of prediction heads.
        stop: cache entries that the pass reads.
        masked: some slot does not see all of them, even where no padding of the prefix is hidden.
    """

    width: int
    targets: int
    prefix: int
    extra: bool
    heads: int
    stop: int
    masked: bool


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers of one pass, int64 on the device.

    Attributes:
        index: ``(1,)``, number of the pass.
        slots: ``(width,)`` slots whose positions are fed; padding repeats the last one.
        places: ``(width,)`` cache entries written; padding writes behind the group, where the next pass will write.
        cells: ``(width,)`` cells whose tokens are fed, 0 where a slot has none.
        extra: ``(width,)`` numbers of extra tokens, -1 for none.
        targets: ``(targets,)`` cells predicted; padding has the number behind the last cell.
        source: ``(heads, targets)`` places within the pass whose logits count, -1 for none.
    """

    index: Tensor
    slots: Tensor
    places: Tensor
    cells: Tensor
    extra: Tensor
    targets: Tensor
    source: Tensor

    @classmethod
    def unpack(cls, row: Tensor, shape: Shape) -> Numbers:
        """Views of a row of :attr:`Plan.rows`."""
        w, t, heads = shape.width, shape.targets, shape.heads
        index, slots, places, cells, extra, targets, source = row.split([1, w, w, w, w, t, heads * t])
        return cls(index, slots, places, cells, extra, targets, source.view(heads, t))

    def fed(self, shape: Shape) -> Slots:
        return Slots(self.slots, shape.prefix, self.extra if shape.extra else None)


@dataclass(frozen=True, eq=False)
class Plan:
    """All passes of a run.

    Attributes:
        steps: as the layout has them.
        shapes: of every pass.
        rows: the numbers of every pass, packed into one int64 tensor on the device.
        capacity: cache entries that the run needs.
    """

    steps: list[Step]
    shapes: list[Shape]
    rows: list[Tensor]
    capacity: int

    @classmethod
    @lru_cache(maxsize=16)
    def of(
        cls,
        layout: Layout,
        given: int = 0,
        stop: int | None = None,
        *,
        buckets: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Plan:
        """The passes behind ``given`` tokens, up to ``stop`` known ones. The last plans are kept.

        Args:
            buckets: at most so many sizes of groups, and of what is read of the cache; smaller ones are padded. None pads nothing.
                The first pass, over the prefix, keeps its width.
        """
        steps = [step for step in layout.steps(given) if stop is None or step.known < stop]
        widths = _sizes([len(step.inputs) for step in steps], buckets, first=1)
        counts = _sizes([len(step.targets) for step in steps], buckets, first=1)
        # a layout is fed from its first slot on, so that a pass ends where as many slots have been fed as its last one says
        ends = [int(step.inputs[-1]) + 1 for step in steps]
        stops = _sizes(ends, buckets, first=0)
        capacity = max([int(step.inputs[0]) + width for step, width in zip(steps, widths)] + stops, default=layout.prefix)
        shapes, packed = [], []
        for index, step in enumerate(steps):
            width, count = widths[index], counts[index]
            first, more = step.inputs[0], width - len(step.inputs)
            slots = torch.cat([step.inputs, step.inputs[-1:].expand(more)])
            extra = torch.cat([layout.extra[step.inputs], torch.full((more,), -1)])
            uneven = bool(layout.rank[first] != layout.rank[slots[-1]])
            shapes.append(
                Shape(
                    width,
                    count,
                    int((step.inputs < layout.prefix).sum()),
                    bool((extra >= 0).any()),
                    layout.num_heads,
                    stops[index],
                    # ranks never fall along the sequence, so slots of one rank see all that stands before them, and each other
                    uneven or stops[index] > ends[index],
                )
            )
            source = torch.nn.functional.pad(step.source, (0, count - len(step.targets)), value=-1)
            targets = torch.cat([step.targets, torch.full((count - len(step.targets),), layout.order.num_cells)])
            cells = layout.cell[slots].clamp(min=0)
            packed.append(
                torch.cat([torch.tensor([index]), slots, first + torch.arange(width), cells, extra, targets, source.flatten()])
            )
        rows = torch.cat(packed).to(device).split([len(row) for row in packed]) if packed else ()
        return cls(steps, shapes, list(rows), capacity)

    def __len__(self) -> int:
        return len(self.steps)


def _sizes(counts: Sequence[int], buckets: int | None, first: int) -> list[int]:
    """Every count from number ``first`` on, rounded up to one of at most ``buckets`` sizes, evenly spaced if there are more."""
    later = sorted(set(counts[first:]))
    if buckets is None or not later:
        return list(counts)
    if len(later) > buckets:
        later = sorted({-(-later[-1] * i // buckets) for i in range(1, buckets + 1)})
    return [*counts[:first], *(next(size for size in later if size >= count) for count in counts[first:])]
