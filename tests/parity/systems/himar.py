"""Cases of Hi-MAR: the diffusion transformer head, both training phases, two-phase generation."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tests.parity.runner import Case, Draw, RecordedNoise, capture, checkpoint_file, component
from vargen.backbones.himar import HiMAR
from vargen.condition import Condition
from vargen.decoding.masked import masked_steps, plan
from vargen.guidance import Guidance
from vargen.heads.diffusion import DiffusionHead
from vargen.heads.dit import TokenDiT
from vargen.model import Sampling
from vargen.official import himar
from vargen.official.shared import under


def flat(grid: Tensor) -> Tensor:
    """``(..., C, H, W)`` to tokens ``(..., H * W, C)``."""
    return rearrange(grid, "... c h w -> ... (h w) c")


def square(tokens: Tensor) -> Tensor:
    """Inverse of :func:`flat` for square grids."""
    return rearrange(tokens, "... (h w) c -> ... c h w", h=round(tokens.shape[-2] ** 0.5))


@component("himar", "head")
def head(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    state = under(case.state32(), "net.")
    grid = (config["grid"], config["grid"])
    net = TokenDiT(
        config["target_channels"],
        config["z_channels"],
        config["width"],
        config["depth"],
        config["head"],
        grid,
        ratio=config["ratio"],
    )
    himar.check_positions(net.positions, state)
    net.load_state_dict(himar.convert_dense_head(state))
    dense = DiffusionHead(net, variance="large", spacing=config["spacing"]).eval()
    outputs: dict[str, Tensor] = {}
    with capture(net, {"after_block0": "blocks.blocks.0"}) as taken:
        outputs["forward"] = square(net(flat(given["x"]), given["t"][:, None], flat(given["z"])))
    outputs |= taken
    error, _ = dense.losses(flat(given["x0"]), flat(given["z"]), flat(given["train_noise"]), given["train_t"][:, None])
    outputs["loss"] = (error * given["train_mask"].flatten(1)).mean()

    steps = len(given["step_noise"])
    known = (given["sample_mask"].flatten(1).unsqueeze(-1) == 0, flat(given["known_tokens"]))

    def sample(rows: tuple[Tensor, ...], known: Any) -> Tensor:
        guidance = Guidance(config["cfg"] if len(rows) == 2 else 1.0)
        return square(
            dense.sample(
                torch.cat([flat(z) for z in rows]),
                flat(given["init_noise"]),
                lambda level: flat(given["step_noise"][steps - 1 - level]),
                combine=lambda stacked: guidance.combine(stacked, config["cfg"]),
                temperature=config["temperature"],
                known=known,
            ).tokens
        )

    outputs["sample_masked"] = sample((given["z"], given["z_null"]), known)
    outputs["sample_full"] = sample((given["z"], given["z_null"]), None)
    outputs["sample_nocfg"] = sample((given["z"],), known)
    for n in (100, 250):
        chain = dense.chain.respaced(str(n))
        outputs |= {
            f"spacing{n}_timesteps": torch.tensor(chain.timesteps),
            f"spacing{n}_alpha_bar": chain.alphas_cumprod,
            f"spacing{n}_beta": chain.betas,
        }
    return outputs


def load_model(case: Case, **options: Any) -> HiMAR:
    config = case.config
    with checkpoint_file(case.state32(), "model_ema") as path:
        return himar.load(
            path,
            heads=config["encoder_num_heads"],
            dense_head_heads=config["head"],
            head_steps=config["num_sampling_steps"],
            dense_head_steps=config["dense_head_spacing"],
            norm_eps=config["norm_eps"],
            condition_dropout=config["label_drop_prob"],
            attn_dropout=config["attn_dropout"],
            dropout=config["proj_dropout"],
            pivot_rate=config["step_stage2_rate"],
            pivot_warmup=config["step_warmup"],
            head_repeats=config["diffusion_batch_mul"],
            **options,
        )


@component("himar", "train")
def train(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    # a uniform draw of 0 stands for the lowest mask rate, here the recorded one
    model = load_model(case, mask_ratio_min=float(given["mask_rate1"])).train()
    small, dense = flat(given["pivot_latents"]), flat(given["latents"])
    batch, pivots, _ = small.shape
    repeats = config["diffusion_batch_mul"]

    def rows_of(record: Tensor, *shape: int) -> Tensor:
        """Rows (copy, sample, ...) as (sample, copy, ...)."""
        return record.reshape(repeats, batch, *shape, *record.shape[1:]).transpose(0, 1)

    def at_places(record: Tensor) -> Any:
        def serve(draw: Draw) -> Tensor:
            places, copies = draw.at
            index = places.expand(-1, repeats, -1)
            index = index if record.dim() == 3 else index.unsqueeze(-1).expand(-1, -1, -1, record.shape[-1])
            return record.gather(2, index)[:, copies.flatten()]

        return serve

    noise = RecordedNoise(
        {
            "mask_rate": torch.zeros(batch),
            "pivot_order": given["orders"][:, :pivots],
            "dense_order": given["orders"][:, pivots:] - pivots,
            "condition_dropout": torch.stack([given["label_drop_u1"], given["label_drop_u2"]]),
            "timestep": at_places(rows_of(given["t1"], pivots)),
            "diffusion": at_places(rows_of(given["noise1"], pivots)),
            "dense_mask_rate": given["mask_rate2_u"].expand(batch),
            "pivot_dropout": given["pivot_drop_u"],
            "dense_timestep": lambda draw: rows_of(given["t2"]),
            "dense_diffusion": lambda draw: rows_of(flat(given["noise2"])),
        },
        batch,
    )
    calls: dict[str, list[Tensor]] = {}
    points = {"block0": model.encoder.blocks[0], "encoder": model.encoder, "decoder": model.decoder, "head2": model.dense_head.net}
    for name, module in points.items():
        module.register_forward_hook(lambda _m, _i, output, name=name: calls.setdefault(name, []).append(output))
    losses = model.training_losses(
        torch.cat([small, dense], dim=1), Condition(class_labels=given["labels"]), noise, config["epoch"]
    )

    slots = model.config.buffer_size
    z1, z2 = (states[:, slots:] + model.head_positions for states in calls["decoder"])
    outputs = {
        "encoder_block0_phase1": calls["block0"][0],
        "encoder_out_phase1": calls["encoder"][0],
        "encoder_out_phase2": calls["encoder"][1],
        "z_pivots": z1[:, :pivots],
        "z_dense": z2[:, pivots:],
        "head2_output": rearrange(square(calls["head2"][0]), "(b r) ... -> (r b) ...", r=repeats),
        "loss_phase1": losses["pivots"],
        "loss_phase2": losses["dense"],
        "loss_total": losses["loss"],
    }
    x0, z = (v.flatten(0, 1).repeat(repeats, 1) for v in (small, outputs["z_pivots"]))
    chain, t = model.head.chain, given["t1"]
    outputs["head1_output"] = model.head.net(chain.add_noise(x0, given["noise1"], t), t, z)
    terms = chain.losses(outputs["head1_output"], x0, given["noise1"], t)
    outputs["head1_mse_per_token"], outputs["head1_vb_per_token"] = terms
    return outputs


@component("himar", "sample")
def sample(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    model = load_model(case)
    pivots, batch = model.num_pivots, len(given["labels"])

    def pivot_draw(draw: Draw) -> Tensor:
        positions = draw.at[0]
        record = given["phase1_init_noise"]
        if draw.name == "token_step":
            record = given["phase1_step_noise"][len(given["phase1_step_noise"]) - 1 - draw.at[1]]
        return record.gather(1, positions.unsqueeze(-1).expand(-1, -1, record.shape[-1]))

    def dense_step(draw: Draw) -> Tensor:
        step, level = draw.at
        return flat(given["phase2_step_noise"][step, given["phase2_step_noise"].shape[1] - 1 - level])

    noise = RecordedNoise(
        {
            "pivot_order": given["orders"][:, :pivots],
            "dense_order": given["orders"][:, pivots:] - pivots,
            "token_start": pivot_draw,
            "token_step": pivot_draw,
            "dense_start": lambda draw: flat(given["phase2_init_noise"][draw.at[0]]),
            "dense_step": dense_step,
        },
        batch,
    )
    condition = Condition(class_labels=given["labels"])
    slots, first_dense = model.config.buffer_size, len(plan(pivots, pivots // 2))
    hidden: list[Tensor] = []
    states: list[Tensor] = []
    grids: list[Tensor] = []
    model.decoder.register_forward_hook(lambda _m, _i, output: hidden.append(output[:, slots:] + model.head_positions))
    model.pivot_hidden.register_forward_pre_hook(lambda _m, inputs: states.append(inputs[0]))
    draw_grid = model.dense_head.sample

    def recording(*arguments: Any, **options: Any) -> Any:
        result = draw_grid(*arguments, **options)
        grids.append(result.tokens)
        return result

    model.dense_head.sample = recording  # type: ignore[method-assign]
    guidance, pivot_guidance = Guidance(config["cfg"], schedule="linear"), Guidance(config["re_cfg"], schedule="linear")
    tokens = model.generate(
        condition,
        noise=noise,
        guidance=guidance,
        sampling=Sampling(temperature=config["temperature"]),
        steps=config["num_iter"],
        pivot_guidance=pivot_guidance,
    )
    pivot_steps = list(masked_steps(noise.permutation("pivot_order", pivots), plan(pivots, first_dense)))
    dense_steps = list(masked_steps(noise.permutation("dense_order", model.num_dense), plan(model.num_dense, config["num_iter"])))
    outputs = {
        "pivot_latents": square(tokens[:, :pivots]),
        "latents": square(tokens[:, pivots:]),
        "pivot_z": states[0],
        "phase1_counts": torch.tensor([max(1, s.masked_after) for s in pivot_steps]),
        "phase1_guidance": torch.tensor([pivot_guidance.at(s.progress) for s in pivot_steps]),
        "phase2_guidance": torch.tensor([guidance.at(s.progress) for s in dense_steps]),
        "phase2_step0_z": hidden[first_dense][:, pivots::4],
        "phase2_step0_grid": square(grids[0]),
        "phase2_step1_grid": square(grids[1]),
    }
    tokens = model.generate(
        condition,
        noise=noise,
        guidance=Guidance(1.0),
        steps=config["num_iter"],
        pivot_guidance=Guidance(config["re_cfg_b"]),
    )
    return outputs | {"b_pivot_latents": square(tokens[:, :pivots]), "b_latents": square(tokens[:, pivots:])}
