"""Released checkpoints of TiTok's masked generators."""

from __future__ import annotations

import os
from typing import Any

from vargen.backbones.maskgit import MaskGIT
from vargen.checkpoint import load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.official.fuse import fuse
from vargen.official.shared import depth_of, shape_of

_LAYER = r"model\.encoder\.layer\.(\d+)\."
BERT_RULES = (
    (r"model\.embeddings\.word_embeddings\.weight", "embedding.weight"),
    (r"model\.embeddings\.LayerNorm\.(.*)", r"network.norm.\1"),
    (_LAYER + r"attention\.qkv\.(.*)", r"network.layers.\1.attn.qkv.\2"),
    (_LAYER + r"attention\.output\.dense\.(.*)", r"network.layers.\1.attn.out.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(.*)", r"network.layers.\1.norm.\2"),
    (_LAYER + r"intermediate\.dense\.(.*)", r"network.layers.\1.feed.mlp.up.\2"),
    (_LAYER + r"output\.dense\.(.*)", r"network.layers.\1.feed.mlp.down.\2"),
    (_LAYER + r"output\.LayerNorm\.(.*)", r"network.layers.\1.feed.norm.\2"),
    (r"model\.lm_head\.(.*)", r"output.\1"),
)


def _uvit_block(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    place = r"\2" if r"(\d+)" in theirs else r"\1"
    names = (("attn\\.proj", "attn.out"), ("mlp\\.fc1", "mlp.up"), ("mlp\\.fc2", "mlp.down"))
    return (
        *((rf"{theirs}\.{a}\.(.*)", f"{ours}.{b}.{place}") for a, b in names),
        (rf"{theirs}\.(attn\.qkv|norm1|norm2)\.(.*)", f"{ours}.{place}." + (r"\3" if place == r"\2" else r"\2")),
    )


UVIT_RULES = (
    (r"embeddings\.weight", "embedding.weight"),
    *_uvit_block(r"in_blocks\.(\d+)", r"network.entry.\1"),
    *_uvit_block(r"mid_block", "network.middle"),
    (r"out_blocks\.(\d+)\.skip_linear\.(.*)", r"network.skips.\1.\2"),
    *_uvit_block(r"out_blocks\.(\d+)", r"network.exit.\1"),
    (r"norm\.(.*)", r"network.norm.\1"),
    (r"lm_head\.(.*)", r"output.\1"),
)


def load(path: str | os.PathLike[str], heads: int = 16, **options: Any) -> MaskGIT:
    """A masked generator, BERT or U-ViT, sizes read from the file's tensors.

    Args:
        heads: attention heads, 16 in all released models.
        options: further arguments of :class:`MaskGIT`.

    Raises:
        CheckpointError: unreadable file, or keys that do not fit.
    """
    state = unwrap(read_file(path), ("model_state", "state_dict"))
    bert = "model.lm_head.weight" in state
    if not bert and "lm_head.weight" not in state:
        raise CheckpointError(f"'{path}' has no lm_head: it is not a masked generator of TiTok")
    codebook_size, dim = shape_of(state, "model.lm_head.weight" if bert else "lm_head.weight")
    table = state["model.embeddings.position_embeddings.weight"] if bert else state["pos_embed"].squeeze(0)
    vocabulary = shape_of(state, "model.embeddings.word_embeddings.weight" if bert else "embeddings.weight")[0]
    first = "model.encoder.layer.0.intermediate.dense.weight" if bert else "mid_block.mlp.fc1.weight"
    config: dict[str, Any] = {
        "grid": [len(table) - 1],
        "codebook_size": codebook_size,
        "trunk": "bert" if bert else "uvit",
        "dim": dim,
        "depth": depth_of(state, r"model\.encoder\.layer\.(\d+)\.") if bert else 2 * depth_of(state, r"in_blocks\.(\d+)\."),
        "heads": heads,
        "mlp_hidden": shape_of(state, first)[0],
        "num_classes": vocabulary - codebook_size - 2,
    }
    model = MaskGIT(**{**config, **options})
    if bert:
        state = fuse(state, (r"attention\.self\.query", r"attention\.self\.key", r"attention\.self\.value"), "attention.qkv")
    renamed = rename(state, BERT_RULES if bert else UVIT_RULES)
    if bert:
        # every token is of type 0: its row joins the position table
        types = renamed.pop("model.embeddings.token_type_embeddings.weight")
        renamed["position_table"] = renamed.pop("model.embeddings.position_embeddings.weight") + types[0]
    else:
        renamed["position_table"] = renamed.pop("pos_embed").squeeze(0)
    load_strictly(model, renamed, (r"model\.embeddings\.position_ids",), str(path))
    return model.eval()
