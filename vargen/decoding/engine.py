"""The decoding engine of causal and block-causal models: one pass per group, guidance rows in one batch, a static cache.

All that changes from pass to pass is a row of numbers on the device (:class:`vargen.decoding.plan.Plan`), and the loop never waits
for the device. The same passes run as they are, padded to a few fixed shapes, through torch.compile, and as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.condition import Condition
from vargen.decoding.compiled import CompiledBlocks, GraphedPasses, compiler
from vargen.decoding.plan import Numbers, Plan, Shape
from vargen.decoding.protocols import CausalModel, RunBlock, run_block
from vargen.decoding.quantize import stored
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance, Progress
from vargen.kernels.dispatch import kernel
from vargen.model import OnStep, Sampling, StepInfo
from vargen.nn.cache import CacheWindow
from vargen.noise import Noise

guided_sample = kernel("guided_sample")


class Run:
    """A batch that is being decoded: buffers that stay where they are, and the passes over them.

    Args:
        scales: guidance scale of every pass of the plan; unused if ``rows`` is 1.
        block: how blocks are called, but for the pass over the prefix.

    Attributes:
        tokens: vocabulary ids ``(B, num_cells + 1)``; the last column takes what padding predicts. Where there was no distribution
            it holds -1, which is reported at the end rather than by the embedding of the next pass.
    """

    def __init__(
        self,
        model: CausalModel,
        plan: Plan,
        condition: Condition,
        noise: Noise,
        rows: int = 1,
        scales: tuple[float, ...] = (1.0,),
        sampling: Sampling | None = None,
        block: RunBlock = run_block,
    ) -> None:
        self.model, self.plan, self.rows, self.block = model, plan, rows, block
        self.sampling = sampling or Sampling()
        self.state = model.start(condition, noise.batch_size, rows, plan.capacity)
        layout, device = model.layout, self.state.prefix.device
        self.layers = self.state.cache.keys.unbind(), self.state.cache.values.unbind()
        self.entries = torch.arange(plan.capacity, device=device)
        # entries behind the last slot are never seen
        rank = layout.rank[: plan.capacity]
        self.rank = F.pad(rank, (0, plan.capacity - len(rank)), value=layout.num_slots).to(device)
        self.scale: float | Tensor = scales[0] if len(set(scales)) == 1 else torch.tensor(scales, device=device)
        self.tokens = torch.zeros(noise.batch_size, layout.order.num_cells + 1, dtype=torch.int64, device=device)
        self.uniforms = self._uniforms(noise)
        self._give(condition)

    def refill(self, condition: Condition, noise: Noise) -> bool:
        """Takes new samples into the same buffers; returns False where they do not fit in."""
        held, prefix = self.state, self.model.layout.prefix
        fresh = self.model.start(condition, noise.batch_size, self.rows, prefix)
        old, new = held.extras | {"prefix": held.prefix}, fresh.extras | {"prefix": fresh.prefix}
        for parts, visible in ((old, held.cache.visible), (new, fresh.cache.visible)):
            if visible is not None:
                parts["visible"] = visible[:, :prefix]
        if {name: part.shape for name, part in old.items()} != {name: part.shape for name, part in new.items()}:
            return False
        for name, part in new.items():
            old[name].copy_(part)
        # entries that are not seen still count as 0 times their value, which must not be what a broken batch left there
        held.cache.keys.zero_()
        held.cache.values.zero_()
        self.uniforms.copy_(self._uniforms(noise))
        self.tokens.zero_()
        self._give(condition)
        return True

    def _uniforms(self, noise: Noise) -> Tensor:
        return F.pad(noise.uniform("token", (self.model.layout.order.num_cells,)), (0, 1))

    def _give(self, condition: Condition) -> None:
        if condition.tokens is not None:
            known = condition.tokens.flatten(1).to(self.tokens.device)
            cells = self.model.layout.order.cells[: known.shape[1]]
            self.tokens[:, cells.to(known.device)] = known + self.model.token_offset

    def logits(self, shape: Shape, numbers: Numbers) -> Tensor:
        """Feeds the slots of a pass; float32 logits ``(rows * B, targets, V)`` of what it predicts."""
        ids = self.tokens[:, numbers.cells].clamp(min=0)
        ids = ids if self.rows == 1 else ids.repeat(self.rows, 1)
        self.state.window = CacheWindow(*self.layers, numbers.places, shape.stop)
        self.state.run = run_block if shape.prefix else self.block
        hidden = self.model.forward(self.state, ids, numbers.fed(shape), self._mask(shape, numbers))
        return mix(self.model, hidden, numbers.source)

    def _mask(self, shape: Shape, numbers: Numbers) -> Tensor | None:
        """Bool ``(rows * B or 1, 1, width, stop)``, or None where everything is seen."""
        visible = self.state.cache.visible
        if visible is None and not shape.masked:
            return None
        mask = self.rank[numbers.slots].unsqueeze(1) >= self.rank[: shape.stop]
        if visible is None:
            return mask[None, None]
        own = numbers.places.unsqueeze(1) == self.entries[: shape.stop]
        return (mask & visible[:, None, None, : shape.stop]) | own

    def step(self, shape: Shape, row: Tensor) -> None:
        """One pass: feeds its slots and draws the tokens that it predicts."""
        numbers = Numbers.unpack(row, shape)
        logits, sampling = self.logits(shape, numbers), self.sampling
        cond, null = (logits, None) if self.rows == 1 else logits.chunk(2)
        drawn = guided_sample(
            cond,
            null,
            self.scale if isinstance(self.scale, float) else self.scale[numbers.index],
            self.uniforms[:, numbers.targets],
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            greedy=sampling.greedy,
        )
        self.tokens.index_copy_(1, numbers.targets, drawn)

    def codes(self) -> Tensor:
        """A copy of the tokens so far, see :func:`as_codes`."""
        return as_codes(self.model, self.tokens[:, :-1])


def as_codes(model: CausalModel, ids: Tensor) -> Tensor:
    """A copy of vocabulary ids ``(B, num_cells)`` as codes on the grid; other entries' ids are clamped into the codebook."""
    space, offset = model.space, model.token_offset
    codes = ids.clone() if offset == 0 else (ids - offset).clamp(0, (space.codebook_size or 1) - 1)
    return codes.unflatten(1, space.token_shape)


def mix(model: CausalModel, hidden: tuple[Tensor, ...], source: Tensor) -> Tensor:
    """Logits of cells: the mean over the heads that predict them. Returns float32 ``(R, targets, V)``.

    Args:
        source: ``(heads, targets)`` on the device, for each head the place within the pass that predicts the cell, -1 for none.
    """
    logits = [model.logits(states[:, place], head) for head, (states, place) in enumerate(zip(hidden, source.clamp(min=0)))]
    if len(hidden) == 1:
        return logits[0]
    used = (source >= 0).unsqueeze(-1)
    return torch.stack([values * use for values, use in zip(logits, used)]).sum(0) / used.sum(0).clamp(min=1)


class Engine:
    """A way of decoding, for ``generate(..., decoding=...)``; keep one to keep what it compiled.

    Args:
        compile: blocks run through torch.compile. Each shape of pass is compiled when it is met first, which takes a while; needs a
            C++ compiler on a CPU, Triton on a GPU.
        graphs: on a GPU, each shape of pass is captured once as a CUDA graph, over buffers that are kept until a call differs in
            model, batch size or settings. Not run on a GPU so far: compare its tokens with the plain engine's before relying on it.
        buckets: number of sizes that groups, and what is read of the cache, are padded to. By default nothing is padded; with
            ``compile`` or ``graphs`` there are four.

    Raises:
        ConfigError: less than one bucket.
    """

    def __init__(self, compile: bool = False, graphs: bool = False, buckets: int | None = None) -> None:
        if buckets is not None and buckets < 1:
            raise ConfigError(f"buckets {buckets}: expected at least one size")
        self.buckets = 4 if buckets is None and (compile or graphs) else buckets
        self.compile, self.graphs = compile, graphs
        self.block: RunBlock = run_block
        if compile:
            self.block = CompiledBlocks()
        self._kept: tuple[Any, Run, GraphedPasses] | None = None

    @torch.no_grad()
    def decode(
        self,
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

        The token of a cell is drawn by inverse CDF of the uniform addressed ("token", cell), so it does not depend on the batch,
        the order of calls, or what else is drawn. ``condition.tokens`` ``(B, n)`` are given: the first n cells in order. With
        ``stop`` only the first ``stop`` cells are generated, the others stay 0.

        Returns:
            int64 ``(B, *space.token_shape)``.

        Raises:
            VargenError: given tokens that end inside a group, more guidance rows than two, a model that produces NaN, or a compiler
                or device that ``compile`` or ``graphs`` lacks.
        """
        guidance, sampling = guidance or Guidance(), sampling or Sampling()
        if guidance.rows > 2:
            raise VargenError(
                "guidance with a partial condition needs a model with three kinds of rows; this one has cond and null"
            )
        layout = model.layout
        given = 0 if condition.tokens is None else condition.tokens.shape[1]
        plan = Plan.of(layout, given, stop, buckets=self.buckets, device=noise.device)
        total, cells = len(plan), layout.order.num_cells
        progress = [Progress(i, total, s.known, s.known + len(s.targets), cells) for i, s in enumerate(plan.steps)]
        scales = tuple(float(guidance.at(p)) for p in progress) or (1.0,)
        with compiler(noise.device) if self.compile else nullcontext():
            run, step = self._run(model, plan, condition, noise, guidance.rows, scales, sampling)
            for index, (shape, row) in enumerate(zip(plan.shapes, plan.rows)):
                step(shape, row)
                if on_step is not None:
                    known = layout.order.step_of <= layout.order.step_of[plan.steps[index].targets[0]]
                    on_step(StepInfo(index, total, run.codes(), known.float().reshape(model.space.token_shape)))
        if (run.tokens[:, :-1] < 0).any():
            raise VargenError("the model produced NaN logits: its weights or its condition are broken")
        return run.codes()

    def _run(
        self, model: Any, plan: Plan, condition: Condition, noise: Noise, rows: int, scales: tuple[float, ...], sampling: Sampling
    ) -> tuple[Run, Callable[[Shape, Tensor], None]]:
        """A run of these samples and its step function; the kept ones with CUDA graphs where these still hold."""
        if not self.graphs:
            run = Run(model, plan, condition, noise, rows, scales, sampling, self.block)
            return run, run.step
        weights = tuple(part.data_ptr() for tensor in chain(model.parameters(), model.buffers()) for part in stored(tensor))
        key = id(model), weights, tuple(plan.shapes), noise.batch_size, rows, scales, sampling
        if self._kept is None or self._kept[0] != key or not self._kept[1].refill(condition, noise):
            self._kept = None  # frees the old buffers before new ones are made
            run = Run(model, plan, condition, noise, rows, scales, sampling, self.block)
            self._kept = key, run, GraphedPasses(run.step, noise.device)
        return self._kept[1], self._kept[2]
