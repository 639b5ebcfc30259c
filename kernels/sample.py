"""Drawing tokens from logits: guidance, temperature, top-k, top-p, and the inverse CDF of one given uniform."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.errors import VargenError

MIN_TEMPERATURE = 1e-5


def inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Index drawn by one uniform per row: the number of entries of the float64 cumulative sum that are <= u * total.

    Args:
        probs: ``(..., V)``, non-negative, need not sum to one.
        uniform: ``(...)`` in [0, 1).

    Returns:
        int64 ``(...)``.
    """
    cumulative = probs.double().cumsum(-1)
    threshold = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # a threshold that rounds up to the total would otherwise fall behind the last entry of non-zero probability
    last = probs.shape[-1] - 1 - probs.flip(-1).ne(0).int().argmax(-1)
    return torch.minimum(index, last)


def guided_logits(cond: Tensor, null: Tensor | None, scale: float | Tensor) -> Tensor:
    """``null + scale * (cond - null)`` in float32; a token that is forbidden (-inf) in either row stays forbidden."""
    cond = cond.float()
    if null is None:
        return cond
    null = null.float()
    forbidden = torch.isneginf(cond) | torch.isneginf(null)
    return (null + (cond - null) * scale).masked_fill(forbidden, -torch.inf)


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits divided by the temperature, with -inf where top-k, then top-p drops a token.

    Top-k drops values strictly below the k-th largest (ties survive). Top-p goes through the survivors in descending order, equal
    ones by index, and drops those before which the cumulative probability already exceeds p; the first always survives.

    Args:
        logits: ``(..., V)``.
        temperature: divisor, at least 1e-5.
        top_k: number of tokens kept; 0 keeps all.
        top_p: probability mass kept; 1 keeps all.

    Returns:
        float32 ``(..., V)``.
    """
    logits = logits.float() / max(temperature, MIN_TEMPERATURE)
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        cumulative = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
        dropped = torch.zeros_like(ordered, dtype=torch.bool)
        dropped[..., 1:] = cumulative[..., :-1] > top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def check_sample(cond: Tensor, null: Tensor | None, uniform: Tensor, top_p: float) -> None:
    """Raises VargenError where the arguments of :func:`guided_sample` do not fit together."""
    if cond.dim() != 3 or (null is not None and null.shape != cond.shape) or uniform.shape != cond.shape[:2] or not cond.shape[2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (cond, null, uniform) if t is not None)
        raise VargenError(f"guided_sample of shapes {shapes}: expected logits (B, T, V), twice with guidance, and uniforms (B, T)")
    if not 0.0 < top_p <= 1.0:
        raise VargenError(f"top_p {top_p}: expected a share in (0, 1]; 1 keeps all tokens")


def guided_sample(
    cond: Tensor,
    null: Tensor | None,
    scale: float | Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
) -> Tensor:
    """One token per position: guidance, temperature, top-k, top-p, softmax, and the inverse CDF of the given uniform.

    A row without a distribution (it holds NaN or +inf, or nothing but -inf) yields -1, which no embedding takes: the decoding loop
    need not wait for the device to find out, and a broken model cannot pass for a working one.

    Args:
        cond: ``(B, T, V)`` logits under the condition.
        null: ``(B, T, V)`` logits without it, or None for no guidance.
        scale: guidance scale, a number or one on the device, float32 of one element; unused without ``null``.
        uniform: ``(B, T)`` draws in [0, 1), float32 or float64; unused if ``greedy``.
        temperature, top_k, top_p: see :func:`filter_logits`.
        greedy: take the largest logit (the first of equal ones) instead of drawing.

    Returns:
        int64 ``(B, T)``.

    Raises:
        VargenError: shapes that do not fit, or a top_p outside (0, 1].
    """
    check_sample(cond, null, uniform, top_p)
    logits = guided_logits(cond, null, scale)
    if greedy:
        largest, index = logits.max(-1)
        return index.masked_fill(~largest.isfinite(), -1)
    probs = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    # one NaN or +inf, or a row of nothing but -inf, makes the whole softmax NaN
    return inverse_cdf(probs, uniform).masked_fill(probs[..., 0].isnan(), -1)
