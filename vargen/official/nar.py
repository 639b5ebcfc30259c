"""Released checkpoints of NAR, images and video."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vargen.backbones.nar import NAR, PRESETS
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.llama import BLOCKS, IGNORE, RULES, WRAPPERS, as_grid, heads_of
from vargen.official.shared import depth_of, shape_of

IMAGE_RULES = (
    (r"norm\.weight", "output_heads.0.norm.weight"),
    (r"output\.weight", "output_heads.0.linear.weight"),
    (r"medusa_norm\.weight", "output_heads.1.norm.weight"),
    (r"medusa_output\.weight", "output_heads.1.linear.weight"),
)
# right, down, back: one block deeper each; the file lists them in another order
VIDEO_RULES = tuple(
    (rf"{part}_{letter}\.weight", f"output_heads.{head}.{ours}.weight")
    for head, letter in enumerate("RDB")
    for part, ours in (("norm", "norm"), ("output", "linear"))
)


def load(path: str | os.PathLike[str], grid: Sequence[int] | None = None, heads: int | None = None, **options: Any) -> NAR:
    """A NAR from an official file, sizes read from its tensors.

    Args:
        grid: token grid; from the image size in the file's name by default, (4, 16, 16) for video.
        heads: attention heads; from the preset of the same width and depth by default.
        options: further arguments of :class:`NAR`.

    Raises:
        CheckpointError: unreadable file, keys that do not fit, or sizes that cannot be told.
    """
    state = unwrap(read_file(path), ("model.sd", *WRAPPERS))
    video = "abs_pe" in state
    if "medusa_output.weight" not in state and not video:
        raise CheckpointError(f"'{path}' has no second head (medusa_output): this is a LlamaGen checkpoint, not one of NAR")
    if grid is None:
        grid = (4, 16, 16) if video else as_grid(None, str(path))
    model = NAR(**{**read_config(state, grid, heads), **options})
    renamed = rename(state, (*RULES, *(VIDEO_RULES if video else IMAGE_RULES)))
    if video:
        renamed["position_table"] = renamed.pop("abs_pe").squeeze(0)
    load_strictly(model, renamed, IGNORE, str(path))
    return model.eval()


def read_config(state: Mapping[str, Tensor], grid: Sequence[int], heads: int | None) -> dict[str, Any]:
    """Constructor arguments that the shapes of an official state dict tell."""
    codebook_size, dim = shape_of(state, "tok_embeddings.weight")
    depth = depth_of(state, BLOCKS) - (len(grid) - 1)
    config: dict[str, Any] = {
        "grid": list(grid),
        "codebook_size": codebook_size,
        "dim": dim,
        "depth": depth,
        "heads": heads_of(dim, depth, PRESETS, heads),
        "mlp_hidden": shape_of(state, "layers.0.feed_forward.w1.weight")[0],
        "positions": "learned" if "abs_pe" in state else "rotary",
    }
    if "cls_embedding.uncond_embedding" in state:
        length, text_dim = shape_of(state, "cls_embedding.uncond_embedding")
        return {**config, "text_dim": text_dim, "text_length": length}
    return {**config, "num_classes": shape_of(state, "cls_embedding.embedding_table.weight")[0] - 1}
