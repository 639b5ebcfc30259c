"""xAR's checkpoints (``OliverRen/xAR``: ``xAR-{B,L,H}.pth``)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.xar import XAR
from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.config import check_keys
from vargen.errors import CheckpointError
from vargen.official.shared import depth_of, shape_of, square

# there: gate of attention, of the MLP, scales, shifts; here: shift, scale, gate of attention, then of the MLP
_CHUNKS = (4, 2, 0, 5, 3, 1)
_DERIVED = (r"mask", r".*\.attn\.rope\.freqs(?:_cos|_sin)?")
_RULES = (
    (r"class_emb\.weight", r"classes.table.weight"),
    (r"time_embed\.mlp\.0\.(.*)", r"time.mlp.up.\1"),
    (r"time_embed\.mlp\.2\.(.*)", r"time.mlp.down.\1"),
    (r"z_proj\.(.*)", r"input.\1"),
    (r"z_proj_ln\.(.*)", r"input_norm.\1"),
    (r"decoder_embed\.(.*)", r"bridge.\1"),
    (r"pred\.(.*)", r"out.\1"),
    (r"(encoder|decoder)_blocks\.(\d+)\.attn\.proj\.(.*)", r"\1.\2.attn.out.\3"),
    (r"(encoder|decoder)_blocks\.(\d+)\.mlp\.fc1_g\.(.*)", r"\1.\2.mlp.gate.\3"),
    (r"(encoder|decoder)_blocks\.(\d+)\.mlp\.fc1_x\.(.*)", r"\1.\2.mlp.up.\3"),
    (r"(encoder|decoder)_blocks\.(\d+)\.mlp\.fc2\.(.*)", r"\1.\2.mlp.down.\3"),
    (r"(encoder|decoder)_blocks\.(\d+)\.ada_lin\.1\.(.*)", r"\1.\2.adaln.linear.\3"),
    (r"(encoder|decoder)_blocks\.(.*)", r"\1.\2"),
)


def convert(state: Mapping[str, Tensor], cells: Tensor) -> State:
    """Our state from a published one, without the derived tables.

    Args:
        cells: the cells in the order of the sequence, which is how published position tables are ordered; ours are by cell.
    """
    ours: State = {}
    for key, value in rename(state, _RULES).items():
        if key.endswith(("adaln.linear.weight", "adaln.linear.bias")):
            chunks = value.chunk(6)
            value = torch.cat([chunks[i] for i in _CHUNKS])
        if key.endswith("_pos_embed_learned"):
            key, value = key.replace("_pos_embed_learned", "_positions"), value[:, cells.argsort()]
        if not any(re.fullmatch(pattern, key) for pattern in _DERIVED):
            ours[key] = value
    return ours


def check_derived(state: Mapping[str, Tensor], model: XAR) -> None:
    """Raises CheckpointError unless the mask and the rotary tables of a checkpoint are those that ``model`` derives."""
    places = torch.arange(model.order.num_cells)
    rows = model.rotary[model.cells].repeat_interleave(2, dim=1)
    for key, value in state.items():
        if key == "mask":
            same = torch.equal(value[0, 0] == 0, model.block_causal(places, places))
        elif key.endswith(("rope.freqs_cos", "rope.freqs_sin")):
            own = rows[..., 0 if key.endswith("cos") else 1]
            same = value.shape == own.shape and torch.allclose(value.float(), own, atol=1e-4)
        else:
            continue
        if not same:
            raise CheckpointError(f"'{key}' is not the table of a {tuple(model.config.grid)} grid of {model.num_entities} entities")


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors tell; the mask tells the size of a cell."""
    cells, dim = shape_of(state, "encoder_pos_embed_learned", 3)[1:]
    shape_of(state, "mask", 4)
    head_dim = shape_of(state, "encoder_blocks.0.attn.rope.freqs_cos", 2)[1]
    return {
        "grid": square(cells),
        "channels": shape_of(state, "z_proj.weight", 2)[1],
        "entity": "cell",
        "entity_size": square(int((state["mask"][0, 0, 0] == 0).sum())),
        "dim": dim,
        "heads": dim // head_dim,
        "encoder_depth": depth_of(state, r"encoder_blocks\.(\d+)\."),
        "decoder_depth": depth_of(state, r"decoder_blocks\.(\d+)\."),
        "mlp_hidden": shape_of(state, "encoder_blocks.0.mlp.fc2.weight", 2)[1],
        "num_classes": shape_of(state, "class_emb.weight", 2)[0] - 1,
    }


def load(path: str | os.PathLike[str], *, ema: bool = True, **options: Any) -> XAR:
    """The generator of a published checkpoint; its sizes are read from the tensors.

    Args:
        path: ``.pth`` with a plain state dict, or a training file with the states under ``model_ema`` and ``model``.
        ema: the averaged weights of a training file rather than the raw ones.
        options: constructor arguments that tensors do not tell (``sampling_steps``), or that differ.

    Raises:
        CheckpointError: an unreadable file, one whose keys or shapes are not those of this model, or other derived tables.
    """
    check_keys(options, list(XAR._get_init_keys(XAR)), "XAR")
    state = unwrap(read_file(path), ("model_ema", "model") if ema else ("model", "model_ema"))
    model = XAR(**{**read_config(state), **options})
    check_derived(state, model)
    load_strictly(model, convert(state, model.cells), source=str(path))
    return model.eval()
