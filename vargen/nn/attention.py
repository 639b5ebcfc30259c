"""Attention with a selectable backend, and the attention layers that blocks are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError
from vargen.nn.cache import KVCache
from vargen.nn.norm import make_norm
from vargen.nn.rope import apply_rotary

BACKENDS = ("sdpa", "eager", "flex", "xformers")
_backend = "sdpa"


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Selects the backend inside the block: ``sdpa`` (default), ``eager``, ``flex`` (no gradient on CPU) or ``xformers``.

    Raises:
        ConfigError: unknown name, or the library is not installed.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"attention backend '{name}': expected one of {', '.join(BACKENDS)}")
    if name == "xformers":
        _xformers()
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention.

    Args:
        q: ``(B, H, N, D)``; k, v: ``(B, K, M, D)`` where K divides H (grouped queries).
        mask: bool, broadcastable to ``(B, H, N, M)``, True where the query sees the key; or additive floats.
        causal: query i sees keys up to i + M - N; give either this or a mask.
        scale: factor of the scores, 1/sqrt(D) by default.

    Returns:
        ``(B, H, N, D)``.
    """
    if k.shape[1] != q.shape[1]:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if causal and (q.shape[2] != k.shape[2] or _backend != "sdpa"):
        n, m = q.shape[2], k.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        causal = False
    if _backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
    if _backend == "flex":
        return _flex(q, k, v, mask, scale, dropout)
    if _backend == "xformers":
        return _xformers_attention(q, k, v, mask, scale, dropout)
    return _eager(q, k, v, mask, scale, dropout)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (scale if scale is not None else q.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.float().softmax(-1).type_as(q), dropout) @ v


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise ConfigError("FlexAttention has no dropout: train with the sdpa backend")
    if mask is None:
        return flex_attention(q, k, v, scale=scale)  # type: ignore[return-value]
    dense = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        entry = dense[b, h, i, j]
        return torch.where(entry, score, float("-inf")) if dense.dtype == torch.bool else score + entry

    return flex_attention(q, k, v, score_mod=modify, scale=scale)  # type: ignore[return-value]


def _xformers() -> Any:
    try:
        import xformers.ops
    except ImportError as error:
        raise ConfigError("attention backend 'xformers' needs the xformers package: pip install 'vargen[xformers]'") from error
    return xformers.ops


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _xformers().memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with one fused projection, rows ordered q, k, v, each head-major.

    Args:
        dim: width of input and output.
        heads: number of query heads; kv_heads: of key and value heads, which divides it.
        head_dim: width of a head, ``dim / heads`` by default.
        qkv_bias, out_bias: biases of the projections.
        qk_norm: None, or a norm over the head channels of q and k: ``"layer"``, ``"rms"``; ``qk_norm_affine`` gives it weights.
        scale: factor of the scores, ``1 / sqrt(head_dim)`` by default.
        attn_dropout, dropout: on the weights, and after the output projection.
        interleaved: pairing of rotary channels, see :func:`vargen.nn.rope.apply_rotary`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm: str | None = None,
        qk_norm_affine: bool = False,
        norm_eps: float = 1e-5,
        scale: float | None = None,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ConfigError(f"attention width {dim} is not divisible by {heads} heads")
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim = head_dim or dim // heads
        if heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} key-value heads: expected a divisor of {heads} heads")
        self.scale = scale if scale is not None else 1 / math.sqrt(self.head_dim)
        self.attn_dropout, self.interleaved = attn_dropout, interleaved
        self.qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=out_bias)
        self.dropout = nn.Dropout(dropout)
        self.q_norm = make_norm(qk_norm, self.head_dim, norm_eps, qk_norm_affine) if qk_norm else None
        self.k_norm = make_norm(qk_norm, self.head_dim, norm_eps, qk_norm_affine) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, dim)``; with a cache, keys are all cached ones and then these."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        # queries and keys turn by the same angles: one rotation of both is half the work of launching
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        if rotary is not None:
            qk = apply_rotary(qk, rotary, self.interleaved)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        y = attention(q, k, v, mask, causal, self.scale, self.attn_dropout if self.training else 0.0)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Queries from ``x`` ``(B, N, dim)``, keys and values from a context ``(B, M, context_dim)``."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        *,
        bias: bool = True,
        out_bias: bool = True,
        attn_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.attn_dropout = heads, attn_dropout
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=out_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool ``(B, M)``, True at context tokens that may be seen."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)
        mask = None if mask is None else mask[:, None, None, :]
        y = attention(q, k, v, mask, dropout=self.attn_dropout if self.training else 0.0)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))
