"""LlamaGen's VQ tokenizer, whole and by halves, and its training objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from vargen.official.llamagen_vq import load, official_key, to_official
from vargen.tokenizers.vq import VQTokenizer


def build(case: Case, missing: dict[str, Tensor] | None = None) -> VQTokenizer:
    """The tokenizer through the public loader; ``missing`` completes the state of a case that holds one half only."""
    c = case.config
    with checkpoint_file({**(missing or {}), **case.state32()}, wrapper="model") as path:
        return load(
            path,
            l2_normalize=c["codebook_l2_norm"],
            commitment_weight=c.get("commit_loss_beta", 0.25),
            entropy_weight=c.get("entropy_loss_ratio", 0.0),
            dropout=c.get("dropout_p", 0.0),
        )


def stand_in(case: Case, multipliers: list[int]) -> dict[str, Tensor]:
    """A freshly initialised state of the case's sizes, under the published names."""
    c = case.config
    widths = [c["ch"] * m for m in multipliers]
    model = VQTokenizer(
        encoder_widths=widths,
        decoder_widths=widths,
        stem_width=c["ch"],
        encoder_blocks=c["num_res_blocks"],
        decoder_blocks=c["num_res_blocks"] + 1,
        latent_channels=c["z_channels"],
        codebook_size=c["codebook_size"],
        codebook_dim=c["codebook_embed_dim"],
        l2_normalize=c["codebook_l2_norm"],
        usage_window=0,
    )
    return to_official(model)


def watched(module: torch.nn.Module, case: Case, half: str = "") -> dict[str, str]:
    """Labels ``after_<published path>`` of the case, paths taken within ``half``, and the submodules that they mean."""
    paths = {}
    for name, _ in module.named_modules():
        path = official_key(f"{half}{name}.").removeprefix(half).strip(".")
        paths["after_" + path.replace(".", "_")] = name
    return {label: paths[label] for label in case.outputs if label in paths}


def channels_first(x: Tensor) -> Tensor:
    return rearrange(x, "b h w d -> b d h w")


@component("llamagen", "vq")
def tokenizer(case: Case) -> dict[str, Tensor]:
    model, pixels = build(case), case.inputs["x"]
    out: dict[str, Tensor] = {}
    with torch.no_grad(), capture(model, watched(model, case)) as after:
        hidden = model.encoder(pixels)
        latents = rearrange(model.quant_conv(hidden), "b d h w -> b h w d")
        quantized = model.quantizer(latents)
        out |= {"encoder": hidden, "quant_conv": channels_first(latents)}
        out |= {"quant": channels_first(quantized.quantized), "indices": quantized.indices.flatten()}
        out["reconstruction"] = model.reconstruct(quantized.quantized)
        out |= after
    with torch.no_grad():
        out["decode_code_square"] = model.decode(model.encode(pixels))
        out["decode_code_rect"] = model.decode(case.inputs["codes_rect"])

    model.train()
    result = model(pixels)
    assert result.reconstruction is not None
    loss = F.mse_loss(result.reconstruction, pixels) + sum(result.losses.values())
    loss.backward()
    zero = torch.zeros(())
    tail = case.outputs["codebook_used_tail"].numel() if "codebook_used_tail" in case.outputs else 0
    return out | {
        "train_reconstruction": result.reconstruction,
        "vq_loss": result.losses["codebook"],
        "commit_loss": result.losses.get("commitment", zero),
        "entropy_loss": result.losses.get("entropy", zero),
        "codebook_usage": result.features["codebook_usage"] if case.config["codebook_show_usage"] else zero,
        "loss": loss,
        "grad_codebook": model.quantizer.codebook.grad,
        "grad_quant_conv_weight": model.quant_conv.weight.grad,
        "grad_encoder_conv_in_weight": model.encoder.conv_in.weight.grad,
        "codebook_used_tail": model.quantizer.recent[-tail:].float(),
    }


@component("llamagen", "vq-encoder")
@torch.no_grad()
def encoder(case: Case) -> dict[str, Tensor]:
    model = build(case, stand_in(case, case.config["encoder_ch_mult"]))
    with capture(model.encoder, watched(model.encoder, case, "encoder.")) as after:
        hidden = model.encoder(case.inputs["x"])
    latents = model.quant_conv(hidden)
    result = model.quantizer(rearrange(latents, "b d h w -> b h w d"))
    return {
        **{label: value[:, :4] for label, value in after.items()},
        "encoder": hidden,
        "quant_conv": latents,
        "quant": channels_first(result.quantized),
        "indices": result.indices.flatten(),
    }


@component("llamagen", "vq-decoder")
@torch.no_grad()
def decoder(case: Case) -> dict[str, Tensor]:
    model = build(case, stand_in(case, case.config["decoder_ch_mult"]))
    with capture(model.decoder, watched(model.decoder, case, "decoder.")) as after:
        image = model.decode(case.inputs["codes"])
    return {
        **{label: value[:, :4] for label, value in after.items()},
        "codebook_entry": channels_first(model.quantizer.lookup(case.inputs["codes"])),
        "image": image,
    }
