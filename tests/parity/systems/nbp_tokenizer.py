"""NBP's video tokenizer and its building blocks. Recorded pixels are in [0, 1], ours in [-1, 1]."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from tests.parity.runner import Case, capture, checkpoint_file, component
from vargen.checkpoint import rename
from vargen.nn.quantize import FSQ
from vargen.official.nbp_tokenizer import RULES, load
from vargen.tokenizers.nbp import CausalConv3d, DepthToSpace, ResidualUnit


@component("nbp", "tokenizer")
@torch.no_grad()
def tokenizer(case: Case) -> dict[str, Tensor]:
    state = {f"module.{key}": value for key, value in case.state32().items()}
    video = case.inputs["video"]
    options = {"sample_size": list(video.shape[2:]), "levels": case.config["fsq_levels"], "norm_groups": case.config["norm_groups"]}
    with checkpoint_file(state, wrapper="model_state_dict") as path:
        model = load(path, **options)
    layers = (re.fullmatch(r"inter/(enc|dec)(\d+)", name) for name in case.outputs)
    names = {m[0]: f"{'encoder' if m[1] == 'enc' else 'decoder'}.{m[2]}" for m in layers if m}
    with capture(model, names) as seen:
        latent = model.latents(video * 2 - 1)
        quantized = model.quantizer(latent)
        reconstruction = model.pixels(quantized.quantized)
    codes = model.encode(video * 2 - 1)
    image_codes = model.encode(case.inputs["image"].unsqueeze(2) * 2 - 1)
    return {
        **seen,
        "latent": latent.movedim(-1, 1),
        "quantized": quantized.quantized.movedim(-1, 1),
        "reconstruction": (reconstruction + 1) / 2,
        "codes": codes,
        "decoded_from_codes": (model.decode(codes) + 1) / 2,
        "decoded_from_random_codes": (model.decode(case.inputs["random_codes"]) + 1) / 2,
        "image_codes": image_codes,
        "image_reconstruction": (model.decode(image_codes) + 1) / 2,
    }


@component("nbp", "tokenizer-blocks")
@torch.no_grad()
def blocks(case: Case) -> dict[str, Tensor]:
    c = case.config
    width, groups = c["dim_out"], c["norm_groups"]
    parts = nn.ModuleDict(
        {
            "res": ResidualUnit(c["dim_in"], width, groups),
            "same": ResidualUnit(width, width, groups),
            "down1": CausalConv3d(width, width, 3, stride=(1, 2, 2)),
            "down2": CausalConv3d(width, width, 3, stride=2),
        }
    )
    for name, module in parts.items():
        # the adapter's rules, which want a place in a network in front
        state = {f"encoder_layers.0.{key}": value for key, value in case.state32(f"{name}.").items()}
        module.load_state_dict({k.removeprefix("encoder.0."): v for k, v in rename(state, RULES).items()})
    same = parts["same"](res := parts["res"](case.inputs["x"]))
    fsq = FSQ(c["fsq_levels"], shift="tan", margin=-1e-3)
    quantized = fsq(case.inputs["z"].movedim(1, -1))
    return {
        "y_res": res,
        "y_same": same,
        "y_down1": parts["down1"](same),
        "y_down2": parts["down2"](same),
        "d2s_222": DepthToSpace((2, 2, 2))(case.inputs["d"]),
        "d2s_122": DepthToSpace((1, 2, 2))(case.inputs["d"]),
        "fsq_codes": quantized.indices,
        "fsq_quantized": quantized.quantized.movedim(-1, 1),
        "fsq_decoded": fsq.lookup(case.inputs["codes"]).movedim(-1, 1),
    }
