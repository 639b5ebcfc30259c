"""Untrained pipelines of a few thousand weights, for tests of everything that needs a pipeline and does not care what it draws."""

from __future__ import annotations

import torch
from torch import nn

from vargen import NAR, NBP, FrameTokenizer, LARPGenerator, LARPTokenizer, LlamaGen, VisualARPipeline, VQTokenizer, WordEncoder
from vargen.model import Generator, VisualTokenizer

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


def tiny_video_pipeline(system: str = "nbp", frames: int = 4) -> VisualARPipeline:
    """Draws clips of ``frames`` frames of 16x16 pixels from 4x4 ids each, of three motions.

    Args:
        system: ``nbp`` (rows of four), ``nar``, ``next-token``, ``nbp-prediction`` (continues given frames only), or
            ``larp-prediction`` (likewise, through the context of a whole clip).
    """
    torch.manual_seed(2)
    tokenizer: VisualTokenizer = FrameTokenizer.of(tiny_tokenizer(), frames)
    if system == "larp-prediction":
        tokenizer = LARPTokenizer.from_preset(
            "larp-tiny", sample_size=16, frames=frames, num_tokens=6, encoder_depth=1, decoder_depth=1, codebook_size=32, prior=None
        )
    model = _video_generator(system, frames).eval()
    for head in model.output_heads:  # type: ignore[union-attr]
        nn.init.normal_(head.linear.weight, std=0.5)
    names = None if "prediction" in system else ["left", "right", "still"]
    return VisualARPipeline(model, tokenizer.eval(), class_names=names)


def _video_generator(system: str, frames: int) -> Generator:
    size = {"codebook_size": 32, "dim": 32, "depth": 2, "heads": 2}
    grid = (frames, 4, 4)
    if system == "nar":
        return NAR(grid=grid, num_classes=3, positions="learned", **size)
    if system == "next-token":
        return LlamaGen(grid=grid, num_classes=3, **{**size, "dim": 48})
    if system == "larp-prediction":
        return LARPGenerator(length=6, **size)
    condition = {} if system == "nbp-prediction" else {"condition_vocabulary": 3}
    return NBP(grid=grid, block_size=4, max_positions=128, **size, **condition)
