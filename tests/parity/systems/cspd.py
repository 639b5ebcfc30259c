"""Continuous speculative decoding: the acceptance test with resampling, and whole generations of a draft and a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.runner import Case, Draw, RecordedNoise, checkpoint_file, component
from vargen.backbones.mar import MAR
from vargen.condition import Condition
from vargen.decoding.continuous import ContinuousSpeculation, Verification, fixed_log_term, log_ratio, resample, residual_share
from vargen.flow.sample import HeadSample
from vargen.guidance import Guidance
from vargen.model import Sampling, StepInfo
from vargen.nn.patch import unpatchify
from vargen.official import mar


@component("cspd", "accept")
def accept(case: Case) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in case.config["sets"]:
        given = {k.removeprefix(f"{name}_"): v for k, v in case.inputs.items() if k.startswith(f"{name}_")}

        def sample(kind: str, given: dict[str, Tensor] = given) -> HeadSample:
            return HeadSample(given["x"], *(given[f"{kind}_{part}"] for part in ("mean", "std", "log_std_sum")))

        draft, target = sample("draft"), sample("target")
        noise, uniform = given["proposal_noise"], given["proposal_uniform"]
        ratio = log_ratio(given["x"], draft, target, case.config["inner_temperature"]).exp()
        accepted = ratio > given["uniform"]
        rounds, result = 0, given["x"]
        if not accepted.all():
            replaced, rounds = resample(draft, target, lambda k, noise=noise, uniform=uniform: (noise[k], uniform[k]))
            result = torch.where(accepted.unsqueeze(-1), given["x"], replaced)
        shares = [residual_share(target.mean + target.std * n, draft, target) for n in noise]
        out |= {
            f"{name}_fixed_term": fixed_log_term(draft, target).exp(),
            f"{name}_ratio": ratio,
            f"{name}_accept": accepted,
            f"{name}_result": result,
            f"{name}_alpha": torch.stack(shares),
            f"{name}_num_proposal_rounds": torch.tensor([rounds]),
        }
    return out


def load(case: Case, name: str) -> MAR:
    config = case.config[name]
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    with checkpoint_file(case.state32(f"{name}."), "model_ema") as path:
        return mar.load(
            path,
            grid=(side, side),
            encoder_heads=config["encoder_num_heads"],
            decoder_heads=config["decoder_num_heads"],
            head_steps=config["num_sampling_steps"],
        )


@component("cspd", "generate")
def generate(case: Case) -> dict[str, Tensor]:
    draft, target = load(case, "draft"), load(case, "target")
    out: dict[str, Tensor] = {}
    for run in case.config["runs"]:
        out |= {f"{run['name']}_{name}": value for name, value in speculate(case, run, draft, target).items()}
    return out


def speculate(case: Case, run: dict[str, Any], draft: MAR, target: MAR) -> dict[str, Tensor]:
    given, name = case.inputs, run["name"]
    batch, cells = given["orders"].shape
    out: dict[str, Tensor] = {}
    verified: list[int] = []

    def draw(asked: Draw) -> Tensor:
        if asked.name == "order":
            return given["orders"]
        positions = asked.at[0]
        if asked.name.startswith("token_"):
            record = given["start_noise"] if asked.name == "token_start" else given["inter_noise"][:, :, asked.at[1]]
            return record.gather(1, positions.unsqueeze(-1).expand(-1, -1, record.shape[-1]))
        record = given[f"{name}_verify{len(verified)}_" + recorded[asked.name]]
        record = record if asked.name.endswith("accept") else record[asked.at[2]]
        return record.unflatten(0, (batch, -1))

    recorded = {
        "speculation/accept": "uniform",
        "speculation/proposal": "proposal_noise",
        "speculation/keep": "proposal_uniform",
    }

    def on_verify(seen: Verification) -> None:
        place = f"verify{len(verified)}_"
        rows = torch.arange(batch).unsqueeze(1).expand_as(seen.positions)
        out.update({place + "step": torch.tensor([seen.step]), place + "ratio": seen.ratio, place + "accept": seen.accepted})
        out.update({place + "positions": torch.stack([rows, seen.positions], dim=-1).flatten(0, 1), place + "result": seen.result})
        for kind, sample in (("draft", seen.draft), ("target", seen.target)):
            out.update({f"{place}{kind}_{part}": getattr(sample, part) for part in ("mean", "std", "log_std_sum")})
        out[place + "draft_tokens"] = seen.draft.tokens
        verified.append(seen.step)

    def on_step(info: StepInfo) -> None:
        if info.index <= run["num_iter"] * run["ratio"]:
            out["after_prefill_tokens"] = info.tokens.flatten(1, -2)
            out["after_prefill_mask"] = (info.tokens.flatten(1, -2) == 0).all(-1).float()

    decoding = ContinuousSpeculation(
        draft,
        num_draft=run["num_draft"],
        prefill=run["ratio"],
        inner_temperature=run["inner_temperature"],
        on_verify=on_verify,
    )
    tokens = target.generate(
        Condition(class_labels=given["labels"] if run["use_labels"] else None),
        batch_size=batch,
        noise=RecordedNoise(draw, batch),
        guidance=Guidance(run["cfg"], schedule=run["cfg_schedule"]),
        sampling=Sampling(temperature=run["temperature"]),
        on_step=on_step,
        steps=run["num_iter"],
        decoding=decoding,
    )
    patch = case.config["target"]["patch_size"]
    passes = decoding.statistics
    return {
        **out,
        "latents": unpatchify(tokens.flatten(1, 2), target.space.shape, (patch, patch), channel_first=True),
        "forward_passes": torch.tensor([passes.draft_passes, passes.target_passes]),
    }
