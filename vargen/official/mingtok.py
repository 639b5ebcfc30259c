"""Released checkpoints of MingTok-Vision, alone or inside a Ming-UniVision checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.official.shared import depth_of, shape_of
from vargen.tokenizers.mingtok import PRESETS, MingTok

WRAPPERS = ("model", "module", "state_dict")

# the teacher of the training code; nothing of it serves the tokenizer
IGNORE = (r"target_backbone\..*",)

_PARTS = (("low_level_encoder", "encoder"), ("semantic_decoder", "semantic_decoder"), ("pixel_decoder", "pixel_decoder"))

RULES: tuple[tuple[str, str], ...] = (
    *(
        rule
        for theirs, ours in _PARTS
        for rule in (
            # blocks stand in one chunk, hence the double index
            (rf"{theirs}\.blocks\.\d+\.(\d+)\.(norm\d|attn\.qkv)\.(.*)", rf"{ours}.trunk.blocks.\1.\2.\3"),
            (rf"{theirs}\.blocks\.\d+\.(\d+)\.attn\.proj\.(.*)", rf"{ours}.trunk.blocks.\1.attn.out.\2"),
            (rf"{theirs}\.blocks\.\d+\.(\d+)\.mlp\.fc1\.(.*)", rf"{ours}.trunk.blocks.\1.mlp.up.\2"),
            (rf"{theirs}\.blocks\.\d+\.(\d+)\.mlp\.(?:fc2|w3)\.(.*)", rf"{ours}.trunk.blocks.\1.mlp.down.\2"),
            (rf"{theirs}\.blocks\.\d+\.(\d+)\.mlp\.w12\.(.*)", rf"{ours}.trunk.blocks.\1.mlp.w12.\2"),
            (rf"{theirs}\.norm\.(.*)", rf"{ours}.trunk.final_norm.\1"),
        )
    ),
    (r"low_level_encoder\.pos_embed", "encoder.positions"),
    (r"low_level_encoder\.(cls_token|patch_embed\.proj\..*|out_norm\..*|out_proj\..*)", r"encoder.\1"),
    (r"sem_to_pix\.(.*)", r"pixel_decoder.expand.\1"),
)


def load(path: str | os.PathLike[str], **options: Any) -> MingTok:
    """A MingTok from an official file, sizes read from its tensors and the latent scaling from the released configuration.

    Args:
        options: further arguments of :class:`MingTok`, such as another ``latent_mean`` and ``latent_std``.

    Raises:
        CheckpointError: unreadable file, or keys that do not fit.
    """
    state = unwrap(read_file(path), WRAPPERS)
    joint = {k.removeprefix("vision."): v for k, v in state.items() if k.startswith("vision.")}
    model = MingTok(**{**read_config(joint or state), **options})
    load_strictly(model, convert(joint or state), IGNORE, str(path))
    return model.eval()


def convert(state: Mapping[str, Tensor]) -> State:
    """Our keys and shapes."""
    converted: State = {}
    for key, value in rename(state, RULES).items():
        if ".mlp.w12." in key:
            for part, half in zip(("gate", "up"), value.chunk(2)):
                converted[key.replace("w12", part)] = half
        elif key == "encoder.positions":
            converted[key] = value[0]
        elif key == "encoder.cls_token":
            converted[key] = value.flatten()
        else:
            converted[key] = value
    return converted


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the shapes of an official state dict tell, with the released latent scaling."""
    encoder_dim, _, patch, _ = shape_of(state, "low_level_encoder.patch_embed.proj.weight")
    semantic_dim, latent_channels = shape_of(state, "semantic_decoder.in_proj.weight")
    pixels, pixel_dim = shape_of(state, "pixel_decoder.head.weight")
    released = PRESETS["mingtok-vision"]
    return {
        "image_size": math.isqrt(shape_of(state, "low_level_encoder.pos_embed")[1] - 1) * patch,
        "patch_size": patch,
        "latent_channels": latent_channels,
        "encoder_dim": encoder_dim,
        "encoder_depth": depth_of(state, r"low_level_encoder\.blocks\.\d+\.(\d+)\."),
        "semantic_dim": semantic_dim,
        "semantic_depth": depth_of(state, r"semantic_decoder\.blocks\.\d+\.(\d+)\."),
        "pixel_patch_size": math.isqrt(pixels // 3),
        "pixel_dim": pixel_dim,
        "pixel_depth": depth_of(state, r"pixel_decoder\.blocks\.\d+\.(\d+)\."),
        "latent_mean": released["latent_mean"],
        "latent_std": released["latent_std"],
    }
