"""TiTok's masked generators: network, loss and confidence sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.runner import Case, Draw, RecordedNoise, checkpoint_file, component
from vargen.condition import Condition
from vargen.guidance import Guidance, power_cosine
from vargen.model import Sampling
from vargen.official.maskgit import load


@component("titok", "maskgit")
@component("titok", "uvit")
@torch.no_grad()
def generator(case: Case) -> dict[str, Tensor]:
    with checkpoint_file(case.state32()) as path:
        model = load(path, heads=case.config["model"]["generator"]["num_attention_heads"])
    ids, labels, targets = case.inputs["input_ids"], case.inputs["labels"], case.inputs["targets"]
    everything = torch.ones(len(ids), dtype=torch.bool)
    cond = model(ids, labels)
    out = {"logits_cond": cond, "logits_uncond": model(ids, labels, everything)}
    out["loss"] = model.masked_cross_entropy(cond, targets, ids == model.config.codebook_size)
    runs = case.metadata.get("generate") or case.config["generate"]
    for name, run in runs.items():
        recorded = {"token": case.inputs[f"u_token_{name}"], "confidence": case.inputs[f"u_conf_{name}"]}

        def draw(asked: Draw, recorded: dict[str, Tensor] = recorded) -> Tensor:
            return recorded[asked.name][asked.at[0]]

        out[f"ids_{name}"] = model.generate(
            Condition(class_labels=labels),
            noise=RecordedNoise(draw, len(labels)),
            guidance=guidance_of(run),
            sampling=Sampling(temperature=run["randomize_temperature"]),
            steps=run["num_sample_steps"],
            anneal_softmax=run.get("softmax_temperature_annealing", False),
        )
    return out


def guidance_of(run: dict[str, float]) -> Guidance:
    """The code's constant and linear rules add w (cond - uncond) to the conditional logits: scale 1 + w."""
    scale, decay = run["guidance_scale"], run["guidance_decay"]
    if decay == "power-cosine":
        return Guidance(scale, schedule=power_cosine(run["guidance_scale_pow"]))
    return Guidance(1 + scale, schedule="linear-index" if decay == "linear" else "constant")
