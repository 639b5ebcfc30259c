"""SEED and SEED-2: an image as 32 causally ordered codes that stand for its meaning rather than for its pixels.

Ge et al., "Planting a SEED of Vision in Large Language Model", arXiv 2307.08041, and "Making LLaMA SEE and Draw with SEED
Tokenizer", ICLR 2024, arXiv 2310.01218. Codes are decoded to the embedding that an unCLIP diffusion model draws from.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.checkpoint import load_strictly
from vargen.condition import TextFeatures
from vargen.errors import CheckpointError, ConfigError, SpaceError
from vargen.model import TokenizerOutput
from vargen.nn.mlp import MLP
from vargen.nn.quantize import QuantizerOutput, VectorQuantizer
from vargen.nn.vit import Transformer
from vargen.noise import Noise
from vargen.space import TokenSpace
from vargen.tokenizers.seed.causal import RELEASED, TINY, CausalEmbedder, freeze, no_pixels
from vargen.tokenizers.seed.embedder import SeedEmbedder
from vargen.tokenizers.seed.qformer import QFormer
from vargen.tokenizers.seed.unclip_training import load_decoder

PRESETS: dict[str, dict[str, Any]] = {
    "seed-2": RELEASED,
    "seed-2-reverse": {**RELEASED, "head": "qformer"},
    "seed-1": {**RELEASED, "head": "qformer", "embedding_dim": 768, "embedding_tokens": 77},
    "seed-tiny": {**TINY, "codebook_size": 256, "decoder_depth": 2, "decoder_heads": 4, "embedding_dim": 64},
}
HEADS = ("mlp", "qformer")


class EmbeddingDecoder(Protocol):
    """Draws images from the embeddings that SEED decodes its codes to."""

    def __call__(self, embeddings: Tensor, noise: Noise | None = None, **options: Any) -> Tensor:
        """``(B, C)`` or ``(B, L, C)`` to pixels ``(B, 3, H, W)``."""


class PositionedBlocks(nn.Module):
    """Learned positions and pre-norm blocks without a final norm."""

    def __init__(self, length: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, dim))
        self.transformer = Transformer(depth, dim, heads, norm_eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x + self.positions)


class MLPHead(nn.Module):
    """Every token shrunk by a bias-free ReLU MLP, all of them joined and projected: the released de-tokeniser."""

    def __init__(self, length: int, dim: int, embedding_dim: int, widths: tuple[int, ...] = (256, 128, 32)) -> None:
        super().__init__()
        sizes = (dim, *widths)
        self.down = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))
        self.proj = nn.Linear(length * widths[-1], embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, length, dim)`` to ``(B, embedding_dim)``."""
        *hidden, last = self.down
        for layer in hidden:
            x = F.relu(layer(x))
        return self.proj(last(x).flatten(1))


class ReverseQFormerHead(nn.Module):
    """Learned queries that read the tokens, projected: the papers' de-tokeniser."""

    def __init__(self, tokens: int, dim: int, depth: int, heads: int, mlp_hidden: int, embedding_dim: int, dropout: float) -> None:
        super().__init__()
        self.qformer = QFormer(tokens, dim, depth, heads, mlp_hidden, dim, dropout=dropout)
        self.proj = nn.Linear(dim, embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, length, dim)`` to ``(B, embedding_dim)``, or to ``(B, tokens, embedding_dim)`` for several."""
        y = self.proj(self.qformer(x))
        return y.squeeze(1) if y.shape[1] == 1 else y


class SeedTokenizer(CausalEmbedder):
    """Images to ``num_queries`` ids, and ids to the embedding of an image; the second training stage.

    The image encoder and the Q-Former are frozen here; :class:`SeedEmbedder` trains them. ``pixel_decoder`` is what :meth:`decode`
    draws with; it is neither saved nor trained along.

    Args:
        image_size, patch_size, vision_dim, vision_depth, vision_heads, vision_mlp: of the image encoder.
        num_queries, dim, depth, heads, mlp_hidden, dropout: of the Q-Former.
        causal: queries attend to earlier queries only.
        codebook_size, code_dim: of the quantizer.
        decoder_depth, decoder_heads: of the blocks behind the codebook.
        head: ``mlp`` (released) or ``qformer``, with head_depth layers.
        embedding_dim, embedding_tokens: shape of the decoded embedding: one CLIP image vector (SEED-2), 77 text vectors (SEED-1).
        quantizer_weight, commitment_weight, codebook_weight: of the quantizer's losses; the codebook has the small one.
        reconstruction_weight: of 1 - cosine between causal embeddings and their reconstruction.
        revive_after: a code unused for so many steps is replaced by a latent of the batch; None leaves dead codes alone.
        embedder: directory of a :class:`SeedEmbedder` whose weights the frozen part starts from; forgotten afterwards.
        unclip: directory or hub id of an unCLIP pipeline, or directory of an :class:`UnCLIP`, that becomes ``pixel_decoder`` when
            :meth:`decode` first needs one.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        vision_dim: int = 1408,
        vision_depth: int = 39,
        vision_heads: int = 16,
        vision_mlp: int = 6144,
        num_queries: int = 32,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_hidden: int = 3072,
        dropout: float = 0.1,
        causal: bool = True,
        codebook_size: int = 8192,
        code_dim: int = 32,
        decoder_depth: int = 4,
        decoder_heads: int = 12,
        head: str = "mlp",
        head_depth: int = 4,
        embedding_dim: int = 1024,
        embedding_tokens: int = 1,
        quantizer_weight: float = 5.0,
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        reconstruction_weight: float = 2.0,
        revive_after: int | None = None,
        embedder: str | None = None,
        unclip: str | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS or (head == "mlp" and embedding_tokens != 1):
            raise ConfigError(f"head '{head}' with {embedding_tokens} embedding tokens: expected 'qformer', or 'mlp' with one")
        self._build()
        freeze(self.vision)
        freeze(self.qformer)
        self.to_code = MLP(dim, dim, code_dim, act="tanh")
        self.quantizer = VectorQuantizer(
            codebook_size,
            code_dim,
            codebook_weight=codebook_weight,
            commitment_weight=commitment_weight,
            revive_after=revive_after,
        )
        self.from_code = MLP(code_dim, code_dim, dim, act="tanh")
        self.causal_decoder = PositionedBlocks(num_queries, dim, decoder_depth, decoder_heads)
        self.image_decoder = PositionedBlocks(num_queries, dim, decoder_depth, decoder_heads)
        self.image_head: nn.Module
        if head == "mlp":
            self.image_head = MLPHead(num_queries, dim, embedding_dim)
        else:
            self.image_head = ReverseQFormerHead(embedding_tokens, dim, head_depth, heads, mlp_hidden, embedding_dim, dropout)
        self.pixel_decoder: EmbeddingDecoder | None = None
        if embedder is not None:
            if not Path(embedder).is_dir():
                raise CheckpointError(f"embedder '{embedder}': no such directory; train SEED's first stage (SeedEmbedder) before")
            self._take_over(SeedEmbedder.from_pretrained(embedder))
            # the weights are this model's own from here on
            self.register_to_config(embedder=None)

    def _take_over(self, embedder: SeedEmbedder) -> None:
        """Copies the frozen part from a model of the first stage."""
        kept = {k: v for k, v in embedder.state_dict().items() if re.match(r"vision\.|qformer\.(?!words|positions|text_feeds)", k)}
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(("vision.", "qformer."))}
        load_strictly(self, own | kept, source="embedder")

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(levels=((self.config.num_queries,),), codebook_size=self.config.codebook_size)

    @property
    def paints(self) -> bool:
        return self.pixel_decoder is not None or self.config.unclip is not None

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels ``(B, 3, H, W)``, sides multiples of the patch, to ids ``(B, num_queries)``; draws nothing."""
        return self.quantizer.nearest(self.to_code(self.causal_embeddings(self.check_pixels(pixels, text))))

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids to the embedding of the image that they stand for, ``(B, embedding_dim)``, or ``(B, tokens, embedding_dim)``."""
        if tokens.dim() == 2 and tokens.shape[1] != self.config.num_queries:
            raise SpaceError(f"{tokens.shape[1]} tokens: SeedTokenizer decodes all of its {self.config.num_queries}")
        return self.embed_codes(self.quantizer.lookup(self.space.check(tokens)))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Code vectors ``(B, num_queries, code_dim)`` to the embedding."""
        return self.image_head(self.image_decoder(self.from_code(codes)))

    def decode(
        self,
        tokens: Tensor,
        text: TextFeatures | None = None,
        noise: Noise | None = None,
        *,
        negative_tokens: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        noise_level: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Ids ``(B, num_queries)`` to pixels, drawn by ``pixel_decoder`` with ``noise``.

        Args:
            negative_tokens: ids of images to steer away from.
            num_inference_steps, guidance_scale, noise_level, height, width: as of
                :class:`~vargen.tokenizers.seed.unclip.UnCLIPDecoder`, whose defaults hold where they are left out.

        Raises:
            VargenError: there is no pixel decoder, or it is made for embeddings of another width.
        """
        self.check_text(text, tokens.shape[0])
        embedding = self.embed(tokens)
        if self.pixel_decoder is None and self.config.unclip is not None:
            self.pixel_decoder = load_decoder(self.config.unclip, self.device)
        if self.pixel_decoder is None:
            raise no_pixels("decode")
        options = {
            "negative": None if negative_tokens is None else self.embed(negative_tokens),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "noise_level": noise_level,
            "height": height,
            "width": width,
        }
        return self.pixel_decoder(embedding, noise, **{name: value for name, value in options.items() if value is not None})

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Cosine between the causal embeddings and what is reconstructed of them behind the codebook, a mean over the queries."""
        causal = self.causal_embeddings(self.check_pixels(pixels, text))
        codes = self.quantizer.lookup(self.quantizer.nearest(self.to_code(causal)))
        return {"causal_cosine": F.cosine_similarity(self.causal_decoder(self.from_code(codes)), causal, dim=-1).mean(1)}

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The second stage's training pass; the decoded embedding is in ``features`` as ``image_teacher``, to be compared there."""
        with torch.no_grad():
            causal = self.causal_embeddings(self.check_pixels(pixels, text))
        return self.train_on(causal, noise)

    def train_on(self, causal: Tensor, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass behind the frozen part, from causal embeddings ``(B, num_queries, dim)``."""
        q: QuantizerOutput = self.quantizer(self.to_code(causal), noise)
        x = self.from_code(q.quantized)
        reconstruction = self.causal_decoder(x)
        losses = {name: self.config.quantizer_weight * loss for name, loss in q.losses.items()}
        cosine = F.cosine_similarity(reconstruction.float(), causal.float(), dim=-1)
        losses["causal"] = self.config.reconstruction_weight * (1 - cosine).mean()
        embedding = self.image_head(self.image_decoder(x)).view(len(causal), self.config.embedding_tokens, -1)
        return TokenizerOutput(q.indices, None, losses, {"image_teacher": embedding, **q.statistics})
