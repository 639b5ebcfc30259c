"""LARP's generator: next-token prediction over holistic video tokens, by class or from given frames (Wang et al., 2025)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.llama import LlamaDecoder
from vargen.condition import Condition
from vargen.errors import ConfigError, VargenError
from vargen.layout import shifted
from vargen.order import Order
from vargen.space import TokenSpace

PRESETS: dict[str, dict[str, Any]] = {
    name: {"depth": depth, "dim": dim, "heads": heads, "num_classes": 101}
    for name, depth, dim, heads in (
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("LP", 30, 1280, 20),
        ("XL", 36, 1280, 20),
        ("XXL", 48, 1536, 24),
        ("XXXL", 48, 2560, 40),
    )
} | {"LP-frame-prediction": {"depth": 30, "dim": 1280, "heads": 20, "num_classes": None}}


class LARPGenerator(LlamaDecoder):
    """Raster-order decoder of ``length`` tokens with a learned position table and no rotary embedding.

    With ``num_classes`` the prefix is one class token. Without, it is the tokens of another clip (``condition.context``, the given
    frames padded to a whole clip) and a separator: frame prediction, which is not guided.

    Args:
        length: tokens per clip.
        codebook_size, dim, depth, heads, mlp_hidden, num_classes, norm_eps, condition_dropout, token_dropout, residual_dropout,
            mlp_dropout: as in LlamaGen.

    Raises:
        ConfigError: widths that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        length: int = 1024,
        codebook_size: int = 8192,
        dim: int = 1280,
        depth: int = 30,
        heads: int = 20,
        mlp_hidden: int | None = None,
        num_classes: int | None = None,
        norm_eps: float = 1e-5,
        condition_dropout: float = 0.1,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        mlp_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if length < 1:
            raise ConfigError(f"length {length}: expected at least one token")
        self.condition_dropout = condition_dropout if num_classes is not None else 0.0
        with torch.device("cpu"):
            layout = shifted(Order.raster((length,)), 1 if num_classes is not None else length + 1)
        self.build(
            layout,
            codebook_size,
            dim,
            heads,
            [depth],
            mlp_hidden=mlp_hidden,
            num_classes=num_classes,
            norm_eps=norm_eps,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            mlp_dropout=mlp_dropout,
        )
        self.position_table = nn.Parameter(torch.randn(layout.num_inputs, dim) * 0.02)
        if num_classes is None:
            self.separator = nn.Parameter(torch.randn(dim) * 0.02)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(((self.config.length,),), codebook_size=self.config.codebook_size)

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class", "tokens") if self.config.num_classes is not None else ("context", "tokens")

    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.num_classes is not None:
            return super().prefix(condition, drop)
        if condition.context is None:
            raise VargenError("frame prediction needs the tokens of the given frames: pass condition.context")
        if drop.any():
            raise VargenError("frame prediction has no unconditional row: use guidance_scale 1")
        context = self.tokens(self.space.check(condition.context).to(drop.device))
        return torch.cat([context, self.separator.to(context.dtype).expand(len(context), 1, -1)], dim=1), None

    def embed_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        return x + self.position_table[slots]
