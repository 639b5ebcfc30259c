"""The convolutional VQGAN of MaskGIT: TiTok's pixel decoder and RAR's tokenizer.

Chang et al., "MaskGIT: Masked Generative Image Transformer", arXiv 2202.04200. No attention; 3x3 convolutions of the blocks without
bias; average pooling down, repetition up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import SpaceError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.conv import Upsample, group_norm
from vargen.nn.patch import patch_grid
from vargen.nn.quantize import VectorQuantizer
from vargen.noise import Noise
from vargen.space import TokenSpace

PRESETS: dict[str, dict[str, Any]] = {
    "maskgit-vqgan-f16-256": {
        "image_size": 256,
        "widths": [128, 128, 256, 256, 512],
        "num_blocks": 2,
        "latent_channels": 256,
        "codebook_size": 1024,
    },
}


class ResBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice. Where the width changes, the shortcut is a 1x1 convolution of the block's own output, so
    that the input is not carried past the block: what the published weights were trained with.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None if in_channels == out_channels else nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(h))


def _blocks(in_channels: int, out_channels: int, count: int, groups: int) -> list[nn.Module]:
    return [ResBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)]


class Encoder(nn.Module):
    """Pixels in [0, 1] to latents ``(B, latent_channels, H / s, W / s)``, ``s = 2 ** (len(widths) - 1)``."""

    def __init__(self, widths: Sequence[int], latent_channels: int, num_blocks: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            nn.Sequential(*_blocks(before, width, num_blocks, groups)) for before, width in zip([widths[0], *widths], widths)
        )
        self.mid = nn.Sequential(*_blocks(widths[-1], widths[-1], num_blocks, groups))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.levels[0](self.conv_in(x))
        for level in self.levels[1:]:
            h = level(F.avg_pool2d(h, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents ``(B, latent_channels, h, w)`` to pixels around [0, 1], not clamped; ``levels`` run deepest first."""

    def __init__(self, widths: Sequence[int], latent_channels: int, num_blocks: int, groups: int) -> None:
        super().__init__()
        deep_first = list(widths[::-1])
        self.conv_in = nn.Conv2d(latent_channels, deep_first[0], 3, padding=1)
        self.mid = nn.Sequential(*_blocks(deep_first[0], deep_first[0], num_blocks, groups))
        self.levels = nn.ModuleList(
            nn.Sequential(*_blocks(before, width, num_blocks, groups))
            for before, width in zip([deep_first[0], *deep_first], deep_first)
        )
        self.ups = nn.ModuleList(Upsample(width) for width in deep_first[:-1])
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels[0](self.mid(self.conv_in(z)))
        for up, level in zip(self.ups, self.levels[1:]):
            h = level(up(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class MaskGITVQGAN(VisualTokenizer):
    """MaskGIT's VQGAN: one id per ``2 ** (len(widths) - 1)`` pixels of a side; any size that the stride divides.

    Args:
        image_size: pixels of a side that ``space`` belongs to.
        widths: channels of every level, full resolution first.
        num_blocks: residual blocks per level and in the middle.
        latent_channels, codebook_size: shape of the codebook.
        codebook_weight, commitment_weight, revive_after, usage_window: see :class:`vargen.nn.quantize.VectorQuantizer`.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        widths: Sequence[int] = (128, 128, 256, 256, 512),
        num_blocks: int = 2,
        latent_channels: int = 256,
        codebook_size: int = 1024,
        norm_groups: int = 32,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        revive_after: int | None = None,
        usage_window: int = 0,
    ) -> None:
        super().__init__()
        self.stride = 2 ** (len(widths) - 1)
        self.grid = patch_grid((image_size, image_size), (self.stride, self.stride))
        self.encoder = Encoder(widths, latent_channels, num_blocks, norm_groups)
        self.quantizer = VectorQuantizer(
            codebook_size,
            latent_channels,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            revive_after=revive_after,
            usage_window=usage_window,
        )
        self.decoder = Decoder(widths, latent_channels, num_blocks, norm_groups)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((self.grid,), codebook_size=self.config.codebook_size)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def latents(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        """What is quantised, ``(B, h, w, latent_channels)``."""
        self.check_pixels(pixels, text)
        patch_grid(pixels.shape[2:], (self.stride, self.stride))
        return rearrange(self.encoder((pixels + 1) / 2), "b c h w -> b h w c")

    def reconstruct(self, quantized: Tensor) -> Tensor:
        """Pixels of code vectors ``(B, h, w, latent_channels)``."""
        return self.decoder(rearrange(quantized, "b h w c -> b c h w")) * 2 - 1

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return self.quantizer.nearest(self.latents(pixels, text))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(tokens))
        if tokens.dim() != 3:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: expected (batch, height, width) ids")
        replace(self.space, levels=(tuple(tokens.shape[1:]),)).check(tokens)
        return self.reconstruct(self.quantizer.lookup(tokens))

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        out = self.quantizer(self.latents(pixels, text), noise)
        return TokenizerOutput(out.indices, self.reconstruct(out.quantized), out.losses, out.statistics)
