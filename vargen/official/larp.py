"""Released checkpoints of LARP's generators."""

from __future__ import annotations

import os
from typing import Any

from vargen.backbones.larp import PRESETS, LARPGenerator
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.official.llama import BLOCKS, IGNORE, RULES, heads_of
from vargen.official.shared import depth_of, shape_of

HEAD_RULES = ((r"norm\.weight", "output_heads.0.norm.weight"), (r"output\.weight", "output_heads.0.linear.weight"))


def load(path: str | os.PathLike[str], heads: int | None = None, **options: Any) -> LARPGenerator:
    """A LARP generator, class-conditional or for frame prediction, sizes read from its tensors.

    Args:
        heads: attention heads; from the preset of the same width and depth by default.
        options: further arguments of :class:`LARPGenerator`.

    Raises:
        CheckpointError: unreadable file, keys that do not fit, or sizes that cannot be told.
    """
    state = unwrap(read_file(path), ("model.sd", "model", "state_dict"))
    codebook_size, dim = shape_of(state, "output.weight")
    depth = depth_of(state, BLOCKS)
    rows = shape_of(state, "abs_pe")[1]
    by_class = "cls_embedding.embedding_table.weight" in state
    config: dict[str, Any] = {
        # the table has a row per prefix token and token, less the last one, which is never fed
        "length": rows if by_class else rows // 2,
        "codebook_size": codebook_size,
        "dim": dim,
        "depth": depth,
        "heads": heads_of(dim, depth, PRESETS, heads),
        "mlp_hidden": shape_of(state, "layers.0.feed_forward.w1.weight")[0],
        "num_classes": shape_of(state, "cls_embedding.embedding_table.weight")[0] - 1 if by_class else None,
    }
    model = LARPGenerator(**{**config, **options})
    renamed = rename(state, (*RULES, *HEAD_RULES))
    renamed["position_table"] = renamed.pop("abs_pe").squeeze(0)
    if not by_class:
        table = renamed["tokens.weight"]
        renamed["tokens.weight"], renamed["separator"] = table[:codebook_size], table[codebook_size]
    load_strictly(model, renamed, IGNORE, str(path))
    return model.eval()
