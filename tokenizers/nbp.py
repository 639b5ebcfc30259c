"""NBP's video tokenizer: causal 3D convolutions and FSQ (MAGVIT-v2's design as Ren et al., 2025, released it)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.quantize import FSQ
from vargen.noise import Noise
from vargen.space import TokenSpace

PRESETS = {"magvit2": {"widths": [128, 256, 512], "sample_size": [17, 128, 128]}}


class CausalConv3d(nn.Conv3d):
    """Convolution with replicate padding, half on each side in space and all of it in front in time."""

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = (k // 2 for k in self.kernel_size)
        padded = F.pad(x, (width, width, height, height, 2 * time, 0), mode="replicate")
        return super().forward(padded)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics of each frame alone, which keeps the network causal."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(y, "(b t) c h w -> b c t h w", b=len(x))


class Swish(nn.Module):
    """``x * sigmoid(beta * x)`` with a learned beta per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(Tensor(1, channels, 1, 1, 1).fill_(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.beta * x).sigmoid()


class ResidualUnit(nn.Module):
    """Norm, swish, convolution, twice, plus a skip that is a 1x1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            FrameGroupNorm(groups, in_channels),
            Swish(in_channels),
            CausalConv3d(in_channels, channels, 3),
            FrameGroupNorm(groups, channels),
            Swish(channels),
            CausalConv3d(channels, channels, 3),
        )
        self.skip = CausalConv3d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.skip(x)


class DepthToSpace(nn.Module):
    """Channels (factor slowest) into a block of ``factor`` (t, h, w); a doubled time axis loses its first frame: t to 2t - 1."""

    def __init__(self, factor: Sequence[int]) -> None:
        super().__init__()
        self.factor = tuple(factor)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.factor
        y = rearrange(x, "n (a b c d) t h w -> n d (t a) (h b) (w c)", a=a, b=b, c=c)
        return y[:, :, 1:] if a == 2 else y


class NBPTokenizer(VisualTokenizer):
    """Causal video tokenizer: space is reduced by 8 and time by 4; the first frame stands alone, so that clips have 1 + 4m frames.

    Images are clips of one frame. The encoder is causal in time: the first frames' tokens do not depend on later ones.

    Args:
        sample_size: (frames, height, width) that ``space`` belongs to; other sizes of the same kind work too.
        widths: channels at full, half and quarter resolution.
        levels: levels of each FSQ channel; their product is the codebook.
        norm_groups: groups of every norm.

    Raises:
        ConfigError: widths or sizes that do not fit.
    """

    video = True
    causal_stride = 4

    @register_to_config
    def __init__(
        self,
        sample_size: Sequence[int] = (17, 128, 128),
        widths: Sequence[int] = (128, 256, 512),
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or any(w % norm_groups for w in widths):
            raise ConfigError(f"widths {list(widths)}: expected three multiples of norm_groups {norm_groups}")
        _latent_shape(sample_size)
        low, middle, high = widths

        def units(*channels: int) -> list[nn.Module]:
            return [ResidualUnit(a, b, norm_groups) for a, b in pairwise(channels)]

        def up(in_channels: int, channels: int, factor: Sequence[int]) -> list[nn.Module]:
            return [CausalConv3d(in_channels, channels * math.prod(factor), 3), DepthToSpace(factor)]

        self.encoder = nn.Sequential(
            CausalConv3d(3, low, 3),
            *units(low, low, low, low, low),
            CausalConv3d(low, low, 3, stride=(1, 2, 2)),
            *units(low, middle, middle, middle, middle),
            CausalConv3d(middle, middle, 3, stride=2),
            *units(middle, middle, middle, middle, middle),
            CausalConv3d(middle, middle, 3, stride=2),
            *units(middle, *(high,) * 8),
            FrameGroupNorm(norm_groups, high),
            Swish(high),
            nn.Conv3d(high, len(levels), 1),
        )
        self.quantizer = FSQ(levels, shift="tan", margin=-1e-3)
        self.decoder = nn.Sequential(
            CausalConv3d(len(levels), high, 3),
            *units(*(high,) * 9),
            *up(high, high, (2, 2, 2)),
            *units(high, middle, middle, middle, middle),
            *up(middle, middle, (2, 2, 2)),
            *units(middle, middle, middle, middle, middle),
            *up(middle, middle, (1, 2, 2)),
            *units(middle, low, low, low, low),
            FrameGroupNorm(norm_groups, low),
            Swish(low),
            CausalConv3d(low, 3, 3),
        )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.config.sample_size)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace((_latent_shape(self.config.sample_size),), codebook_size=math.prod(self.config.levels))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder[-1].weight  # type: ignore[return-value]

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to latents before quantisation, ``(B, t, h, w, levels)``."""
        self.check_pixels(pixels)
        _latent_shape(pixels.shape[2:])
        return rearrange(self.encoder((pixels + 1) / 2), "b c t h w -> b t h w c")

    def pixels(self, codes: Tensor) -> Tensor:
        """Code values ``(B, t, h, w, levels)`` to pixels in [-1, 1], not clamped."""
        return self.decoder(rearrange(codes, "b t h w c -> b c t h w")) * 2 - 1

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(pixels))
        return self.quantizer(self.latents(pixels)).indices

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(tokens))
        if tokens.dim() != 4:
            raise VargenError(f"tokens of shape {tuple(tokens.shape)}: expected (batch, frames, rows, columns)")
        TokenSpace((tuple(tokens.shape[1:]),), codebook_size=self.space.codebook_size).check(tokens)
        return self.pixels(self.quantizer.lookup(tokens))

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        self.check_text(text, len(pixels))
        quantized = self.quantizer(self.latents(pixels))
        return TokenizerOutput(quantized.indices, self.pixels(quantized.quantized), quantized.losses, quantized.statistics)


def _latent_shape(size: Sequence[int]) -> tuple[int, int, int]:
    frames, height, width = size
    if (frames - 1) % 4 or height % 8 or width % 8 or min(size) < 1:
        raise VargenError(
            f"clip of (frames, height, width) {tuple(size)}: expected 1 + 4m frames and sides that are multiples of 8"
        )
    return (frames - 1) // 4 + 1, height // 8, width // 8
