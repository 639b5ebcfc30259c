"""Throughput of training: steps of every system at equal size, eager and compiled, beside what the device can multiply."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from vargen.bench.device import PeakMemory, ceilings, describe, seconds
from vargen.bench.run import Settings
from vargen.bench.systems import Subject
from vargen.decoding.counting import counting
from vargen.noise import Noise
from vargen.train.compiling import compile_network

logger = logging.getLogger(__name__)
MODES = ("eager", "compiled")


def bench_training(settings: Settings, device: torch.device, scale: float = 1.0) -> dict[str, Any]:
    """The whole record, with a row for every system and mode.

    A step is the loss of a batch of random tokens, its gradient, and AdamW; weights are float32, as in our recipes, and losses are
    computed under autocast where ``settings.dtype`` is another. The batch size is the largest of the settings.

    Args:
        scale: of the operations that measure ceilings, see :func:`vargen.bench.device.ceilings`.
    """
    deadline, batch_size = settings.deadline(), max(settings.batch_sizes)
    limits = ceilings(device, settings.torch_dtype, scale=scale)
    rows = []
    for name in settings.systems:
        for mode in MODES:
            row: dict[str, Any] = {"system": name, "mode": mode, "batch_size": batch_size}
            rows.append(row)
            if time.monotonic() > deadline:
                row["left_out"] = "no time left"
                continue
            logger.info("training of %s, %s", name, mode)
            try:
                _measure(Step(name, settings, batch_size, device), mode, settings.repeats, limits["flops_per_second"], row)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {**describe(device), "settings": asdict(settings), "ceilings": limits, "rows": rows}


class Step:
    """One optimizer step of a fresh model, over and over on one batch."""

    def __init__(self, name: str, settings: Settings, batch_size: int, device: torch.device) -> None:
        self.subject, self.batch_size = Subject.build(name, settings.size, device, torch.float32), batch_size
        self.dtype = settings.torch_dtype
        self.model = self.subject.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.tokens = self._tokens(device)
        self.count = 0

    def _tokens(self, device: torch.device) -> Tensor:
        space, noise = self.model.space, Noise(0, self.batch_size, device)
        if space.codebook_size is None:
            return noise.normal("tokens", tuple(space.token_shape))
        return noise.integers("tokens", space.codebook_size, tuple(space.token_shape))

    def loss(self) -> Tensor:
        self.count += 1
        device = self.model.device
        condition, noise = self.subject.condition(self.batch_size), Noise(1, self.batch_size, device).at(self.count)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model.training_losses(self.tokens, condition, noise)["loss"]

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _measure(step: Step, mode: str, repeats: int, limit: float, row: dict[str, Any]) -> None:
    device = step.model.device
    with counting(step.model) as cost:
        step.loss().backward()
    step.optimizer.zero_grad()
    if mode == "compiled" and not compile_network(step.model, "true", device):
        row["left_out"] = "nothing can be compiled here"
        return
    for _ in range(2 if mode == "compiled" else 1):
        step()
    with PeakMemory(device) as memory:
        step()
    middle = statistics.median(seconds(step, device) for _ in range(repeats))
    tokens = step.model.space.num_tokens * step.batch_size
    row |= {
        "parameters": sum(p.numel() for p in step.model.parameters()),
        "milliseconds_per_step": 1000 * middle,
        "images_per_second": step.batch_size / middle,
        "tokens_per_second": tokens / middle,
        "peak_memory_bytes": memory.bytes,
        "flops": cost.flops,
        "model_flop_utilisation": cost.flops / middle / limit,
    }
