"""FlexTok: VAE front, register encoder, FSQ, flow decoder in training and sampling. Cases hold one part's weights at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.runner import Case, RecordedNoise, capture, component
from vargen.checkpoint import load_strictly
from vargen.flow.flow import straight_path
from vargen.nn.quantize import FSQ
from vargen.official.flextok import read_decoder, read_encoder, read_vae, rename_keys, with_front
from vargen.tokenizers.flextok import FlexTok, training_times

SMALL: dict[str, Any] = {"encoder_depth": 1, "decoder_depth": 1}


def fill(model: FlexTok, case: Case, names: dict[str, str]) -> FlexTok:
    """Loads the part that the case has through the adapter; the others stay as initialised."""
    renamed = rename_keys(case.state32(), names, model)
    load_strictly(model, {**model.state_dict(), **renamed}, source=str(case.path))
    return model.eval()


def part(case: Case, read: Any) -> FlexTok:
    sizes, names = read(case.config)
    vae = {"latent_channels": sizes["channels"], "block_out_channels": [4], "norm_num_groups": 4}
    levels = case.config["regularizer"]["levels"]
    return fill(FlexTok(**{**SMALL, "levels": levels, **with_front(sizes, vae)}), case, names)


@component("flextok", "vae")
@torch.no_grad()
def vae(case: Case) -> dict[str, Tensor]:
    wrapper, base = case.config["wrapper"], case.config["vae_base"]
    front = read_vae({"vae": wrapper}, base)
    side = 2 ** (len(base["block_out_channels"]) - 1)
    sizes = {"head_dim": 8, "encoder_dim": 16, "decoder_dim": 16, **SMALL}
    model = FlexTok(
        sample_size=4 * side, vae=front, scaling_factor=wrapper["scaling_factor"], patch_size=2, num_registers=4, **sizes
    )
    fill(model, case, {})
    image, noise = case.inputs["image"], RecordedNoise({"posterior": case.inputs["posterior_noise"]}, len(case.inputs["image"]))
    posterior = model.posterior(image)
    assert posterior is not None
    return {
        "latents_sampled": model.latents(image, noise),
        "latents_mean": model.latents(image),
        "kl": posterior.kl().flatten(1).sum(1),
        "reconstruction": model.paint(case.inputs["latents"]),
    }


@component("flextok", "encoder")
@torch.no_grad()
def encoder(case: Case) -> dict[str, Tensor]:
    model = part(case, read_encoder)
    latents = case.inputs["vae_latents"]
    names = {"patches": "encoder.patches", **{f"after_block{i}": f"encoder.blocks.{i}" for i in range(model.config.encoder_depth)}}
    with capture(model, names) as taken:
        codes = model.encoder(latents)
    q = model.quantizer(codes)
    grid = [n // model.config.patch_size for n in latents.shape[2:]]
    return {
        "patches_with_posemb": taken.pop("patches").unflatten(1, grid),
        **taken,
        "latents_before_fsq": codes,
        "quants": q.quantized,
        "tokens": q.indices,
    }


@component("flextok", "fsq")
def fsq(case: Case) -> dict[str, Tensor]:
    quantizer = FSQ(case.config["regularizer"]["levels"])
    z = case.inputs["z"].clone().requires_grad_()
    q = quantizer(z)
    (gradient,) = torch.autograd.grad((q.quantized * case.inputs["grad_weight"]).sum(), z)
    codes = quantizer.lookup(case.inputs["indices"])
    return {
        "bounded": quantizer.bound(z),
        "quants": q.quantized,
        "tokens": q.indices,
        "grad_z": gradient,
        "embedding_of_indices": codes,
        "indices_roundtrip": quantizer.index(codes),
    }


@component("flextok", "decoder")
@torch.no_grad()
def decoder(case: Case) -> dict[str, Tensor]:
    model, x = part(case, read_decoder), case.inputs
    codes, latents, normal, keep = model.quantizer.lookup(x["tokens"]), x["vae_latents"], x["train_noise"], x["keep_k"]
    t = training_times(RecordedNoise({"time": x["logit_normal_draw"]}, len(latents)), "logit-normal")
    names = {"time": "decoder.time", **{f"train_after_block{i}": f"decoder.blocks.{i}" for i in range(model.config.decoder_depth)}}
    with capture(model, {**names, "decoder": "decoder"}) as taken:
        loss, patches = model.flow_loss(latents, codes, keep, x["null_flags"].bool(), t, normal)
    out = {
        "codes": codes,
        "train_sigmas": t,
        "train_noised": straight_path(latents, normal, t)[0],
        "train_time_embedding": taken.pop("time"),
        "train_velocity": taken.pop("decoder")[0],
        **taken,
        "train_repa_patch_features": patches,
        "train_loss_per_sample": loss,
        "train_loss": loss.mean(),
    }
    steps, scale = case.config["timesteps"], case.config["guidance_scale"]
    guidance: dict[str, tuple[Any, bool]] = {
        "sample_no_guidance": (1.0, False),
        "sample_cfg": (scale, False),
        "sample_apg": (scale, True),
        "sample_callable_cfg": (lambda t: 1 + (scale - 1) * t, False),
    }
    side = latents.shape[-1] * model.stride
    for name, (how, normalized) in guidance.items():
        noise = RecordedNoise({"latent": x["sample_noise"]}, len(codes))
        out[name] = model.sample(codes, keep, noise, steps, how, normalized, (side, side))
    return out
