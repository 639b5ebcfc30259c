"""What cases of causal generators share: teacher-forced cached decoding, and outputs in raster order."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.backbones.causal import CausalGenerator
from vargen.condition import Condition
from vargen.decoding.engine import Run
from vargen.decoding.plan import Numbers, Plan
from vargen.guidance import Guidance, Progress
from vargen.noise import Noise


@torch.no_grad()
def step_logits(
    model: CausalGenerator, condition: Condition, ids: Tensor, guidance: Guidance | None = None, given: int = 0
) -> Tensor:
    """Guided logits of every generated cell in order of generation, decoding through the cache with ``ids`` fed.

    Args:
        ids: flat vocabulary ids ``(B, num_cells)``.

    Returns:
        ``(B, num_cells - given, V)``; without ``guidance`` the unguided rows [cond, null] are returned, ``(2B, ...)``.
    """
    rows = 2 if guidance is None else guidance.rows
    layout, logits = model.layout, []
    plan = Plan.of(layout, given)
    run = Run(model, plan, condition, Noise(0, len(ids)), rows)
    run.tokens[:, :-1] = ids
    for index, (step, shape, row) in enumerate(zip(plan.steps, plan.shapes, plan.rows)):
        mixed = run.logits(shape, Numbers.unpack(row, shape))
        if guidance is not None:
            progress = Progress(index, len(plan), step.known, step.known + len(step.targets), layout.order.num_cells)
            mixed = guidance.combine(mixed, guidance.at(progress))
        logits.append(mixed)
    return torch.cat(logits, dim=1)


def all_slots(model: CausalGenerator) -> Tensor:
    return torch.arange(model.layout.num_slots)


def raster_place(model: CausalGenerator) -> Tensor:
    """Place of every slot in a sequence of prefix tokens and then all cells in raster order."""
    layout = model.layout
    return torch.where(layout.cell >= 0, layout.cell + layout.prefix, torch.arange(layout.num_slots))


def to_raster(model: CausalGenerator, values: Tensor, axis: int = 1) -> Tensor:
    """Values per slot, put into that sequence's order."""
    return values.index_select(axis, raster_place(model).argsort())
