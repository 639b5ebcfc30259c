"""Next Block Prediction's GPT: frame prediction with any block, hybrid start from labels or text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity.runner import Case, capture, checkpoint_file, component
from tests.parity.systems.causal_steps import step_logits
from vargen.backbones.nbp import NBP
from vargen.condition import Condition
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.official.nbp import load


def build(case: Case, block_size: int) -> NBP:
    c = case.config
    state = {f"transformer.{key}": value for key, value in case.state32().items()}
    with checkpoint_file(state, wrapper="state_dict") as path:
        return load(
            path,
            codebook_size=c["first_stage_vocab_size"],
            block_size=block_size,
            condition_length=max(c["cond_token_num"], 1),
            heads=c["n_head"],
            grid=c["latent_shape"],
            token_dropout=0.0,
            residual_dropout=0.0,
        )


@torch.no_grad()
def forward(model: NBP, tokens: Tensor, condition: Condition, skip: int) -> dict[str, Tensor]:
    """Training outputs over all inputs; logits of the cells from ``skip`` on."""
    with capture(model, {"after_block0": "blocks.0"}) as seen:
        hidden = model.sequence(tokens, condition, torch.zeros(len(tokens), dtype=torch.bool))
    logits = model.assemble(hidden)[:, skip:]
    target = tokens[:, skip:] + model.token_offset
    return {
        **seen,
        "mask": model.layout.mask().expand(len(tokens), 1, -1, -1).to(torch.uint8),
        "logits": logits,
        "target": target,
        "loss": F.cross_entropy(logits.transpose(1, 2), target).reshape(1),
    }


@component("nbp", "gpt-frameprediction")
def frame_prediction(case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for size in case.config["block_sizes_tested"]:
        model = build(case, size)
        trained = forward(model, case.inputs["z"], Condition(), size)
        out |= {f"train_b{size}/{name}": value for name, value in trained.items()}
        prefix = case.inputs["prefix"]
        condition = Condition(tokens=prefix)
        tokens = model.generate(condition, sampling=Sampling(temperature=0.0)).flatten(1)
        out[f"gen_b{size}/tokens"] = tokens[:, prefix.shape[1] :]
        out[f"gen_b{size}/step_logits"] = step_logits(model, condition, tokens, Guidance(), given=prefix.shape[1])
    return out


@component("nbp", "gpt-hybrid-label")
@component("nbp", "gpt-hybrid-text")
def hybrid(case: Case) -> dict[str, Tensor]:
    size = case.config["token_number_per_step"]
    model = build(case, size)
    trained = forward(model, case.inputs["z"], condition_of(case.inputs["cond"]), 0)
    out = {f"train/{name}": value for name, value in trained.items()}
    out["train/input_ids"] = input_ids(model, case.inputs["cond"], case.inputs["z"])
    given = condition_of(case.inputs["gen_cond"])
    tokens = model.generate(given, sampling=Sampling(temperature=0.0)).flatten(1)
    raw = greedy_ids(model, given)
    out["gen/raw_ids"] = raw
    out["gen/tokens"] = tokens
    out["gen/step_logits"] = step_logits(model, given, raw, Guidance())
    return out


def input_ids(model: NBP, condition: Tensor, tokens: Tensor) -> Tensor:
    """Vocabulary ids of all input slots, read from the layout and found again in the embedding table."""
    layout, size = model.layout, model.config.block_size
    slots = torch.arange(layout.num_inputs)
    cell, extra = layout.cell[slots], layout.extra[slots]
    ids = tokens[:, cell.clamp(min=0)] + model.token_offset
    ids[:, extra >= 0] = extra[extra >= 0] + 1
    prefix = torch.cat([condition.reshape(len(condition), -1) + size, torch.zeros(len(condition), 1, dtype=torch.int64)], 1)
    ids[:, : layout.prefix] = prefix
    embedded = model.embed(model.prefix(condition_of(condition), torch.zeros(len(ids), dtype=torch.bool))[0], ids, slots)
    expected = model.embed_slots(model.tokens(ids), slots)
    torch.testing.assert_close(embedded, expected)
    return ids


def condition_of(ids: Tensor) -> Condition:
    return Condition(class_labels=ids) if ids.dim() == 1 else Condition(text_ids=ids)


@torch.no_grad()
def greedy_ids(model: NBP, condition: Condition) -> Tensor:
    """Vocabulary ids of greedy decoding, before they are clamped into the codebook, by whole passes without a cache."""
    batch = condition.batch_size or 1
    ids = torch.zeros(batch, model.layout.order.num_cells, dtype=torch.int64)
    for step in model.layout.steps():
        hidden = model.sequence(ids - model.token_offset, condition, torch.zeros(batch, dtype=torch.bool))
        ids[:, step.targets] = model.assemble(hidden)[:, step.targets].argmax(-1)
    return ids
