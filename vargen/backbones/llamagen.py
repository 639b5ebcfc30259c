"""LlamaGen's GPT: Llama blocks over a raster grid of ids, with class or text tokens as prefix (Sun et al., 2024, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vargen.backbones.llama import LlamaDecoder, grid_rotary, require_one_condition
from vargen.layout import shifted
from vargen.order import Order


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


class LlamaGen(LlamaDecoder):
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
        require_one_condition("LlamaGen", num_classes, text_dim)
        self.condition_dropout = condition_dropout
        # tables of places have values even where parameters are only declared (meta device)
        with torch.device("cpu"):
            layout = shifted(Order.raster(grid), 1 if text_dim is None else text_length)
        self.build(
            layout,
            codebook_size,
            dim,
            heads,
            [depth],
            mlp_hidden=mlp_hidden,
            num_classes=num_classes,
            text_dim=text_dim,
            text_length=text_length,
            norm_eps=norm_eps,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            mlp_dropout=mlp_dropout,
        )
        with torch.device("cpu"):
            self.register_buffer("rotary_rows", grid_rotary(layout.cell, grid, dim, heads, rope_base), persistent=False)

    def rotary(self, slots: Tensor) -> Tensor:
        return self.rotary_rows[slots]  # type: ignore[index]
