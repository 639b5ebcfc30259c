"""LlamaGen's tokenizer checkpoints (``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt``, ``vq_ds16_t2i.pt`` and their safetensors mirrors)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, unwrap
from vargen.config import check_keys
from vargen.errors import CheckpointError
from vargen.tokenizers.vq import VQTokenizer

# our name of a module -> the published one; decoder levels stand in visiting order on both sides
_NAMES = (
    (".levels.", ".conv_blocks."),
    (".blocks.", ".res."),
    (".attentions.", ".attn."),
    (".shortcut.", ".nin_shortcut."),
    (".out.", ".proj_out."),
    ("quantizer.codebook", "quantize.embedding.weight"),
    ("quantizer.recent", "quantize.codebook_used"),
)
_RECENT = "quantize.codebook_used"


def official_key(key: str) -> str:
    """The published name of one of our tensors."""
    for ours, theirs in _NAMES:
        key = key.replace(ours, theirs)
    if ".resample." in key:
        key = key.replace(".resample.", ".downsample." if key.startswith("encoder.") else ".upsample.")
    return key


def to_official(model: VQTokenizer) -> State:
    """The state of ``model`` under the published names."""
    state = {official_key(k): v for k, v in model.state_dict().items()}
    if _RECENT in state:
        # the published buffer is float and starts with zeros
        state[_RECENT] = state[_RECENT].clamp_min(0).float()
    return state


def load(path: str | os.PathLike[str], *, ema: bool = False, **options: Any) -> VQTokenizer:
    """The tokenizer of a published checkpoint; its sizes are read from the tensors.

    Args:
        path: ``.pt`` file with the state under ``model`` (or plain), or a safetensors mirror.
        ema: take the averaged weights of a training file, where the file has them.
        options: constructor arguments that tensors do not tell, such as ``sample_size`` or ``l2_normalize``.

    Raises:
        CheckpointError: an unreadable file, or one whose keys or shapes are not those of this model.
        ConfigError: an option that the model does not have.
    """
    state = unwrap(read_file(path), ("ema", "model", "state_dict") if ema else ("model", "state_dict"))
    config = read_config(state, str(path))
    check_keys(options, list(VQTokenizer._get_init_keys(VQTokenizer)), "VQTokenizer")
    model = VQTokenizer(**{**config, **options})
    own = model.state_dict()
    if _RECENT not in state and "quantizer.recent" in own:
        state[_RECENT] = own["quantizer.recent"]
    names = {official_key(k): k for k in own}
    renamed = {names.get(k, k): v for k, v in state.items()}
    if "quantizer.recent" in renamed:
        renamed["quantizer.recent"] = renamed["quantizer.recent"].to(torch.int64)
    load_strictly(model, renamed, ignore=(re.escape(_RECENT),), source=str(path))
    return model.eval()


def read_config(state: Mapping[str, Tensor], source: str = "checkpoint") -> dict[str, Any]:
    """Constructor arguments that the shapes of a published state dict tell."""

    def shape(key: str, axes: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else None
        if found is None or len(found) != axes:
            problem = "it has no" if found is None else f"shape {found} of"
            raise CheckpointError(f"{source}: not a LlamaGen VQ tokenizer, {problem} '{key}'")
        return found

    def indices(pattern: str) -> list[int]:
        return sorted({int(m[1]) for m in (re.match(pattern, key) for key in state) if m})

    def widths(half: str) -> list[int]:
        levels = indices(rf"{half}\.conv_blocks\.(\d+)\.") or [0]
        return [shape(f"{half}.conv_blocks.{i}.res.0.conv2.weight", 4)[0] for i in levels]

    encoder_widths = widths("encoder")
    deepest = len(encoder_widths) - 1
    stem_width = shape("encoder.conv_in.weight", 4)[0]
    codebook_size, codebook_dim = shape("quantize.embedding.weight", 2)
    return {
        "encoder_widths": encoder_widths,
        "decoder_widths": widths("decoder")[::-1],
        "stem_width": None if stem_width == encoder_widths[0] else stem_width,
        "encoder_blocks": len(indices(r"encoder\.conv_blocks\.0\.res\.(\d+)\.")),
        "decoder_blocks": len(indices(r"decoder\.conv_blocks\.0\.res\.(\d+)\.")),
        "attention_levels": [-1 if i == deepest else i for i in indices(r"encoder\.conv_blocks\.(\d+)\.attn\.")],
        "latent_channels": shape("encoder.conv_out.weight", 4)[0],
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
        "usage_window": len(state[_RECENT]) if _RECENT in state else 65536,
    }
