"""The plain way to decode, which cached decoding must equal: the whole sequence is run again for every group."""

import torch

from vargen.backbones.causal import CausalGenerator
from vargen.condition import Condition


@torch.no_grad()
def uncached_greedy(model: CausalGenerator, condition: Condition, batch: int, scale: float = 1.0, given: int = 0) -> torch.Tensor:
    """Greedy codes ``(B, *token_shape)``."""
    ids = torch.zeros(batch, model.layout.order.num_cells, dtype=torch.int64)
    if condition.tokens is not None:
        ids[:, model.layout.order.cells[:given]] = condition.tokens + model.token_offset
    for step in model.layout.steps(given):
        codes = ids - model.token_offset
        logits = model.assemble(model.sequence(codes, condition, torch.zeros(batch, dtype=torch.bool)))
        if scale != 1.0:
            null = model.assemble(model.sequence(codes, condition, torch.ones(batch, dtype=torch.bool)))
            logits = null + (logits - null) * scale
        ids[:, step.targets] = logits[:, step.targets].argmax(-1)
    return (ids - model.token_offset).clamp(0, model.space.codebook_size - 1).unflatten(1, model.space.token_shape)
