"""The decoding loop of causal and block-causal models: one pass per group, guidance rows in one batch, a static cache."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.condition import Condition
from vargen.decoding.protocols import CausalModel
from vargen.errors import VargenError
from vargen.guidance import Guidance, Progress
from vargen.kernels.dispatch import kernel
from vargen.layout import Layout, Step
from vargen.model import OnStep, Sampling, StepInfo
from vargen.noise import Noise

guided_sample = kernel("guided_sample")


@torch.no_grad()
def decode(
    model: CausalModel,
    condition: Condition,
    batch_size: int,
    noise: Noise,
    guidance: Guidance | None = None,
    sampling: Sampling | None = None,
    on_step: OnStep | None = None,
    stop: int | None = None,
) -> Tensor:
    """Generates all cells of the model's layout.

    The token of a cell is drawn by inverse CDF of the uniform addressed ("token", cell), so it does not depend on the batch, the
    order of calls, or what else is drawn. ``condition.tokens`` ``(B, n)`` are given: the first n cells in order. With ``stop`` only
    the first ``stop`` cells are generated, the others stay 0.

    Returns:
        int64 ``(B, *space.token_shape)``.

    Raises:
        VargenError: given tokens that end inside a group, or more guidance rows than two.
    """
    guidance, sampling = guidance or Guidance(), sampling or Sampling()
    if guidance.rows > 2:
        raise VargenError("guidance with a partial condition needs a model with three kinds of rows; this one has cond and null")
    layout, rows = model.layout, guidance.rows
    given = 0 if condition.tokens is None else condition.tokens.shape[1]
    steps = [step for step in layout.steps(given) if stop is None or step.known < stop]
    state = model.start(condition, batch_size, rows)
    device = state.prefix.device
    tokens = torch.zeros(batch_size, layout.order.num_cells, dtype=torch.int64, device=device)
    if condition.tokens is not None:
        tokens[:, layout.order.cells[:given].to(device)] = condition.tokens.to(device) + model.token_offset
    uniforms = noise.uniform("token", (layout.order.num_cells,))

    for index, step in enumerate(steps):
        slots, targets = step.inputs, step.targets.to(device)
        # a broken row holds -1, which is reported at the end rather than by the embedding of the next step
        ids = tokens[:, layout.cell[slots].clamp(min=0).to(device)].clamp(min=0).repeat(rows, 1)
        hidden = model.forward(state, ids, slots, step_mask(layout, slots, state.cache.visible))
        logits = mix(model, hidden, step)
        progress = Progress(index, len(steps), step.known, step.known + len(step.targets), layout.order.num_cells)
        cond, null = (logits, None) if rows == 1 else logits.chunk(2)
        tokens[:, targets] = guided_sample(
            cond,
            null,
            guidance.at(progress),
            uniforms[:, targets],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=sampling.greedy,
        )
        if on_step is not None:
            known = layout.order.step_of < layout.order.step_of[step.targets[0]] + 1
            on_step(StepInfo(index, len(steps), as_codes(model, tokens), known.float().reshape(model.space.token_shape)))
    if (tokens < 0).any():
        raise VargenError("the model produced NaN logits: its weights or its condition are broken")
    return as_codes(model, tokens)


def as_codes(model: CausalModel, ids: Tensor) -> Tensor:
    """Vocabulary ids ``(B, num_cells)`` as codes on the grid; ids of other vocabulary entries are clamped into the codebook."""
    codes = ids if model.token_offset == 0 else (ids - model.token_offset).clamp(0, (model.space.codebook_size or 1) - 1)
    return codes.unflatten(1, model.space.token_shape)


def mix(model: CausalModel, hidden: tuple[Tensor, ...], step: Step) -> Tensor:
    """Logits of a step's targets: the mean over the heads that predict them. Returns float32 ``(R, targets, V)``."""
    used = step.source >= 0
    count = used.sum(0).to(hidden[0].device)
    if len(hidden) == 1:
        return model.logits(hidden[0][:, step.source[0].to(hidden[0].device)])
    total: Tensor | None = None
    for head, states in enumerate(hidden):
        if not used[head].any():
            continue
        logits = model.logits(states, head)[:, step.source[head].clamp(min=0).to(states.device)]
        logits = logits * used[head].to(states.device).unsqueeze(-1)
        total = logits if total is None else total + logits
    assert total is not None
    return total / count.unsqueeze(-1)


def step_mask(layout: Layout, slots: Tensor, visible: Tensor | None) -> Tensor | None:
    """Mask of ``slots`` fed behind all earlier ones: bool ``(R or 1, 1, n, cached + n)``, or None if everything is seen."""
    stop = int(slots[-1]) + 1
    if visible is None and layout.rank[slots[0]] == layout.rank[slots[-1]]:
        # ranks never fall along the sequence, so slots of one rank see all that stands before them, and each other
        return None
    mask = layout.mask(slots, torch.arange(stop))
    if visible is None:
        return mask[None, None]
    device = visible.device
    own = slots.unsqueeze(1) == torch.arange(stop)
    return (mask.to(device) & visible[:, None, None, :stop]) | own.to(device)
