"""Triton kernel of :func:`vargen.kernels.sample.guided_sample`. Checked under Triton's interpreter, never run on a GPU: opt-in.

One program per row, no sorting and no scratch memory: the row is read again in every pass (from cache after the first). Top-k and
top-p both come down to a threshold on the logits, found by bisection on their bits, which float order and integer order share
after one transformation: top-k wants the largest threshold that leaves k tokens, top-p the least that leaves a mass of at most p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vargen.kernels.sample import MIN_TEMPERATURE, check_sample

_MAX_BLOCK = 4096


@triton.jit
def _guided(cond_ptr, null_ptr, tokens, V, scale, temperature):
    """Logits as the reference has them before filtering; -inf beyond the vocabulary."""
    logits = tl.load(cond_ptr + tokens, tokens < V, -float("inf")).to(tl.float32)
    if null_ptr is not None:
        null = tl.load(null_ptr + tokens, tokens < V, -float("inf")).to(tl.float32)
        forbidden = (logits == -float("inf")) | (null == -float("inf"))
        # an explicit fma: whether two operations fuse is up to the compiler, and every pass must see the same values
        logits = tl.where(forbidden, -float("inf"), tl.fma(logits - null, scale, null))
    return tl.div_rn(logits, temperature)


@triton.jit
def _ordered(x):
    """int32 in the order of the floats, with one value for both zeros."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(cond_ptr, null_ptr, V, scale, temperature, largest, threshold, BLOCK: tl.constexpr):
    """Number of tokens at or above a threshold, and their mass relative to the largest logit's."""
    count = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        logits = _guided(cond_ptr, null_ptr, tokens, V, scale, temperature)
        inside = (_ordered(logits) >= threshold.to(tl.int32)) & (tokens < V)
        count += tl.sum(inside.to(tl.int32))
        mass += tl.sum(tl.where(inside, tl.exp(logits - largest), 0.0))
    return count, mass


@triton.jit
def _weights(
    cond_ptr, null_ptr, tokens, V, scale, temperature, largest, low, high, kept_ties, ties,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """Unnormalised float64 probabilities of a block, and the number of tokens in [low, high) up to its end."""
    logits = _guided(cond_ptr, null_ptr, tokens, V, scale, temperature)
    weights = tl.exp(logits - largest)
    keys = _ordered(logits).to(tl.int64)
    if TOP_P:
        tie = (keys >= low) & (keys < high) & (tokens < V)
        rank = ties + tl.cumsum(tie.to(tl.int32), 0)
        weights = tl.where((keys >= high) | (tie & (rank <= kept_ties)), weights, 0.0)
        ties += tl.sum(tie.to(tl.int32))
    elif TOP_K:
        weights = tl.where(keys >= high, weights, 0.0)
    return weights.to(tl.float64), ties


@triton.jit
def _guided_sample(
    out_ptr, cond_ptr, null_ptr, uniform_ptr, scale_ptr, V, top_k, temperature, top_p,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cond_ptr += row * V
    if null_ptr is not None:
        null_ptr += row * V
    scale = tl.load(scale_ptr)

    largest = tl.full((), -float("inf"), tl.float32)
    best = tl.zeros((), tl.int32)
    broken = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        logits = _guided(cond_ptr, null_ptr, tokens, V, scale, temperature)
        broken += tl.sum((logits != logits).to(tl.int32))
        top, index = tl.max(tl.where(logits == logits, logits, -float("inf")), 0, return_indices=True)
        best = tl.where(top > largest, start + index, best)
        largest = tl.maximum(largest, top)
    if (broken > 0) | (tl.abs(largest) == float("inf")):
        tl.store(out_ptr + row, tl.full((), -1, tl.int64))
        return
    if GREEDY:
        tl.store(out_ptr + row, best.to(tl.int64))
        return

    # kept are the tokens at or above `high`, and the first `kept_ties` of those in [low, high)
    low = _ordered(tl.full((), -float("inf"), tl.float32)).to(tl.int64)
    high = low
    kept_ties = tl.zeros((), tl.int32)
    if TOP_K:
        above = _ordered(largest).to(tl.int64) + 1
        count = V
        while (above - high > 1) & (count != top_k):
            middle = (high + above) >> 1
            count_middle, _ = _above(cond_ptr, null_ptr, V, scale, temperature, largest, middle, BLOCK)
            if count_middle >= top_k:
                high = middle
                count = count_middle
            else:
                above = middle
    if TOP_P:
        low = high
        count_low, mass_low = _above(cond_ptr, null_ptr, V, scale, temperature, largest, low, BLOCK)
        limit = top_p * mass_low
        high = _ordered(largest).to(tl.int64) + 1
        count_high = 0
        mass_high = 0.0
        # a single token in between is the one that crosses the limit
        while (high - low > 1) & (count_low - count_high > 1):
            middle = (low + high) >> 1
            count_middle, mass_middle = _above(cond_ptr, null_ptr, V, scale, temperature, largest, middle, BLOCK)
            if mass_middle <= limit:
                high = middle
                count_high = count_middle
                mass_high = mass_middle
            else:
                low = middle
                count_low = count_middle
        bits = low.to(tl.int32)
        tie = tl.exp((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - largest)
        kept_ties = tl.minimum((limit - mass_high) / tl.maximum(tie, 1e-30), V - 1.0).to(tl.int32) + 1

    total = tl.zeros((), tl.float64)
    ties = tl.zeros((), tl.int32)
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights, ties = _weights(
            cond_ptr, null_ptr, tokens, V, scale, temperature, largest, low, high, kept_ties, ties, TOP_K, TOP_P
        )  # fmt: skip
        total += tl.sum(weights)

    limit = tl.load(uniform_ptr + row).to(tl.float64) * total
    total = tl.zeros((), tl.float64)
    ties = tl.zeros((), tl.int32)
    drawn = V
    last = 0
    for start in range(0, V, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        weights, ties = _weights(
            cond_ptr, null_ptr, tokens, V, scale, temperature, largest, low, high, kept_ties, ties, TOP_K, TOP_P
        )  # fmt: skip
        cumulative = total + tl.cumsum(weights, 0)
        drawn = tl.minimum(drawn, tl.min(tl.where((cumulative > limit) & (weights > 0.0), tokens, V)))
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, tokens, 0)))
        total += tl.sum(weights)
    tl.store(out_ptr + row, tl.minimum(drawn, last).to(tl.int64))


@torch.no_grad()
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
    """See :func:`vargen.kernels.sample.guided_sample`; the same token up to rounding at the edges of top-p and of the draw."""
    check_sample(cond, null, uniform, top_p)
    batch, length, vocabulary = cond.shape
    tokens = torch.empty(batch, length, dtype=torch.int64, device=cond.device)
    block = min(triton.next_power_of_2(vocabulary), _MAX_BLOCK)
    # a scale on the device may change from call to call of a captured graph
    scale = scale.float() if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=cond.device)
    if tokens.numel():
        _guided_sample[(tokens.numel(),)](
            tokens, cond.contiguous(), None if null is None else null.contiguous(), uniform.contiguous(), scale,
            vocabulary, top_k, 1.0 if greedy else float(max(temperature, MIN_TEMPERATURE)), float(top_p),
            GREEDY=greedy, TOP_K=0 < top_k < vocabulary, TOP_P=top_p < 1.0, BLOCK=block,
            num_warps=8 if block > 1024 else 4,
        )  # fmt: skip
    return tokens
