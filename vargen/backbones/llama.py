"""What LlamaGen, NAR and LARP's generator share: a Llama-style decoder. Each adds its layout, heads and positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator, PredictionHead
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.layout import Layout
from vargen.nn.block import TransformerBlock
from vargen.nn.embed import ClassEmbedding, TextEmbedding
from vargen.nn.mlp import swiglu_hidden
from vargen.nn.norm import RMSNorm
from vargen.nn.rope import axial_angles, rotary_table
from vargen.space import TokenSpace


def grid_coordinates(cell: Tensor, grid: Sequence[int]) -> Tensor:
    """Coordinates of cells (flat numbers, -1 for none) on a grid, int64 ``(S, axes)``; zeros for none."""
    rest, columns = cell.clamp(min=0), []
    for size in reversed(grid):
        columns.append(rest % size)
        rest = rest // size
    return torch.stack(columns[::-1], dim=1)


def llama_block(
    dim: int, heads: int, mlp_hidden: int | None = None, norm_eps: float = 1e-5, mlp_dropout: float = 0.0, dropout: float = 0.0
) -> TransformerBlock:
    """Llama's block: RMSNorm, attention without biases, SwiGLU of Llama's width unless ``mlp_hidden`` is given."""
    return TransformerBlock(
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
        dropout=dropout,
    )


def grid_rotary(cell: Tensor, grid: Sequence[int], dim: int, heads: int, base: float = 10000.0) -> Tensor:
    """Rotary rows ``(S, head_dim / 2, 2)`` over a grid: the angles of each slot's ``cell``, all zeros (cos included) for -1.

    Raises:
        ConfigError: heads whose width is not a multiple of twice the number of axes.
    """
    head_dim, multiple = dim // heads, 2 * len(grid)
    if dim % heads or head_dim % multiple:
        raise ConfigError(
            f"width {dim} of {heads} heads: rotary embedding over {len(grid)} axes needs a multiple of {multiple} per head"
        )
    return rotary_table(axial_angles(grid_coordinates(cell, grid), head_dim, base), zero=cell < 0)


class LlamaDecoder(CausalGenerator):
    """RMSNorm, rotary or no rotary attention without biases, SwiGLU; a class token or text tokens as prefix.

    Subclasses call :meth:`build` with a layout, then set what their positions need. Configurations have ``grid``,
    ``codebook_size``, ``num_classes`` and ``text_dim``, ``text_length`` where they are conditioned on them.
    """

    def build(
        self,
        layout: Layout,
        codebook_size: int,
        dim: int,
        heads: int,
        head_depths: Sequence[int],
        *,
        mlp_hidden: int | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_length: int = 120,
        norm_eps: float = 1e-5,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
        zero_heads: Sequence[int] = (0,),
    ) -> None:
        """Creates all modules.

        Args:
            head_depths: number of blocks below each prediction head, increasing; the last one is the depth of the model.
            zero_heads: heads whose output layer starts at zero.
        """
        if dim % heads:
            raise ConfigError(f"width {dim} is not divisible by {heads} heads")
        self.layout = layout
        if num_classes is not None:
            self.classes = ClassEmbedding(num_classes, dim)
        if text_dim is not None:
            self.text = TextEmbedding(text_dim, text_length, dim)
        self.tokens = nn.Embedding(codebook_size, dim)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            llama_block(dim, heads, mlp_hidden, norm_eps, mlp_dropout, residual_dropout) for _ in range(head_depths[-1])
        )
        self.output_heads = nn.ModuleList(
            PredictionHead(RMSNorm(dim, norm_eps), dim, codebook_size, depth) for depth in head_depths
        )
        self.apply(_initialise)
        for head in zero_heads:
            nn.init.zeros_(self.output_heads[head].linear.weight)  # type: ignore[union-attr, arg-type]

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((tuple(self.config.grid),), codebook_size=self.config.codebook_size)

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class" if self.config.num_classes is not None else "text", "tokens")

    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        """The class token, or the left-padded text tokens; the null caption keeps the padding mask of the caption it replaces."""
        name = type(self).__name__
        if self.config.num_classes is not None:
            if condition.class_labels is None:
                raise VargenError(f"{name} needs class labels: pass class_labels")
            labels = condition.class_labels.to(drop.device)
            return self.classes(labels.masked_fill(drop, self.config.num_classes)).unsqueeze(1), None
        if condition.text is None:
            raise VargenError(f"{name} needs text: pass prompts or text features")
        if condition.text.features.shape[-1] != self.config.text_dim:
            raise VargenError(f"text features of width {condition.text.features.shape[-1]}: expected {self.config.text_dim}")
        text = condition.text.left_padded(self.config.text_length).to(drop.device)
        return self.text(text.features.to(self.dtype), drop), text.mask


def require_one_condition(name: str, num_classes: int | None, text_dim: int | None) -> None:
    """Raises ConfigError unless exactly one kind of condition is configured."""
    if (num_classes is None) == (text_dim is None):
        raise ConfigError(f"{name} is conditioned on classes (num_classes) or on text (text_dim): give exactly one")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
