"""LARP: a video tokenizer whose learned queries read the whole clip, quantized by sampling and ordered by a learned prior.

Wang et al., "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior", ICLR 2025, arXiv 2410.21264. The network
works on values in [0, 1]; the public methods take and return [-1, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError, nearest
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.norm import LayerNorm
from vargen.nn.patch import PatchEmbed, patch_grid, unpatchify
from vargen.nn.positions import sincos_1d, sincos_3d
from vargen.nn.quantize import VectorQuantizer
from vargen.nn.vit import Transformer
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace
from vargen.tokenizers.larp_prior import PRIORS, LatentPrior, top_accuracy

PRESETS: dict[str, dict[str, Any]] = {
    "larp-l-long": {"prior": "S"},
    "larp-tiny": {
        "sample_size": 32,
        "frames": 8,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "num_tokens": 64,
        "encoder_dim": 128,
        "encoder_depth": 4,
        "encoder_heads": 4,
        "decoder_dim": 128,
        "decoder_depth": 4,
        "decoder_heads": 4,
        "codebook_size": 512,
        "prior": {"depth": 3, "heads": 4, "dim": 128},
    },
}


class LARPTokenizer(VisualTokenizer):
    """Videos to ``num_tokens`` ids and back, at any multiple of the temporal patch up to ``frames`` frames.

    Args:
        sample_size, frames: side of the square frames and the longest clip.
        patch_size, temporal_patch_size: patches of encoder and decoder.
        num_tokens: number of queries and so of tokens, whatever the number of patches.
        encoder_dim, encoder_depth, encoder_heads, decoder_dim, decoder_depth, decoder_heads: sizes of both transformers.
        codebook_size, code_dim, temperature: of the stochastic quantizer, which draws a code with probability
            softmax(cosine / temperature) (section 3.2).
        position_base: base of the sine-cosine table of the latent positions.
        norm_eps: of the norms inside both transformers.
        query_std: of the queries at the start; short runs need more than the published 0.02 for the tokens to become different.
        quantizer_weight, commitment_weight: weight of codebook loss + commitment_weight * commitment loss.
        revive_after: a code unused for so many steps is replaced by a latent of the batch; None leaves dead codes alone.
        prior: size of the autoregressive prior, a key of ``PRIORS`` or arguments of :class:`LatentPrior`; None for none, which is
            all that inference needs.
        prior_weight: weight of the prior's loss.
    """

    video = True
    scheduled = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        frames: int = 16,
        patch_size: int = 8,
        temporal_patch_size: int = 4,
        num_tokens: int = 1024,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        codebook_size: int = 8192,
        code_dim: int = 16,
        temperature: float = 0.03,
        position_base: float = 10000.0,
        norm_eps: float = 1e-5,
        query_std: float = 0.02,
        quantizer_weight: float = 0.1,
        commitment_weight: float = 0.25,
        revive_after: int | None = None,
        prior: str | dict[str, Any] | None = None,
        prior_weight: float = 0.06,
    ) -> None:
        super().__init__()
        self.patch = (temporal_patch_size, patch_size, patch_size)
        grid = patch_grid((frames, sample_size, sample_size), self.patch)
        block: dict[str, Any] = {"norm_eps": norm_eps, "qkv_bias": False}
        self.embed = PatchEmbed(3, encoder_dim, self.patch)
        self.queries = nn.Parameter(query_std * torch.randn(num_tokens, encoder_dim))
        self.encoder = Transformer(encoder_depth, encoder_dim, encoder_heads, **block)
        self.to_code = nn.Linear(encoder_dim, code_dim)
        self.quantizer = VectorQuantizer(
            codebook_size,
            code_dim,
            l2_normalize=True,
            commitment_weight=commitment_weight,
            sampling_temperature=temperature,
            revive_after=revive_after,
        )
        self.from_code = nn.Linear(code_dim, decoder_dim)
        self.patch_type = nn.Parameter(0.02 * torch.randn(decoder_dim))
        self.decoder = Transformer(decoder_depth, decoder_dim, decoder_heads, **block)
        self.norm_out = LayerNorm(decoder_dim, 1e-6)
        self.to_patch = nn.Linear(decoder_dim, math.prod(self.patch) * 3)
        self.prior_model = None if prior is None else _build_prior(prior, code_dim, num_tokens)
        self.apply(_init_weights)
        nn.init.zeros_(self.to_patch.weight)
        nn.init.kaiming_uniform_(self.quantizer.codebook)

        self.register_buffer("encoder_positions", sincos_3d(encoder_dim, grid), persistent=False)
        self.register_buffer("patch_positions", sincos_3d(decoder_dim, grid), persistent=False)
        latent_positions = sincos_1d(decoder_dim, torch.arange(num_tokens), position_base).float()
        self.register_buffer("latent_positions", latent_positions, persistent=False)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(levels=((self.config.num_tokens,),), codebook_size=self.config.codebook_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.config.frames, self.config.sample_size, self.config.sample_size)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.to_patch.weight

    def grid(self, frames: int) -> tuple[int, ...]:
        """Patch grid of a clip; raises VargenError for a length that the model has no positions for."""
        if frames > self.config.frames or frames < 1 or frames % self.patch[0]:
            raise VargenError(f"LARPTokenizer: {frames} frames, expected a multiple of {self.patch[0]} up to {self.config.frames}")
        return patch_grid((frames, *self.sample_shape[1:]), self.patch)

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        super().check_pixels(pixels, text)
        if tuple(pixels.shape[3:]) != self.sample_shape[1:]:
            raise VargenError(f"LARPTokenizer: frames of {tuple(pixels.shape[3:])}, expected {self.sample_shape[1:]}; resize first")
        self.grid(pixels.shape[2])
        return pixels

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to what the quantizer sees, ``(B, N, C)``."""
        patches = self.embed((pixels + 1) / 2)
        patches = patches + self.encoder_positions[: patches.shape[1]]
        queries = self.queries.expand(pixels.shape[0], -1, -1)
        return self.to_code(self.encoder(torch.cat([patches, queries], dim=1))[:, -queries.shape[1] :])

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        """Quantized latents ``(B, N, C)`` to pixels around [-1, 1]."""
        grid = self.grid(frames)
        count = math.prod(grid)
        latents = self.from_code(latents.to(self.from_code.weight.dtype)) + self.latent_positions
        patches = (self.patch_positions[:count] + self.patch_type).expand(latents.shape[0], -1, -1)
        patches = self.decoder(torch.cat([latents, patches], dim=1))[:, -count:]
        return 2 * unpatchify(self.to_patch(self.norm_out(patches)), grid, self.patch) - 1

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Ids ``(B, num_tokens)``: the most probable codes, or codes drawn with ``noise`` as in training."""
        self.check_pixels(pixels, text)
        return self.quantizer(self.latents(pixels), noise, sample=noise is not None).indices

    def decode(
        self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None, *, frames: int | None = None
    ) -> Tensor:
        """Ids ``(B, num_tokens)`` to a clip of ``frames`` frames (all by default), ``(B, 3, frames, H, W)``."""
        self.check_text(text, tokens.shape[0])
        if tokens.dim() == 2 and tokens.shape[1] > self.config.num_tokens:
            raise SpaceError(f"{tokens.shape[1]} tokens: LARPTokenizer has {self.config.num_tokens}")
        return self.pixels(self.quantizer.lookup(self.space.check(tokens)), frames or self.config.frames)

    def forward(
        self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None, progress: float = 1.0
    ) -> TokenizerOutput:
        """Reconstruction with the quantizer's and the prior's losses (section 3); ``progress`` in [0, 1] is how far training is."""
        self.check_pixels(pixels, text)
        noise = as_noise(noise, pixels.shape[0], pixels.device)
        q = self.quantizer(self.latents(pixels), noise)
        reconstruction = self.pixels(q.quantized, pixels.shape[2])
        losses = {name: self.config.quantizer_weight * loss for name, loss in q.losses.items()}
        features = dict(q.statistics)
        if self.prior_model is not None:
            prior = self.prior_model.loss(q.quantized, q.indices, self.quantizer.codes, progress, noise)
            losses["prior"] = self.config.prior_weight * prior.loss
            top = min(5, self.config.codebook_size)
            features["prior_top5"] = top_accuracy(prior.logits[0].detach(), q.indices[:, 1:], top)
        return TokenizerOutput(q.indices, reconstruction, losses, features)


def _build_prior(size: str | dict[str, Any], code_dim: int, num_tokens: int) -> LatentPrior:
    if isinstance(size, str):
        if size not in PRIORS:
            raise ConfigError(f"prior '{size}'{nearest(size, PRIORS)}")
        size = PRIORS[size]
    arguments: dict[str, Any] = {"max_tokens": num_tokens, **size}
    if not 2 <= num_tokens <= arguments["max_tokens"]:
        raise ConfigError(f"a prior of up to {arguments['max_tokens']} tokens for {num_tokens}: expected at least 2 and no more")
    return LatentPrior(code_dim, **arguments)


def _init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear layers and patch embedding, zero biases, as published."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
