"""A diffusion transformer that denoises all tokens of a grid together, each with its own condition (Hi-MAR, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vargen.heads.mlp import Denoiser
from vargen.nn.adaln import AdaLN, modulate
from vargen.nn.norm import LayerNorm
from vargen.nn.positions import sincos_2d
from vargen.nn.vit import Transformer


class TokenDiT(Denoiser):
    """DiT blocks (Peebles and Xie, 2023) over a grid, modulated per token by ``time(t) + cond(z)``.

    Args:
        grid: (rows, columns) in raster order, for fixed sine-cosine positions, column first; None for grids of any size, of which
            the hidden states tell the places.
        width, depth, heads, ratio: size of the blocks; ``ratio`` is MLP hidden width over width.
    """

    positions: Tensor | None

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        width: int,
        depth: int,
        heads: int,
        grid: Sequence[int] | None,
        *,
        ratio: float = 4.0,
        out_channels: int | None = None,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__(channels, condition_dim, width, time_scale)
        self.input = nn.Linear(channels, width)
        self.register_buffer("positions", None if grid is None else sincos_2d(width, grid), persistent=False)
        self.blocks = Transformer(depth, width, heads, int(width * ratio), norm_affine=False, act="gelu_tanh", condition_dim=width)
        self.adaln = AdaLN(width, width, 2)
        self.norm = LayerNorm(width, 1e-6, affine=False)
        self.out = nn.Linear(width, out_channels or channels)
        self.initialise()
        for layer in (self.adaln.linear, self.out, *(block.adaln.linear for block in self.blocks.blocks)):
            nn.init.zeros_(layer.weight)  # type: ignore[union-attr, arg-type]

    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(B, N, channels)`` and ``(B, N, width)`` to ``(B, N, out_channels)``, N the cells of the grid."""
        h = self.input(x)
        h = h if self.positions is None else h + self.positions
        h = self.blocks(h, condition=condition)
        shift, scale = self.adaln(condition)
        return self.out(modulate(self.norm(h), shift, scale))
