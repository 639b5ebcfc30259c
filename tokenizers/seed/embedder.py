"""SEED's first training stage: a causal Q-Former learns, against captions, to put an image into a sequence of embeddings."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import VargenError
from vargen.losses.contrastive import contrastive_loss, retrieval_accuracy
from vargen.model import TokenizerOutput
from vargen.noise import Noise
from vargen.space import TokenSpace
from vargen.tokenizers.seed.captions import SPECIAL, CaptionIds
from vargen.tokenizers.seed.causal import RELEASED, TINY, CausalEmbedder, freeze, no_pixels

PRESETS: dict[str, dict[str, Any]] = {
    "seed-2": RELEASED,
    "seed-tiny": {**TINY, "max_text": 24, "feature_dim": 64, "freeze_vision": False},
}


class SeedEmbedder(CausalEmbedder):
    """Images to causal embeddings, trained by a contrastive loss on the last one of them and the captions' own.

    Captions pass through the same BERT as the queries: ``text`` holds word ids, ``features`` ``(B, L, 1)``, from ``text_encoder``.

    Args:
        image_size ... causal: as of :class:`~vargen.tokenizers.seed.tokenizer.SeedTokenizer`.
        words: closed vocabulary of the captions; None for that of ``caption_tokenizer``, with vocab_size words.
        caption_tokenizer: directory or hub id of a tokenizer of transformers.
        max_text, max_caption: positions of the text branch, and tokens that captions are cut to.
        feature_dim: width of the compared features.
        temperature: initial divisor of the cosines, learned.
        label_smoothing: of the contrastive targets.
        freeze_vision: train the image encoder's last norm only, or all of it.
    """

    takes_text = True

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
        words: list[str] | None = None,
        caption_tokenizer: str = "bert-base-uncased",
        vocab_size: int = 30523,
        max_text: int = 512,
        max_caption: int = 32,
        feature_dim: int = 256,
        temperature: float = 0.07,
        label_smoothing: float = 0.1,
        freeze_vision: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size_ = vocab_size if words is None else SPECIAL + len(words)
        self._build(self.vocab_size_, max_text)
        self.text_encoder = CaptionIds(words, caption_tokenizer, min(max_caption, max_text))
        if freeze_vision:
            freeze(self.vision)
            self.vision.norm.requires_grad_(True)
        self.image_proj = nn.Linear(dim, feature_dim)
        self.text_proj = nn.Linear(dim, feature_dim)
        self.text_shape = (max_text, 1)
        self.temperature_ = nn.Parameter(torch.tensor(float(temperature)))

    def check_text(self, text: TextFeatures | None, batch_size: int) -> None:
        """As in the base, but only the training pass needs captions."""
        if text is not None:
            super().check_text(text, batch_size)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(levels=((self.config.num_queries,),), channels=self.config.dim)

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels to causal embeddings ``(B, num_queries, dim)``; captions are not needed here."""
        return self.causal_embeddings(self.check_pixels(pixels, text))

    def decode(self, tokens: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        raise no_pixels("SeedEmbedder")

    def image_features(self, embeddings: Tensor) -> Tensor:
        """Causal embeddings to unit features ``(B, feature_dim)``; only the last embedding, which has seen all, counts."""
        return F.normalize(self.image_proj(embeddings[:, -1]), dim=-1)

    def text_features(self, text: TextFeatures) -> Tensor:
        """Word ids to unit features ``(B, feature_dim)`` of the first position."""
        return F.normalize(self.text_proj(self.text_hidden(text)[:, 0]), dim=-1)

    def text_hidden(self, text: TextFeatures) -> Tensor:
        """Word ids to hidden states ``(B, L, dim)``."""
        ids = text.features[..., 0].long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size_:
            raise VargenError(f"word ids span {int(ids.min())}..{int(ids.max())}: expected 0..{self.vocab_size_ - 1}")
        return self.qformer.text(ids, text.mask)

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """Whether an image finds its caption among those of the batch (chance 1 / B), and a caption its image."""
        if text is None:
            raise VargenError("SeedEmbedder is scored on captions: pass text=embedder.text_encoder.encode(captions)")
        image, caption = self.image_features(self.encode(pixels, text)), self.text_features(text)
        partner = torch.arange(len(pixels), device=pixels.device)
        found = {"image_to_text": image @ caption.T, "text_to_image": caption @ image.T}
        return {name: (similarity.argmax(-1) == partner).float() for name, similarity in found.items()}

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The first stage's training pass."""
        embeddings = self.causal_embeddings(self.check_pixels(pixels, text))
        if text is None:
            raise VargenError("SeedEmbedder learns from captions: pass text=embedder.text_encoder.encode(captions)")
        image, caption = self.image_features(embeddings), self.text_features(text)
        loss = contrastive_loss(image, caption, self.temperature_, self.config.label_smoothing)
        return TokenizerOutput(
            embeddings, None, {"contrastive": loss}, {"retrieval_top1": retrieval_accuracy(image.detach(), caption.detach())}
        )
