"""How much memory decoding takes, from sizes alone; docs/speed.md states the formula in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.decoding.plan import Plan
from vargen.decoding.quantize import stored


def decoding_memory(
    model: Any,
    batch_size: int,
    rows: int = 1,
    dtype: torch.dtype | None = None,
    *,
    given: int = 0,
    stop: int | None = None,
    buckets: int | None = None,
) -> dict[str, int]:
    """Bytes that :class:`vargen.decoding.engine.Engine` needs for one batch, by use and in ``"total"``.

    Weights, cache and buffers are exact. Activations and logits are about what the widest pass holds at once; they are not held at
    the same time, so that the total counts the larger one. Top-p needs half as much again for logits, since it sorts them.

    Args:
        model: a :class:`vargen.backbones.causal.CausalGenerator`.
        rows: 2 with guidance, else 1.
        dtype: of weights and activations, the model's own by default; quantised weights count as they are.
        given, stop, buckets: as in the engine.
    """
    plan = Plan.of(model.layout, given, stop, buckets=buckets)
    number = (dtype or model.dtype).itemsize
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    dim, hidden, vocabulary = model.tokens.embedding_dim, mlp.down.in_features, model.output_heads[0].linear.out_features
    samples = rows * batch_size
    width, targets = (max((getattr(shape, name) for shape in plan.shapes), default=0) for name in ("width", "targets"))
    seen = max((shape.width * shape.stop for shape in plan.shapes if shape.masked), default=0)
    memory = {
        "weights": sum(_nbytes(p, dtype) for p in model.parameters()) + sum(_nbytes(b, dtype) for b in model.buffers()),
        "cache": 2 * len(model.blocks) * samples * attn.kv_heads * plan.capacity * attn.head_dim * number,
        "buffers": samples * model.layout.prefix * dim * number
        + batch_size * (model.layout.order.num_cells + 1) * (8 + 4)
        + 8 * (sum(map(len, plan.rows)) + 2 * plan.capacity),
        # residual, norm and the feed-forward layer's three hidden tensors; temporaries of norms in float32; mask, bool and additive
        "activations": samples * width * ((2 * dim + 3 * hidden) * number + 4 * dim * 4) + samples * seen * 5,
        # float32 rows, guided ones, probabilities, and their cumulative sum in float64
        "logits": targets * vocabulary * (samples * 4 + batch_size * (20 if rows == 1 else 24)),
    }
    return memory | {"total": sum(memory.values()) - min(memory["activations"], memory["logits"])}


def _nbytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    parts = list(stored(tensor))
    if dtype is not None and len(parts) == 1 and tensor.is_floating_point():
        return tensor.numel() * dtype.itemsize
    return sum(part.numel() * part.element_size() for part in parts)
