"""The pre-norm transformer block that most systems share; their differences are its arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vargen.nn.adaln import AdaLN, modulate
from vargen.nn.attention import Attention, CrossAttention
from vargen.nn.cache import KVCache
from vargen.nn.mlp import MLP, GatedMLP
from vargen.nn.norm import make_norm

Modulation = Sequence[Tensor | None]


class TransformerBlock(nn.Module):
    """``x += gate_a * attn(mod_a(norm1(x))); x += cross(norm_cross(x), context); x += gate_m * mlp(mod_m(norm2(x)))``.

    Args:
        dim, heads: width and attention heads.
        mlp_hidden: hidden width of the feed-forward layer.
        norm, norm_eps, norm_affine: kind of norm, see :func:`vargen.nn.norm.make_norm`.
        gated: feed-forward layer with a gate (SwiGLU, GEGLU); ``act`` is its activation.
        mlp_bias: biases of the feed-forward layer.
        mlp_dropout, mlp_hidden_dropout: dropout after the feed-forward output and on its hidden layer.
        condition_dim: if given, the block computes its own modulation from a condition vector of this width.
        context_dim: if given, a cross-attention to a context of this width stands between attention and feed-forward.
        attention: further arguments of :class:`vargen.nn.attention.Attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_hidden: int,
        *,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        gated: bool = False,
        act: str | None = None,
        mlp_bias: bool = True,
        mlp_dropout: float = 0.0,
        mlp_hidden_dropout: float = 0.0,
        condition_dim: int | None = None,
        zero_init: bool = True,
        context_dim: int | None = None,
        **attention: object,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, dim, norm_eps, norm_affine)
        self.attn = Attention(dim, heads, **attention)  # type: ignore[arg-type]
        if context_dim is not None:
            self.norm_cross = make_norm(norm, dim, norm_eps, norm_affine)
            self.cross = CrossAttention(dim, context_dim, heads)
        self.norm2 = make_norm(norm, dim, norm_eps, norm_affine)
        layer = GatedMLP if gated else MLP
        act = act or ("silu" if gated else "gelu")
        self.mlp = layer(dim, mlp_hidden, act=act, bias=mlp_bias, dropout=mlp_dropout, hidden_dropout=mlp_hidden_dropout)
        self.adaln = AdaLN(condition_dim, dim, 6, zero_init) if condition_dim is not None else None

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        modulation: Modulation | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, dim)``.

        Args:
            condition: ``(B, N or 1, condition_dim)`` for blocks that compute their own modulation.
            modulation: or the six tensors themselves, broadcastable to x: shift, scale, gate of attention, then of the MLP; None
                leaves that one out.
        """
        if self.adaln is not None and condition is not None:
            modulation = self.adaln(condition)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation if modulation is not None else (None,) * 6
        y = self.attn(modulate(self.norm1(x), shift_a, scale_a), mask=mask, causal=causal, rotary=rotary, cache=cache, layer=layer)
        x = x + (y if gate_a is None else gate_a * y)
        if context is not None:
            x = x + self.cross(self.norm_cross(x), context, context_mask)
        y = self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return x + (y if gate_m is None else gate_m * y)
