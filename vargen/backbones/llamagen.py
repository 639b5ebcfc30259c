"""LlamaGen's GPT: Llama blocks over a raster grid of ids, with class or text tokens as prefix (Sun et al., 2024, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator, PredictionHead
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.layout import shifted
from vargen.nn.block import TransformerBlock
from vargen.nn.embed import ClassEmbedding, TextEmbedding
from vargen.nn.mlp import swiglu_hidden
from vargen.nn.norm import RMSNorm
from vargen.nn.rope import axial_angles, rotary_table
from vargen.order import Order
from vargen.space import TokenSpace


def _preset(depth: int, heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"depth": depth, "heads": heads, "dim": dim, "num_classes": 1000, **more}


PRESETS: dict[str, dict[str, Any]] = {
    "B": _preset(12, 12, 768),
    "L": _preset(24, 16, 1024),
    "XL": _preset(36, 20, 1280),
    "XXL": _preset(48, 24, 1536),
    "3B": _preset(24, 32, 3200),
    "1B": _preset(22, 32, 2048),
    "XXXL": _preset(48, 40, 2560),
    "7B": _preset(32, 32, 4096),
    "XL-t2i": {"depth": 36, "heads": 20, "dim": 1280, "num_classes": None, "text_dim": 2048},
}


class LlamaGen(CausalGenerator):
    """Next-token generator over an h x w grid.

    Args:
        grid: token grid (rows, columns); the raster order runs over it.
        codebook_size: vocabulary.
        dim, depth, heads: width, number of blocks, attention heads.
        mlp_hidden: hidden width of SwiGLU; Llama's rule with multiples of 256 by default.
        num_classes: class-conditional model; or
        text_dim, text_length: text-conditional model over features of this width, padded on the left to this length.
        condition_dropout: probability that a training sample's condition becomes the null one.
        token_dropout, residual_dropout, mlp_dropout: on embeddings, attention outputs, feed-forward outputs.

    Raises:
        ConfigError: both or neither of ``num_classes`` and ``text_dim``, or widths that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        grid: Sequence[int] = (16, 16),
        codebook_size: int = 16384,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_hidden: int | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_length: int = 120,
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (text_dim is None):
            raise ConfigError("LlamaGen is conditioned on classes (num_classes) or on text (text_dim): give exactly one")
        if dim % (4 * heads):
            raise ConfigError(f"width {dim} over {heads} heads: 2D rotary embedding needs head widths that are multiples of 4")
        self.condition_dropout = condition_dropout
        # tables of places have values even where parameters are only declared (meta device)
        with torch.device("cpu"):
            self.layout = shifted(Order.raster(grid), 1 if text_dim is None else text_length)
            rotary_rows = self._rotary_rows(columns=grid[1], head_dim=dim // heads, base=rope_base)
        if num_classes is not None:
            self.classes = ClassEmbedding(num_classes, dim)
        else:
            assert text_dim is not None
            self.text = TextEmbedding(text_dim, text_length, dim)
        self.tokens = nn.Embedding(codebook_size, dim)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                heads,
                mlp_hidden or swiglu_hidden(dim),
                norm="rms",
                norm_eps=norm_eps,
                gated=True,
                mlp_bias=False,
                mlp_dropout=mlp_dropout,
                qkv_bias=False,
                out_bias=False,
                dropout=residual_dropout,
            )
            for _ in range(depth)
        )
        self.output_heads = nn.ModuleList([PredictionHead(RMSNorm(dim, norm_eps), dim, codebook_size, depth)])
        self.register_buffer("rotary_rows", rotary_rows, persistent=False)
        self.apply(self._initialise)
        nn.init.zeros_(self.output_heads[0].linear.weight)  # type: ignore[union-attr, arg-type]

    def _rotary_rows(self, columns: int, head_dim: int, base: float) -> Tensor:
        """A row per slot: the angles of the slot's own cell, all zeros (cos included) for condition slots."""
        cell = self.layout.cell
        coordinates = torch.stack([cell.clamp(min=0) // columns, cell.clamp(min=0) % columns], dim=1)
        return rotary_table(axial_angles(coordinates, head_dim, base), zero=cell < 0)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), codebook_size=self.config.codebook_size)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class",) if self.config.num_classes is not None else ("text",)

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class token, or the left-padded text tokens; the null caption keeps the padding mask of the caption it replaces."""
        if self.config.num_classes is not None:
            if condition.class_labels is None:
                raise VargenError("LlamaGen needs class labels: pass class_labels")
            labels = condition.class_labels.to(drop.device)
            return self.classes(labels.masked_fill(drop, self.config.num_classes)).unsqueeze(1), None
        if condition.text is None:
            raise VargenError("LlamaGen needs text: pass prompts or text features")
        if condition.text.features.shape[-1] != self.config.text_dim:
            raise VargenError(f"text features of width {condition.text.features.shape[-1]}: expected {self.config.text_dim}")
        text = condition.text.left_padded(self.config.text_length).to(drop.device)
        return self.text(text.features.to(self.dtype), drop), text.mask

    def rotary(self, slots: Tensor) -> Tensor:
        return self.rotary_rows[slots]  # type: ignore[index]
