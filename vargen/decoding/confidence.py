"""MaskGIT's decoding: all masked tokens are drawn in every step, the least confident are masked again (Chang et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vargen.errors import VargenError
from vargen.guidance import Guidance, Progress
from vargen.model import OnStep, StepInfo
from vargen.noise import Noise
from vargen.space import TokenSpace

Logits = Callable[[Tensor, int], Tensor]


def arccos_schedule(tokens: int, steps: int) -> list[int]:
    """Tokens masked again after each step before limits: floor(K arccos((s + 1) / T) / (pi / 2)), 0 in the end.

    Raises:
        VargenError: not 1 <= steps <= tokens.
    """
    if not 1 <= steps <= tokens:
        raise VargenError(f"{steps} decoding steps for {tokens} tokens: expected 1..{tokens}")
    return [math.floor(tokens * math.acos((s + 1) / steps) / (math.pi / 2)) for s in range(steps)]


def gumbel(uniform: Tensor) -> Tensor:
    """``-log(-log u)`` with the arguments of both logarithms at least 1e-20."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@torch.no_grad()
def decode_by_confidence(
    logits: Logits,
    space: TokenSpace,
    batch_size: int,
    noise: Noise,
    steps: int,
    guidance: Guidance,
    temperature: float,
    anneal_softmax: bool = False,
    known: Tensor | None = None,
    tokens: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Fills all unknown cells.

    In step s, with ratio (s + 1) / T and temperature tau (1 - ratio): ids are the argmax of guided logits plus tau' times Gumbel
    noise; the confidence of a new token is its guided logit plus tau' times fresh noise; the n least confident are masked again,
    where n follows the arccos schedule, at least 1 and fewer than before. The last step keeps all.

    Args:
        logits: function of ids ``(B, K)`` (the codebook size stands for a masked cell) and the number of guidance rows, returning
            ``(rows * B, K, V)``.
        temperature: tau, the scale of the Gumbel noise in the first step.
        anneal_softmax: divide the logits by 0.5 + 0.8 (1 - ratio), as the published benchmark does.
        known, tokens: bool ``(B, K)`` and ids ``(B, K)`` of given cells.

    Returns:
        int64 ``(B, K)``. Draws are addressed ("token", step) and ("confidence", step).
    """
    cells, mask_id = space.num_tokens, space.codebook_size or 0
    ids = torch.full((batch_size, cells), mask_id, dtype=torch.int64, device=noise.device)
    if known is not None and tokens is not None:
        ids = torch.where(known.to(ids.device), tokens.to(ids.device), ids)
    unknown = cells if known is None else int((~known[0]).sum())
    if unknown == 0:
        return ids
    schedule = arccos_schedule(unknown, steps if known is None else min(steps, unknown))
    for step, target in enumerate(schedule):
        ratio = (step + 1) / len(schedule)
        noise_scale = temperature * (1 - ratio)
        masked = ids == mask_id
        count = int(masked[0].sum())
        progress = Progress(step, len(schedule), cells - count, cells - target, cells)
        scale = guidance.at(progress)
        # the guided rows cost a pass; a scale of 1 needs none
        guided = scale != 1.0 and guidance.rows == 2
        out = logits(ids, 2 if guided else 1).float()
        out = guidance.combine(out, scale) if guided else out
        if anneal_softmax:
            out = out / (0.5 + 0.8 * (1 - ratio))
        drawn = (out + noise_scale * gumbel(noise.uniform("token", tuple(out.shape[1:]), (step,)))).argmax(-1)
        drawn = torch.where(masked, drawn, ids)
        again = max(1, min(count - 1, target))
        if step < len(schedule) - 1:
            score = out.gather(-1, drawn.clamp(max=out.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
            score = score.masked_fill(~masked, float("inf"))
            confidence = score + noise_scale * gumbel(noise.uniform("confidence", (cells,), (step,)))
            cut = confidence.sort(dim=-1).values[:, again - 1 : again]
            ids = drawn.masked_fill(confidence <= cut, mask_id)
        else:
            ids = drawn
        if on_step is not None:
            shown = ids.masked_fill(ids == mask_id, 0).unflatten(1, space.token_shape)
            on_step(StepInfo(step, len(schedule), shown, (ids != mask_id).float().mean(0).reshape(space.token_shape)))
    return ids
