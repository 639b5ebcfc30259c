"""Released checkpoints of LANTERN: drafters, and LlamaGen's text-conditional models in Llama naming."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vargen.backbones.drafter import EagleDrafter
from vargen.backbones.llamagen import PRESETS, LlamaGen
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.fuse import fuse
from vargen.official.llama import BLOCKS, RULES, heads_of
from vargen.official.shared import depth_of, shape_of

WEIGHTS = ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")

# tokens of an image, by the name that the configurations give to the kind of model
BLOCK_SIZES = {"t2i": 256, "t2i2": 1024, "c2i": 576}

LLAMA_RULES = (
    (r"layers\.(\d+)\.self_attn\.o_proj\.weight", r"blocks.\1.attn.out.weight"),
    (r"layers\.(\d+)\.attn\.qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"blocks.\1.mlp.\2.weight"),
    (r"layers\.(\d+)\.input_layernorm\.weight", r"blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.post_attention_layernorm\.weight", r"blocks.\1.norm2.weight"),
    (r"embed_tokens\.weight", "tokens.weight"),
    (r"norm\.weight", "output_heads.0.norm.weight"),
    (r"lm_head\.weight", "output_heads.0.linear.weight"),
    (r"fc\.(weight|bias)", r"join.\1"),
)
QKV = tuple(rf"self_attn\.{name}_proj" for name in "qkv")


def load(path: str | os.PathLike[str], **options: Any) -> EagleDrafter | LlamaGen:
    """A drafter, or a base model, whichever the file or directory holds; see :func:`load_drafter` and :func:`load_base`."""
    state, config = _read(path)
    return _drafter(state, config, path, options) if "fc.weight" in state else _base(state, config, path, options)


def load_drafter(path: str | os.PathLike[str], **options: Any) -> EagleDrafter:
    """A drafter from its file, or a directory with ``config.json`` and weights.

    Args:
        options: arguments of :class:`EagleDrafter`; what neither they nor ``config.json`` tell is read from the tensors' shapes.

    Raises:
        CheckpointError: unreadable, keys that do not fit, or sizes that cannot be told.
    """
    return _drafter(*_read(path), path, options)


def load_base(path: str | os.PathLike[str], **options: Any) -> LlamaGen:
    """A LlamaGen from LANTERN's conversion of it; arguments as for :func:`load_drafter`."""
    return _base(*_read(path), path, options)


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and the configuration beside them (empty if there is none)."""
    folder, file = Path(path), Path(path)
    if folder.is_dir():
        found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
        if not found:
            raise CheckpointError(f"'{folder}' holds none of {', '.join(WEIGHTS)}")
        file = found[0]
    beside = file.parent / "config.json"
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{beside}' is not valid JSON ({error})") from error
    return unwrap(read_file(file), ()), config


def _drafter(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Any, options: Mapping[str, Any]) -> EagleDrafter:
    codebook_size, dim = shape_of(state, "embed_tokens.weight")
    sizes = {
        "codebook_size": codebook_size,
        "dim": dim,
        "depth": depth_of(state, BLOCKS),
        "mlp_hidden": shape_of(state, "layers.0.mlp.up_proj.weight")[0],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        **_told(config, options, path, dim, None),
    }
    drafter = EagleDrafter(**{**sizes, **options})
    load_strictly(drafter, rename(fuse(state, QKV, "attn.qkv"), LLAMA_RULES), (), str(path))
    return drafter.eval()


def _base(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Any, options: Mapping[str, Any]) -> LlamaGen:
    state = {key.removeprefix("model."): value for key, value in state.items()}
    codebook_size, dim = shape_of(state, "embed_tokens.weight")
    length, text_dim = shape_of(state, "cls_embedding.uncond_embedding")
    sizes = {
        "codebook_size": codebook_size,
        "dim": dim,
        "depth": depth_of(state, BLOCKS),
        "mlp_hidden": shape_of(state, "layers.0.mlp.up_proj.weight")[0],
        "text_dim": text_dim,
        "text_length": length,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        **_told(config, options, path, dim, depth_of(state, BLOCKS)),
    }
    model = LlamaGen(**{**sizes, **options})
    load_strictly(model, rename(fuse(state, QKV, "attn.qkv"), (*RULES, *LLAMA_RULES)), (), str(path))
    return model.eval()


def _told(
    config: Mapping[str, Any], options: Mapping[str, Any], path: Any, dim: int, depth: int | None
) -> dict[str, Sequence[int] | int]:
    """Grid and heads, as given, from the configuration, or for heads from the preset of the same sizes."""
    told: dict[str, Any] = {}
    if "grid" not in options:
        kind = str(config.get("input_type"))
        block = config.get("block_size") or BLOCK_SIZES.get(kind)
        if block is None:
            raise CheckpointError(f"'{path}': no config.json tells the token grid; pass grid, for example grid=[16, 16] at 256 px")
        told["grid"] = [math.isqrt(block)] * 2
    if "heads" not in options:
        presets = PRESETS if depth is not None else {"": {**PRESETS["XL"], "depth": None}}
        told["heads"] = config.get("num_attention_heads") or heads_of(dim, depth, presets, None)  # type: ignore[arg-type]
    return told
