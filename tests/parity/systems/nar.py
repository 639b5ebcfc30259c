"""NAR: class- and text-conditional images, class-conditional video."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from tests.parity.systems.causal_steps import all_slots, step_logits, to_raster
from vargen.backbones.nar import NAR
from vargen.condition import Condition, TextFeatures
from vargen.guidance import Guidance, until
from vargen.kernels.sample import filter_logits
from vargen.model import Sampling
from vargen.official.nar import load

FILTERS = {"topk5": (5, 1.0, 1.0), "topp": (0, 0.8, 0.7), "both": (9, 0.6, 1.3)}
HEADS = {"c2i": ("right", "below"), "t2i": ("right", "below"), "video": ("right", "down", "back")}


def build(case: Case) -> NAR:
    c = case.config
    side = round(c.get("block_size", 0) ** 0.5)
    grid = c.get("latent_shape", (side, side))
    dropouts = {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
    with checkpoint_file(case.state32(), wrapper="model") as path:
        return load(path, grid=grid, heads=c["n_head"], **dropouts)


def condition_of(case: Case, kind: str) -> Condition:
    cond = case.inputs[f"{kind}_cond"]
    if cond.dim() == 1:
        return Condition(class_labels=cond)
    mask = case.inputs["emb_mask" if kind == "train" else "gen_emb_mask"]
    return Condition(text=TextFeatures(cond, mask.bool()))


@component("nar", "c2i")
@component("nar", "t2i")
@component("nar", "video")
def nar(case: Case) -> dict[str, Tensor]:
    model = build(case)
    out = {f"train/{name}": value for name, value in training(model, case).items()}
    if model.config.positions == "rotary":
        out["rope_table"] = to_raster(model, model.rotary(all_slots(model)), axis=0)
    for name, (top_k, top_p, temperature) in FILTERS.items():
        if "filter_logits" in case.inputs:
            out[f"filter/{name}_probs"] = F.softmax(filter_logits(case.inputs["filter_logits"], temperature, top_k, top_p), -1)
    condition = condition_of(case, "gen")
    for name, guidance in runs(case).items():
        tokens = model.generate(condition, guidance=guidance, sampling=Sampling(temperature=0.0)).flatten(1)
        out[f"gen_{name}/tokens"] = tokens
        out[f"gen_{name}/step_logits"] = step_logits(model, condition, tokens, guidance)
    return out


@torch.no_grad()
def training(model: NAR, case: Case) -> dict[str, Tensor]:
    tokens, condition = case.inputs["idx"], condition_of(case, "train")
    keep = torch.zeros(len(tokens), dtype=torch.bool)
    heads = model.output_heads
    labels = HEADS[case.component]
    names = {"after_layer0": "blocks.0"} | {f"hidden_{n}": f"blocks.{head.depth - 1}" for n, head in zip(labels, heads)}
    with capture(model, names) as seen:
        hidden = model.sequence(tokens, condition, keep, all_slots(model))
    out = {name: to_raster(model, value) for name, value in seen.items()}
    out |= {f"logits_{n}_raw": to_raster(model, model.logits(hidden[i], i)) for i, n in enumerate(labels)}
    out["logits"] = model.assemble(hidden)
    out["loss"] = F.cross_entropy(out["logits"].transpose(1, 2), tokens).reshape(1)
    mask = model.layout.mask(all_slots(model), all_slots(model)).expand(len(tokens), -1, -1)
    _, valid = model.prefix(condition, keep)
    if valid is not None:
        visible = F.pad(valid, (0, mask.shape[-1] - valid.shape[1]), value=True)
        mask = (mask & visible.unsqueeze(1)) | torch.eye(mask.shape[-1], dtype=torch.bool)
    out["mask"] = to_raster(model, to_raster(model, mask, 1), 2).to(torch.uint8)
    return out


def runs(case: Case) -> dict[str, Guidance]:
    """The generation settings, which the case tells in words."""
    found = re.findall(r"gen_(\w+):? cfg_scale ([\d.]+)(?: (?:and|with) cfg_interval (\d+))?", case.metadata["call"])
    settings = {name: Guidance(float(scale), schedule=until(int(k)) if k else "constant") for name, scale, k in found}
    return {**settings, "nocfg": Guidance(1.0)}
