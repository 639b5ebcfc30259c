"""MAR's tokenizer checkpoint ``kl16.ckpt``, which Hi-MAR and xAR use too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoint import load_strictly, read_file, unwrap
from vargen.config import check_keys
from vargen.errors import CheckpointError
from vargen.official.shared import ldm_autoencoder, ldm_sizes, shape_of
from vargen.tokenizers.kl import KLTokenizer


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors tell."""
    sizes = ldm_sizes(state)
    widths = sizes["encoder_widths"]
    if not widths or sizes["decoder_widths"] != widths:
        raise CheckpointError(f"encoder widths {widths} and decoder widths {sizes['decoder_widths']}: expected the same, and some")
    return {
        "widths": widths,
        "encoder_blocks": sizes["encoder_blocks"][0],
        "decoder_blocks": sizes["decoder_blocks"][0],
        "encoder_attention_levels": sizes["encoder_attention"],
        "decoder_attention_levels": sizes["decoder_attention"],
        "latent_channels": shape_of(state, "post_quant_conv.weight", 4)[0],
    }


def load(path: str | os.PathLike[str], **options: Any) -> KLTokenizer:
    """The tokenizer of a published checkpoint; its sizes are read from the tensors.

    Args:
        path: ``.ckpt`` file with the state under ``model``, or a plain state dict.
        options: constructor arguments that tensors do not tell (``sample_size``, ``patch``), or that differ.

    Raises:
        CheckpointError: an unreadable file, or one whose keys or shapes are not those of this model.
    """
    check_keys(options, list(KLTokenizer._get_init_keys(KLTokenizer)), "KLTokenizer")
    state = unwrap(read_file(path), ("model", "state_dict"))
    model = KLTokenizer(**{**read_config(state), **options})
    load_strictly(model, ldm_autoencoder(state), source=str(path))
    return model.eval()
