"""Networks that denoise tokens given hidden states: the AdaLN-MLP of single tokens (Li et al., 2024, MAR, section 3.2)."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from vargen.kernels.dispatch import kernel
from vargen.nn.adaln import AdaLN, modulate
from vargen.nn.embed import TimestepEmbedding
from vargen.nn.mlp import MLP, GatedMLP
from vargen.nn.norm import LayerNorm

adaln_mlp_block = kernel("adaln_mlp_block")
adaln_linear = kernel("adaln_linear")


class Denoiser(nn.Module):
    """A network of noisy tokens x, time t and hidden states z, which sees t and z only through ``time(t) + cond(z)``.

    The parts are public so that a sampler embeds z and all its times once. A subclass has a layer ``input`` that every evaluation
    passes once.

    Args:
        channels: length of a token; condition_dim: of a hidden state; width: of the network.
        time_scale: times are multiplied by it before the sinusoid: 1 for integer timesteps, 1000 for times in [0, 1].
    """

    input: nn.Linear

    def __init__(self, channels: int, condition_dim: int, width: int, time_scale: float = 1.0) -> None:
        super().__init__()
        self.channels = channels
        self.time = TimestepEmbedding(width, scale=time_scale)
        self.cond = nn.Linear(condition_dim, width)

    @abstractmethod
    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(..., channels)`` and ``(..., width)`` to the output ``(..., out_channels)``."""

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """``x`` ``(..., channels)``, ``z`` ``(..., condition_dim)``; the shape of ``t`` broadcasts to ``(...)``."""
        return self.denoise(x, self.time(t) + self.cond(z))

    def initialise(self) -> None:
        """Xavier weights and zero biases; N(0, 0.02^2) in the time network. Gates and output layers are to be zeroed after it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.time.mlp.up.weight, std=0.02)
        nn.init.normal_(self.time.mlp.down.weight, std=0.02)


class AdaLNBlock(nn.Module):
    """``h + gate * MLP(LayerNorm(h) * (1 + scale) + shift)``; the MLP is SiLU of one width, or SwiGLU of a given hidden width."""

    def __init__(self, width: int, gated_hidden: int | None = None) -> None:
        super().__init__()
        self.norm = LayerNorm(width, 1e-6)
        self.mlp = MLP(width, width, act="silu") if gated_hidden is None else GatedMLP(width, gated_hidden, bias=True)

    def forward(self, h: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        if isinstance(self.mlp, GatedMLP):
            return h + gate * self.mlp(modulate(self.norm(h), shift, scale))
        norm, up, down = self.norm, self.mlp.up, self.mlp.down
        return adaln_mlp_block(h, shift, scale, gate, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias, norm.eps)


class TokenMLP(Denoiser):
    """The diffusion or flow MLP of a single token.

    Args:
        out_channels: length of the output, ``channels`` by default; twice that for a learned variance.
        depth: number of residual blocks.
        gated_hidden: hidden width of SwiGLU blocks (MingTok); plain SiLU blocks of the network's width without it.

    The modulations of all blocks and of the output layer are one linear layer, ordered shift, scale, gate per block, then shift,
    scale; it and the output layer start at zero.
    """

    def __init__(
        self,
        channels: int,
        condition_dim: int,
        width: int,
        depth: int,
        *,
        out_channels: int | None = None,
        time_scale: float = 1.0,
        gated_hidden: int | None = None,
    ) -> None:
        super().__init__(channels, condition_dim, width, time_scale)
        self.input = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(AdaLNBlock(width, gated_hidden) for _ in range(depth))
        self.adaln = AdaLN(width, width, 3 * depth + 2)
        self.norm = LayerNorm(width, 1e-6, affine=False)
        self.out = nn.Linear(width, out_channels or channels)
        self.initialise()
        for layer in (self.adaln.linear, self.out):
            nn.init.zeros_(layer.weight)

    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.input(x)
        modulation = self.adaln(condition)
        for i, block in enumerate(self.blocks):
            h = block(h, *modulation[3 * i : 3 * i + 3])
        shift, scale = modulation[-2:]
        return adaln_linear(h, shift, scale, None, None, self.out.weight, self.out.bias, self.norm.eps)
