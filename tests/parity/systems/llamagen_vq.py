"""LlamaGen's VQ tokenizer, whole and by halves, and its training objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from vargen.checkpoint import load_strictly
from vargen.losses import adversarial
from vargen.losses.discriminators import PatchGAN
from vargen.losses.objective import TokenizerObjective
from vargen.losses.perceptual import LPIPS
from vargen.model import TokenizerOutput
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


@component("llamagen", "vqloss")
def objective(case: Case) -> dict[str, Tensor]:
    c, inputs = case.config, case.inputs
    loss_names = {"hinge": "hinge", "vanilla": "vanilla", "non-saturating": "swapped"}
    options = {"width": c["disc_dim"], "num_layers": c["disc_num_layers"]}
    with checkpoint_file(case.state32("perceptual_loss.")) as path:
        terms = TokenizerObjective(
            reconstruction=c["reconstruction_loss"],
            reconstruction_weight=c["reconstruction_weight"],
            perceptual=path,
            perceptual_weight=c["perceptual_weight"],
            discriminator=c["disc_type"],
            discriminator_options=options,
            generator_loss=loss_names[c["gen_adv_loss"]],
            discriminator_loss=loss_names[c["disc_loss"]],
            adversarial_weight=c["disc_weight"],
            discriminator_weight=c["disc_weight"],
            discriminator_start=c["disc_start"],
            use_adaptive_weight=True,
        )
    lpips, discriminator = terms.perceptual, terms.discriminator
    assert isinstance(lpips, LPIPS)
    assert isinstance(discriminator, PatchGAN)
    stored = case.state32("discriminator.")
    x, start = inputs["x"], c["disc_start"]

    def restart(training: bool) -> None:
        """The discriminator as stored, in the given mode; LPIPS without dropout."""
        load_strictly(discriminator, stored)
        terms.train(training)
        lpips.eval()

    restart(False)
    features = lpips.features(x)
    out = {f"vgg_feature_{i}": feature[:, :4] for i, feature in enumerate(features)}
    out["lpips_per_image"] = lpips(x, inputs["recon"]).reshape(-1, 1, 1, 1)
    out["disc_logits_real_eval"] = discriminator(x)
    out["disc_logits_fake_eval"] = discriminator(inputs["recon"])

    restart(True)
    out["disc_logits_real_train"] = discriminator(x)
    first_norm = next(m for m in discriminator.main if isinstance(m, torch.nn.BatchNorm2d))
    out["bn_running_mean_after"] = first_norm.running_mean.clone()
    out["bn_running_var_after"] = first_norm.running_var.clone()

    weight = inputs["last_weight"].clone().requires_grad_()
    reconstruction = F.conv2d(inputs["last_hidden"], weight, padding=1)
    quantizer_losses = {f"codebook_{i}": loss for i, loss in enumerate(inputs["codebook_losses"])}
    output = TokenizerOutput(torch.zeros(0), reconstruction, quantizer_losses)

    def generator(step: int, adaptive: bool) -> dict[str, Tensor]:
        restart(True)
        terms.use_adaptive_weight = adaptive
        return terms.generator_losses(x, output, step, weight)

    before, at_start, adaptive = generator(start - 1, False), generator(start, False), generator(start, True)
    out["grad_last_weight"] = torch.autograd.grad(adaptive["loss"], weight)[0]
    restart(True)
    discriminator_loss = terms.discriminator_losses(x, reconstruction, start)
    assert discriminator_loss is not None
    paused = terms.discriminator_losses(x, reconstruction, start - 1)
    out |= {
        "reconstruction": reconstruction,
        "rec_loss": at_start["reconstruction"],
        "perceptual": lpips(x, reconstruction).mean(),
        "gen_adv": at_start["adversarial"],
        "gen_loss_before_start": before["loss"],
        "gen_loss_at_start": at_start["loss"],
        "adaptive_weight": adaptive["adaptive_weight"],
        "gen_loss_adaptive": adaptive["loss"],
        "disc_loss_at_start": discriminator_loss["loss"],
        "disc_loss_before_start": torch.zeros(()) if paused is None else paused["loss"],
    }
    a, b = inputs["logit_a"], inputs["logit_b"]
    return out | {
        "d_hinge": adversarial.hinge_discriminator(a, b),
        "d_vanilla": adversarial.vanilla_discriminator(a, b),
        "d_nonsat": adversarial.swapped_discriminator(a, b),
        "g_hinge": adversarial.hinge_generator(b),
        "g_nonsat": adversarial.swapped_generator(b),
    }
