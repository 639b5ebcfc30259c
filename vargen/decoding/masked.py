"""Masked decoding: bidirectional models that reveal a set of cells per step, in a random order per sample (MAR, Hi-MAR, MMAR)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vargen.errors import VargenError
from vargen.flow.sample import HeadSample
from vargen.guidance import Guidance, Progress
from vargen.model import OnStep, StepInfo
from vargen.nn.masking import positions_where, put, take
from vargen.noise import Noise
from vargen.order import cosine_schedule
from vargen.space import TokenSpace


@dataclass(frozen=True)
class MaskedStep:
    """One step of masked decoding.

    Attributes:
        index, total: number of this step and of all.
        mask: bool ``(B, L)``, cells unknown before the step.
        mask_after: bool ``(B, L)``, cells unknown after it.
        positions: int64 ``(B, n)``, the cells that it reveals, increasing.
        masked: number of cells unknown before the step; masked_after: after it.
    """

    index: int
    total: int
    mask: Tensor
    mask_after: Tensor
    positions: Tensor
    masked: int
    masked_after: int

    @property
    def progress(self) -> Progress:
        """For guidance schedules. As published, the last step counts one token as masked: a linear scale never ends."""
        tokens = self.mask.shape[1]
        return Progress(self.index, self.total, tokens - self.masked, tokens - max(self.masked_after, 1), tokens)


def masked_steps(order: Tensor, masked_after: Sequence[int], known: Tensor | None = None) -> Iterator[MaskedStep]:
    """The steps of a plan.

    Args:
        order: one permutation of the cells per sample, int64 ``(B, L)``; the first ones stay masked longest.
        masked_after: how many cells are masked after each step, decreasing to 0; see :func:`vargen.order.cosine_schedule`.
        known: bool ``(B, L)``, given cells, as many in every sample. They are never masked and the order skips them.
    """
    if known is not None:
        # a stable sort keeps the order of the unknown cells and puts the known ones at its end
        order = order.gather(1, known.gather(1, order).int().argsort(dim=1, stable=True))
    masked = order.shape[1] if known is None else int((~known[0]).sum())

    def mask_of(count: int) -> Tensor:
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)

    mask = mask_of(masked)
    for index, after in enumerate(masked_after):
        mask_after = mask_of(after)
        positions = positions_where(mask & ~mask_after, masked - after)
        yield MaskedStep(index, len(masked_after), mask, mask_after, positions, masked, after)
        mask, masked = mask_after, after


def plan(cells: int, steps: int, known: Tensor | None = None) -> list[int]:
    """Cells masked after each of ``steps`` steps, by the cosine schedule over the unknown ones (at least one revealed per step).

    Raises:
        VargenError: not 1 <= steps <= cells. Known cells shorten a plan that would have more steps than unknown cells.
    """
    if not 1 <= steps <= cells:
        raise VargenError(f"{steps} decoding steps for {cells} tokens: expected 1..{cells}")
    unknown = cells if known is None else int((~known[0]).sum())
    return cosine_schedule(unknown, min(steps, unknown)) if unknown else []


def given_tokens(space: TokenSpace, batch_size: int, known: Any, tokens: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Checked arguments of editing: ``known`` bool ``(*grid)`` or ``(B, *grid)``, True at cells that ``tokens`` gives.

    The grid is that of the finest level; ``tokens`` has the space's token shape, with a batch of B or 1.

    Returns:
        ``(B, cells)`` and ``(B, *token_shape)``, or two None when neither is given.

    Raises:
        VargenError: only one of them, another shape, or samples with different numbers of unknown cells.
    """
    if known is None and tokens is None:
        return None, None
    if known is None or tokens is None:
        raise VargenError("editing needs both tokens=... and known=..., a mask that is True where tokens are to be kept")
    known, tokens = torch.as_tensor(known), torch.as_tensor(tokens)
    if known.dtype != torch.bool:
        raise VargenError(f"known is a {known.dtype} tensor: expected a bool mask, True where tokens are to be kept")
    known = known.unsqueeze(0) if known.dim() == len(space.shape) else known
    if tuple(known.shape[1:]) != space.shape or len(known) not in (1, batch_size):
        raise VargenError(
            f"known of shape {tuple(known.shape)}: expected (B, {', '.join(map(str, space.shape))}) with B {batch_size} or 1"
        )
    if len(tokens) not in (1, batch_size):
        raise VargenError(f"{len(tokens)} samples of given tokens for a batch of {batch_size}")
    known = known.flatten(1).expand(batch_size, -1)
    if (known.sum(1) != known[0].sum()).any():
        raise VargenError("the masks of a batch keep different numbers of tokens: edit these images one at a time")
    return known, space.check(tokens).expand(batch_size, *space.token_shape)


class MaskedModel(Protocol):
    """A bidirectional model of continuous tokens under masks; drivers, plain and speculative, are written against it."""

    @property
    def space(self) -> TokenSpace: ...

    def hidden(self, state: Any, tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``(rows * B, L, D)`` of all cells.

        Args:
            state: from the model's ``start(condition, batch_size, rows)``.
            tokens: ``(B, L, C)``; what stands in masked cells is not read. mask: bool ``(B, L)``, True where unknown.
        """

    def draw(
        self, z: Tensor, positions: Tensor, noise: Noise, combine: Any = None, temperature: float = 1.0, **options: Any
    ) -> HeadSample:
        """Tokens at ``positions`` ``(B, n)`` from their hidden states ``(rows * B, n, D)``; draws are addressed by position."""


@torch.no_grad()
def decode_masked(
    model: MaskedModel,
    state: Any,
    tokens: Tensor,
    steps: Iterator[MaskedStep],
    noise: Noise,
    guidance: Guidance,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
    **options: Any,
) -> Tensor:
    """Runs ``steps`` over ``tokens`` ``(B, L, C)`` (given cells filled, zeros elsewhere); returns all tokens ``(B, L, C)``.

    ``options`` go to the model's ``draw``.
    """
    for step in steps:
        z = model.hidden(state, tokens, step.mask)
        z = take(z, step.positions.repeat(guidance.rows, 1))
        combine = partial(guidance.combine, scale=guidance.at(step.progress))
        sample = model.draw(z, step.positions, noise, combine, temperature, **options)
        tokens = put(tokens, step.positions, sample.tokens)
        if on_step is not None:
            on_step(step_info(step, tokens, model.space))
    return tokens


def step_info(step: MaskedStep, tokens: Tensor, space: TokenSpace) -> StepInfo:
    """What a callback is told: cells known in all samples count 1, in some a share."""
    known = (~step.mask_after).float().mean(0)
    return StepInfo(step.index, step.total, tokens.reshape(-1, *space.token_shape), known.reshape(space.shape))


def refuse_editing(options: Mapping[str, Any], name: str, reason: str) -> None:
    """Raises VargenError, for a system that cannot hold arbitrary tokens fixed, if it is asked to."""
    if any(options.get(key) is not None for key in ("known", "tokens")):
        raise VargenError(f"{name} cannot keep given tokens ({reason}): edit with a masked system such as MAR or Hi-MAR")
