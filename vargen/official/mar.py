"""MAR's checkpoints (``mar_base``, ``mar_large``, ``mar_huge``: ``checkpoint-last.pth``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vargen.backbones.mar import MAR
from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.config import check_keys
from vargen.errors import CheckpointError
from vargen.official.shared import TIMM_BLOCK, depth_of, shape_of, square, token_mlp, token_mlp_sizes, under

HEADS = {768: 12, 1024: 16, 1280: 16}
_HEAD = "diffloss.net."
_RULES = (
    (r"encoder_pos_embed_learned", r"encoder_positions"),
    (r"decoder_pos_embed_learned", r"decoder_positions"),
    (r"diffusion_pos_embed_learned", r"head_positions"),
    (r"z_proj\.(.*)", r"input.\1"),
    (r"z_proj_ln\.(.*)", r"input_norm.\1"),
    (r"(encoder|decoder)_norm\.(.*)", r"\1.final_norm.\2"),
    (r"decoder_embed\.(.*)", r"bridge.\1"),
    (r"(encoder|decoder)_blocks\.(.*)", r"\1.blocks.\2"),
)


def convert(state: Mapping[str, Tensor]) -> State:
    """Our state from a published one; the null class joins the class table. A linear map, so gradients pass through it."""
    trunk = {k: v for k, v in state.items() if not k.startswith(_HEAD)}
    for key in ("class_emb.weight", "fake_latent"):
        shape_of(trunk, key, 2)
    trunk["condition.classes.table.weight"] = torch.cat([trunk.pop("class_emb.weight"), trunk.pop("fake_latent")])
    ours = rename(rename(trunk, _RULES), TIMM_BLOCK)
    return {**ours, **{f"head.net.{k}": v for k, v in token_mlp(under(state, _HEAD)).items()}}


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the tensors tell; attention heads only for the released widths."""
    cells, decoder_dim = shape_of(state, "diffusion_pos_embed_learned", 3)[1:]
    encoder_dim, channels = shape_of(state, "z_proj.weight", 2)
    width, depth = token_mlp_sizes(under(state, _HEAD))
    config = {
        "grid": square(cells),
        "channels": channels,
        "encoder_dim": encoder_dim,
        "encoder_depth": depth_of(state, r"encoder_blocks\.(\d+)\."),
        "decoder_dim": decoder_dim,
        "decoder_depth": depth_of(state, r"decoder_blocks\.(\d+)\."),
        "mlp_ratio": shape_of(state, "encoder_blocks.0.mlp.fc1.weight", 2)[0] / encoder_dim,
        "buffer_size": shape_of(state, "encoder_pos_embed_learned", 3)[1] - cells,
        "num_classes": shape_of(state, "class_emb.weight", 2)[0],
        "head_width": width,
        "head_depth": depth,
    }
    if encoder_dim in HEADS:
        config["encoder_heads"] = HEADS[encoder_dim]
    if decoder_dim in HEADS:
        config["decoder_heads"] = HEADS[decoder_dim]
    return config


def load(path: str | os.PathLike[str], *, ema: bool = True, **options: Any) -> MAR:
    """The generator of a published checkpoint; its sizes are read from the tensors.

    Args:
        path: ``.pth`` with the states under ``model_ema`` and ``model``, or a plain state dict.
        ema: the averaged weights, which generation uses, rather than the raw ones.
        options: constructor arguments that tensors do not tell (``encoder_heads`` and ``decoder_heads`` for widths that were not
            released, ``head_steps``), or that differ.

    Raises:
        CheckpointError: an unreadable file, or one whose keys or shapes are not those of this model.
    """
    check_keys(options, list(MAR._get_init_keys(MAR)), "MAR")
    state = unwrap(read_file(path), ("model_ema", "model") if ema else ("model", "model_ema"))
    config = {**read_config(state), **options}
    for stack in ("encoder", "decoder"):
        if f"{stack}_heads" not in config:
            raise CheckpointError(f"{path}: no released MAR has width {config[f'{stack}_dim']}: pass {stack}_heads=...")
    model = MAR(**config)
    load_strictly(model, convert(state), source=str(path))
    return model.eval()
