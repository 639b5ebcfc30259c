"""Released checkpoint of MaskGIT's VQGAN in PyTorch (``maskgit-vqgan-imagenet-f16-256.bin``), and its part inside TiTok's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.official.shared import depth_of, shape_of
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN

WRAPPERS = ("model", "state_dict")


def load(path: str | os.PathLike[str], **options: Any) -> MaskGITVQGAN:
    """The tokenizer of a published checkpoint, sizes read from its tensors.

    Args:
        options: further arguments of :class:`MaskGITVQGAN`, such as ``image_size``.

    Raises:
        CheckpointError: unreadable file, or keys that do not fit.
    """
    state = unwrap(read_file(path), WRAPPERS)
    codebook_size, latent_channels = shape_of(state, "quantize.embedding.weight")
    config = {"codebook_size": codebook_size, "latent_channels": latent_channels, **decoder_config(state, "decoder")}
    model = MaskGITVQGAN(**{**config, **options})
    load_strictly(model, convert(state), source=str(path))
    return model.eval()


def convert(state: Mapping[str, Tensor]) -> State:
    """Our keys."""
    rules = (
        (r"quantize\.embedding\.weight", "quantizer.codebook"),
        (r"encoder\.down\.(\d+)\.block\.(.*)", r"encoder.levels.\1.\2"),
    )
    return {k.replace("nin_shortcut", "shortcut"): v for k, v in rename(convert_decoder(state, "decoder"), rules).items()}


def convert_decoder(state: Mapping[str, Tensor], name: str) -> State:
    """Our keys of the decoder called ``name``; its levels are stored full resolution first and run deepest first."""
    deepest = depth_of(state, rf"{name}\.up\.(\d+)\.") - 1
    rules = [
        rule
        for i in range(deepest + 1)
        for rule in (
            (rf"{name}\.up\.{i}\.block\.(.*)", rf"{name}.levels.{deepest - i}.\1"),
            (rf"{name}\.up\.{i}\.upsample_conv\.(.*)", rf"{name}.ups.{deepest - i}.conv.\1"),
        )
    ]
    return {k.replace("nin_shortcut", "shortcut"): v for k, v in rename(state, rules).items()}


def decoder_config(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """``widths`` and ``num_blocks`` of the decoder called ``name``."""
    levels = depth_of(state, rf"{name}\.up\.(\d+)\.")
    return {
        "widths": [shape_of(state, f"{name}.up.{i}.block.0.conv2.weight")[0] for i in range(levels)],
        "num_blocks": depth_of(state, rf"{name}\.up\.0\.block\.(\d+)\."),
    }
