"""MAR: masked autoregression over continuous tokens with a diffusion head (Li et al. 2024, arXiv 2406.11838)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.config import check_keys
from vargen.decoding.masked import decode_masked, given_tokens, masked_steps, plan
from vargen.errors import VargenError
from vargen.flow.sample import HeadSample
from vargen.guidance import Guidance
from vargen.heads.diffusion import Combine
from vargen.heads.make import token_head
from vargen.model import Generator, OnStep, Sampling
from vargen.nn.init import initialise
from vargen.nn.masking import ConditionSlots, drop_rows, pad_visible, positions_where, put, take, truncated_normal_rate
from vargen.nn.mode import evaluating
from vargen.nn.norm import LayerNorm
from vargen.nn.vit import Transformer
from vargen.noise import Noise
from vargen.space import TokenSpace


def _preset(dim: int, depth: int, heads: int, head_depth: int, head_width: int) -> dict[str, Any]:
    return {
        "encoder_dim": dim,
        "encoder_depth": depth,
        "encoder_heads": heads,
        "decoder_dim": dim,
        "decoder_depth": depth,
        "decoder_heads": heads,
        "head_depth": head_depth,
        "head_width": head_width,
        "num_classes": 1000,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "B": _preset(768, 12, 12, 6, 1024),
    "L": _preset(1024, 16, 16, 8, 1280),
    "H": _preset(1280, 20, 16, 12, 1536),
    "L-small-head": _preset(1024, 16, 16, 3, 1024),
}


class MAR(Generator):
    """Masked encoder-decoder over a grid of continuous tokens; a small diffusion (or flow) network draws each token.

    Args:
        grid: token grid (rows, columns), or any shape; cells are numbered in raster order.
        channels: length of a token.
        encoder_dim, encoder_depth, encoder_heads: the stack that sees the condition slots and the known tokens only.
        decoder_dim, decoder_depth, decoder_heads: the stack that sees everything.
        mlp_ratio: hidden width of feed-forward layers over width.
        buffer_size: number of condition slots.
        num_classes, text_dim: condition, see :class:`vargen.nn.masking.ConditionSlots`.
        head, head_width, head_depth, head_steps: see :func:`vargen.heads.make.token_head`.
        condition_dropout: share of training samples whose condition becomes the null one.
        attn_dropout, dropout: in training, on attention weights; after attention and feed-forward outputs.
        mask_ratio_min: lower end of the mask rates in training.
        head_repeats: draws of time and noise per token and training step.
    """

    edits = True

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        channels: int = 16,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        buffer_size: int = 64,
        num_classes: int | None = None,
        text_dim: int | None = None,
        head: str = "diffusion",
        head_width: int = 1024,
        head_depth: int = 6,
        head_steps: int | str = "100",
        condition_dropout: float = 0.1,
        attn_dropout: float = 0.1,
        dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        head_repeats: int = 4,
    ) -> None:
        super().__init__()
        cells = math.prod(grid)

        def stack(depth: int, dim: int, heads: int) -> Transformer:
            return Transformer(
                depth,
                dim,
                heads,
                int(dim * mlp_ratio),
                final_norm=True,
                norm_eps=norm_eps,
                attn_dropout=attn_dropout,
                dropout=dropout,
                mlp_dropout=dropout,
                mlp_hidden_dropout=dropout,
            )

        def table(rows: int, dim: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(1, rows, dim))

        self.condition = ConditionSlots(buffer_size, encoder_dim, num_classes, text_dim)
        self.input = nn.Linear(channels, encoder_dim)
        self.encoder_positions = table(buffer_size + cells, encoder_dim)
        self.input_norm = LayerNorm(encoder_dim, 1e-6)
        self.encoder = stack(encoder_depth, encoder_dim, encoder_heads)
        self.bridge = nn.Linear(encoder_dim, decoder_dim)
        self.mask_token = table(1, decoder_dim)
        self.decoder_positions = table(buffer_size + cells, decoder_dim)
        self.decoder = stack(decoder_depth, decoder_dim, decoder_heads)
        self.head_positions = table(cells, decoder_dim)
        self.apply(initialise)
        for parameter in (self.encoder_positions, self.mask_token, self.decoder_positions, self.head_positions):
            nn.init.normal_(parameter, std=0.02)
        self.head = token_head(head, channels, decoder_dim, head_width, head_depth, head_steps)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), channels=self.config.channels)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return self.condition.kinds

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    def start(self, condition: Condition, batch_size: int, rows: int = 1) -> Tensor:
        """Condition slots ``(rows * B, K, D)``: of the condition, then, for guidance, of the null condition."""
        stacked = condition.to(self.device).select(torch.arange(batch_size, device=self.device).repeat(rows))
        return self.condition(stacked, drop_rows(rows, batch_size, self.device))

    def hidden(self, state: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Hidden states ``(rows * B, L, D)``, see :class:`vargen.decoding.masked.MaskedModel`; all samples know as many tokens."""
        slots, rows = state.shape[1], len(state) // len(tokens)
        tokens, mask = tokens.repeat(rows, 1, 1), pad_visible(mask, slots).repeat(rows, 1)
        x = torch.cat([state, self.input(tokens.to(state.dtype))], dim=1)
        x = self.input_norm(x + self.encoder_positions)
        kept = positions_where(~mask, int((~mask[0]).sum()))
        x = self.bridge(self.encoder(take(x, kept)))
        x = put(self.mask_token.to(x.dtype).expand(len(x), mask.shape[1], -1), kept, x)
        return self.decoder(x + self.decoder_positions)[:, slots:] + self.head_positions

    def training_losses(self, tokens: Tensor, condition: Condition, noise: Noise | None = None) -> dict[str, Tensor]:
        """Denoising loss of masked tokens; the mask rate is one draw for the whole batch, from its first sample."""
        tokens = self.space.check(tokens).flatten(1, -2)
        batch = self.check_condition(condition, len(tokens))
        noise = noise or Noise.fresh(batch, tokens.device)
        cells = tokens.shape[1]
        rate = truncated_normal_rate(float(noise.uniform("mask_rate")[0]), self.config.mask_ratio_min)
        masked = math.ceil(cells * rate)
        order = noise.permutation("order", cells)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :masked], True)
        drop = noise.uniform("condition_dropout") < self.config.condition_dropout
        z = self.hidden(self.condition(condition, drop), tokens, mask)
        # unmasked tokens have no loss, so the head does not see them
        places = positions_where(mask, masked)
        copies = torch.arange(self.config.head_repeats, device=places.device)
        at = (places.unsqueeze(1), copies[None, :, None])
        return {"loss": self.head.loss(take(tokens, places).unsqueeze(1), take(z, places).unsqueeze(1), noise, at).mean()}

    def draw(
        self,
        z: Tensor,
        positions: Tensor,
        noise: Noise,
        combine: Combine | None = None,
        temperature: float = 1.0,
        head_steps: int | str | None = None,
    ) -> HeadSample:
        """Tokens at ``positions``, see :class:`vargen.decoding.masked.MaskedModel`; ``head_steps`` if not the head's own."""
        shape = (self.config.channels,)
        start = noise.normal("token_start", shape, at=(positions,))
        return self.head.sample(
            z,
            start,
            lambda level: noise.normal("token_step", shape, at=(positions, level)),
            combine=combine,
            steps=head_steps,
            temperature=temperature,
        )

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

        steps: decoding steps, 64 or one per cell by default.
        head_steps: sampling steps of the head, its own by default.
        decoding: another driver than the plain loop, such as :class:`vargen.decoding.continuous.ContinuousSpeculation`.
        known, tokens: cells to keep and their tokens (inpainting, outpainting), see :func:`vargen.decoding.masked.given_tokens`.
        """
        check_keys(options, ("steps", "head_steps", "decoding", "known", "tokens"), "MAR.generate")
        batch = self.check_condition(condition, batch_size)
        guidance = guidance or Guidance()
        if guidance.rows > 2:
            raise VargenError("MAR has a condition and a null condition: guidance with a partial condition is not possible")
        noise = (noise or Noise.fresh(batch)).to(self.device)
        cells = math.prod(self.config.grid)
        known, given = given_tokens(self.space, batch, options.get("known"), options.get("tokens"))
        tokens = torch.zeros(batch, cells, self.config.channels, device=self.device)
        if known is not None and given is not None:
            known, given = known.to(self.device), given.to(self.device).flatten(1, -2)
            tokens = torch.where(known.unsqueeze(-1), given, tokens)
        counts = plan(cells, options.get("steps") or min(64, cells), known)
        decoding = options.get("decoding")
        with evaluating(self):
            run = partial(decode_masked, self, self.start(condition, batch, guidance.rows))
            tokens = (run if decoding is None else partial(decoding.decode, self, condition))(
                tokens,
                masked_steps(noise.permutation("order", cells), counts, known),
                noise,
                guidance,
                (sampling or Sampling()).temperature,
                on_step,
                head_steps=options.get("head_steps"),
            )
        return tokens.reshape(batch, *self.space.token_shape)
