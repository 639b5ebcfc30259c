"""The two transformers of FlexTok (arXiv 2502.13967, section 3): registers read the patches, patches are painted from registers.

Norms have no weights, attention normalises queries and keys and scales scores by 8 / head_dim (maximal update parametrisation),
feed-forward layers are gated, and no linear layer inside the blocks has a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vargen.errors import ConfigError
from vargen.nn.adaln import AdaLN, modulate
from vargen.nn.block import TransformerBlock
from vargen.nn.embed import TimestepEmbedding
from vargen.nn.norm import LayerNorm
from vargen.nn.patch import patch_grid, patchify, unpatchify
from vargen.nn.positions import sincos_2d

EPS = 1e-5


def make_blocks(depth: int, dim: int, head_dim: int) -> nn.ModuleList:
    if dim % head_dim:
        raise ConfigError(f"width {dim}: expected a multiple of the {head_dim} channels of a head")
    options: dict[str, Any] = {
        "norm_eps": EPS,
        "norm_affine": False,
        "gated": True,
        "mlp_bias": False,
        "qkv_bias": False,
        "out_bias": False,
        "qk_norm": "layer",
        "scale": 8 / head_dim,
    }
    hidden = int(2 * int(4 * dim) / 3)
    return nn.ModuleList(TransformerBlock(dim, dim // head_dim, hidden, **options) for _ in range(depth))


class Patches(nn.Module):
    """A linear patch embedding plus 2D positions, whose table is cropped for smaller grids."""

    positions: Tensor

    def __init__(self, channels: int, dim: int, patch_size: int, grid: Sequence[int], positions: str) -> None:
        super().__init__()
        self.patch, self.grid = (patch_size, patch_size), tuple(grid)
        self.proj = nn.Linear(patch_size * patch_size * channels, dim)
        if positions == "sincos":
            table = sincos_2d(dim, grid, column_first=False).unflatten(0, self.grid)
            self.register_buffer("positions", table, persistent=False)
        elif positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(*grid, dim))
        else:
            raise ConfigError(f"patch positions '{positions}': expected 'sincos' or 'learned'")

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, N, dim)``."""
        height, width = patch_grid(x.shape[2:], self.patch)
        return self.proj(patchify(x, self.patch)) + self.positions[:height, :width].flatten(0, 1).to(x.dtype)


def registers_last_mask(patches: int, registers: int, device: torch.device | str = "cpu") -> Tensor:
    """Bool ``(N, N)``: every token sees all patches; a register sees registers up to itself, patches see none."""
    mask = torch.ones(patches + registers, patches + registers, dtype=torch.bool, device=device).tril()
    mask[:, :patches] = True
    return mask


class RegisterEncoder(nn.Module):
    """Latents to ``num_registers`` vectors of ``code_dim`` channels, register i depending on the image and on registers below i."""

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: Sequence[int],
        num_registers: int,
        dim: int,
        depth: int,
        head_dim: int,
        code_dim: int,
        positions: str,
        register_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.patches = Patches(channels, dim, patch_size, grid, positions)
        self.registers = nn.Parameter(torch.empty(num_registers, dim))
        nn.init.trunc_normal_(self.registers, std=register_std, a=-2 * register_std, b=2 * register_std)
        self.blocks = make_blocks(depth, dim, head_dim)
        self.norm = LayerNorm(dim, EPS, affine=False)
        self.to_code = nn.Linear(dim, code_dim)

    def forward(self, latents: Tensor) -> Tensor:
        patches = self.patches(latents)
        count = patches.shape[1]
        mask = registers_last_mask(count, len(self.registers), latents.device)
        x = torch.cat([patches, self.registers.to(patches.dtype).expand(len(patches), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.to_code(self.norm(x[:, count:]))


class FlowDecoder(nn.Module):
    """Velocity of noised latents given the registers' codes; patches and registers are modulated by time with sets of their own.

    ``dropped``, the vector that stands for registers left out, replaces position and all, so that those registers are alike.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: Sequence[int],
        num_registers: int,
        dim: int,
        depth: int,
        head_dim: int,
        code_dim: int,
        positions: str,
        max_timestep: float,
        learned_null: bool,
    ) -> None:
        super().__init__()
        self.from_code = nn.Linear(code_dim, dim)
        # about as large as the embedded codes, so that registers are told apart from the first step
        self.register_positions = nn.Parameter(0.2 * torch.randn(num_registers, dim))
        self.dropped = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.dropped, std=0.02)
        self.null = nn.Parameter(torch.empty(dim)) if learned_null else None
        if self.null is not None:
            nn.init.trunc_normal_(self.null, std=0.02)
        self.patches = Patches(channels, dim, patch_size, grid, positions)
        self.time = TimestepEmbedding(dim, max_period=256, scale=1000 / max_timestep)
        self.blocks = make_blocks(depth, dim, head_dim)
        self.modulations = nn.ModuleList(AdaLN(dim, dim, 12) for _ in range(depth))
        self.norm = LayerNorm(dim, EPS, affine=False)
        self.modulation_out = AdaLN(dim, dim, 2)
        self.to_patch = nn.Linear(dim, patch_size * patch_size * channels)
        nn.init.zeros_(self.to_patch.weight)
        nn.init.zeros_(self.to_patch.bias)

    def condition(self, codes: Tensor, keep: Tensor, null: Tensor | None = None) -> Tensor:
        """Codes ``(B, R, code_dim)`` to register tokens ``(B, R, dim)``.

        Args:
            keep: int64 ``(B,)``; registers from this number on are left out.
            null: bool ``(B,)``, samples without any condition.
        """
        registers = self.from_code(codes.to(self.from_code.weight.dtype)) + self.register_positions
        beyond = torch.arange(registers.shape[1], device=keep.device) >= keep.unsqueeze(1)
        registers = torch.where(beyond.unsqueeze(-1), self.dropped.to(registers.dtype), registers)
        if null is None:
            return registers
        nothing = torch.zeros_like(self.dropped) if self.null is None else self.null
        return torch.where(null[:, None, None], nothing.to(registers.dtype), registers)

    def forward(self, latents: Tensor, t: Tensor, registers: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Velocity like ``latents`` ``(B, C, H, W)``, and the patches ``(B, h, w, dim)`` after block ``tap``.

        Args:
            t: ``(B,)`` in [0, 1], 1 for pure noise.
            registers: from :meth:`condition`.
        """
        grid = patch_grid(latents.shape[2:], self.patches.patch)
        patches, time = self.patches(latents), self.time(t)
        counts = (patches.shape[1], registers.shape[1])
        x = torch.cat([patches, registers], dim=1)
        tapped = None
        for index, (block, modulation) in enumerate(zip(self.blocks, self.modulations, strict=True)):
            x = block(x, modulation=_spread(modulation(time), counts))
            if index == tap:
                tapped = x[:, : counts[0]].unflatten(1, grid)
        shift, scale = (m.unsqueeze(1) for m in self.modulation_out(time))
        patches = self.to_patch(modulate(self.norm(x[:, : counts[0]]), shift, scale))
        return unpatchify(patches, grid, self.patches.patch), tapped


def _spread(chunks: Sequence[Tensor], counts: tuple[int, int]) -> list[Tensor]:
    """Twelve vectors ``(B, dim)``, six for patches and six for registers, as six tensors ``(B, N, dim)`` over both."""
    return [
        torch.cat([m.unsqueeze(1).expand(-1, n, -1) for m, n in zip(pair, counts, strict=True)], dim=1)
        for pair in zip(chunks[:6], chunks[6:], strict=True)
    ]
