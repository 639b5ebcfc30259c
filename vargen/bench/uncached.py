"""Decoding without a cache, the way to compare others with: the whole sequence is run again for every group of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vargen.backbones.causal import CausalGenerator
from vargen.condition import Condition
from vargen.decoding.engine import as_codes, mix
from vargen.guidance import Guidance, Progress
from vargen.kernels.sample import guided_sample
from vargen.model import OnStep, Sampling
from vargen.noise import Noise


class Uncached:
    """A :class:`vargen.decoding.protocols.Decoding`; it draws what the engine draws, up to rounding."""

    @torch.no_grad()
    def decode(
        self,
        model: CausalGenerator,
        condition: Condition,
        batch_size: int,
        noise: Noise,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        stop: int | None = None,
    ) -> Tensor:
        guidance, sampling = guidance or Guidance(), sampling or Sampling()
        layout, rows = model.layout, guidance.rows
        given = 0 if condition.tokens is None else condition.tokens.shape[1]
        steps = [step for step in layout.steps(given) if stop is None or step.known < stop]
        drop = torch.arange(rows * batch_size, device=model.device) >= batch_size
        stacked = condition.to(model.device).select(torch.arange(batch_size, device=model.device).repeat(rows))
        tokens = torch.zeros(batch_size, layout.order.num_cells, dtype=torch.int64, device=model.device)
        if condition.tokens is not None:
            tokens[:, layout.order.cells[:given].to(model.device)] = condition.tokens.to(model.device) + model.token_offset
        uniforms = noise.uniform("token", (layout.order.num_cells,))
        for index, step in enumerate(steps):
            count, codes = int(step.inputs[-1]) + 1, tokens - model.token_offset
            whole = model.sequence(codes.repeat(rows, 1), stacked, drop, torch.arange(count))
            logits = mix(model, tuple(hidden[:, -len(step.inputs) :] for hidden in whole), step.source.to(model.device))
            progress = Progress(index, len(steps), step.known, step.known + len(step.targets), layout.order.num_cells)
            cond, null = (logits, None) if rows == 1 else logits.chunk(2)
            targets = step.targets.to(model.device)
            filters: dict[str, Any] = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            scale = guidance.at(progress)
            tokens[:, targets] = guided_sample(cond, null, scale, uniforms[:, targets], greedy=sampling.greedy, **filters)
        return as_codes(model, tokens)
