"""The shared causal decoder: prefix, embedding, blocks, heads at their depths; loss and decoding read the model's layout."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.decoding.engine import Engine
from vargen.decoding.protocols import Decoding, RunBlock, State, run_block
from vargen.errors import VargenError
from vargen.guidance import Guidance
from vargen.layout import Layout, Slots
from vargen.model import Generator, OnStep, Sampling
from vargen.nn.cache import CacheWindow, KVCache
from vargen.noise import Noise


class PredictionHead(nn.Module):
    """Final norm and output layer of one head, applied to the hidden states after ``depth`` blocks."""

    def __init__(self, norm: nn.Module, dim: int, codebook_size: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.norm = norm
        self.linear = nn.Linear(dim, codebook_size, bias=False)


class CausalGenerator(Generator):
    """A causal or block-causal generator of discrete tokens.

    A subclass builds, in ``__init__``: ``tokens`` (``nn.Embedding``), ``blocks`` (``nn.ModuleList`` of blocks with an ``attn``),
    ``output_heads`` (``nn.ModuleList`` of :class:`PredictionHead`, by increasing depth), ``token_dropout`` and the attribute
    ``layout``; and says how its prefix and its positions are made.
    """

    tokens: nn.Embedding
    blocks: nn.ModuleList
    output_heads: nn.ModuleList
    token_dropout: nn.Module
    layout: Layout
    condition_dropout: float
    token_offset: int = 0

    @abstractmethod
    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """Prefix embeddings ``(R, P, width)`` and the mask of valid ones, bool ``(R, P)`` or None.

        ``drop``: bool ``(R,)``, rows whose condition is replaced by the null one.
        """

    def embed_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        """Adds what depends on the slot (absolute positions) to embeddings ``(R, n, width)``; nothing by default."""
        return x

    def rotary(self, slots: Tensor) -> Tensor | None:
        """Rotary rows ``(n, head_dim / 2, 2)`` of ``slots`` (on any device); None without rotary embedding."""
        return None

    def extra_tokens(self, numbers: Tensor) -> Tensor:
        """Embeddings ``(n, width)`` of the layout's extra tokens."""
        raise VargenError(f"{type(self).__name__} has a layout with extra tokens but no embeddings for them")

    def embed(self, prefix: Tensor, ids: Tensor, slots: Tensor | Slots) -> Tensor:
        """Input embeddings ``(R, n, width)`` of ``slots`` (on the CPU, or placed): prefix rows, tokens ``ids`` ``(R, n)``, extra
        tokens."""
        slots = slots if isinstance(slots, Slots) else self.layout.place(slots, prefix.device)
        count = slots.prefix
        parts = [prefix[:, slots.index[:count]], self.tokens(ids[:, count:])]
        x = torch.cat(parts, dim=1) if 0 < count < len(slots) else parts[0 if count else 1]
        if slots.extra is not None:
            extra = self.extra_tokens(slots.extra.clamp(min=0)).to(x.dtype)
            x = torch.where(slots.extra.unsqueeze(1) >= 0, extra, x)
        return self.embed_slots(self.token_dropout(x), slots.index)

    def trunk(
        self,
        x: Tensor,
        slots: Tensor | Slots,
        mask: Tensor | None,
        cache: KVCache | CacheWindow | None,
        run: RunBlock = run_block,
        **block: Any,
    ) -> tuple[Tensor, ...]:
        """All blocks, each called through ``run``; hidden states after each head's norm."""
        rotary = self.rotary(slots.index if isinstance(slots, Slots) else slots.to(x.device))
        causal = mask is None and cache is None
        hidden: list[Tensor] = []
        for depth, layer in enumerate(self.blocks, start=1):
            x = run(layer, x, mask=mask, causal=causal, rotary=rotary, cache=cache, layer=depth - 1, **block)
            hidden.extend(head.norm(x) for head in self.output_heads if head.depth == depth)
        return tuple(hidden)

    def start(self, condition: Condition, batch_size: int, rows: int = 1, capacity: int | None = None) -> State:
        drop = torch.arange(rows * batch_size, device=self.device) >= batch_size
        stacked = condition.to(self.device).select(torch.arange(batch_size, device=self.device).repeat(rows))
        prefix, valid = self.prefix(stacked, drop)
        attn = self.blocks[0].attn
        capacity = self.layout.num_inputs if capacity is None else capacity
        cache = KVCache(len(self.blocks), len(drop), attn.kv_heads, capacity, attn.head_dim, prefix.dtype, prefix.device)  # type: ignore[union-attr, arg-type]
        if valid is not None:
            cache.visible = F.pad(valid, (0, capacity - valid.shape[1]), value=True)
        return State(prefix, cache, self.context(stacked, drop))

    def context(self, condition: Condition, drop: Tensor) -> dict[str, Any]:
        """Further arguments of the blocks, with a row per row of the batch; none by default."""
        return {}

    def forward(self, state: State, ids: Tensor, slots: Tensor | Slots, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        x = self.embed(state.prefix, ids, slots)
        cache = state.cache if state.window is None else state.window
        hidden = self.trunk(x, slots, None if mask is None else mask.to(x.device), cache, state.run, **state.extras)
        if state.window is None:
            state.cache.advance(len(slots))
        return hidden

    def logits(self, hidden: Tensor, head: int = 0) -> Tensor:
        return self.output_heads[head].linear(hidden).float()  # type: ignore[operator, union-attr]

    def sequence(self, tokens: Tensor, condition: Condition, drop: Tensor, slots: Tensor | None = None) -> tuple[Tensor, ...]:
        """One uncached pass over a whole sequence, the training path.

        Args:
            tokens: flat codes ``(B, num_cells)``.
            drop: bool ``(B,)``, samples whose condition is dropped.
            slots: CPU slots, all inputs by default.

        Returns:
            hidden states after each head's norm, ``(B, n, width)`` per head.
        """
        slots = torch.arange(self.layout.num_inputs) if slots is None else slots
        prefix, valid = self.prefix(condition, drop)
        ids = tokens[:, self.layout.cell[slots].clamp(min=0).to(tokens.device)] + self.token_offset
        x = self.embed(prefix, ids, slots)
        mask: Tensor | None = None
        if valid is not None or not self.layout.causal:
            dense = self.layout.mask(slots, slots).to(x.device)[None, None]
            if valid is not None:
                visible = F.pad(valid, (0, len(slots) - valid.shape[1]), value=True)[:, None, None, :]
                dense = (dense & visible) | torch.eye(len(slots), dtype=torch.bool, device=x.device)
            mask = dense
        return self.trunk(x, slots, mask, None, **self.context(condition, drop))

    def assemble(self, hidden: tuple[Tensor, ...]) -> Tensor:
        """Logits ``(B, num_cells, V)`` of every cell that has an edge, zeros elsewhere: the mean over its edges."""
        edges = self.layout.edges.to(hidden[0].device)
        used = edges >= 0
        total: Tensor | None = None
        for head, states in enumerate(hidden):
            logits = self.logits(states[:, edges[head].clamp(min=0)], head)
            if not used[head].all():
                logits = logits * used[head].unsqueeze(-1)
            total = logits if total is None else total + logits
        assert total is not None
        return total if len(hidden) == 1 else total / used.sum(0).clamp(min=1).unsqueeze(-1)

    def training_losses(
        self, tokens: Tensor, condition: Condition, noise: Noise | None = None, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Mean cross-entropy over predicted cells; ``weight`` ``(B,)`` weighs samples (LlamaGen's ``valid``)."""
        self.space.check(tokens)
        batch = self.check_condition(condition, len(tokens))
        noise = noise or Noise.fresh(batch, tokens.device)
        drop = noise.uniform("condition_dropout") < self.condition_dropout
        logits = self.assemble(self.sequence(tokens.flatten(1), condition, drop.to(tokens.device)))
        predicted = (self.layout.edges >= 0).any(0).to(tokens.device)
        loss = F.cross_entropy(logits.transpose(1, 2), tokens.flatten(1) + self.token_offset, reduction="none")[:, predicted]
        if weight is None:
            return {"loss": loss.mean()}
        weight = weight.to(loss.dtype).unsqueeze(1).expand_as(loss)
        return {"loss": (loss * weight).sum() / weight.sum().clamp(min=1)}

    def generate(
        self,
        condition: Condition,
        *,
        batch_size: int | None = None,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        num_tokens: int | None = None,
        decoding: Decoding | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens ``(B, *token_shape)``; with ``num_tokens``, for ordered spaces, the first so many, ``(B, num_tokens)``.

        ``decoding``: another way of decoding than the engine's plain loop, such as :class:`vargen.decoding.lantern.Lantern` or an
        :class:`vargen.decoding.engine.Engine` with compiled steps.
        """
        if num_tokens is not None and not (self.space.ordered and 1 <= num_tokens <= self.space.num_tokens):
            reason = f"expected 1..{self.space.num_tokens}" if self.space.ordered else "this token space has no valid prefixes"
            raise VargenError(f"num_tokens {num_tokens}: {reason}")
        if options:
            raise VargenError(f"{type(self).__name__}.generate has no option '{next(iter(options))}'")
        batch = self.check_condition(condition, batch_size)
        noise = noise or Noise.fresh(batch)
        training = self.training
        self.eval()
        try:
            driver = decoding or Engine()
            tokens = driver.decode(self, condition, batch, noise.to(self.device), guidance, sampling, on_step, num_tokens)  # type: ignore[arg-type]
            return tokens if num_tokens is None else tokens[:, :num_tokens]
        finally:
            self.train(training)
