"""The frozen image encoder of SEED: EVA-CLIP's ViT without its last block (Fang et al., 2023), as BLIP-2 reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vargen.nn.norm import LayerNorm
from vargen.nn.patch import PatchEmbed, patch_grid, resize_positions
from vargen.nn.vit import Transformer

# of the pixels in [0, 1] that CLIP models see
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_normalize(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] ``(B, 3, H, W)`` as CLIP models take them."""
    mean, std = (pixels.new_tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / std


class VisionEncoder(nn.Module):
    """Patches and a class token through pre-norm blocks; all tokens of the last block are normed and returned.

    The blocks' keys have a bias that checkpoints lack: it cancels in the softmax.

    Args:
        image_size: pixels of a side that the learned positions belong to; those of other sizes are interpolated.
        patch_size, dim, depth, heads, mlp_hidden: of the transformer.
    """

    def __init__(self, image_size: int, patch_size: int, dim: int, depth: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.grid = patch_grid((image_size, image_size), (patch_size, patch_size))
        self.patches = PatchEmbed(3, dim, (patch_size, patch_size))
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1 + self.grid[0] * self.grid[1], dim))
        self.transformer = Transformer(depth, dim, heads, mlp_hidden, norm_eps=1e-6)
        self.norm = LayerNorm(dim, 1e-5)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` to the tokens that enter the blocks, ``(B, 1 + N, dim)``, class token first."""
        grid = patch_grid(images.shape[2:], self.patches.patch)
        positions = torch.cat([self.positions[:1], resize_positions(self.positions[1:], self.grid, grid)])
        class_token = self.class_token.expand(images.shape[0], 1, -1)
        return torch.cat([class_token, self.patches(images)], dim=1) + positions

    def forward(self, images: Tensor) -> Tensor:
        """Images as :func:`clip_normalize` gives them to features ``(B, 1 + N, dim)``."""
        return self.norm(self.transformer(self.embed(images)))
