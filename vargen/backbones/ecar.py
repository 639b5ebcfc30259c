"""E-CAR: stages of growing resolution, each a flow from a partly denoised map to a less noisy one (arXiv 2412.14170).

The paper's architecture was not at hand: see :mod:`vargen.flow.multistage` for the formulation, and the class for the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.config import check_keys
from vargen.decoding.masked import refuse_editing
from vargen.errors import ConfigError, VargenError, nearest
from vargen.flow.flow import draw_times, uniform_times
from vargen.flow.multistage import endpoints, jump, pyramid, schedule, upsample
from vargen.guidance import Guidance, Progress
from vargen.heads.dit import TokenDiT
from vargen.heads.flow import FlowHead
from vargen.heads.mlp import Denoiser, TokenMLP
from vargen.model import Generator, OnStep, Sampling, StepInfo
from vargen.nn.cache import KVCache
from vargen.nn.init import initialise
from vargen.nn.masking import ConditionSlots, drop_rows
from vargen.nn.mode import evaluating
from vargen.nn.positions import sincos_2d
from vargen.nn.vit import Transformer
from vargen.noise import Noise
from vargen.order import Order
from vargen.space import TokenSpace

STAGE_INPUTS = ("ends", "starts")

PRESETS: dict[str, dict[str, Any]] = {
    "B": {"dim": 768, "depth": 12, "heads": 12, "head_width": 1024, "head_depth": 6, "num_classes": 1000},
    "L": {"dim": 1024, "depth": 24, "heads": 16, "head_width": 1280, "head_depth": 8, "num_classes": 1000},
}


class ECAR(Generator):
    """A block-causal transformer over one map per stage, whose outputs condition a flow head that is shared by stages.

    Of a stage the transformer sees where the stage before ended, upsampled (nothing in the first), and not the noise that its path
    starts with: hidden states that knew the start would turn the flow into a regression, since start and noisy map together give
    the velocity away in training, where at the start itself only the mean of all pictures is left to predict.

    A stage's tokens see the condition, all tokens of coarser stages and each other; position tables are sine-cosine at the stage's
    own scale, plus a learned vector per stage. The tokenizer's space is the finest grid; coarser maps are averages of it.

    Args:
        grid: finest token grid (rows, columns), divisible by ``2 ** (stages - 1)``.
        channels: length of a token.
        stages: number of stages; one stage is plain flow matching.
        ends: time at which each stage ends, k / stages by default; the starts follow from them.
        dim, depth, heads, mlp_ratio: size of the transformer.
        num_classes, text_dim, text_length: condition slots, see :class:`vargen.nn.masking.ConditionSlots`; one slot without text.
        stage_input: ``ends``, or ``starts`` for the variant in which the transformer sees the start map of each stage.
        head: ``dit`` (over all tokens of a stage) or ``mlp`` (per token, so that a stage's tokens agree only through hidden
            states), with head_width, head_depth, head_heads.
        time_law: of the training times, see :func:`vargen.flow.flow.draw_times`.
        condition_dropout: share of training samples whose condition becomes the null one.
        attn_dropout, dropout: in training, on attention weights; after attention and feed-forward outputs.
        sampling_steps: Euler steps per stage.
        renoise: white noise at the start of every stage; False is the biased variant without.

    Raises:
        ConfigError: a grid that cannot be halved so often, ends that do not fit, or an unknown name.
    """

    reports_flops = True

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        channels: int = 16,
        stages: int = 4,
        ends: Sequence[float] | None = None,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_length: int = 77,
        stage_input: str = "ends",
        head: str = "dit",
        head_width: int = 1024,
        head_depth: int = 6,
        head_heads: int = 8,
        time_law: str = "uniform",
        condition_dropout: float = 0.1,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
        sampling_steps: int = 8,
        renoise: bool = True,
    ) -> None:
        super().__init__()
        halved = 2 ** (stages - 1)
        if stages < 1 or len(grid) != 2 or any(n % halved for n in grid):
            raise ConfigError(f"grid {tuple(grid)} with {stages} stages: expected two sides that can be halved {stages - 1} times")
        self.times = schedule([float(e) for e in ends] if ends is not None else [(k + 1) / stages for k in range(stages)])
        if len(self.times) != stages:
            raise ConfigError(f"{len(self.times)} ends for {stages} stages")
        if stage_input not in STAGE_INPUTS:
            raise ConfigError(f"ECAR stage_input '{stage_input}'{nearest(stage_input, STAGE_INPUTS)}")
        self.order = Order.scales([[n // 2 ** (stages - 1 - k) for n in grid] for k in range(stages)])
        self.condition = ConditionSlots(1 if text_dim is None else text_length, dim, num_classes, text_dim)
        self.input = nn.Linear(channels, dim)
        self.stage_vectors = nn.Embedding(stages, dim)
        table = torch.cat([sincos_2d(dim, level) for level in self.order.levels])
        self.register_buffer("positions", table, persistent=False)
        self.transformer = Transformer(
            depth,
            dim,
            heads,
            int(dim * mlp_ratio),
            final_norm=True,
            attn_dropout=attn_dropout,
            dropout=dropout,
            mlp_dropout=dropout,
        )
        self.apply(initialise)
        nets: dict[str, Any] = {
            "mlp": lambda: TokenMLP(channels, dim, head_width, head_depth, time_scale=1000.0),
            "dit": lambda: TokenDiT(channels, dim, head_width, head_depth, head_heads, None, time_scale=1000.0),
        }
        if head not in nets:
            raise ConfigError(f"ECAR head '{head}'{nearest(head, nets)}")
        net: Denoiser = nets[head]()
        self.head = FlowHead(net, law=time_law, steps=sampling_steps)
        slots = torch.zeros(self.condition.slots, dtype=torch.int64)
        self.rank = torch.cat([slots, self.order.step_of + 1])

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), channels=self.config.channels)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return self.condition.kinds

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    @property
    def num_stages(self) -> int:
        return len(self.order.levels)

    def hidden(self, inputs: Sequence[Tensor], slots: Tensor | None, first: int = 0, cache: KVCache | None = None) -> Tensor:
        """Hidden states of consecutive stages.

        Args:
            inputs: what is seen ``(R, h, w, C)`` of stages ``first``, ``first + 1``, ..., see :meth:`stage_input`.
            slots: condition ``(R, K, dim)`` before the first stage; None behind a cache that holds it.
            cache: keys and values of everything before, to which these are added.

        Returns:
            ``(R, n, dim)``, the stages' cells one after the other.
        """
        cells = torch.arange(self.order.num_cells)[(self.order.level_of >= first) & (self.order.level_of < first + len(inputs))]
        cells = cells.to(inputs[0].device)
        x = self.input(torch.cat([seen.flatten(1, 2) for seen in inputs], dim=1).to(self.dtype))
        stage = self.stage_vectors(self.order.level_of.to(cells.device)[cells])
        x = x + self.positions[cells].to(x.dtype) + stage  # type: ignore[index]
        x = x if slots is None else torch.cat([slots, x], dim=1)
        before = 0 if cache is None else cache.length
        rank = self.rank[: before + x.shape[1]].to(x.device)
        mask = rank[before:].unsqueeze(1) >= rank
        return self.transformer(x, mask=mask, cache=cache)[:, -len(cells) :]

    def training_losses(self, tokens: Tensor, condition: Condition, noise: Noise | None = None) -> dict[str, Tensor]:
        """Squared velocity errors of all stages, summed, each the mean over its positions; the paths come from the data."""
        self.space.check(tokens)
        batch = self.check_condition(condition, len(tokens))
        noise = noise or Noise.fresh(batch, tokens.device)
        starts, ends, inputs = self.paths(pyramid(tokens, self.num_stages), noise)
        drop = noise.uniform("condition_dropout") < self.config.condition_dropout
        z = self.hidden(inputs, self.condition(condition, drop)).split([m.shape[1] * m.shape[2] for m in inputs], dim=1)
        t = draw_times(noise, "time", self.head.law, (self.num_stages,))
        losses = [
            self.head.losses(starts[k].flatten(1, 2), ends[k].flatten(1, 2), z[k], t[:, k : k + 1]).mean()
            for k in range(self.num_stages)
        ]
        named = {f"stage_{k + 1}": loss.detach() for k, loss in enumerate(losses)}
        return {"loss": torch.stack(losses).sum(), **named}

    def paths(self, maps: Sequence[Tensor], noise: Noise) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Starts and ends of all stages' paths through the maps X_1 ... X_K of a latent, and what the transformer sees of each.

        With ``ends`` a stage starts where the jump from the end of the one before leads, as in sampling; with ``starts`` every
        stage has noise of its own.
        """
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        inputs: list[Tensor] = []
        for k, (s, e) in enumerate(self.times):
            draws = noise.normal("stage_noise", maps[k].shape[1:], at=(k,))
            coarse, before = (maps[k - 1], ends[k - 1]) if k else (None, None)
            if coarse is not None and before is not None and self.config.stage_input == "ends":
                # the noise in the jumped map, so that start and end of the path share it
                draws = (jump(before, self.times[k - 1][1], draws) - s * upsample(coarse)) / (1 - s)
            start, end = endpoints(coarse, maps[k], s, e, draws)
            starts.append(start)
            ends.append(end)
            inputs.append(self.stage_input(start, before))
        return starts, ends, inputs

    def stage_input(self, start: Tensor, before: Tensor | None) -> Tensor:
        """What the transformer sees of a stage: its start ``(R, h, w, C)``, or the end of the stage before, None in the first."""
        if self.config.stage_input == "starts":
            return start
        return torch.zeros_like(start) if before is None else upsample(before)

    def generate(
        self,
        condition: Condition,
        *,
        batch_size: int | None = None,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens ``(B, *grid, C)``. Options:

        sampling_steps: Euler steps per stage, a number or one per stage; the model's own by default.

        The temperature scales the initial noise and the noise added between stages. What ``on_step`` is shown of a stage is its map
        at the finest grid, divided by how far it is denoised.
        """
        refuse_editing(options, "ECAR", "every stage denoises the whole picture at once")
        check_keys(options, ("sampling_steps",), "ECAR.generate")
        batch = self.check_condition(condition, batch_size)
        guidance, temperature = guidance or Guidance(), (sampling or Sampling()).temperature
        if guidance.rows > 2:
            raise VargenError("ECAR has a condition and a null condition: guidance with a partial condition is not possible")
        noise = (noise or Noise.fresh(batch)).to(self.device)
        steps = self._steps(options.get("sampling_steps", self.config.sampling_steps))
        with evaluating(self):
            rows = guidance.rows
            stacked = condition.to(self.device).select(torch.arange(batch, device=self.device).repeat(rows))
            slots: Tensor | None = self.condition(stacked, drop_rows(rows, batch, self.device))
            cache = self._cache(rows * batch)
            shape = (*self.order.levels[0], self.config.channels)
            x = noise.normal("stage_noise", shape, at=(0,)) * temperature
            before: Tensor | None = None
            for k, (_, end) in enumerate(self.times):
                z = self.hidden([self.stage_input(x, before).repeat(rows, 1, 1, 1)], slots, k, cache)
                slots = None
                progress = Progress(k, self.num_stages, entity=k, entities=self.num_stages)
                combine = partial(guidance.combine, scale=guidance.at(progress)) if rows > 1 else None
                sample = self.head.integrate(z, x.flatten(1, 2), uniform_times(steps[k], 0.0, 1.0), combine=combine)
                before = x = sample.tokens.unflatten(1, self.order.levels[k])
                if on_step is not None:
                    on_step(self._info(k, x, end))
                if k + 1 < self.num_stages:
                    draws = noise.normal("stage_noise", (*self.order.levels[k + 1], self.config.channels), at=(k + 1,))
                    x = jump(x, end, draws * temperature if self.config.renoise else torch.zeros_like(draws))
        return x

    def _steps(self, steps: Any) -> list[int]:
        steps = [steps] * self.num_stages if isinstance(steps, int) else [int(n) for n in steps]
        if len(steps) != self.num_stages or min(steps) < 1:
            raise VargenError(f"sampling_steps {steps}: expected a positive number, or one for each of {self.num_stages} stages")
        return steps

    def _cache(self, batch_size: int) -> KVCache:
        attn = self.transformer.blocks[0].attn
        count = len(self.transformer.blocks)
        return KVCache(count, batch_size, attn.heads, len(self.rank), attn.head_dim, self.dtype, self.device)  # type: ignore[union-attr, arg-type]

    def _info(self, stage: int, x: Tensor, end: float) -> StepInfo:
        shown = upsample(x, 2 ** (self.num_stages - 1 - stage)) / end
        return StepInfo(stage, self.num_stages, shown, torch.full(self.space.shape, end), stage)
