"""VQ-8 and VQ-16, the convolutional tokenizers of LlamaGen (Sun et al. 2024, arXiv 2406.06525, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.conv import Decoder, Encoder
from vargen.nn.quantize import VectorQuantizer
from vargen.noise import Noise
from vargen.space import TokenSpace

PRESETS = {
    "VQ-16": {
        "sample_size": 256,
        "encoder_widths": [128, 128, 256, 256, 512],
        "decoder_widths": [128, 128, 256, 256, 512],
        "latent_channels": 256,
        "codebook_size": 16384,
        "codebook_dim": 8,
    },
    "VQ-8": {
        "sample_size": 256,
        "encoder_widths": [128, 256, 256, 512],
        "decoder_widths": [128, 256, 256, 512],
        "latent_channels": 256,
        "codebook_size": 16384,
        "codebook_dim": 8,
    },
}


class VQTokenizer(VisualTokenizer):
    """Convolutional encoder, l2-normalised codebook, convolutional decoder; one id per ``stride`` x ``stride`` pixels.

    Args:
        sample_size: pixels of a side, or ``(height, width)``, that ``space`` belongs to. Any size that the stride divides can be
            encoded, and any grid of ids decoded.
        encoder_widths, decoder_widths: channels per level, full resolution first; the stride is 2 to the number of levels less one.
        stem_width: channels of the encoder's first convolution, by default those of its first level.
        encoder_blocks, decoder_blocks: residual blocks per level.
        attention_levels: levels with attention after every block; -1 is the deepest.
        latent_channels: width between the networks and the 1x1 projections to and from the codebook.
        codebook_size, codebook_dim, l2_normalize, codebook_weight, commitment_weight, entropy_weight, ema_decay, revive_after,
            usage_window: see :class:`~vargen.nn.quantize.VectorQuantizer`.
        norm_groups: of every group normalisation; it divides all widths.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 256,
        encoder_widths: Sequence[int] = (128, 128, 256, 256, 512),
        decoder_widths: Sequence[int] = (128, 128, 256, 256, 512),
        stem_width: int | None = None,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        attention_levels: Sequence[int] = (-1,),
        latent_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        l2_normalize: bool = True,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        ema_decay: float | None = None,
        revive_after: int | None = None,
        usage_window: int = 65536,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(encoder_widths) != len(decoder_widths):
            raise ConfigError(f"{len(encoder_widths)} encoder levels and {len(decoder_widths)} decoder levels: expected as many")
        self.encoder = Encoder(
            encoder_widths,
            latent_channels,
            stem_width=stem_width,
            num_blocks=encoder_blocks,
            attention_levels=attention_levels,
            groups=norm_groups,
            dropout=dropout,
        )
        self.quant_conv = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.quantizer = VectorQuantizer(
            codebook_size,
            codebook_dim,
            l2_normalize=l2_normalize,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            ema_decay=ema_decay,
            revive_after=revive_after,
            usage_window=usage_window,
        )
        self.post_quant_conv = nn.Conv2d(codebook_dim, latent_channels, 1)
        self.decoder = Decoder(
            decoder_widths,
            latent_channels,
            num_blocks=decoder_blocks,
            attention_levels=attention_levels,
            groups=norm_groups,
            dropout=dropout,
        )
        height, width = self.sample_shape
        if not height * width or height % self.stride or width % self.stride:
            raise ConfigError(f"sample_size {sample_size}: expected a multiple of the stride {self.stride}")

    @property
    def stride(self) -> int:
        """Pixels per token along each axis."""
        return self.encoder.stride

    @property
    def sample_shape(self) -> tuple[int, int]:
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @property
    def space(self) -> TokenSpace:
        height, width = self.sample_shape
        return TokenSpace(levels=((height // self.stride, width // self.stride),), codebook_size=self.config.codebook_size)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def latents(self, pixels: Tensor) -> Tensor:
        """What is quantised, ``(B, h, w, codebook_dim)``, not yet normalised."""
        return rearrange(self.quant_conv(self.encoder(pixels)), "b d h w -> b h w d")

    def reconstruct(self, quantized: Tensor) -> Tensor:
        """Pixels of code vectors ``(B, h, w, codebook_dim)``."""
        return self.decoder(self.post_quant_conv(rearrange(quantized, "b h w d -> b d h w")))

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Ids ``(B, H / stride, W / stride)`` of pixels ``(B, 3, H, W)``; draws nothing."""
        return self.quantizer.nearest(self.latents(self.check_pixels(pixels, text)))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels ``(B, 3, h * stride, w * stride)`` of ids ``(B, h, w)``, any h and w; draws nothing.

        Raises:
            SpaceError: not a grid of ids, or ids outside the codebook.
        """
        if tokens.dim() != 3:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: expected (batch, height, width) ids")
        self.check_text(text, tokens.shape[0])
        replace(self.space, levels=(tuple(tokens.shape[1:]),)).check(tokens)
        return self.reconstruct(self.quantizer.lookup(tokens))

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass; ``noise`` draws the latents that dead codes are revived from."""
        latents = self.latents(self.check_pixels(pixels, text))
        out = self.quantizer(latents, noise)
        return TokenizerOutput(out.indices, self.reconstruct(out.quantized), out.losses, {"latents": latents, **out.statistics})

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        super().check_pixels(pixels, text)
        height, width = pixels.shape[-2:]
        if not height * width or height % self.stride or width % self.stride:
            raise VargenError(f"pixels of {height}x{width}: expected both sides to be multiples of the stride {self.stride}")
        return pixels
