"""FlexTok's generator: next-token prediction over ordered 1D tokens that may stop after any number (Bachmann et al., 2025)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator, PredictionHead
from vargen.condition import Condition, TextFeatures
from vargen.errors import ConfigError, VargenError
from vargen.layout import shifted
from vargen.nn.block import TransformerBlock
from vargen.nn.mlp import MLP
from vargen.nn.norm import make_norm
from vargen.order import Order
from vargen.space import TokenSpace

# class-conditional sizes of the paper; text-conditional ones are 64 wide per block
PRESETS: dict[str, dict[str, Any]] = {
    name: {"depth": depth, "dim": dim, "heads": dim // 64, "num_classes": 1000}
    for name, depth, dim in (
        ("49M", 10, 640),
        ("85M", 12, 768),
        ("201M", 16, 1024),
        ("393M", 20, 1280),
        ("679M", 24, 1536),
        ("1.33B", 30, 1920),
    )
} | {
    f"d{depth}-t2i": {"depth": depth, "dim": 64 * depth, "heads": depth, "num_classes": None, "text_dim": 2048}
    for depth in (12, 18, 26, 36)
}


class FlexTokGenerator(CausalGenerator):
    """Pre-norm decoder without rotary embedding; position 0 is a start token, to which the class embedding is added.

    A dropped class is the zero vector. Text enters through cross-attention in every block; dropped text is the empty string, whose
    features :meth:`set_null_text` stores with the model.

    Args:
        length: tokens of an image.
        codebook_size, dim, depth, heads: vocabulary, width, blocks, attention heads.
        mlp_hidden: hidden width of the feed-forward layer, four times the width by default.
        num_classes: class-conditional model; or
        text_dim: text-conditional model over features of this width.
        null_text_length: features of the empty string (T5 has one, of its end token).
        norm, qk_norm, gated: kind of norm, of head norm (or None), and whether the feed-forward layer has a gate.
        norm_eps, condition_dropout, dropout: of norms; of conditions; of embeddings and block outputs.

    Raises:
        ConfigError: both or neither of ``num_classes`` and ``text_dim``, or widths that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        length: int = 256,
        codebook_size: int = 64000,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_hidden: int | None = None,
        num_classes: int | None = None,
        text_dim: int | None = None,
        null_text_length: int = 1,
        norm: str = "layer",
        qk_norm: str | None = None,
        gated: bool = False,
        norm_eps: float = 1e-5,
        condition_dropout: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (text_dim is None):
            raise ConfigError("FlexTokGenerator is conditioned on classes (num_classes) or on text (text_dim): give exactly one")
        self.condition_dropout = condition_dropout
        with torch.device("cpu"):
            self.layout = shifted(Order.raster((length,)), 1)
        self.start_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.position_table = nn.Parameter(torch.randn(length, dim) * 0.02)
        if num_classes is not None:
            self.classes = nn.Embedding(num_classes, dim)
        else:
            assert text_dim is not None
            self.text = MLP(text_dim, text_dim, dim, act="gelu_tanh", bias=False)
            self.register_buffer("null_text", torch.zeros(null_text_length, text_dim))
        self.tokens = nn.Embedding(codebook_size, dim)
        self.token_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                heads,
                mlp_hidden or 4 * dim,
                norm=norm,
                norm_eps=norm_eps,
                gated=gated,
                mlp_dropout=dropout,
                context_dim=dim if text_dim is not None else None,
                qk_norm=qk_norm,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.output_heads = nn.ModuleList([PredictionHead(make_norm(norm, dim, norm_eps), dim, codebook_size, depth)])
        self.apply(_initialise)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(((self.config.length,),), codebook_size=self.config.codebook_size, ordered=True)

    @property
    def num_classes(self) -> int | None:
        return self.config.num_classes

    @property
    def conditioning(self) -> tuple[str, ...]:
        return ("class" if self.config.num_classes is not None else "text", "tokens")

    def set_null_text(self, text: TextFeatures) -> None:
        """Stores the features of the empty string, one text, as the null condition."""
        features = text.features[0][text.mask[0]]
        if features.shape != self.null_text.shape:
            raise VargenError(
                f"null text of shape {tuple(features.shape)}: expected {tuple(self.null_text.shape)}, see null_text_length"
            )
        self.null_text.copy_(features)  # type: ignore[operator]

    def prefix(self, condition: Condition, drop: Tensor) -> tuple[Tensor, Tensor | None]:
        start = self.start_token.expand(len(drop), 1, -1)
        if self.config.num_classes is None:
            return start, None
        if condition.class_labels is None:
            raise VargenError("FlexTokGenerator needs class labels: pass class_labels")
        label = self.classes(condition.class_labels.to(drop.device)).masked_fill(drop.unsqueeze(1), 0.0)
        return start + label.unsqueeze(1), None

    def context(self, condition: Condition, drop: Tensor) -> dict[str, Any]:
        if self.config.num_classes is not None:
            return {}
        if condition.text is None:
            raise VargenError("FlexTokGenerator needs text: pass prompts or text features")
        text = condition.text.to(drop.device, self.dtype)
        if text.features.shape[-1] != self.config.text_dim:
            raise VargenError(f"text features of width {text.features.shape[-1]}: expected {self.config.text_dim}")
        null: Tensor = self.null_text  # type: ignore[assignment]
        length = max(text.features.shape[1], len(null))
        features = nn.functional.pad(text.features, (0, 0, 0, length - text.features.shape[1]))
        mask = nn.functional.pad(text.mask, (0, length - text.mask.shape[1]))
        places = torch.arange(length, device=drop.device) < len(null)
        features = torch.where(drop[:, None, None], nn.functional.pad(null, (0, 0, 0, length - len(null))), features)
        mask = torch.where(drop[:, None], places, mask)
        return {"context": self.text(features), "context_mask": mask}

    def embed_slots(self, x: Tensor, slots: Tensor) -> Tensor:
        return x + self.position_table[slots]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
