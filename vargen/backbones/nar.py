"""NAR: tokens at equal Manhattan distance in one step, predicted by a head for each axis (He et al., 2025, arXiv 2503.10696)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.llama import LlamaDecoder, grid_rotary, require_one_condition
from vargen.errors import ConfigError
from vargen.layout import neighboring
from vargen.order import Order


def _image(depth: int, heads: int, dim: int, **more: Any) -> dict[str, Any]:
    return {"depth": depth, "heads": heads, "dim": dim, "num_classes": 1000, **more}


def _video(depth: int, heads: int, dim: int) -> dict[str, Any]:
    common = {"grid": [4, 16, 16], "codebook_size": 8192, "num_classes": 101, "positions": "learned"}
    return {**common, "depth": depth, "heads": heads, "dim": dim}


PRESETS: dict[str, dict[str, Any]] = {
    "B": _image(12, 12, 768),
    "M": _image(18, 16, 1024),
    "L": _image(24, 16, 1024),
    "XL": _image(36, 20, 1280),
    "XXL": _image(48, 24, 1536),
    "XXXL": _image(48, 40, 2560),
    "1B": _image(22, 32, 2048),
    "3B": _image(24, 32, 3200),
    "7B": _image(32, 32, 4096),
    "XL-t2i": {"depth": 36, "heads": 20, "dim": 1280, "num_classes": None, "text_dim": 2048},
    "video-S": _video(12, 6, 384),
    "video-B": _video(12, 12, 768),
    "video-L": _video(24, 16, 1024),
    "video-LP": _video(30, 20, 1280),
    "video-XL": _video(36, 20, 1280),
    "video-XXL": _video(48, 24, 1536),
    "video-XXXL": _video(48, 40, 2560),
}


class NAR(LlamaDecoder):
    """Neighbour-decoding generator over a grid of two or three axes; sum(grid) - axes + 1 passes per sample.

    The head of the last axis branches off after ``depth`` blocks, and each further axis (rows, then frames) one block later. A
    token's logits are the mean of its known neighbours' predictions, in the loss as in decoding.

    Args:
        grid: (rows, columns) or (frames, rows, columns).
        codebook_size, dim, heads, mlp_hidden, num_classes, text_dim, text_length, norm_eps, rope_base, condition_dropout,
            token_dropout, residual_dropout, mlp_dropout: as in LlamaGen.
        depth: blocks below the first head.
        positions: ``"rotary"`` (images) or ``"learned"``, a table with a row per class token and cell (video).

    Raises:
        ConfigError: both or neither of ``num_classes`` and ``text_dim``, unknown positions, or widths that do not divide.
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
        positions: str = "rotary",
        norm_eps: float = 1e-5,
        rope_base: float = 10000.0,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_one_condition("NAR", num_classes, text_dim)
        if positions not in ("rotary", "learned"):
            raise ConfigError(f"positions '{positions}': expected 'rotary' or 'learned'")
        axes = len(grid)
        self.condition_dropout = condition_dropout
        with torch.device("cpu"):
            layout = neighboring(Order.neighbors(grid), 1 if text_dim is None else text_length)
        self.build(
            layout,
            codebook_size,
            dim,
            heads,
            range(depth, depth + axes),
            mlp_hidden=mlp_hidden,
            num_classes=num_classes,
            text_dim=text_dim,
            text_length=text_length,
            norm_eps=norm_eps,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            mlp_dropout=mlp_dropout,
            zero_heads=range(axes) if positions == "learned" else (0,),
        )
        with torch.device("cpu"):
            if positions == "rotary":
                self.register_buffer("rotary_rows", grid_rotary(layout.cell, grid, dim, heads, rope_base), persistent=False)
            # row of the position table that a slot takes: prefix slots first, then cells by their raster number
            place = torch.where(layout.cell >= 0, layout.cell + layout.prefix, torch.arange(layout.num_slots))
            self.register_buffer("place", place, persistent=False)
        if positions == "learned":
            self.position_table = nn.Parameter(torch.randn(layout.num_slots, dim) * 0.02)

    def embed_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        return x + self.position_table[self.place[slots]] if self.config.positions == "learned" else x  # type: ignore[index]

    def rotary(self, slots: Tensor) -> Tensor | None:
        return self.rotary_rows[slots] if self.config.positions == "rotary" else None  # type: ignore[index]
