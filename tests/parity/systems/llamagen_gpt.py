"""LlamaGen's GPT, class- and text-conditional: training pass, cached decoding, generation, filtering."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from tests.parity.systems.causal_steps import step_logits
from vargen.backbones.llamagen import LlamaGen
from vargen.condition import Condition, TextFeatures
from vargen.guidance import Guidance, until
from vargen.kernels.sample import filter_logits
from vargen.model import Sampling
from vargen.official.llamagen import load


def build(case: Case) -> LlamaGen:
    c = case.config
    side = round(c["block_size"] ** 0.5)
    dropouts = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
    with checkpoint_file(case.state32(), wrapper="model") as path:
        return load(
            path,
            grid=(side, side),
            heads=c["n_head"],
            norm_eps=c["norm_eps"],
            rope_base=c["rope_base"],
            condition_dropout=c["class_dropout_prob"],
            **dropouts,
        )


def condition_of(case: Case) -> Condition:
    cond = case.inputs["cond"]
    if cond.dim() == 1:
        return Condition(class_labels=cond)
    return Condition(text=TextFeatures(cond, case.inputs["emb_masks"].bool()))


@component("llamagen", "gpt-c2i")
def class_conditional(case: Case) -> dict[str, Tensor]:
    return {**training(build(case), case, 0), **common(build(case), case)}


@component("llamagen", "gpt-t2i")
def text_conditional(case: Case) -> dict[str, Tensor]:
    model = build(case)
    out = {**training(model, case, 100), **common(model, case)}
    start = model.start(condition_of(case), len(case.inputs["cond"]), rows=2)
    return {**out, "prefill_embeddings": start.prefix[:, 100:104]}


def training(model: LlamaGen, case: Case, shown_from: int) -> dict[str, Tensor]:
    tokens = case.inputs["tokens"]
    grid = tokens.unflatten(1, model.space.shape)
    batch = len(tokens)
    noise = RecordedNoise({"condition_dropout": case.inputs["drop_uniform"]}, batch)
    condition = condition_of(case)
    out: dict[str, Tensor] = {}
    weight = case.inputs.get("valid")
    model.train().zero_grad()
    drop = case.inputs["drop_uniform"] < model.condition_dropout
    names = {f"train_after_layer{i}": f"blocks.{i}" for i in range(len(model.blocks))}
    with capture(model, names.values()) as seen:
        out["train_logits"] = model.assemble(model.sequence(tokens, condition, drop))
    out.update({name: seen[module][:, shown_from:] for name, module in names.items()})
    out["train_loss"] = model.training_losses(grid, condition, noise, weight)["loss"]
    if weight is not None:
        out["train_loss_no_valid"] = model.training_losses(grid, condition, noise)["loss"]
    out["train_loss"].backward()
    out["grad_wqkv0"] = model.blocks[0].attn.qkv.weight.grad
    out["grad_w2_last"] = model.blocks[-1].mlp.down.weight.grad
    return out


def common(model: LlamaGen, case: Case) -> dict[str, Tensor]:
    model.eval()
    prefix, cells = model.layout.prefix, model.layout.order.num_cells
    batch = len(case.inputs["cond"])
    condition = condition_of(case)
    out = {"rope_table": model.rotary(torch.arange(prefix - 1, prefix + cells))}
    out["cache_logits"] = step_logits(model, condition, case.inputs["tokens"])
    for name, run in case.config["run"]["greedy"].items():
        greedy = Sampling(temperature=0.0)
        out[f"greedy_{name}"] = model.generate(condition, guidance=guidance_of(run), sampling=greedy).flatten(1)
    for name, run in case.config["run"]["sampled"].items():
        noise = RecordedNoise({"token": case.inputs[f"u_{name}"].T}, batch)
        sampling = Sampling(run["temperature"], run["top_k"], run["top_p"])
        out[f"sampled_{name}"] = model.generate(condition, noise=noise, guidance=guidance_of(run), sampling=sampling).flatten(1)
    for name, run in case.config["run"]["filters"].items():
        logits = case.inputs["filter_logits_ties" if name.endswith("ties") else "filter_logits"]
        out[f"probs_{name}"] = F.softmax(filter_logits(logits, run["temperature"], run["top_k"], run["top_p"]), dim=-1)
    return out


def guidance_of(run: dict[str, float]) -> Guidance:
    """``cfg_interval`` k guides the first k + 2 tokens: those before which at most k + 1 tokens are known."""
    interval = int(run["cfg_interval"])
    scale = max(run["cfg_scale"], 1.0)
    return Guidance(scale, schedule="constant" if interval < 0 else until(interval + 1))
