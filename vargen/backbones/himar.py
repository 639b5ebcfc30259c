"""Hi-MAR: masked autoregression in two phases, the first of which gives the second low-resolution pivots (arXiv 2505.20288)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import reduce
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.config import check_keys
from vargen.decoding.masked import MaskedStep, given_tokens, masked_steps, plan
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.heads.diffusion import DiffusionHead
from vargen.heads.dit import TokenDiT
from vargen.heads.make import token_head
from vargen.model import Generator, OnStep, Sampling, StepInfo
from vargen.nn.block import TransformerBlock
from vargen.nn.init import initialise
from vargen.nn.masking import ConditionSlots, drop_rows, pad_visible, positions_where, put, take, truncated_normal_rate
from vargen.nn.mode import evaluating
from vargen.nn.norm import LayerNorm
from vargen.noise import Noise
from vargen.space import TokenSpace

PIVOTS, DENSE = 0, 1


def _preset(dim: int, depth: int, heads: int, head: tuple[int, int], dense_head: tuple[int, int, int]) -> dict[str, Any]:
    return {
        "dim": dim,
        "encoder_depth": depth,
        "decoder_depth": depth,
        "heads": heads,
        "head_depth": head[0],
        "head_width": head[1],
        "dense_head_depth": dense_head[0],
        "dense_head_width": dense_head[1],
        "dense_head_heads": dense_head[2],
        "num_classes": 1000,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "B": _preset(768, 12, 12, (6, 1024), (6, 512, 8)),
    "L": _preset(1024, 16, 16, (8, 1280), (8, 512, 8)),
    "H": _preset(1280, 20, 16, (12, 1536), (12, 768, 12)),
}


class ScaleAwareStack(nn.Module):
    """Pre-norm blocks whose scales and gates depend on the phase (section 3.4).

    One vector per phase goes through SiLU and a linear layer to scale and gate of attention, scale and gate of the MLP; every block
    multiplies it by a gain and adds an offset of its own. Fresh blocks are plain ones: gains 0, offsets 0 for scales, 1 for gates.
    """

    def __init__(
        self, depth: int, dim: int, heads: int, mlp_hidden: int, norm_eps: float, attn_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.phases = nn.Embedding(2, dim)
        self.modulation = nn.Linear(dim, 4 * dim)
        self.gains = nn.Parameter(torch.zeros(depth, 2, 4 * dim))
        self.offsets = nn.Parameter(torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(dim).expand(depth, 2, -1).clone())
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                heads,
                mlp_hidden,
                norm_eps=norm_eps,
                attn_dropout=attn_dropout,
                dropout=dropout,
                mlp_dropout=dropout,
                mlp_hidden_dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = LayerNorm(dim, norm_eps)

    def forward(self, x: Tensor, phase: int) -> Tensor:
        shared = self.modulation(F.silu(self.phases.weight[phase]))
        for block, gain, offset in zip(self.blocks, self.gains[:, phase], self.offsets[:, phase]):
            scale_a, gate_a, scale_m, gate_m = (shared * gain + offset).chunk(4)
            x = block(x, modulation=(None, scale_a, gate_a, None, scale_m, gate_m))
        return self.norm(x)


class HiMAR(Generator):
    """Two-level masked generator: phase 1 draws pivots token by token, phase 2 the dense grid with a diffusion transformer.

    Tokens are flat, pivots before dense cells, each in raster order (:class:`vargen.tokenizers.pyramid.PyramidTokenizer`).

    Args:
        grid, pivots: dense and pivot grids; the first is a multiple of the second.
        channels: length of a token of either level.
        dim, encoder_depth, decoder_depth, heads, mlp_ratio: size of both stacks.
        buffer_size, num_classes, text_dim: condition slots, see :class:`vargen.nn.masking.ConditionSlots`.
        head_width, head_depth, head_steps: diffusion MLP of the pivots.
        dense_head_width, dense_head_depth, dense_head_heads, dense_head_ratio, dense_head_steps: diffusion transformer.
        condition_dropout: share of training samples whose condition becomes the null one, drawn anew in each phase.
        mask_ratio_min: lower end of the mask rates of pivots in training.
        pivot_rate: share of training samples that see pivots in phase 2, to which it rises over the share ``pivot_warmup`` of
            training.
        head_repeats: draws of time and noise per sample and training step.

    Raises:
        ConfigError: grids that are not multiples.
    """

    scheduled = True
    edits = True
    coarse_from = "pixels"

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        pivots: Sequence[int] = (8, 8),
        channels: int = 16,
        dim: int = 768,
        encoder_depth: int = 12,
        decoder_depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        buffer_size: int = 64,
        num_classes: int | None = None,
        text_dim: int | None = None,
        head_width: int = 1024,
        head_depth: int = 6,
        head_steps: int | str = "100",
        dense_head_width: int = 512,
        dense_head_depth: int = 6,
        dense_head_heads: int = 8,
        dense_head_ratio: float = 4.0,
        dense_head_steps: int | str = "250",
        condition_dropout: float = 0.1,
        attn_dropout: float = 0.1,
        dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        pivot_rate: float = 0.25,
        pivot_warmup: float = 0.125,
        head_repeats: int = 4,
    ) -> None:
        super().__init__()
        if len(grid) != 2 or len(pivots) != 2 or any(g % p for g, p in zip(grid, pivots)):
            raise ConfigError(f"grid {tuple(grid)} with pivots {tuple(pivots)}: expected two axes, each a multiple of its pivots")
        self.num_pivots, self.num_dense = math.prod(pivots), math.prod(grid)
        cells = self.num_pivots + self.num_dense

        def stack(depth: int) -> ScaleAwareStack:
            return ScaleAwareStack(depth, dim, heads, int(dim * mlp_ratio), norm_eps, attn_dropout, dropout)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * 0.02)

        self.condition = ConditionSlots(buffer_size, dim, num_classes, text_dim)
        self.input = nn.Linear(channels, dim)
        self.pivot_input = nn.Linear(channels, dim)
        self.pivot_hidden = nn.Linear(dim, dim)
        self.encoder_positions = table(2, buffer_size + cells, dim)
        self.input_norm = LayerNorm(dim, 1e-6)
        self.encoder = stack(encoder_depth)
        self.bridge = nn.Linear(dim, dim)
        self.mask_tokens = table(2, cells, dim)
        self.decoder_positions = table(2, buffer_size + cells, dim)
        self.decoder = stack(decoder_depth)
        self.head_positions = table(1, cells, dim)
        self.pivot_null = table(1, self.num_pivots, channels)
        self.apply(initialise)
        self.head = token_head("diffusion", channels, dim, head_width, head_depth, head_steps)
        net = TokenDiT(channels, dim, dense_head_width, dense_head_depth, dense_head_heads, grid, ratio=dense_head_ratio)
        self.dense_head = DiffusionHead(net, variance="large", spacing=str(dense_head_steps))

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.pivots), tuple(self.config.grid)), channels=self.config.channels)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return self.condition.kinds

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    def trunk(self, phase: int, slots: Tensor, pivots: Tensor, dense: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``(R, P + N, dim)`` of a phase.

        Args:
            slots: condition ``(R, K, dim)``; pivots: embedded ``(R, P, dim)``; dense: tokens ``(R, N, C)``.
            mask: bool ``(R, P + N)``, True at unknown cells, as many in every row. The encoder does not see these; the decoder sees
                a learned token of the phase and place there.
        """
        x = torch.cat([slots, pivots, self.input(dense.to(slots.dtype))], dim=1)
        x = self.input_norm(x + self.encoder_positions[phase])
        mask = pad_visible(mask, slots.shape[1])
        kept = positions_where(~mask, int((~mask[0]).sum()))
        x = self.bridge(self.encoder(take(x, kept), phase))
        empty = F.pad(self.mask_tokens[phase], (0, 0, slots.shape[1], 0)).to(x.dtype)
        x = put(empty.expand(len(x), -1, -1), kept, x)
        return self.decoder(x + self.decoder_positions[phase], phase)[:, slots.shape[1] :] + self.head_positions

    def training_losses(
        self, tokens: Tensor, condition: Condition, noise: Noise | None = None, progress: float = 1.0
    ) -> dict[str, Tensor]:
        """Weighted losses of both phases; mask rates are one draw for the whole batch, from its first sample.

        ``loss`` is their sum by share of cells, with factors 2 and 0.75 (0.4 and 0.6 for 64 pivots and 256 dense cells).
        """
        self.space.check(tokens)
        batch = self.check_condition(condition, len(tokens))
        noise = noise or Noise.fresh(batch, tokens.device)
        small, dense = tokens.split([self.num_pivots, self.num_dense], dim=1)
        pivot_loss, z, pivot_mask = self._pivot_loss(small, dense, condition, noise)
        warmup = self.config.pivot_warmup
        rate = self.config.pivot_rate * (min(1.0, progress / warmup) if warmup else 1.0)
        seen = noise.uniform("pivot_dropout") > 1 - rate
        pivots = self.pivot_states(z.detach(), pivot_mask & seen[:, None])
        dense_loss = self._dense_loss(dense, pivots, condition, noise)
        cells = self.num_pivots + self.num_dense
        loss = 2 * self.num_pivots / cells * pivot_loss + 0.75 * self.num_dense / cells * dense_loss
        return {"loss": loss, "pivots": pivot_loss.detach(), "dense": dense_loss.detach()}

    def _slots(self, condition: Condition, noise: Noise, phase: int) -> Tensor:
        return self.condition(condition, noise.uniform("condition_dropout", at=(phase,)) < self.config.condition_dropout)

    def _pivot_loss(self, small: Tensor, dense: Tensor, condition: Condition, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Phase 1: the loss of masked pivots, the hidden states of all, and the mask; no dense token is known."""
        rate = truncated_normal_rate(float(noise.uniform("mask_rate")[0]), self.config.mask_ratio_min)
        masked = math.ceil(self.num_pivots * rate)
        order = noise.permutation("pivot_order", self.num_pivots)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :masked], True)
        everything = F.pad(mask, (0, self.num_dense), value=True)
        slots = self._slots(condition, noise, PIVOTS)
        z = self.trunk(PIVOTS, slots, self.pivot_input(small.to(slots.dtype)), dense, everything)[:, : self.num_pivots]
        places = positions_where(mask, masked)
        copies = torch.arange(self.config.head_repeats, device=places.device)
        at = (places.unsqueeze(1), copies[None, :, None])
        loss = self.head.loss(take(small, places).unsqueeze(1), take(z, places).unsqueeze(1), noise, at)
        return loss.mean(), z, mask

    def _dense_loss(self, dense: Tensor, pivots: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """Phase 2: squared error over the whole grid, counted at masked cells (and averaged over all)."""
        masked = math.ceil(self.num_dense * math.cos(float(noise.uniform("dense_mask_rate")[0]) * math.pi / 2))
        order = noise.permutation("dense_order", self.num_dense)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :masked], True)
        slots = self._slots(condition, noise, DENSE)
        z = self.trunk(DENSE, slots, pivots, dense, F.pad(mask, (self.num_pivots, 0)))[:, self.num_pivots :]

        copies = torch.arange(self.config.head_repeats, device=dense.device)
        t = noise.integers("dense_timestep", len(self.dense_head.chain), (), at=(copies[None],)).flatten().unsqueeze(1)
        draws = noise.normal("dense_diffusion", dense.shape[1:], at=(copies[None],)).flatten(0, 1)
        tokens, z, mask = (v.repeat_interleave(len(copies), dim=0) for v in (dense, z, mask))
        error, _ = self.dense_head.losses(tokens, z, draws, t)
        return (error * mask).mean()

    def pivot_states(self, z: Tensor, drawn: Tensor) -> Tensor:
        """What phase 2 sees as pivots: hidden states of phase 1 where ``drawn`` (bool ``(R, P)``), a learned stand-in elsewhere."""
        return torch.where(drawn.unsqueeze(-1), self.pivot_hidden(z), self.pivot_input(self.pivot_null))

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
        """Tokens ``(B, P + N, C)``. Options:

        steps: steps of phase 2, 4 by default; pivot_steps: of phase 1, half the number of pivots by default.
        pivot_guidance: a Guidance, or a scale with the schedule of ``guidance``, for phase 1; that of phase 2 by default.
        head_steps, dense_head_steps: sampling steps of the heads, their own by default.
        known, tokens: dense cells to keep and the tokens of both levels, see :func:`vargen.decoding.masked.given_tokens`.
        """
        known_options = ("steps", "pivot_steps", "pivot_guidance", "head_steps", "dense_head_steps", "known", "tokens")
        check_keys(options, known_options, "HiMAR.generate")
        batch = self.check_condition(condition, batch_size)
        guidance = guidance or Guidance()
        pivot_guidance = options.get("pivot_guidance", guidance)
        if not isinstance(pivot_guidance, Guidance):
            pivot_guidance = Guidance(float(pivot_guidance), schedule=guidance.schedule)
        if max(guidance.rows, pivot_guidance.rows) > 2:
            raise VargenError("HiMAR has a condition and a null condition: guidance with a partial condition is not possible")
        noise = (noise or Noise.fresh(batch)).to(self.device)
        known, given = given_tokens(self.space, batch, options.get("known"), options.get("tokens"))
        tokens = torch.zeros(batch, *self.space.token_shape, device=self.device)
        known_pivots = None
        if known is not None and given is not None:
            known = known.to(self.device)
            known_pivots = self._pivots_inside(known)
            everything = torch.cat([known_pivots, known], dim=1).unsqueeze(-1)
            tokens = torch.where(everything, given.to(self.device), tokens)
        temperature = (sampling or Sampling()).temperature
        pivot_plan = plan(self.num_pivots, options.get("pivot_steps") or max(1, self.num_pivots // 2), known_pivots)
        dense_plan = plan(self.num_dense, options.get("steps") or min(4, self.num_dense), known)
        pivot_steps = masked_steps(noise.permutation("pivot_order", self.num_pivots), pivot_plan, known_pivots)
        dense_steps = masked_steps(noise.permutation("dense_order", self.num_dense), dense_plan, known)
        report = partial(self._report, on_step, len(pivot_plan) + len(dense_plan))
        with evaluating(self):
            tokens, z = self._draw_pivots(
                condition, tokens, pivot_steps, noise, pivot_guidance, temperature, options.get("head_steps"), report
            )
            drawn = None if known_pivots is None else ~known_pivots
            return self._draw_dense(
                condition, tokens, z, drawn, dense_steps, noise, guidance, temperature, options.get("dense_head_steps"), report
            )

    def _pivots_inside(self, known: Tensor) -> Tensor:
        """Pivots all of whose dense cells are known: bool ``(B, P)``."""
        (height, width), (rows, columns) = self.config.grid, self.config.pivots
        unknown = (~known).float().unflatten(1, (height, width))
        blocks = reduce(unknown, "b (h p) (w q) -> b (h w)", "max", h=rows, w=columns)
        inside = blocks == 0
        if (inside.sum(1) != inside[0].sum()).any():
            raise VargenError("the masks of a batch keep different numbers of pivots: edit these images one at a time")
        return inside

    def start(self, condition: Condition, batch_size: int, rows: int) -> Tensor:
        """Condition slots ``(rows * B, K, dim)``: of the condition, then, for guidance, of the null condition."""
        stacked = condition.to(self.device).select(torch.arange(batch_size, device=self.device).repeat(rows))
        return self.condition(stacked, drop_rows(rows, batch_size, self.device))

    def _draw_pivots(
        self,
        condition: Condition,
        tokens: Tensor,
        steps: Iterator[MaskedStep],
        noise: Noise,
        guidance: Guidance,
        temperature: float,
        head_steps: int | str | None,
        report: Any,
    ) -> tuple[Tensor, Tensor]:
        """Phase 1: tokens with pivots drawn, and the conditional hidden state from which each was drawn ``(B, P, dim)``."""
        rows, shape = guidance.rows, (self.config.channels,)
        slots = self.start(condition, len(tokens), rows)
        small, dense = tokens.split([self.num_pivots, self.num_dense], dim=1)
        states = slots.new_zeros(len(tokens), self.num_pivots, self.config.dim)
        for step in steps:
            positions = step.positions
            pivots = self.pivot_input(small.to(slots.dtype)).repeat(rows, 1, 1)
            mask = F.pad(step.mask, (0, self.num_dense), value=True).repeat(rows, 1)
            z = take(self.trunk(PIVOTS, slots, pivots, dense.repeat(rows, 1, 1), mask), positions.repeat(rows, 1))
            states = put(states, positions, z[: len(tokens)])
            sample = self.head.sample(
                z,
                noise.normal("token_start", shape, at=(positions,)),
                lambda level, positions=positions: noise.normal("token_step", shape, at=(positions, level)),  # type: ignore[misc]
                combine=partial(guidance.combine, scale=guidance.at(step.progress)),
                steps=head_steps,
                temperature=temperature,
            )
            small = put(small, positions, sample.tokens)
            report(PIVOTS, step, torch.cat([small, dense], dim=1))
        return torch.cat([small, dense], dim=1), states

    def _draw_dense(
        self,
        condition: Condition,
        tokens: Tensor,
        z_pivots: Tensor,
        drawn: Tensor | None,
        steps: Iterator[MaskedStep],
        noise: Noise,
        guidance: Guidance,
        temperature: float,
        head_steps: int | str | None,
        report: Any,
    ) -> Tensor:
        """Phase 2: in every step the head draws the whole grid around the known cells, of which the step's positions are kept."""
        rows, shape = guidance.rows, (self.num_dense, self.config.channels)
        slots = self.start(condition, len(tokens), rows)
        small, dense = tokens.split([self.num_pivots, self.num_dense], dim=1)
        drawn = torch.ones_like(z_pivots[..., 0], dtype=torch.bool) if drawn is None else drawn
        pivots = self.pivot_states(z_pivots, drawn).repeat(rows, 1, 1)
        for step in steps:
            mask = F.pad(step.mask, (self.num_pivots, 0)).repeat(rows, 1)
            z = self.trunk(DENSE, slots, pivots, dense.repeat(rows, 1, 1), mask)[:, self.num_pivots :]
            sample = self.dense_head.sample(
                z,
                noise.normal("dense_start", shape, at=(step.index,)),
                lambda level, index=step.index: noise.normal("dense_step", shape, at=(index, level)),  # type: ignore[misc]
                combine=partial(guidance.combine, scale=guidance.at(step.progress)),
                steps=head_steps,
                temperature=temperature,
                known=(~step.mask.unsqueeze(-1), dense),
            )
            dense = torch.where(step.mask.unsqueeze(-1), sample.tokens, dense)
            report(DENSE, step, torch.cat([small, dense], dim=1))
        return torch.cat([small, dense], dim=1)

    def _report(self, on_step: OnStep | None, total: int, phase: int, step: MaskedStep, tokens: Tensor) -> None:
        if on_step is not None:
            known = (~step.mask_after).float().mean(0)
            known = F.pad(known, (0, self.num_dense)) if phase == PIVOTS else F.pad(known, (self.num_pivots, 0), value=1.0)
            index = step.index if phase == PIVOTS else total - step.total + step.index
            on_step(StepInfo(index, total, tokens, known, level=phase))
