"""LARP's generators: class-conditional, and frame prediction end to end with the tokenizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from tests.parity.systems.causal_steps import step_logits
from tests.parity.systems.larp_tokenizer import NORM_EPS
from vargen.backbones.larp import LARPGenerator
from vargen.condition import Condition
from vargen.guidance import Guidance, until
from vargen.kernels.sample import filter_logits
from vargen.model import Sampling
from vargen.noise import Noise
from vargen.official.larp import load
from vargen.official.larp_tokenizer import load as load_tokenizer

GREEDY = Sampling(temperature=0.0)
NO_DROPOUT = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}


@component("larp", "ar")
@torch.no_grad()
def class_conditional(case: Case) -> dict[str, Tensor]:
    heads = case.config["ModelArgs"]["n_head"]
    with checkpoint_file(case.state32(), wrapper="model") as path:
        model = load(path, heads=heads, **NO_DROPOUT)
    labels, tokens = case.inputs["labels"], case.inputs["tokens"]
    condition, keep = Condition(class_labels=labels), torch.zeros(len(tokens), dtype=torch.bool)
    with capture(model, {"after_block0": "blocks.0"}) as seen:
        logits = model.assemble(model.sequence(tokens, condition, keep))
    slots = torch.arange(model.layout.num_inputs)
    prefix, _ = model.prefix(condition, keep)
    null = Condition(class_labels=torch.tensor([model.num_classes, -1]))
    out = {
        **seen,
        "h0": model.embed(prefix, tokens[:, model.layout.cell[slots].clamp(min=0)], slots),
        "train_logits": logits,
        "train_loss": F.cross_entropy(logits.transpose(1, 2), tokens),
        "train_logits_uncond": model.assemble(model.sequence(tokens[:2], null, keep[:2])),
    }
    # condition dropout 0.1 of the loss is switched off by draws of 1
    out["masked_loss"] = masked_loss(model, tokens, condition, case.inputs["valid"])
    temperature, top_k, top_p = case.config["filter [temperature,top_k,top_p]"]
    for name, (k, p) in {"topk": (top_k, 1.0), "topp": (0, top_p), "both": (top_k, top_p)}.items():
        out[f"filtered_probs_{name}"] = F.softmax(filter_logits(logits[:, -1], temperature, k, p), -1)
    for name, (scale, interval) in case.config["cfg runs {name:[cfg_scale,cfg_interval]}"].items():
        guidance = Guidance(scale, schedule=until(interval + 1) if interval > -1 else "constant")
        drawn = model.generate(condition, guidance=guidance, sampling=GREEDY)
        out[f"tokens_{name}"] = drawn
        out[f"step_logits_{name}"] = step_logits(model, condition, drawn, guidance)
    return out


def masked_loss(model: LARPGenerator, tokens: Tensor, condition: Condition, weight: Tensor) -> Tensor:
    model.condition_dropout = 0.0
    return model.training_losses(tokens, condition, Noise(0, len(tokens)), weight)["loss"]


@component("larp", "fp")
@torch.no_grad()
def frame_prediction(case: Case) -> dict[str, Tensor]:
    with checkpoint_file(case.state32("tokenizer.")) as path:
        tokenizer = load_tokenizer(path, case.config["LARPTokenizer"], {}, NORM_EPS)
    with checkpoint_file(case.state32("ar."), wrapper="model") as path:
        model = load(path, heads=case.config["ModelArgs"]["n_head"], **NO_DROPOUT)
    video, given = case.inputs["video"], case.config["num_cond_frames"]
    held = torch.cat([video[:, :, :given], video[:, :, given - 1 : given].expand(-1, -1, video.shape[2] - given, -1, -1)], dim=2)
    target, context = tokenizer.encode(video * 2 - 1), tokenizer.encode(held * 2 - 1)
    condition = Condition(context=context)
    logits = model.assemble(model.sequence(target, condition, torch.zeros(len(target), dtype=torch.bool)))
    tokens = model.generate(condition, sampling=GREEDY)
    raw = (tokenizer.decode(tokens) + 1) / 2
    clamped = raw.clamp(0, 1)
    frames = clamped.transpose(1, 2).flatten(0, 1)
    half = (frames.shape[-2] // 2, frames.shape[-1] // 2)
    resized = F.interpolate(frames, half, mode="bilinear", antialias=True, align_corners=False)
    return {
        "target_tokens": target,
        "cond_tokens": context,
        "cond_video": held,
        "cond_with_sep": F.pad(context, (0, 1), value=model.config.codebook_size),
        "train_logits": logits,
        "train_loss": F.cross_entropy(logits.transpose(1, 2), target),
        "tokens": tokens,
        "step_logits": step_logits(model, condition, tokens, Guidance()),
        "video_raw": raw,
        "video": clamped,
        "video_resized": resized.unflatten(0, (len(video), -1)).transpose(1, 2),
    }
