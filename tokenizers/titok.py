"""TiTok and TA-TiTok: an image as a short sequence of tokens that stand on no grid.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550, and Kim et al., "Democratizing
Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens", arXiv 2501.07730.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.mlp import MLP
from vargen.nn.patch import PatchEmbed, patch_grid, unpatchify
from vargen.nn.quantize import VectorQuantizer
from vargen.nn.vit import Transformer, init_vit, key_mask
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace
from vargen.tokenizers.titok_vqgan import Decoder as VQGANDecoder
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN

_SMALL_ENCODER = {"encoder_dim": 512, "encoder_depth": 8, "encoder_heads": 8}
_BASE_ENCODER = {"encoder_dim": 768, "encoder_depth": 12, "encoder_heads": 12}
_LARGE_ENCODER = {"encoder_dim": 1024, "encoder_depth": 24, "encoder_heads": 16}
_SMALL_DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 8}
_BASE_DECODER = {"decoder_dim": 768, "decoder_depth": 12, "decoder_heads": 12}
_LARGE_DECODER = {"decoder_dim": 1024, "decoder_depth": 24, "decoder_heads": 16}
_PROXY = {"mixed_latents": True, "proxy_codes": 1024, "pixel_widths": [128, 128, 256, 256, 512]}
_VQ_L2 = {"codebook_size": 4096, "channels": 12, "l2_normalize": True}
_VQ = {"codebook_size": 8192, "channels": 64}
_KL = {"codebook_size": None, "channels": 16}
_TEXT = {"text_dim": 768, "text_length": 77}

PRESETS: dict[str, dict[str, Any]] = {
    "titok-l32": {"num_tokens": 32, **_LARGE_ENCODER, **_LARGE_DECODER, **_VQ_L2, **_PROXY},
    "titok-b64": {"num_tokens": 64, **_BASE_ENCODER, **_BASE_DECODER, **_VQ_L2, **_PROXY},
    "titok-s128": {"num_tokens": 128, **_SMALL_ENCODER, **_SMALL_DECODER, **_VQ_L2, **_PROXY},
    "titok-bl64-vq": {"num_tokens": 64, **_BASE_ENCODER, **_LARGE_DECODER, **_VQ},
    "titok-bl128-vq": {"num_tokens": 128, **_BASE_ENCODER, **_LARGE_DECODER, **_VQ},
    "titok-sl256-vq": {"num_tokens": 256, **_SMALL_ENCODER, **_LARGE_DECODER, **_VQ},
    "titok-ll32-kl": {"num_tokens": 32, **_LARGE_ENCODER, **_LARGE_DECODER, **_KL},
    "titok-bl64-kl": {"num_tokens": 64, **_BASE_ENCODER, **_LARGE_DECODER, **_KL},
    "titok-bl128-kl": {"num_tokens": 128, **_BASE_ENCODER, **_LARGE_DECODER, **_KL},
    "tatitok-bl32-vq": {"num_tokens": 32, **_BASE_ENCODER, **_LARGE_DECODER, **_VQ, **_TEXT},
    "tatitok-bl64-vq": {"num_tokens": 64, **_BASE_ENCODER, **_LARGE_DECODER, **_VQ, **_TEXT},
    "tatitok-bl128-vq": {"num_tokens": 128, **_BASE_ENCODER, **_LARGE_DECODER, **_VQ, **_TEXT},
    "tatitok-bl32-kl": {"num_tokens": 32, **_BASE_ENCODER, **_LARGE_DECODER, **_KL, **_TEXT},
    "tatitok-bl64-kl": {"num_tokens": 64, **_BASE_ENCODER, **_LARGE_DECODER, **_KL, **_TEXT},
    "tatitok-sl128-kl": {"num_tokens": 128, **_SMALL_ENCODER, **_LARGE_DECODER, **_KL, **_TEXT},
}


def _table(dim: int, *rows: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*rows, dim) * dim**-0.5)


def _trunk(depth: int, dim: int, heads: int) -> Transformer:
    return Transformer(depth, dim, heads, pre_norm=True, final_norm=True, norm_eps=1e-5)


class Encoder(nn.Module):
    """Pixels in [0, 1] to one vector ``(B, num_tokens, out_channels)`` per latent token, from [class; patches; latent tokens].

    Args:
        mixed: before the last projection the outputs are reshaped, not transposed, from (tokens, channels) to (channels, tokens):
            every latent mixes all tokens. The first three released models were trained so.
    """

    def __init__(
        self,
        grid: Sequence[int],
        patch_size: int,
        num_tokens: int,
        out_channels: int,
        dim: int,
        depth: int,
        heads: int,
        mixed: bool,
    ) -> None:
        super().__init__()
        self.mixed = mixed
        self.patch_embed = PatchEmbed(3, dim, (patch_size, patch_size))
        self.class_embedding = _table(dim)
        self.positions = _table(dim, math.prod(grid) + 1)
        self.latent_tokens = _table(dim, num_tokens)
        self.latent_positions = _table(dim, num_tokens)
        self.trunk = _trunk(depth, dim, heads)
        self.out = nn.Linear(dim, out_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, num_tokens = len(pixels), len(self.latent_tokens)
        patches = torch.cat([self.class_embedding.expand(batch, 1, -1), self.patch_embed(pixels)], dim=1)
        latents = (self.latent_tokens + self.latent_positions).expand(batch, -1, -1)
        x = self.trunk(torch.cat([patches + self.positions, latents], dim=1))[:, -num_tokens:]
        if self.mixed:
            x = x.reshape(batch, -1, num_tokens).transpose(1, 2)
        return self.out(x)


class Decoder(nn.Module):
    """Latents to features ``(B, prod(grid), dim)`` of the image's patches, from [class; mask tokens; latents; text].

    Args:
        text_dim, text_length: width and longest length of a caption's features; None for a decoder without text.
    """

    def __init__(
        self,
        grid: Sequence[int],
        num_tokens: int,
        channels: int,
        dim: int,
        depth: int,
        heads: int,
        text_dim: int | None,
        text_length: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, dim)
        self.class_embedding = _table(dim)
        self.mask_token = _table(dim)
        self.positions = _table(dim, math.prod(grid) + 1)
        self.latent_positions = _table(dim, num_tokens)
        self.text_proj = None if text_dim is None else nn.Linear(text_dim, dim)
        self.text_positions = None if text_dim is None else _table(dim, text_length)
        self.trunk = _trunk(depth, dim, heads)

    def forward(self, latents: Tensor, text: TextFeatures | None = None) -> Tensor:
        batch, patches = len(latents), len(self.positions) - 1
        canvas = torch.cat([self.class_embedding[None], self.mask_token.expand(patches, -1)]) + self.positions
        x = torch.cat([canvas.expand(batch, -1, -1), self.embed(latents) + self.latent_positions], dim=1)
        mask = None
        if text is not None and self.text_proj is not None and self.text_positions is not None:
            mask = key_mask(x.shape[1], text.mask, batch_size=batch)
            features = self.text_proj(text.features.to(self.text_proj.weight.dtype))
            x = torch.cat([x, features + self.text_positions[: features.shape[1]]], dim=1)
        return self.trunk(x, mask=mask)[:, 1 : patches + 1]


class TiTok(VisualTokenizer):
    """TiTok: ``(B, 3, S, S)`` to ``num_tokens`` ids or Gaussian latents; with ``text_dim`` TA-TiTok, whose decoder reads captions.

    A direct decoder paints pixels. A two-stage one predicts the codes of a VQGAN: the first stage has no pixel decoder and learns
    from ``features["code_logits"]``; the second adds the VQGAN's decoder, fed with the softmax-weighted mean of its codes. Networks
    see pixels in [0, 1].

    Args:
        image_size, patch_size, decoder_patch_size: pixels of a side, of the image and of a patch (the decoder's is the encoder's by
            default; with a pixel decoder it is its stride).
        num_tokens, channels: number of latent tokens, and length of a code or latent.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads: the two transformers.
        codebook_size: number of codes, or None for Gaussian latents, which ``encode`` samples; ``kl_weight`` is the weight of their
            divergence, summed over a sample.
        l2_normalize, codebook_weight, commitment_weight, clustering_decay, revive_after, usage_window: see
            :class:`vargen.nn.quantize.VectorQuantizer`.
        mixed_latents: see :class:`Encoder`.
        proxy_codes: number of VQGAN codes of a two-stage model, None for a direct one.
        pixel_widths, pixel_blocks, pixel_channels, pixel_groups: the VQGAN decoder of the second stage, see
            :class:`vargen.tokenizers.titok_vqgan.Decoder`.
        text_dim, text_length: width and longest length of a caption's features, for a decoder that reads captions.
        train_encoder: False freezes encoder and quantiser (the second stage's training).
        latent_mean, latent_std: Gaussian tokens are ``(latent - latent_mean) / latent_std``.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_tokens: int = 32,
        channels: int = 12,
        encoder_dim: int = 1024,
        encoder_depth: int = 24,
        encoder_heads: int = 16,
        decoder_dim: int = 1024,
        decoder_depth: int = 24,
        decoder_heads: int = 16,
        decoder_patch_size: int | None = None,
        codebook_size: int | None = 4096,
        l2_normalize: bool = False,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        clustering_decay: float | None = None,
        revive_after: int | None = None,
        usage_window: int = 0,
        kl_weight: float = 1e-6,
        mixed_latents: bool = False,
        proxy_codes: int | None = None,
        pixel_widths: Sequence[int] | None = None,
        pixel_blocks: int = 2,
        pixel_channels: int = 256,
        pixel_groups: int = 32,
        text_dim: int | None = None,
        text_length: int = 77,
        train_encoder: bool = True,
        latent_mean: float = 0.0,
        latent_std: float = 1.0,
    ) -> None:
        super().__init__()
        side = decoder_patch_size or patch_size
        grid = patch_grid((image_size, image_size), (patch_size, patch_size))
        self.decoder_patch = (side, side)
        self.decoder_grid = patch_grid((image_size, image_size), self.decoder_patch)
        moments = 1 if codebook_size is not None else 2
        self.encoder = Encoder(
            grid, patch_size, num_tokens, moments * channels, encoder_dim, encoder_depth, encoder_heads, mixed_latents
        )
        self.quantizer = None
        if codebook_size is not None:
            self.quantizer = VectorQuantizer(
                codebook_size,
                channels,
                l2_normalize=l2_normalize,
                codebook_weight=codebook_weight,
                commitment_weight=commitment_weight,
                clustering_decay=clustering_decay,
                revive_after=revive_after,
                usage_window=usage_window,
            )
        self.decoder = Decoder(
            self.decoder_grid, num_tokens, channels, decoder_dim, decoder_depth, decoder_heads, text_dim, text_length
        )
        self.code_head = self.pixel_codebook = self.pixel_decoder = self.pixel_head = self.pixel_conv = None
        if proxy_codes is None:
            self.pixel_head = nn.Linear(decoder_dim, math.prod(self.decoder_patch) * 3)
            self.pixel_conv = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.code_head = MLP(decoder_dim, 2 * decoder_dim, proxy_codes, act="tanh")
        init_vit(self)
        if self.pixel_conv is not None:
            # starts as the identity, so that the head below it learns from the first step
            nn.init.dirac_(self.pixel_conv.weight)
        if pixel_widths is not None:
            if proxy_codes is None:
                raise ConfigError("pixel_widths describe the pixel decoder of a two-stage TiTok: give proxy_codes too")
            if 2 ** (len(pixel_widths) - 1) != side:
                raise ConfigError(
                    f"{len(pixel_widths)} pixel_widths: a decoder of {side} pixels per patch needs {side.bit_length()}"
                )
            self.pixel_codebook = nn.Parameter(torch.empty(proxy_codes, pixel_channels).uniform_(-1 / proxy_codes, 1 / proxy_codes))
            self.pixel_decoder = VQGANDecoder(pixel_widths, pixel_channels, pixel_blocks, pixel_groups)
        if not train_encoder:
            self.encoder.requires_grad_(False)
            if self.quantizer is not None:
                self.quantizer.requires_grad_(False)
        if text_dim is not None:
            self.takes_text, self.text_shape = True, (text_length, text_dim)

    def with_pixel_decoder(self, vqgan: MaskGITVQGAN) -> TiTok:
        """The second stage that follows this first one: its weights and the decoder of the VQGAN whose codes it predicts.

        Encoder and quantiser of the new model are frozen. Raises ConfigError if the VQGAN's codes are not those of this model.
        """
        if self.paints:
            raise ConfigError("this TiTok is no first stage: only a model that predicts codes and has no pixel decoder takes one")
        if vqgan.config.codebook_size != self.config.proxy_codes:
            raise ConfigError(f"a VQGAN of {vqgan.config.codebook_size} codes for a first stage of {self.config.proxy_codes}")
        c = vqgan.config
        pixels = {"pixel_widths": c.widths, "pixel_blocks": c.num_blocks, "pixel_channels": c.latent_channels}
        model = TiTok(**{**self.config_dict(), **pixels, "pixel_groups": c.norm_groups, "train_encoder": False})
        decoder = {f"pixel_decoder.{k}": v for k, v in vqgan.decoder.state_dict().items()}
        model.load_state_dict({**self.state_dict(), **decoder, "pixel_codebook": vqgan.quantizer.codes})
        return model

    @property
    def space(self) -> TokenSpace:
        c = self.config
        if c.codebook_size is not None:
            return TokenSpace(((c.num_tokens,),), codebook_size=c.codebook_size)
        return TokenSpace(((c.num_tokens,),), channels=c.channels, mean=c.latent_mean, std=c.latent_std)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def paints(self) -> bool:
        """False for the first stage of a two-stage model."""
        return self.code_head is None or self.pixel_decoder is not None

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """None for a first stage, which has no pixels to compare."""
        return super().scores(pixels, text, noise) if self.paints else {}

    @property
    def last_layer(self) -> nn.Parameter | None:
        if self.pixel_conv is not None:
            return self.pixel_conv.weight
        return self.pixel_decoder.conv_out.weight if self.pixel_decoder is not None else None

    def latents(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        """What goes into the bottleneck, ``(B, num_tokens, channels)``, twice as many channels for Gaussian latents."""
        self.check_pixels(pixels, text)
        if tuple(pixels.shape[2:]) != self.sample_shape:
            size = self.config.image_size
            raise VargenError(
                f"TiTok: pixels of size {pixels.shape[2]}x{pixels.shape[3]}, expected {size}x{size}; resize and crop first"
            )
        return self.encoder((pixels + 1) / 2)

    def paint(self, latents: Tensor, text: TextFeatures | None = None) -> Tensor:
        """Codes or raw latents ``(B, num_tokens, channels)`` to pixels in [0, 1], not clamped.

        Raises:
            VargenError: this is the first stage of a two-stage model, which has no pixels.
        """
        features = self.decoder(latents, text)
        if self.pixel_head is not None and self.pixel_conv is not None:
            return self.pixel_conv(unpatchify(self.pixel_head(features), self.decoder_grid, self.decoder_patch))
        if self.pixel_codebook is None or self.pixel_decoder is None:
            raise VargenError("this TiTok is a first stage, which predicts codes: train or load its second stage to get pixels")
        codes = self.code_logits(features).softmax(-1) @ self.pixel_codebook
        return self.pixel_decoder(rearrange(codes, "b h w c -> b c h w"))

    def code_logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, h, w, proxy_codes)`` of a two-stage model from the decoder's features."""
        assert self.code_head is not None
        return self.code_head(features).unflatten(1, self.decoder_grid)

    def codes(self, tokens: Tensor) -> Tensor:
        """Code vectors of ids ``(B, num_tokens)``, or of soft assignments ``(..., codebook_size)``."""
        assert self.quantizer is not None
        if not tokens.is_floating_point():
            return self.quantizer.lookup(tokens)
        mixed = tokens @ self.quantizer.codebook
        return F.normalize(mixed, dim=-1) if self.config.l2_normalize else mixed

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        latents = self.latents(pixels, text)
        return self.quantizer.nearest(latents) if self.quantizer is not None else self.tokens_of(latents, noise)

    @property
    def moments_shape(self) -> tuple[int, ...] | None:
        return None if self.quantizer is not None else (self.config.num_tokens, 2 * self.config.channels)

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        return self.latents(pixels, text) if self.quantizer is None else super().moments(pixels, text)

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        return self.space.normalize(self._sample(DiagonalGaussian.from_moments(moments.float()), noise))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(tokens))
        self.space.check(tokens)
        latents = self.codes(tokens) if self.quantizer is not None else self.space.denormalize(tokens)
        return self.paint(latents, text) * 2 - 1

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass; a first stage returns no reconstruction but ``features["code_logits"]`` ``(B, h, w, proxy_codes)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_encoder):
            tokens, latents, losses, features = self._bottleneck(self.latents(pixels, text), noise)
        if not self.config.train_encoder:
            losses = {}
        if not self.paints:
            return TokenizerOutput(tokens, None, losses, {**features, "code_logits": self.code_logits(self.decoder(latents, text))})
        return TokenizerOutput(tokens, self.paint(latents, text) * 2 - 1, losses, features)

    def _bottleneck(self, latents: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
        if self.quantizer is not None:
            out = self.quantizer(latents, noise)
            return out.indices, out.quantized, out.losses, out.statistics
        posterior = DiagonalGaussian.from_moments(latents.float())
        sample = self._sample(posterior, noise)
        return self.space.normalize(sample), sample, {"kl": self.config.kl_weight * posterior.kl().sum() / len(sample)}, {}

    def _sample(self, posterior: DiagonalGaussian, noise: Noise | None) -> Tensor:
        shape = posterior.mean.shape
        return posterior.sample(as_noise(noise, shape[0], posterior.mean.device).normal("posterior", shape[1:]))
