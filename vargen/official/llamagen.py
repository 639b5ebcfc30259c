"""Released checkpoints of LlamaGen's GPT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vargen.backbones.llamagen import PRESETS, LlamaGen
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.official.llama import BLOCKS, IGNORE, RULES, WRAPPERS, as_grid, heads_of
from vargen.official.shared import depth_of, shape_of

HEAD_RULES = ((r"norm\.weight", "output_heads.0.norm.weight"), (r"output\.weight", "output_heads.0.linear.weight"))


def load(path: str | os.PathLike[str], grid: Sequence[int] | None = None, heads: int | None = None, **options: Any) -> LlamaGen:
    """A LlamaGen from an official file, sizes read from its tensors.

    Args:
        grid: token grid; from the image size in the file's name by default.
        heads: attention heads; from the preset of the same width and depth by default.
        options: further arguments of :class:`LlamaGen`.

    Raises:
        CheckpointError: unreadable file, keys that do not fit, or sizes that cannot be told.
    """
    state = unwrap(read_file(path), WRAPPERS)
    config = read_config(state, as_grid(grid, str(path)), heads)
    model = LlamaGen(**{**config, **options})
    load_strictly(model, rename(state, (*RULES, *HEAD_RULES)), IGNORE, str(path))
    return model.eval()


def read_config(state: Mapping[str, Tensor], grid: Sequence[int], heads: int | None) -> dict[str, Any]:
    """Constructor arguments that the shapes of an official state dict tell."""
    codebook_size, dim = shape_of(state, "tok_embeddings.weight")
    depth = depth_of(state, BLOCKS)
    config: dict[str, Any] = {
        "grid": list(grid),
        "codebook_size": codebook_size,
        "dim": dim,
        "depth": depth,
        "heads": heads_of(dim, depth, PRESETS, heads),
        "mlp_hidden": shape_of(state, "layers.0.feed_forward.w1.weight")[0],
    }
    if "cls_embedding.uncond_embedding" in state:
        length, text_dim = shape_of(state, "cls_embedding.uncond_embedding")
        return {**config, "text_dim": text_dim, "text_length": length}
    return {**config, "num_classes": shape_of(state, "cls_embedding.embedding_table.weight")[0] - 1}
