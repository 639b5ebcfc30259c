"""TiTok and TA-TiTok tokenizers: encoder, quantiser or posterior, decoder, pixels. Latents are recorded channels first."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from vargen.condition import TextFeatures
from vargen.nn.gaussian import DiagonalGaussian
from vargen.official.titok import load
from vargen.tokenizers.titok import TiTok

# heads by the names of sizes; the last two exist in recorded cases only
HEADS = {"small": 8, "base": 12, "large": 16, "tiny": 2, "mini": 3}


def build(case: Case) -> TiTok:
    vq = case.config["model"]["vq_model"]
    options: dict[str, Any] = {
        "encoder_heads": HEADS[vq["vit_enc_model_size"]],
        "decoder_heads": HEADS[vq["vit_dec_model_size"]],
        "mixed_latents": vq.get("is_legacy", True),
        "l2_normalize": vq.get("use_l2_norm", False),
        "commitment_weight": vq.get("commitment_cost", 0.25),
    }
    with checkpoint_file(case.state32()) as path:
        return load(path, **options)


def text_of(case: Case) -> TextFeatures | None:
    text = case.inputs.get("text")
    return None if text is None else TextFeatures(text, torch.ones(text.shape[:2], dtype=torch.bool))


def channels_first(latents: Tensor) -> Tensor:
    return rearrange(latents, "b k c -> b c 1 k")


def channels_last(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c 1 k -> b k c")


def unit(pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2


@component("titok", "vq")
@component("titok", "vqdirect")
@component("titok", "tatitokvq")
@torch.no_grad()
def vq(case: Case) -> dict[str, Tensor]:
    model, text = build(case), text_of(case)
    pixels = case.inputs["image"] * 2 - 1
    assert model.quantizer is not None
    latents = encoder_of(model, pixels, text)
    quantized = model.quantizer(latents["encoder_output"])
    out = {"indices": model.encode(pixels, text)[:, None], "z_quantized": channels_first(quantized.quantized)}
    out |= {f"{name}_loss": quantized.losses.get(name, torch.zeros(())) for name in ("codebook", "commitment")}
    out["quantizer_loss"] = out["codebook_loss"] + out["commitment_loss"]
    out |= decoder_of(model, quantized.quantized, text)
    out["image_from_indices"] = unit(model.decode(case.inputs["indices"].squeeze(1), text))
    if "soft_codes" in case.inputs:
        out["soft_codebook_entry"] = model.codes(case.inputs["soft_codes"])
    return latents | out | {"encoder_output": channels_first(latents["encoder_output"])}


@component("titok", "kl")
@component("titok", "tatitokkl")
@torch.no_grad()
def kl(case: Case) -> dict[str, Tensor]:
    model, text = build(case), text_of(case)
    pixels = case.inputs["image"] * 2 - 1
    latents = encoder_of(model, pixels, text)
    posterior = DiagonalGaussian.from_moments(latents["encoder_output"])
    noise = RecordedNoise({"posterior": channels_last(case.inputs["posterior_noise"])}, len(pixels))
    tokens = model.encode(pixels, text, noise)
    return {
        **latents,
        **decoder_of(model, tokens, text),
        "encoder_output": channels_first(latents["encoder_output"]),
        "mean": channels_first(posterior.mean),
        "logvar": channels_first(posterior.logvar),
        "z_sampled": channels_first(tokens),
        "kl": posterior.kl().sum(-1),
        "image_from_latents": unit(model.decode(channels_last(case.inputs["latents"]), text)),
    }


def encoder_of(model: TiTok, pixels: Tensor, text: TextFeatures | None) -> dict[str, Tensor]:
    names = {f"enc_after_block{i}": f"encoder.trunk.blocks.{i}" for i in range(len(model.encoder.trunk.blocks))}
    with capture(model, names) as out:
        out["encoder_output"] = model.latents(pixels, text)
    return out


def decoder_of(model: TiTok, latents: Tensor, text: TextFeatures | None) -> dict[str, Tensor]:
    names = {f"dec_after_block{i}": f"decoder.trunk.blocks.{i}" for i in range(len(model.decoder.trunk.blocks))}
    with capture(model, names) as out:
        features = model.decoder(latents, text)
    image = model.paint(latents, text)
    logits = None if model.code_head is None else rearrange(model.code_logits(features), "b h w c -> b c h w")
    return out | {"decoder_output": image if logits is None else logits, "reconstruction": image}
