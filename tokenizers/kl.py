"""KL-16, the continuous convolutional tokenizer of MAR, Hi-MAR and xAR (Li et al. 2024, arXiv 2406.11838; Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.conv import Decoder, Encoder
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.patch import patchify, unpatchify
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace

PRESETS: dict[str, dict[str, Any]] = {
    "KL-16": {
        "sample_size": 256,
        "widths": [128, 128, 256, 256, 512],
        "latent_channels": 16,
        "encoder_attention_levels": [-1],
        "decoder_attention_levels": [],
        "std": 1 / 0.2325,
    },
}


class KLTokenizer(VisualTokenizer):
    """Convolutional autoencoder with a Gaussian bottleneck; a token is the latent of one patch.

    Args:
        sample_size: pixels of a side, or ``(height, width)``, that ``space`` belongs to. Any size that the patches divide can be
            encoded, and any grid of tokens decoded.
        widths: channels per level, full resolution first; the stride is 2 to the number of levels less one.
        encoder_blocks, decoder_blocks: residual blocks per level.
        encoder_attention_levels, decoder_attention_levels: levels with attention after every block; -1 is the deepest.
        latent_channels: channels of the latent.
        patch: latent positions per token along each axis. A token holds ``latent_channels * patch**2`` numbers, channel slowest,
            then row, then column.
        mean, std: tokens are ``(latent - mean) / std``; :meth:`calibrate` sets those of a newly trained tokenizer's latents.
        kl_weight: of the KL divergence, summed over a latent, beside a reconstruction loss that is summed over pixels as well.
        norm_groups: of every group normalisation; it divides all widths.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 256,
        widths: Sequence[int] = (128, 128, 256, 256, 512),
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        encoder_attention_levels: Sequence[int] = (-1,),
        decoder_attention_levels: Sequence[int] = (),
        latent_channels: int = 16,
        patch: int = 1,
        mean: float = 0.0,
        std: float = 1 / 0.2325,
        kl_weight: float = 1e-6,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            widths,
            2 * latent_channels,
            num_blocks=encoder_blocks,
            attention_levels=encoder_attention_levels,
            groups=norm_groups,
            dropout=dropout,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(
            widths,
            latent_channels,
            num_blocks=decoder_blocks,
            attention_levels=decoder_attention_levels,
            groups=norm_groups,
            dropout=dropout,
        )
        if any(side % self.stride for side in self.sample_shape):
            raise ConfigError(f"sample_size {sample_size}: expected a multiple of the {self.stride} pixels of a token")

    @property
    def stride(self) -> int:
        """Pixels per token along each axis."""
        return self.encoder.stride * self.config.patch

    @property
    def sample_shape(self) -> tuple[int, int]:
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def space(self) -> TokenSpace:
        height, width = self.sample_shape
        return TokenSpace(
            levels=((height // self.stride, width // self.stride),),
            channels=self.config.latent_channels * self.config.patch**2,
            mean=self.config.mean,
            std=self.config.std,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    @property
    def moments_shape(self) -> tuple[int, ...]:
        channels, patch = self.config.latent_channels, self.config.patch
        return (2 * channels, *(patch * n for n in self.space.shape))

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Mean and log-variance ``(B, 2 * latent_channels, h, w)`` of the posterior, not clamped: what latent caches hold."""
        return self.quant_conv(self.encoder(self.check_pixels(pixels, text)))

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        """Tokens of a sample of the posterior, ``(B, h, w, C)``; ``noise`` draws it."""
        return self.space.normalize(self._tokens(self._sample(DiagonalGaussian.from_moments(moments.float(), dim=1), noise)))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Pixels of latents ``(B, latent_channels, h, w)``, at the tokenizer's own scale."""
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Tokens ``(B, H / stride, W / stride, C)`` of pixels ``(B, 3, H, W)``, sampled from the posterior."""
        return self.tokens_of(self.moments(pixels, text), noise)

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels of tokens ``(B, h, w, C)``, any h and w; draws nothing.

        Raises:
            SpaceError: not a grid of such tokens, or NaN among them.
        """
        if tokens.dim() != 4:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: expected (batch, height, width, {self.space.channels})")
        self.check_text(text, tokens.shape[0])
        grid, patch = tuple(tokens.shape[1:3]), (self.config.patch, self.config.patch)
        replace(self.space, levels=(grid,)).check(tokens)
        latents = self.space.denormalize(tokens).to(self.dtype)
        return self.reconstruct(unpatchify(latents.flatten(1, 2), grid, patch, channel_first=True))

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass: reconstruction of a posterior sample, and the weighted divergence from the standard normal.

        The divergence is divided by the number of pixel values, since objectives average the reconstruction error over them.
        """
        self.check_text(text, pixels.shape[0])
        posterior = DiagonalGaussian.from_moments(self.moments(pixels).float(), dim=1)
        latents = self._sample(posterior, noise)
        kl = posterior.kl().flatten(1).sum(1).mean()
        tokens = self.space.normalize(self._tokens(latents))
        statistics = {"latent_mean": latents.detach().mean(), "latent_std": latents.detach().std(), "kl_nats": kl.detach()}
        losses = {"kl": self.config.kl_weight * kl / pixels[0].numel()}
        return TokenizerOutput(tokens, self.reconstruct(latents.to(self.dtype)), losses, statistics)

    def _sample(self, posterior: DiagonalGaussian, noise: Noise | None) -> Tensor:
        shape = posterior.mean.shape
        return posterior.sample(as_noise(noise, shape[0], posterior.mean.device).normal("posterior", shape[1:]))

    def _tokens(self, latents: Tensor) -> Tensor:
        patch = self.config.patch
        flat = patchify(latents, (patch, patch), channel_first=True)
        return rearrange(flat, "b (h w) c -> b h w c", h=latents.shape[2] // patch)

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        super().check_pixels(pixels, text)
        height, width = pixels.shape[-2:]
        if not height * width or height % self.stride or width % self.stride:
            raise VargenError(f"pixels of {height}x{width}: expected both sides to be multiples of the {self.stride} of a token")
        return pixels
