"""TexTok: a ViT autoencoder whose encoder and decoder both read the caption, so that its latents carry only what text cannot.

Zha et al., "Language-Guided Image Tokenization for Generation", arXiv 2412.05796 (CVPR 2025). There is no code or checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import VargenError
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.patch import PatchEmbed, patch_grid, unpatchify
from vargen.nn.vit import Transformer, init_vit, key_mask
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace

T5_XL, T5_XXL = 2048, 4096

PRESETS: dict[str, dict[str, Any]] = {
    "textok-32-256": {"image_size": 256, "patch_size": 8, "num_tokens": 32, "text_dim": T5_XL},
    "textok-64-256": {"image_size": 256, "patch_size": 8, "num_tokens": 64, "text_dim": T5_XL},
    "textok-128-256": {"image_size": 256, "patch_size": 8, "num_tokens": 128, "text_dim": T5_XL},
    "textok-256-256": {"image_size": 256, "patch_size": 8, "num_tokens": 256, "text_dim": T5_XL},
    "textok-32-512": {"image_size": 512, "patch_size": 16, "num_tokens": 32, "text_dim": T5_XXL},
    "textok-64-512": {"image_size": 512, "patch_size": 16, "num_tokens": 64, "text_dim": T5_XXL},
    "textok-128-512": {"image_size": 512, "patch_size": 16, "num_tokens": 128, "text_dim": T5_XXL},
    "textok-256-512": {"image_size": 512, "patch_size": 16, "num_tokens": 256, "text_dim": T5_XXL},
}


def _table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.02)


class TextGroup(nn.Module):
    """The caption as the last tokens of a sequence: projected to the model's width, with positions of its own."""

    def __init__(self, text_dim: int, dim: int, length: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, dim)
        self.positions = _table(length, dim)

    def forward(self, text: TextFeatures) -> Tensor:
        return self.proj(text.features.to(self.proj.weight.dtype)) + self.positions[: text.features.shape[1]]


class TexTok(VisualTokenizer):
    """TexTok: ``(B, 3, S, S)`` and a caption to ``num_tokens`` latents ``(B, num_tokens, channels)``.

    The encoder runs over [patches; latent queries; text] and keeps the outputs at the queries, the decoder over
    [patch queries; latents; text] and keeps those at the patch queries. A query is its own position code. Padded text is masked.

    Args:
        image_size, patch_size: pixels of a side, of the image and of a patch.
        num_tokens, channels: number of latents, and their length.
        dim, depth, heads: size of both transformers.
        text_dim, text_length: width of the caption's features and the most tokens it may have.
        encoder_text, decoder_text: the sides that read the caption; with neither, the model is the baseline and takes no text.
        variational: a Gaussian bottleneck instead of a deterministic one; ``kl_weight`` is the weight of its divergence, summed
            over a sample's latents.
        latent_mean, latent_std: tokens are ``(latent - latent_mean) / latent_std``; measured after training.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 8,
        num_tokens: int = 128,
        channels: int = 8,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        text_dim: int = T5_XL,
        text_length: int = 128,
        encoder_text: bool = True,
        decoder_text: bool = True,
        variational: bool = False,
        kl_weight: float = 1e-6,
        latent_mean: float = 0.0,
        latent_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.patch = (patch_size, patch_size)
        self.grid = patch_grid((image_size, image_size), self.patch)
        num_patches = math.prod(self.grid)
        self.patch_embed = PatchEmbed(3, dim, self.patch)
        self.patch_positions = _table(num_patches, dim)
        self.latent_queries = _table(num_tokens, dim)
        self.encoder_text = TextGroup(text_dim, dim, text_length) if encoder_text else None
        self.encoder = Transformer(depth, dim, heads, final_norm=True)
        self.to_latents = nn.Linear(dim, channels * (2 if variational else 1))
        self.from_latents = nn.Linear(channels, dim)
        self.latent_positions = _table(num_tokens, dim)
        self.patch_queries = _table(num_patches, dim)
        self.decoder_text = TextGroup(text_dim, dim, text_length) if decoder_text else None
        self.decoder = Transformer(depth, dim, heads, final_norm=True)
        self.to_pixels = nn.Linear(dim, math.prod(self.patch) * 3)
        init_vit(self)
        if encoder_text or decoder_text:
            self.takes_text, self.text_shape = True, (text_length, text_dim)

    @property
    def space(self) -> TokenSpace:
        c = self.config
        return TokenSpace(((c.num_tokens,),), channels=c.channels, mean=c.latent_mean, std=c.latent_std)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """PSNR of the round trip, and with every sample given its neighbour's caption on both sides: what captions are worth."""
        right = super().scores(pixels, text, noise)
        if text is None:
            return right
        others = text.select(torch.arange(len(pixels), device=text.mask.device).roll(1))
        return {**right, "psnr_other_caption": super().scores(pixels, others, noise)["psnr"]}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.to_pixels.weight

    def posterior(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor | DiagonalGaussian:
        """Raw latents ``(B, num_tokens, channels)``, or their distribution if the bottleneck is variational."""
        raw = self._bottleneck(pixels, text)
        return DiagonalGaussian.from_moments(raw) if self.config.variational else raw

    def _bottleneck(self, pixels: Tensor, text: TextFeatures | None) -> Tensor:
        self.check_pixels(pixels, text)
        if tuple(pixels.shape[2:]) != self.sample_shape:
            raise VargenError(
                f"TexTok: pixels of size {pixels.shape[2]}x{pixels.shape[3]}, expected {self.config.image_size}x"
                f"{self.config.image_size}; resize and crop first"
            )
        patches = self.patch_embed(pixels) + self.patch_positions
        queries = self.latent_queries.expand(len(pixels), -1, -1)
        x = self._run(self.encoder, self.encoder_text, patches, queries, text)
        return self.to_latents(x[:, patches.shape[1] : patches.shape[1] + queries.shape[1]])

    @property
    def moments_shape(self) -> tuple[int, ...] | None:
        return (self.config.num_tokens, 2 * self.config.channels) if self.config.variational else None

    def moments(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        return self._bottleneck(pixels, text) if self.config.variational else super().moments(pixels, text)

    def tokens_of(self, moments: Tensor, noise: Noise | None = None) -> Tensor:
        return self.space.normalize(self._latents(DiagonalGaussian.from_moments(moments), noise))

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        return self.space.normalize(self._latents(self.posterior(pixels, text), noise))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(tokens))
        return self._paint(self.space.denormalize(self.space.check(tokens)), text)

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        posterior = self.posterior(pixels, text)
        latents = self._latents(posterior, noise)
        losses = {}
        if isinstance(posterior, DiagonalGaussian):
            losses["kl"] = self.config.kl_weight * posterior.kl().sum() / len(pixels)
        return TokenizerOutput(self.space.normalize(latents), self._paint(latents, text), losses)

    def _latents(self, posterior: Tensor | DiagonalGaussian, noise: Noise | None) -> Tensor:
        if isinstance(posterior, Tensor):
            return posterior
        shape, device = posterior.mean.shape, posterior.mean.device
        return posterior.sample(as_noise(noise, shape[0], device).normal("posterior", shape[1:]).to(posterior.mean.dtype))

    def _paint(self, latents: Tensor, text: TextFeatures | None) -> Tensor:
        queries = self.patch_queries.expand(len(latents), -1, -1)
        x = self._run(self.decoder, self.decoder_text, queries, self.from_latents(latents) + self.latent_positions, text)
        return unpatchify(self.to_pixels(x[:, : queries.shape[1]]), self.grid, self.patch)

    def _run(self, trunk: Transformer, group: TextGroup | None, first: Tensor, second: Tensor, text: TextFeatures | None) -> Tensor:
        if group is None or text is None:
            return trunk(torch.cat([first, second], dim=1))
        mask = key_mask(first.shape[1] + second.shape[1], text.mask, batch_size=len(first))
        return trunk(torch.cat([first, second, group(text)], dim=1), mask=mask)
