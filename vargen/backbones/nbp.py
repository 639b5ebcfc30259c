"""Next Block Prediction: a GPT whose blocks of tokens each predict the next block (Ren et al., 2025, arXiv 2502.07737)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator, PredictionHead
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.layout import hybrid, shifted
from vargen.nn.block import TransformerBlock
from vargen.nn.norm import LayerNorm
from vargen.order import Order
from vargen.space import TokenSpace

_SIZES = {"base": (24, 16, 1536), "xl": (24, 32, 2048), "3b": (32, 32, 3072)}
_UCF = {"condition_vocabulary": 32000, "condition_length": 8}

PRESETS: dict[str, dict[str, Any]] = {
    f"{data}-{name}": {"depth": depth, "heads": heads, "dim": dim, **condition}
    for data, condition in (("k600", {}), ("ucf", _UCF))
    for name, (depth, heads, dim) in _SIZES.items()
}


class NBP(CausalGenerator):
    """Semi-autoregressive generator: attention is bidirectional inside a block of ``block_size`` raster tokens, causal between.

    Without a condition the first block must be given (frame prediction, ``condition.tokens``). With ``condition_vocabulary`` the
    sequence starts hybrid: condition tokens, a begin token, the first block token by token, ``block_size - 1`` middle tokens that
    complete the first real block, then block by block; num_tokens / block_size + block_size - 1 passes.

    One embedding and output table holds, in this order, the begin and middle tokens (``block_size``), the condition's vocabulary
    and the codebook; sampling runs over all of it, and ids outside the codebook are clamped, as in the released code.

    Args:
        grid: token grid, raster order.
        codebook_size: number of codes.
        block_size: tokens per block, a divisor of the number of tokens.
        dim, depth, heads: width, number of blocks, attention heads.
        condition_vocabulary: ids of the condition: classes, or a text tokenizer's vocabulary; None for frame prediction.
        condition_length: condition tokens: 1 takes class labels, more take ``condition.text_ids``, padded by the text tokenizer
            (padding is visible, as in the released models).
        max_positions: rows of the learned position table.
        token_dropout, residual_dropout: on embeddings, and on attention and feed-forward outputs.

    Raises:
        ConfigError: a sequence longer than the position table.
        VargenError: a block size that does not divide.
    """

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (5, 16, 16),
        codebook_size: int = 64000,
        block_size: int = 16,
        dim: int = 1536,
        depth: int = 24,
        heads: int = 16,
        condition_vocabulary: int | None = None,
        condition_length: int = 1,
        max_positions: int = 5120,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.hybrid = condition_vocabulary is not None
        self.condition_dropout = 0.0
        with torch.device("cpu"):
            blocks = Order.blocks(grid, block_size)
            self.layout = hybrid(grid, block_size, condition_length) if self.hybrid else shifted(blocks, 0)
        if self.layout.num_inputs > max_positions:
            raise ConfigError(f"max_positions {max_positions}: expected at least the {self.layout.num_inputs} tokens of a sequence")
        self.token_offset = block_size + (condition_vocabulary or 0) if self.hybrid else 0
        vocabulary = self.token_offset + codebook_size
        self.tokens = nn.Embedding(vocabulary, dim)
        self.position_table = nn.Parameter(torch.zeros(max_positions, dim))
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, 4 * dim, norm_eps=1e-5, dropout=residual_dropout, mlp_dropout=residual_dropout)
            for _ in range(depth)
        )
        self.output_heads = nn.ModuleList([PredictionHead(LayerNorm(dim), dim, vocabulary, depth)])
        self.apply(_initialise)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), codebook_size=self.config.codebook_size)

    @property
    def num_classes(self) -> int | None:
        return self.config.condition_vocabulary if self.hybrid and self.config.condition_length == 1 else None

    @property
    def conditioning(self) -> tuple[str, ...]:
        if not self.hybrid:
            return ("tokens",)
        return ("class" if self.config.condition_length == 1 else "text_ids", "tokens")

    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """Condition tokens, shifted behind the special tokens, and the begin token, id 0."""
        if drop.any():
            raise VargenError("NBP has no unconditional row (its models were trained without): use guidance_scale 1")
        if not self.hybrid:
            return self.tokens.weight.new_zeros(len(drop), 0, self.config.dim), None
        ids = condition.text_ids if self.num_classes is None else condition.class_labels
        if ids is None:
            raise VargenError(f"NBP needs {'class_labels' if self.num_classes is not None else 'text_ids'}")
        ids = ids.to(drop.device).reshape(len(drop), -1)
        length, vocabulary = self.config.condition_length, self.config.condition_vocabulary
        if ids.shape[1] != length or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise VargenError(f"condition ids of shape {tuple(ids.shape)}: expected {length} ids per sample in 0..{vocabulary - 1}")
        begin = torch.zeros(len(ids), 1, dtype=ids.dtype, device=ids.device)
        return self.tokens(torch.cat([ids + self.config.block_size, begin], dim=1)), None

    def extra_tokens(self, numbers: Tensor) -> Tensor:
        return self.tokens(numbers + 1)

    def embed_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        return x + self.position_table[slots]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
