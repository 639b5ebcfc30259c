"""What both training stages of SEED share: a frozen image encoder read by a causal Q-Former."""

from __future__ import annotations

from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import VargenError
from vargen.model import VisualTokenizer
from vargen.nn.patch import patch_grid
from vargen.tokenizers.seed.qformer import QFormer
from vargen.tokenizers.seed.vit import VisionEncoder, clip_normalize

# constructor arguments of both stages: the released size and a small one
RELEASED = {
    "image_size": 224,
    "patch_size": 14,
    "vision_dim": 1408,
    "vision_depth": 39,
    "vision_heads": 16,
    "vision_mlp": 6144,
    "num_queries": 32,
    "dim": 768,
    "depth": 12,
    "heads": 12,
    "mlp_hidden": 3072,
}
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "vision_dim": 96,
    "vision_depth": 4,
    "vision_heads": 4,
    "vision_mlp": 384,
    "num_queries": 16,
    "dim": 96,
    "depth": 4,
    "heads": 4,
    "mlp_hidden": 384,
}


class CausalEmbedder(VisualTokenizer):
    """Base of SEED's models: pixels to causal embeddings ``(B, num_queries, dim)``."""

    vision: VisionEncoder
    qformer: QFormer

    def _build(self, vocab_size: int | None = None, max_positions: int = 512) -> None:
        c = self.config
        self.vision = VisionEncoder(c.image_size, c.patch_size, c.vision_dim, c.vision_depth, c.vision_heads, c.vision_mlp)
        self.qformer = QFormer(
            c.num_queries,
            c.dim,
            c.depth,
            c.heads,
            c.mlp_hidden,
            c.vision_dim,
            causal=c.causal,
            vocab_size=vocab_size,
            max_positions=max_positions,
            dropout=c.dropout,
        )

    @property
    def paints(self) -> bool:
        return False

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        super().check_pixels(pixels, text)
        patch_grid(pixels.shape[2:], self.vision.patches.patch)
        return pixels

    def causal_embeddings(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to ``(B, num_queries, dim)``; the last embedding has seen all others."""
        return self.qformer(self.vision(clip_normalize(pixels)))


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


def no_pixels(what: str) -> VargenError:
    return VargenError(f"{what}: SEED's codes become an image embedding; attach a decoder of such embeddings (UnCLIPDecoder) first")
