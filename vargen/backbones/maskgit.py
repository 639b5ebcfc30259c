"""MaskGIT-style generators over discrete tokens, as TiTok trains them: a BERT or a U-ViT over masked tokens (Yu et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.decoding.confidence import decode_by_confidence
from vargen.decoding.masked import given_tokens
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.model import Generator, OnStep, Sampling
from vargen.nn.bert import BertLayer
from vargen.nn.block import TransformerBlock
from vargen.nn.norm import LayerNorm
from vargen.noise import Noise
from vargen.space import TokenSpace

PRESETS: dict[str, dict[str, Any]] = {
    "L-32": {"grid": [32], "trunk": "bert", "dim": 768, "depth": 24, "heads": 16, "mlp_hidden": 3072},
    "B-64": {"grid": [64], "trunk": "bert", "dim": 768, "depth": 24, "heads": 16, "mlp_hidden": 3072},
    "S-128": {"grid": [128], "trunk": "uvit", "dim": 1024, "depth": 20, "heads": 16, "mlp_hidden": 4096},
}


class BertTrunk(nn.Module):
    """Embedding norm, then post-norm layers (eps 1e-12)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, 1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(BertLayer(dim, heads, mlp_hidden, dropout=dropout, attn_dropout=dropout) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x)
        return x


class UViTTrunk(nn.Module):
    """Pre-norm blocks with long skips: ``depth`` / 2 blocks in, one in the middle, ``depth`` / 2 out (Bao et al., 2023)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_hidden: int, dropout: float) -> None:
        super().__init__()

        def block() -> TransformerBlock:
            rates: dict[str, Any] = {"mlp_dropout": dropout, "attn_dropout": dropout, "dropout": dropout}
            return TransformerBlock(dim, heads, mlp_hidden, norm_eps=1e-5, qkv_bias=False, **rates)

        self.entry = nn.ModuleList(block() for _ in range(depth // 2))
        self.middle = block()
        self.exit = nn.ModuleList(block() for _ in range(depth // 2))
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth // 2))
        self.norm = LayerNorm(dim, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.entry:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block, skip in zip(self.exit, self.skips):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)))
        return self.norm(x)


class MaskGIT(Generator):
    """Bidirectional generator of discrete tokens: a class token and the tokens, of which some are masked, in; logits out.

    Args:
        grid: token grid, any number of axes.
        codebook_size: codes; the vocabulary also holds the mask, the classes and the null class.
        trunk: ``"bert"`` or ``"uvit"``.
        dim, depth, heads, mlp_hidden: of the trunk; a U-ViT has ``depth`` + 1 blocks.
        num_classes: classes.
        condition_dropout: probability that a training sample's class becomes the null one.
        label_smoothing, known_weight: of the loss: smoothing, and the weight of tokens that were not masked.
        dropout: on attention weights and all outputs.

    Raises:
        ConfigError: an unknown trunk, or an odd depth of a U-ViT.
    """

    edits = True

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (32,),
        codebook_size: int = 4096,
        trunk: str = "bert",
        dim: int = 768,
        depth: int = 24,
        heads: int = 16,
        mlp_hidden: int = 3072,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        known_weight: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if trunk not in ("bert", "uvit"):
            raise ConfigError(f"trunk '{trunk}': expected 'bert' or 'uvit'")
        if trunk == "uvit" and depth % 2:
            raise ConfigError(f"depth {depth}: a U-ViT has as many blocks in as out, expected an even number")
        self.embedding = nn.Embedding(codebook_size + 1 + num_classes + 1, dim)
        self.position_table = nn.Parameter(torch.zeros(math.prod(grid) + 1, dim))
        self.network = (BertTrunk if trunk == "bert" else UViTTrunk)(dim, depth, heads, mlp_hidden, dropout)
        self.output = nn.Linear(dim, codebook_size)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.position_table, std=0.02)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), codebook_size=self.config.codebook_size)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class",)

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    def forward(self, ids: Tensor, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Logits ``(B, K, V)`` of ids ``(B, K)``, where the codebook size stands for masked cells.

        Args:
            labels: int64 ``(B,)``; drop: bool ``(B,)``, samples whose class is dropped.
        """
        if drop is not None:
            labels = labels.masked_fill(drop, self.config.num_classes)
        tokens = torch.cat([labels.unsqueeze(1) + self.config.codebook_size + 1, ids], dim=1)
        hidden = self.network(self.embedding(tokens) + self.position_table)
        return self.output(hidden[:, 1:])

    def training_losses(self, tokens: Tensor, condition: Condition, noise: Noise | None = None) -> dict[str, Tensor]:
        """Cross-entropy with label smoothing over all tokens, those not masked weighing ``known_weight``.

        The mask rate is arccos(u) / (pi / 2) for a uniform u per sample, at least one token.
        """
        ids = self.space.check(tokens).flatten(1)
        noise = noise or Noise.fresh(self.check_condition(condition, len(ids)), ids.device)
        labels = self._labels(condition)
        cells = ids.shape[1]
        rate = noise.uniform("mask_rate").acos() / (math.pi / 2)
        count = (cells * rate).round().clamp(min=1)
        mask = noise.permutation("mask", cells) < count.unsqueeze(1)
        drop = noise.uniform("condition_dropout") < self.config.condition_dropout
        logits = self(ids.masked_fill(mask, self.config.codebook_size), labels, drop)
        return {"loss": self.masked_cross_entropy(logits, ids, mask)}

    def masked_cross_entropy(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The loss of logits ``(B, K, V)`` against ids ``(B, K)``, with ``mask`` True where the input was masked."""
        loss = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none", label_smoothing=self.config.label_smoothing)
        weight = torch.where(mask, 1.0, self.config.known_weight)
        return (loss * weight).sum() / (weight.sum() + 1e-8)

    def _labels(self, condition: Condition) -> Tensor:
        if condition.class_labels is None:
            raise VargenError("MaskGIT needs class labels: pass class_labels")
        return condition.class_labels.to(self.device)

    def generate(
        self,
        condition: Condition,
        *,
        batch_size: int | None = None,
        noise: Noise | None = None,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        steps: int = 8,
        anneal_softmax: bool = True,
        known: Tensor | None = None,
        tokens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Tokens ``(B, *grid)`` in ``steps`` passes (twice as many with guidance).

        ``sampling.temperature`` scales the Gumbel noise (the papers' randomize temperature); top-k and top-p do not apply. With
        ``known`` and ``tokens`` the masked rest of given tokens is filled (editing).
        """
        if options:
            raise VargenError(f"MaskGIT.generate has no option '{next(iter(options))}'")
        sampling = sampling or Sampling()
        if sampling.top_k or sampling.top_p < 1:
            raise VargenError("MaskGIT draws by Gumbel noise and confidence: top_k and top_p do not apply, set temperature")
        batch = self.check_condition(condition, batch_size)
        labels = self._labels(condition)
        held, given = given_tokens(self.space, batch, known, tokens)
        noise = (noise or Noise.fresh(batch)).to(self.device)
        training = self.training
        self.eval()

        def logits(ids: Tensor, rows: int) -> Tensor:
            drop = torch.arange(rows * batch, device=ids.device) >= batch
            return self(ids.repeat(rows, 1), labels.repeat(rows), drop)

        try:
            out = decode_by_confidence(
                logits,
                self.space,
                batch,
                noise,
                steps,
                guidance or Guidance(),
                sampling.temperature,
                anneal_softmax,
                held,
                None if given is None else given.flatten(1),
                on_step,
            )
        finally:
            self.train(training)
        return out.unflatten(1, self.space.token_shape)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
