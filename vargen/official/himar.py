"""Hi-MAR's checkpoints (``HiDream-ai/Hi-MAR``: ``Hi-MAR-{B,L,H}/checkpoint-last.pth``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.himar import HiMAR
from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.config import check_keys
from vargen.errors import CheckpointError
from vargen.official.shared import TIMM_BLOCK, depth_of, shape_of, square, token_mlp, token_mlp_sizes, under

# width of the trunk -> its attention heads, width of the dense head -> its
HEADS = {768: 12, 1024: 16, 1280: 16}
DENSE_HEADS = {512: 8, 768: 12}
_HEAD, _DENSE_HEAD = "diffloss.net.", "cond_diffloss.net."
_RULES = (
    (r"diffusion_pos_embed_learned", r"head_positions"),
    (r"z_proj\.(.*)", r"input.\1"),
    (r"cond_proj\.(.*)", r"pivot_input.\1"),
    (r"cond_z_proj\.(.*)", r"pivot_hidden.\1"),
    (r"cond_tokens", r"pivot_null"),
    (r"z_proj_ln\.(.*)", r"input_norm.\1"),
    (r"(encoder|decoder)_task_emb\.(.*)", r"\1.phases.\2"),
    (r"(encoder|decoder)_blocks_ada\.1\.(.*)", r"\1.modulation.\2"),
    (r"(encoder|decoder)_norm\.(.*)", r"\1.norm.\2"),
    (r"decoder_embed\.(.*)", r"bridge.\1"),
    (r"(encoder|decoder)_blocks\.(.*)", r"\1.blocks.\2"),
)
_DIT_RULES = (
    (r"t_embedder\.mlp\.0\.(.*)", r"time.mlp.up.\1"),
    (r"t_embedder\.mlp\.2\.(.*)", r"time.mlp.down.\1"),
    (r"x_embedder\.proj\.(.*)", r"input.\1"),
    (r"c_embedder\.proj\.(.*)", r"cond.\1"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(.*)", r"blocks.blocks.\1.adaln.linear.\2"),
    (r"blocks\.(\d+)\.(.*)", r"blocks.blocks.\1.\2"),
    (r"final_layer\.adaLN_modulation\.1\.(.*)", r"adaln.linear.\1"),
    (r"final_layer\.linear\.(.*)", r"out.\1"),
)


def convert(state: Mapping[str, Tensor]) -> State:
    """Our state from a published one: the null class joins the class table, phases and blocks get axes of their own."""
    trunk = {k: v for k, v in state.items() if not k.startswith((_HEAD, _DENSE_HEAD))}
    for key in ("class_emb.weight", "fake_latent"):
        shape_of(trunk, key, 2)
    ours: State = {"condition.classes.table.weight": torch.cat([trunk.pop("class_emb.weight"), trunk.pop("fake_latent")])}
    for theirs, name in (
        ("mask_token", "mask_tokens"),
        ("encoder_pos_embed_learned", "encoder_positions"),
        ("decoder_pos_embed_learned", "decoder_positions"),
    ):
        shape_of(trunk, theirs, 3)
        # phase 1 in the first half of the rows, phase 2 in the second
        ours[name] = torch.cat(trunk.pop(theirs).chunk(2, dim=1))
    for stack in ("encoder", "decoder"):
        for theirs, name in (("adaLN_scale", "gains"), ("adaLN_shift", "offsets")):
            keys = [f"{stack}_blocks.{i}.{theirs}" for i in range(depth_of(trunk, rf"{stack}_blocks\.(\d+)\."))]
            for key in keys:
                shape_of(trunk, key, 4)
            ours[f"{stack}.{name}"] = torch.stack([trunk.pop(key).flatten(1) for key in keys])
    ours |= rename(rename(trunk, _RULES), TIMM_BLOCK)
    ours |= {f"head.net.{k}": v for k, v in token_mlp(under(state, _HEAD)).items()}
    return ours | {f"dense_head.net.{k}": v for k, v in convert_dense_head(under(state, _DENSE_HEAD)).items()}


def convert_dense_head(state: Mapping[str, Tensor]) -> State:
    """State of :class:`vargen.heads.dit.TokenDiT`; the frozen position tables, of which one is unused, are left out."""
    ours = rename(rename({k: v for k, v in state.items() if k not in ("pos_embed", "c_pos_embed")}, _DIT_RULES), TIMM_BLOCK)
    # 1x1 convolutions are linear layers
    return {k: v.flatten(1) if v.dim() == 4 else v for k, v in ours.items()}


def check_positions(table: Tensor, state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless the published fixed positions are the ones that we compute."""
    if "pos_embed" in state and (state["pos_embed"].shape[1:] != table.shape or (state["pos_embed"][0] - table).abs().max() > 1e-4):
        raise CheckpointError("the dense head's fixed positions are not sine-cosine ones of this grid")


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors tell; attention heads only for the released widths."""
    dim, channels = shape_of(state, "z_proj.weight", 2)
    pivots = shape_of(state, "cond_tokens", 3)[1]
    cells = shape_of(state, "diffusion_pos_embed_learned", 3)[1]
    width, depth = token_mlp_sizes(under(state, _HEAD))
    dense_width = shape_of(state, f"{_DENSE_HEAD}x_embedder.proj.weight", 4)[0]
    config = {
        "grid": square(cells - pivots),
        "pivots": square(pivots),
        "channels": channels,
        "dim": dim,
        "encoder_depth": depth_of(state, r"encoder_blocks\.(\d+)\."),
        "decoder_depth": depth_of(state, r"decoder_blocks\.(\d+)\."),
        "mlp_ratio": shape_of(state, "encoder_blocks.0.mlp.fc1.weight", 2)[0] / dim,
        "buffer_size": shape_of(state, "encoder_pos_embed_learned", 3)[1] // 2 - cells,
        "num_classes": shape_of(state, "class_emb.weight", 2)[0],
        "head_width": width,
        "head_depth": depth,
        "dense_head_width": dense_width,
        "dense_head_depth": depth_of(state, rf"{_DENSE_HEAD}blocks\.(\d+)\."),
        "dense_head_ratio": shape_of(state, f"{_DENSE_HEAD}blocks.0.mlp.fc1.weight", 2)[0] / dense_width,
    }
    if dim in HEADS:
        config["heads"] = HEADS[dim]
    if dense_width in DENSE_HEADS:
        config["dense_head_heads"] = DENSE_HEADS[dense_width]
    return config


def load(path: str | os.PathLike[str], *, ema: bool = True, **options: Any) -> HiMAR:
    """The generator of a published checkpoint; its sizes are read from the tensors.

    Args:
        path: ``.pth`` with the states under ``model_ema`` and ``model``, or a plain state dict.
        ema: the averaged weights, which generation uses, rather than the raw ones.
        options: constructor arguments that tensors do not tell (``heads`` and ``dense_head_heads`` for widths that were not
            released, ``head_steps``), or that differ.

    Raises:
        CheckpointError: an unreadable file, or one whose keys or shapes are not those of this model.
    """
    check_keys(options, list(HiMAR._get_init_keys(HiMAR)), "HiMAR")
    state = unwrap(read_file(path), ("model_ema", "model") if ema else ("model", "model_ema"))
    config = {**read_config(state), **options}
    for heads, width in (("heads", "dim"), ("dense_head_heads", "dense_head_width")):
        if heads not in config:
            raise CheckpointError(f"{path}: no released Hi-MAR has {width} {config[width]}: pass {heads}=...")
    model = HiMAR(**config)
    check_positions(model.dense_head.net.positions, under(state, _DENSE_HEAD))
    load_strictly(model, convert(state), source=str(path))
    return model.eval()
