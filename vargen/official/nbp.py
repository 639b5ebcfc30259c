"""Released checkpoints of Next Block Prediction's GPT."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vargen.backbones.nbp import NBP
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.fuse import fuse
from vargen.official.shared import depth_of, shape_of

RULES = (
    (r"tok_emb\.weight", "tokens.weight"),
    (r"blocks\.(\d+)\.ln([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"blocks.\1.attn.out.\2"),
    (r"blocks\.(\d+)\.mlp\.0\.(weight|bias)", r"blocks.\1.mlp.up.\2"),
    (r"blocks\.(\d+)\.mlp\.2\.(weight|bias)", r"blocks.\1.mlp.down.\2"),
    (r"ln_f\.(weight|bias)", r"output_heads.0.norm.\1"),
    (r"head\.weight", "output_heads.0.linear.weight"),
)
_HEADS = {1536: 16, 2048: 32, 3072: 32}


def load(
    path: str | os.PathLike[str],
    codebook_size: int = 64000,
    block_size: int = 16,
    condition_length: int = 8,
    heads: int | None = None,
    grid: Sequence[int] = (5, 16, 16),
    **options: Any,
) -> NBP:
    """An NBP generator from an official Lightning file; the video tokenizer inside it is left to its own loader.

    Args:
        codebook_size: codes of its tokenizer; a larger vocabulary is the hybrid, class-conditional kind.
        block_size: tokens per step, which the weights of frame prediction do not fix.
        condition_length: condition tokens of the hybrid kind: 8 for class names as text, 1 for class labels.
        heads: attention heads; those of the published size with the same width by default.
        grid, options: further arguments of :class:`NBP`.

    Raises:
        CheckpointError: unreadable file, keys that do not fit, or sizes that cannot be told.
    """
    state = {k.removeprefix("module."): v for k, v in unwrap(read_file(path), ("state_dict", "model")).items()}
    state = {
        k.removeprefix("transformer."): v for k, v in state.items() if not k.startswith("first_stage_model.") and "mask" not in k
    }
    vocabulary, dim = shape_of(state, "tok_emb.weight")
    if heads is None and dim not in _HEADS:
        raise CheckpointError(f"no published size has width {dim}; pass heads")
    special = vocabulary - codebook_size
    if special < 0 or 0 < special <= block_size:
        raise CheckpointError(
            f"a vocabulary of {vocabulary} does not hold {codebook_size} codes and blocks of {block_size}; pass both"
        )
    config: dict[str, Any] = {
        "grid": list(grid),
        "codebook_size": codebook_size,
        "block_size": block_size,
        "dim": dim,
        "depth": depth_of(state, r"blocks\.(\d+)\."),
        "heads": heads or _HEADS[dim],
        "condition_vocabulary": special - block_size if special else None,
        "condition_length": condition_length,
        "max_positions": shape_of(state, "pos_emb")[1],
    }
    model = NBP(**{**config, **options})
    renamed = rename(fuse(state, (r"attn\.query", r"attn\.key", r"attn\.value"), "attn.qkv"), RULES)
    renamed["position_table"] = renamed.pop("pos_emb").squeeze(0)
    # never used by the released models, which were trained without dropping conditions
    load_strictly(model, renamed, (r"uncond_embedding",), str(path))
    return model.eval()
