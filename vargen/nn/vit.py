"""The transformer trunk of all ViT tokenizers: a stack of pre-norm blocks over whatever tokens its owner concatenates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vargen.nn.block import TransformerBlock
from vargen.nn.cache import KVCache
from vargen.nn.norm import make_norm


class Transformer(nn.Module):
    """``depth`` blocks; optionally a norm before the first (CLIP's ``ln_pre``) and one after the last.

    Args:
        depth, dim, heads: size; mlp_hidden: hidden width of the feed-forward layers, ``4 * dim`` by default.
        pre_norm, final_norm: which of the two outer norms there are; they take the blocks' kind, eps and affinity.
        block: further arguments of :class:`vargen.nn.block.TransformerBlock`.
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        heads: int,
        mlp_hidden: int | None = None,
        *,
        pre_norm: bool = False,
        final_norm: bool = False,
        norm: str = "layer",
        norm_eps: float = 1e-6,
        norm_affine: bool = True,
        **block: Any,
    ) -> None:
        super().__init__()

        def outer(there: bool) -> nn.Module:
            return make_norm(norm, dim, norm_eps, norm_affine) if there else nn.Identity()

        block = {"norm": norm, "norm_eps": norm_eps, "norm_affine": norm_affine, **block}
        self.pre_norm = outer(pre_norm)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, mlp_hidden or 4 * dim, **block) for _ in range(depth))
        self.final_norm = outer(final_norm)
        # set by diffusers' enable_gradient_checkpointing()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint

    def forward(self, x: Tensor, *, cache: KVCache | None = None, **arguments: Any) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, dim)``; ``arguments`` (mask, causal, rotary, condition, context...) go to every block.

        With a cache, ``x`` are the tokens after the cached ones, which it extends.
        """
        x = self.pre_norm(x)
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = self._gradient_checkpointing_func(lambda x, block=block: block(x, **arguments), x, use_reentrant=False)
            else:
                x = block(x, cache=cache, layer=layer, **arguments)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.final_norm(x)


def key_mask(*groups: Tensor | int, batch_size: int) -> Tensor:
    """Attention mask ``(B, 1, 1, N)`` of concatenated token groups, True where a key may be seen.

    Args:
        groups: per group the number of its tokens, all visible, or a bool mask ``(B, n)``.
    """
    device = next((g.device for g in groups if isinstance(g, Tensor)), torch.device("cpu"))
    parts = [torch.ones(batch_size, g, dtype=torch.bool, device=device) if isinstance(g, int) else g for g in groups]
    return torch.cat(parts, dim=1)[:, None, None, :]


def init_vit(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and convolution inside (MAE, He et al. 2021).

    Their scale follows the width, so that small models start with features that depend on their input as much as large ones do.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
