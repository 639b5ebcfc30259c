"""MingTok: encoder, semantic decoder whole and step by step, pixel decoder, reconstruction losses."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from vargen.official.mingtok import load
from vargen.tokenizers.mingtok import MingTok

LOSSES = {"L1": "l1_rescaled", "L1_tanh": "l1_tanh", "L1_plain": "l1", "L2": "l2", "L2_normpix": "l2_standardized"}


def build(case: Case) -> MingTok:
    with checkpoint_file(case.state32(), wrapper="model") as path:
        return load(path, latent_mean=case.config["mean"], latent_std=case.config["scaling_factor"])


@component("mingtok", "tokenizer")
@torch.no_grad()
def tokenizer(case: Case) -> dict[str, Tensor]:
    model = build(case)
    image = case.inputs["image"]
    names = {f"enc_after_block{i}": f"encoder.trunk.blocks.{i}" for i in range(len(model.encoder.trunk.blocks))}
    names |= {"enc_embedded": "encoder.trunk.pre_norm", "semantic_in": "semantic_decoder.trunk.pre_norm"}
    names |= {
        "sem_to_pix": "pixel_decoder.expand",
        "pixel_decoder_in": "pixel_decoder.trunk.pre_norm",
        "pixel_pred": "pixel_decoder",
    }
    with capture(model, names) as out:
        raw = model.encode_with_class(image)
        features = model.semantic_decoder(raw)
        grid = model.encode(image).shape[1:3]
        out["recon"] = model.decode_features(features[:, :-1].unflatten(1, grid)).clamp(-1, 1)
    out |= {"latent_raw": raw, "semantic": features[:, :-1], "semantic_cls": features[:, -1], "latent": model.space.normalize(raw)}
    cache = model.semantic_decoder.new_cache(len(raw), raw.shape[1])
    latents = model.space.denormalize(out["latent"][:, :-1])
    out["semantic_stepwise"] = torch.cat([model.semantic_decoder(z, cache) for z in latents.split(1, dim=1)], dim=1)
    for suffix, mask in (("", None), ("_masked", case.inputs["mask"])):
        for name, kind in LOSSES.items():
            out[f"loss_{name}{suffix}"] = model.reconstruction_loss(out["pixel_pred"], image, mask, kind)
    return out | large(model, case.inputs["image_large"])


def large(model: MingTok, image: Tensor) -> dict[str, Tensor]:
    raw = model.encode_with_class(image)
    tokens = model.encode(image)
    return {
        "large_pos_embed": model.encoder.positions_of(tokens.shape[1:3])[None],
        "large_latent_raw": raw,
        "large_semantic": model.semantic_features(tokens).flatten(1, 2),
        "large_recon": model.decode(tokens).clamp(-1, 1),
    }
