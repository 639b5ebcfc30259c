"""MingTok: an image to continuous latents, semantic features and pixels, in that order.

Huang et al., "Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer", arXiv 2510.06590.
A low-level encoder makes a grid of latents; a causal decoder expands them into semantic features, which a language model reads and
from which a bidirectional decoder paints the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, VargenError, nearest
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.cache import KVCache
from vargen.nn.mlp import swiglu_hidden
from vargen.nn.norm import LayerNorm
from vargen.nn.patch import PatchEmbed, patch_grid, patchify, resize_positions, unpatchify
from vargen.nn.vit import Transformer, init_vit
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace

PRESETS: dict[str, dict[str, Any]] = {
    "mingtok-vision": {
        "image_size": 512,
        "patch_size": 32,
        "latent_channels": 32,
        "encoder_dim": 768,
        "encoder_depth": 12,
        "semantic_dim": 1024,
        "semantic_depth": 24,
        "pixel_patch_size": 16,
        "pixel_dim": 1024,
        "pixel_depth": 24,
        "latent_mean": 1.46817409,
        "latent_std": 8.09449291,
    },
}

HEAD_DIM = 64
NORM_EPS = 1e-6


def _trunk(dim: int, depth: int, gated: bool, final_norm: bool) -> Transformer:
    if dim % HEAD_DIM:
        raise ConfigError(f"MingTok width {dim}: expected a multiple of {HEAD_DIM}, the width of a head")
    hidden = swiglu_hidden(dim, multiple_of=8) if gated else 4 * dim
    return Transformer(depth, dim, dim // HEAD_DIM, hidden, gated=gated, final_norm=final_norm, norm_eps=NORM_EPS)


class LowLevelEncoder(nn.Module):
    """Pixels to raw latents ``(B, h * w + 1, latent_channels)`` in raster order with the class token last.

    The output is a shortcut, the mean over each run of ``dim / latent_channels`` channels, plus a projection.
    """

    def __init__(self, image_size: int, patch_size: int, dim: int, depth: int, latent_channels: int, masked: bool) -> None:
        super().__init__()
        if dim % latent_channels:
            raise ConfigError(f"encoder width {dim}: expected a multiple of the {latent_channels} latent channels")
        self.grid = patch_grid((image_size, image_size), (patch_size, patch_size))
        self.patch_embed = PatchEmbed(3, dim, (patch_size, patch_size))
        self.cls_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.positions = nn.Parameter(torch.randn(math.prod(self.grid) + 1, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(dim)) if masked else None
        self.trunk = _trunk(dim, depth, gated=True, final_norm=False)
        self.out_norm = LayerNorm(dim, NORM_EPS)
        self.out_proj = nn.Linear(dim, latent_channels)

    def positions_of(self, grid: Sequence[int]) -> Tensor:
        """Positions ``(prod(grid) + 1, dim)`` of another grid, the class token's unchanged and last."""
        return torch.cat([resize_positions(self.positions[:-1], self.grid, grid, offset=0.1), self.positions[-1:]])

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask``: bool ``(B, h * w)``, True at patches that the encoder may not see."""
        x = self.patch_embed(pixels)
        if mask is not None and self.mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), self.mask_token, x)
        x = torch.cat([x, self.cls_token.expand(len(x), 1, -1)], dim=1)
        x = self.trunk(x + self.positions_of(patch_grid(pixels.shape[2:], self.patch_embed.patch)))
        shortcut = reduce(x, "b n (c group) -> b n c", "mean", c=self.out_proj.out_features)
        return shortcut + self.out_proj(F.gelu(self.out_norm(x)))


class SemanticDecoder(nn.Module):
    """Raw latents to semantic features by causal blocks without position table: the latents and the mask carry the order."""

    def __init__(self, latent_channels: int, dim: int, depth: int) -> None:
        super().__init__()
        if dim % latent_channels:
            raise ConfigError(f"semantic width {dim}: expected a multiple of the {latent_channels} latent channels")
        self.in_proj = nn.Linear(latent_channels, dim)
        self.trunk = _trunk(dim, depth, gated=True, final_norm=True)

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """A cache for decoding latents as they arrive."""
        weight = self.in_proj.weight
        dim = weight.shape[0]
        return KVCache(len(self.trunk.blocks), batch_size, dim // HEAD_DIM, capacity, HEAD_DIM, weight.dtype, weight.device)

    def forward(self, latents: Tensor, cache: KVCache | None = None) -> Tensor:
        """``(B, n, latent_channels)`` to ``(B, n, dim)``; with a cache the latents follow those that it has seen."""
        shortcut = repeat(latents, "b n c -> b n (c group)", group=self.in_proj.out_features // latents.shape[-1])
        return self.trunk(self.in_proj(latents) + shortcut, causal=True, cache=cache)


class PixelDecoder(nn.Module):
    """Semantic features to pixel patches; each feature becomes ``up x up`` tokens of the finer pixel grid first."""

    def __init__(self, semantic_dim: int, dim: int, depth: int, up: int, patch_size: int) -> None:
        super().__init__()
        self.up = up
        self.expand = nn.Linear(semantic_dim, up * up * dim)
        self.trunk = _trunk(dim, depth, gated=False, final_norm=True)
        self.head = nn.Linear(dim, patch_size * patch_size * 3)

    def forward(self, features: Tensor, grid: Sequence[int]) -> Tensor:
        """``(B, h * w, semantic_dim)`` to patches ``(B, h up * w up, patch * patch * 3)``, channel fastest."""
        x = rearrange(self.expand(features), "b (h w) (y x c) -> b (h y w x) c", h=grid[0], w=grid[1], y=self.up, x=self.up)
        return self.head(self.trunk(x))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _standardized(patches: Tensor) -> Tensor:
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def _rescaled(prediction: Tensor) -> Tensor:
    low, high = prediction.min(), prediction.max()
    return 2 * (prediction - low) / (high - low) - 1


def _square(difference: Tensor) -> Tensor:
    return difference.square()


# what is done to the prediction, to the target, and to their difference
PIXEL_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "l1": (_unchanged, _unchanged, torch.abs),
    "l1_tanh": (torch.tanh, _unchanged, torch.abs),
    "l1_rescaled": (_rescaled, _unchanged, torch.abs),
    "l2": (_unchanged, _unchanged, _square),
    "l2_standardized": (_unchanged, _standardized, _square),
}


def pixel_loss(kind: str, prediction: Tensor, target: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Mean loss of pixel patches ``(B, N, D)``, over the patches that are not ``excluded`` (bool ``(B, N)``).

    Args:
        kind: ``l1`` (the released model's), ``l1_tanh`` of a squashed prediction, ``l1_rescaled`` of one stretched to [-1, 1] over
            the whole batch, ``l2``, ``l2_standardized`` against patches of zero mean and unit (unbiased) variance.
    """
    if kind not in PIXEL_LOSSES:
        raise ConfigError(f"pixel loss '{kind}'{nearest(kind, PIXEL_LOSSES)}")
    of_prediction, of_target, distance = PIXEL_LOSSES[kind]
    per_patch = distance(of_prediction(prediction) - of_target(target)).mean(-1)
    if excluded is None:
        return per_patch.mean()
    kept = (~excluded).to(per_patch.dtype)
    return (per_patch * kept).sum() / kept.sum().clamp(min=1)


class MingTok(VisualTokenizer):
    """MingTok-Vision: ``(B, 3, H, W)`` to a grid of latents ``(B, H / patch, W / patch, latent_channels)``.

    Any size that the patch divides can be encoded; position embeddings are interpolated. Tokens are normalised latents without the
    class token's, which no other token sees.

    Args:
        image_size, patch_size: the size that positions are stored for, and pixels per latent.
        latent_channels: length of a latent.
        encoder_dim, encoder_depth, semantic_dim, semantic_depth, pixel_dim, pixel_depth: the three transformers; heads have 64
            channels.
        pixel_patch_size: pixels per token of the pixel decoder.
        latent_mean, latent_std: tokens are ``(latent - latent_mean) / latent_std``.
        pixel_loss, pixel_weight: reconstruction loss of the training pass, see :func:`pixel_loss`, and its weight.
        mask_ratio: share of patches that the encoder does not see in training; above 0 there is a learned mask token.
        latent_teacher_channels, semantic_teacher_channels: widths of the frozen teachers that supervise latents and semantics in
            training; each adds a linear head whose output is in ``features`` under ``latent_teacher`` or ``semantic_teacher``.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        image_size: int = 512,
        patch_size: int = 32,
        latent_channels: int = 32,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        semantic_dim: int = 1024,
        semantic_depth: int = 24,
        pixel_patch_size: int = 16,
        pixel_dim: int = 1024,
        pixel_depth: int = 24,
        latent_mean: float = 0.0,
        latent_std: float = 1.0,
        pixel_loss: str = "l1",
        pixel_weight: float = 1.0,
        mask_ratio: float = 0.0,
        latent_teacher_channels: int | None = None,
        semantic_teacher_channels: int | None = None,
    ) -> None:
        super().__init__()
        if patch_size % pixel_patch_size:
            raise ConfigError(f"patch size {patch_size}: expected a multiple of the pixel decoder's {pixel_patch_size}")
        if not 0 <= mask_ratio < 1:
            raise ConfigError(f"mask_ratio {mask_ratio}: expected 0 <= mask_ratio < 1")
        if pixel_loss not in PIXEL_LOSSES:
            raise ConfigError(f"pixel loss '{pixel_loss}'{nearest(pixel_loss, PIXEL_LOSSES)}")
        up = patch_size // pixel_patch_size
        self.encoder = LowLevelEncoder(image_size, patch_size, encoder_dim, encoder_depth, latent_channels, mask_ratio > 0)
        self.semantic_decoder = SemanticDecoder(latent_channels, semantic_dim, semantic_depth)
        self.pixel_decoder = PixelDecoder(semantic_dim, pixel_dim, pixel_depth, up, pixel_patch_size)
        self.teacher_heads = nn.ModuleDict()
        if latent_teacher_channels is not None:
            self.teacher_heads["latent_teacher"] = nn.Linear(latent_channels, latent_teacher_channels)
        if semantic_teacher_channels is not None:
            self.teacher_heads["semantic_teacher"] = nn.Linear(semantic_dim, semantic_teacher_channels)
        init_vit(self)

    @property
    def space(self) -> TokenSpace:
        c = self.config
        return TokenSpace((self.encoder.grid,), channels=c.latent_channels, mean=c.latent_mean, std=c.latent_std)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.pixel_decoder.head.weight

    def encode_with_class(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw latents ``(B, h * w + 1, C)``, the class token's last."""
        return self.encoder(self.check_pixels(pixels), mask)

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(pixels))
        latents = self.encode_with_class(pixels)[:, :-1]
        return self.space.normalize(latents.unflatten(1, patch_grid(pixels.shape[2:], self.encoder.patch_embed.patch)))

    def semantic_features(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, h, w, C)`` of any grid to semantic features ``(B, h, w, semantic_dim)``."""
        if tokens.dim() != 4:
            raise VargenError(f"MingTok: tokens of shape {tuple(tokens.shape)}, expected (B, h, w, {self.config.latent_channels})")
        grid = tokens.shape[1:3]
        replace(self.space, levels=(tuple(grid),)).check(tokens)
        return self.semantic_decoder(self.space.denormalize(tokens).flatten(1, 2)).unflatten(1, grid)

    def decode_features(self, features: Tensor) -> Tensor:
        """Semantic features ``(B, h, w, semantic_dim)`` to pixels."""
        return self._join(self.pixel_decoder(features.flatten(1, 2), features.shape[1:3]), features.shape[1:3])

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        self.check_text(text, len(tokens))
        return self.decode_features(self.semantic_features(tokens))

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass: in training mode masked patches are hidden from the encoder and left out of the pixel loss."""
        self.check_pixels(pixels, text)
        grid = patch_grid(pixels.shape[2:], self.encoder.patch_embed.patch)
        masking = self.training and self.config.mask_ratio > 0
        mask = self._draw_mask(grid, as_noise(noise, len(pixels), pixels.device)) if masking else None
        latents = self.encode_with_class(pixels, mask)
        semantic = self.semantic_decoder(latents)[:, :-1]
        patches = self.pixel_decoder(semantic, grid)
        hidden = {"latent_teacher": latents[:, :-1], "semantic_teacher": semantic}
        return TokenizerOutput(
            tokens=self.space.normalize(latents[:, :-1].unflatten(1, grid)),
            reconstruction=self._join(patches, grid),
            losses={"pixel": self.config.pixel_weight * self.reconstruction_loss(patches, pixels, mask)},
            features={"semantic": semantic.unflatten(1, grid)}
            | {name: head(hidden[name]).unflatten(1, grid) for name, head in self.teacher_heads.items()},
        )

    def reconstruction_loss(self, patches: Tensor, pixels: Tensor, mask: Tensor | None = None, kind: str | None = None) -> Tensor:
        """Loss of predicted patches against the image, leaving out the patches under ``mask`` (bool ``(B, h * w)``)."""
        side, up = self.config.pixel_patch_size, self.pixel_decoder.up
        if mask is not None:
            height = pixels.shape[2] // self.config.patch_size
            mask = repeat(mask, "b (h w) -> b (h y w x)", h=height, y=up, x=up)
        return pixel_loss(kind or self.config.pixel_loss, patches, patchify(pixels, (side, side)), mask)

    def _draw_mask(self, grid: Sequence[int], noise: Noise) -> Tensor:
        count = math.prod(grid)
        return noise.permutation("mask", count) < round(self.config.mask_ratio * count)

    def _join(self, patches: Tensor, grid: Sequence[int]) -> Tensor:
        side, up = self.config.pixel_patch_size, self.pixel_decoder.up
        return unpatchify(patches, [n * up for n in grid], (side, side))
