"""LARP's tokenizer: encoding, decoding, shorter clips, all losses. Recorded videos are in [0, 1], ours in [-1, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.gradients import official_gradients
from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from vargen.losses.discriminators import TransformerDiscriminator
from vargen.losses.objective import TokenizerObjective
from vargen.official.larp_tokenizer import load, load_discriminator, rename_keys
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.larp_prior import top_accuracy

# default of the timm version that the cases were recorded with; released models were trained with 1e-5
NORM_EPS = 1e-6


def tokenizer_state(case: Case) -> dict[str, Tensor]:
    return {k: v for k, v in case.state32().items() if not k.startswith("loss.")}


def build(case: Case) -> LARPTokenizer:
    prior = next((v for k, v in case.config.items() if k.startswith("prior GPTCConfig")), {})
    names = {"depth": "n_layer", "heads": "n_head", "dim": "n_embd"}
    with checkpoint_file(tokenizer_state(case)) as path:
        sizes = {ours: prior[theirs] for ours, theirs in names.items() if theirs in prior}
        return load(path, case.config["LARPTokenizer"], sizes, NORM_EPS)


def unit(pixels: Tensor) -> Tensor:
    return (pixels + 1) / 2


@component("larp", "tokenizer")
@torch.no_grad()
def tokenizer(case: Case) -> dict[str, Tensor]:
    model = build(case)
    video, short = (2 * case.inputs[name] - 1 for name in ("video", "video_short"))
    layers = {"patch": "embed", "encoder": "encoder.blocks.0", "encoded": "from_code", "decoder": "decoder.blocks.0"}
    with capture(model, layers) as taken:
        z = model.latents(video)
        q = model.quantizer(z, sample=False)
        recon = model.pixels(q.quantized, video.shape[2])
        out = {
            "patch_embed": taken["patch"],
            "enc_after_block0": taken["encoder"],
            "encoded": taken["encoded"],
            "dec_after_block0": taken["decoder"],
        }
    ids, short_ids = model.encode(video), model.encode(short)
    return {
        **out,
        "projected_z": z,
        "unregularized_z": F.normalize(z, dim=-1),
        "emb": model.quantizer.codes,
        "indices": ids,
        "regularized_z": q.quantized,
        "loss_commit": q.losses["commitment"] / model.quantizer.commitment_weight,
        "loss_codebook": q.losses["codebook"] / model.quantizer.codebook_weight,
        "loss_q": q.losses["commitment"] + q.losses["codebook"],
        "recon": unit(recon),
        "recon_from_indices": unit(model.decode(ids, frames=video.shape[2])),
        "short_indices": short_ids,
        "short_recon": unit(model.decode(short_ids, frames=short.shape[2])),
    }


@component("larp", "losses")
def losses(case: Case) -> dict[str, Tensor]:
    model, weights = build(case), case.config["loss"]
    video, x = 2 * case.inputs["video"] - 1, case.inputs
    rounds = model.prior_model.rounds
    draws = {
        "quantizer": x["svq_draw"],
        "prior/mask": x["prior_mask_uniform"].squeeze(-1),
        "prior/sample": torch.stack([x[f"prior_samples_round{i}"] for i in range(rounds - 1)]),
        "smooth_real": x["d_noise_real"],
        "smooth_fake": x["d_noise_fake"],
    }
    noise = RecordedNoise(draws, len(video))
    objective = objective_of(case)
    clock = case.config["forward kwargs"]

    with capture(model, {"quantized": "quantizer"}) as taken:
        output = model(video, noise=noise, progress=clock["global_step"] / clock["max_steps"])
    q = taken["quantized"]
    prior = model.prior_model.loss(q.quantized, q.indices, model.quantizer.codes, clock["global_step"] / clock["max_steps"], noise)
    labels = q.indices[:, 1:]
    with capture(objective, {"logits": "discriminator"}) as judged:
        generator = objective.generator_losses(video, output, step=0)
    fake = judged["logits"]
    assert objective.discriminator is not None
    real = objective.discriminator(video)
    discriminator = objective.discriminator_losses(video, output.reconstruction, 0, noise)
    gradients = official_gradients(generator["loss"], model, tokenizer_state(case), rename_keys)
    return {
        "svq_probs": model.quantizer.probabilities(model.latents(video)),
        "svq_indices": q.indices,
        "pred_frames": unit(output.reconstruction),
        "loss_commit": q.losses["commitment"] / model.quantizer.commitment_weight,
        "loss_codebook": q.losses["codebook"] / model.quantizer.codebook_weight,
        "loss_q": q.losses["commitment"] + q.losses["codebook"],
        "prior_logits": prior.logits,
        "prior_last_round_input": prior.last_input,
        "loss_latent_ce": prior.loss,
        "prior_top1_acc": 100 * top_accuracy(prior.logits[0], labels, 1),
        "prior_top5_acc": 100 * top_accuracy(prior.logits[0], labels, 5),
        "logits_real": real,
        "logits_fake": fake,
        "d_loss_bce": discriminator["discriminator"],
        "d_lecam_loss": weights["lecam_weight"] * discriminator["lecam"],
        "d_total_loss": discriminator["loss"],
        "lecam_ema_real_after": objective.lecam_real,
        "lecam_ema_fake_after": objective.lecam_fake,
        "g_adv_loss": generator["adversarial"],
        # absolute differences of values in [-1, 1] are twice those in [0, 1]
        "rec_loss_l1": generator["reconstruction"] / 2,
        "total_generator_loss": generator["loss"],
        **{f"grad/{name}": gradient for name, gradient in gradients.items()},
    }


def objective_of(case: Case) -> TokenizerObjective:
    """LARP's objective without its perceptual term; the published code applies the LeCam weight twice."""
    d, weights = case.config["TransformerDiscriminator"], case.config["loss"]
    discriminator = TransformerDiscriminator(
        d["input_size"],
        d["frame_num"],
        d["patch_size"],
        d["temporal_patch_size"],
        d["hidden_size"],
        d["n_layers"],
        d["n_heads"],
        NORM_EPS,
    )
    objective = TokenizerObjective(
        reconstruction="l1",
        reconstruction_weight=0.5,
        discriminator=load_discriminator(discriminator, case.state32("loss.")),
        generator_loss="non-saturating",
        discriminator_loss="smoothed",
        adversarial_weight=weights["disc_weight"],
        lecam_weight=weights["lecam_weight"] ** 2,
        lecam_of_means=True,
    )
    objective.lecam_real, objective.lecam_fake = case.inputs["lecam_ema_real"], case.inputs["lecam_ema_fake"]
    return objective
