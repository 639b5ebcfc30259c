"""Cases of xAR: the training pass under noisy context, and sampling with guidance and cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.parity.runner import Case, RecordedNoise, capture, checkpoint_file, component
from vargen.backbones.xar import XAR
from vargen.condition import Condition
from vargen.flow.flow import stochastic_times
from vargen.guidance import Guidance
from vargen.official import xar


def load_model(case: Case) -> XAR:
    config = case.config
    with checkpoint_file(case.state32()) as path:
        return xar.load(
            path,
            condition_dropout=config["label_drop_prob"],
            attn_dropout=config["attn_dropout"],
            dropout=config["proj_dropout"],
            sampling_steps=config["num_steps"],
        )


@component("xar", "model")
@component("xar", "cellsize")
def model(case: Case) -> dict[str, Tensor]:
    network = load_model(case)
    return {**train(case, network.train()), **sample(case, network.eval())}


def train(case: Case, network: XAR) -> dict[str, Tensor]:
    given, batch = case.inputs, len(case.inputs["labels"])
    by_cell = given["train_noise"].transpose(0, 1).flatten(1, 2)[:, network.cells.argsort()]
    noise = RecordedNoise(
        {
            "time": given["train_t"].T.double().logit(),
            "noise": by_cell,
            "condition_dropout": 1.0 - given["train_label_drop"].float(),
        },
        batch,
    )
    points = {"train_after_encoder_block0": "encoder.0", "train_after_encoder_norm": "encoder_norm", "train_velocity": "out"}
    with capture(network, {**points, "train_time_embedding": "time"}) as taken:
        tokens = given["latents"].permute(0, 2, 3, 1)
        loss = network.training_losses(tokens, Condition(class_labels=given["labels"]), noise)["loss"]
    taken["train_time_embedding"] = taken["train_time_embedding"].transpose(0, 1)
    return {**taken, "train_loss": loss}


def sample(case: Case, network: XAR) -> dict[str, Tensor]:
    given, steps = case.inputs, case.config["num_steps"]
    noise = RecordedNoise(
        {"entity_start": given["sample_init_noise"], "entity_step": given["sample_step_noise"]}, len(given["sample_labels"])
    )
    velocities: list[Tensor] = []
    times: list[int] = []
    network.out.register_forward_hook(lambda _m, _i, output: velocities.append(output))
    network.time.register_forward_pre_hook(lambda _m, inputs: times.append(int(inputs[0][0, -1])))
    tokens = network.generate(
        Condition(class_labels=given["sample_labels"]), noise=noise, guidance=Guidance(case.config["cfg"], schedule="linear-entity")
    )
    assert len(stochastic_times(steps)) == steps + 1
    outputs = {"sample_latents": tokens.permute(0, 3, 1, 2), "sample_time_indices": torch.tensor(times[:steps])}
    for k in range(network.num_entities):
        size = network.bounds[k + 1] - network.bounds[k]
        for i in range(steps):
            outputs[f"sample_velocity_cell{k}_step{i}"] = velocities[k * steps + i][:, -size:]
    outputs["sample_velocity_lastcell_laststep"] = velocities[-1]
    return outputs
