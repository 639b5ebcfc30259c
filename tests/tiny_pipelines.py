"""Untrained pipelines of a few thousand weights, for tests of everything that needs a pipeline and does not care what it draws."""

from __future__ import annotations

import torch
from torch import nn

from vargen import LlamaGen, VisualARPipeline, VQTokenizer, WordEncoder

WORDS = ["a", "blue", "circle", "large", "red", "small", "square"]


def tiny_tokenizer() -> VQTokenizer:
    """16x16 pixels to 4x4 ids below 32."""
    torch.manual_seed(0)
    return VQTokenizer(
        sample_size=16,
        encoder_widths=[8, 8, 8],
        decoder_widths=[8, 8, 8],
        encoder_blocks=1,
        decoder_blocks=1,
        latent_channels=8,
        codebook_size=32,
        codebook_dim=4,
        norm_groups=4,
    ).eval()


def tiny_pipeline(text: bool = False) -> VisualARPipeline:
    """Draws 16x16 images of ten classes (``digit 0`` ... ``digit 9``), or of texts in ``WORDS``."""
    torch.manual_seed(1)
    encoder = WordEncoder(WORDS, dim=16, max_length=8, depth=1, heads=2).eval() if text else None
    condition = {"text_dim": 16, "text_length": 8} if text else {"num_classes": 10}
    model = LlamaGen(grid=(4, 4), codebook_size=32, dim=32, depth=2, heads=2, **condition).eval()
    for head in model.output_heads:
        # a fresh model predicts a uniform distribution; tests want conditions to matter
        nn.init.normal_(head.linear.weight, std=0.5)
    names = None if text else [f"digit {number}" for number in range(10)]
    return VisualARPipeline(model, tiny_tokenizer(), encoder, class_names=names, defaults={"guidance_scale": 1.5, "top_k": 16})
