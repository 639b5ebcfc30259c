"""Post-norm transformer layers as in BERT (Devlin et al., 2019): every sub-layer is ``x = LayerNorm(x + f(x))``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vargen.nn.attention import Attention, CrossAttention
from vargen.nn.mlp import MLP
from vargen.nn.norm import LayerNorm


class PostNormMLP(nn.Module):
    """``LayerNorm(x + down(gelu(up(x))))``."""

    def __init__(self, dim: int, hidden: int, *, norm_eps: float = 1e-12, dropout: float = 0.0) -> None:
        super().__init__()
        self.mlp = MLP(dim, hidden, dropout=dropout)
        self.norm = LayerNorm(dim, norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention to a context if there is one, feed-forward; each is followed by its norm.

    Args:
        dim, heads: width and attention heads.
        mlp_hidden: hidden width of the feed-forward layer.
        context_dim: width of the context of the cross-attention; None for a layer without one.
        dropout, attn_dropout: after every output projection, and on the attention weights.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_hidden: int,
        *,
        context_dim: int | None = None,
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        rates: dict[str, Any] = {"attn_dropout": attn_dropout, "dropout": dropout}
        self.attn = Attention(dim, heads, **rates)
        self.norm = LayerNorm(dim, norm_eps)
        self.cross = None if context_dim is None else CrossAttention(dim, context_dim, heads, **rates)
        self.norm_cross = None if context_dim is None else LayerNorm(dim, norm_eps)
        self.feed = PostNormMLP(dim, mlp_hidden, norm_eps=norm_eps, dropout=dropout)

    def attend(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The layer without its feed-forward part, for models whose token kinds have feed-forward layers of their own."""
        x = self.norm(x + self.attn(x, mask=mask, causal=causal))
        if context is not None and self.cross is not None and self.norm_cross is not None:
            x = self.norm_cross(x + self.cross(x, context))
        return x

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, dim)``.

        Args:
            context: ``(B, M, context_dim)`` for layers with cross-attention.
            mask: bool, broadcastable to ``(B, heads, N, N)``, True where a query sees a key.
            causal: position i sees positions up to i; give either this or a mask.
        """
        return self.feed(self.attend(x, context, mask, causal))
