"""Cases of MAR: its tables and plans, its head, its training pass, its generation loop, its tokenizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.parity.runner import Case, Draw, RecordedNoise, capture, checkpoint_file, component
from vargen.backbones.mar import MAR
from vargen.condition import Condition
from vargen.decoding.masked import masked_steps, plan
from vargen.flow.diffusion import Diffusion, cosine_betas
from vargen.guidance import Guidance
from vargen.heads.diffusion import DiffusionHead
from vargen.heads.mlp import TokenMLP
from vargen.model import Sampling
from vargen.nn.embed import timestep_sinusoid
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.patch import patchify, unpatchify
from vargen.official import kl16, mar
from vargen.official.shared import token_mlp, under

TABLES = (
    "alphas_cumprod",
    "betas",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


@component("mar", "schedule")
def schedule(case: Case) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for spacing in case.config["respacing"]:
        chain = Diffusion(cosine_betas()).respaced(spacing)
        name = f"diff_{spacing.replace(',', '_') or 'full'}"
        outputs |= {f"{name}/{table}": getattr(chain, table) for table in TABLES}
        outputs[f"{name}/timestep_map"] = torch.tensor(chain.timesteps)
    guidance = Guidance(3.0, schedule="linear")
    for cells, count in case.config["order"]:
        steps = list(masked_steps(torch.arange(cells)[None], plan(cells, count)))
        name = f"order_{cells}_{count}"
        outputs[f"{name}/linear_cfg3"] = torch.tensor([guidance.at(s.progress) for s in steps], dtype=torch.float64)
        outputs[f"{name}/predicted"] = torch.tensor([s.positions.shape[1] for s in steps])
        # the published loop leaves one token masked after its last step, and then reveals whatever is left
        outputs[f"{name}/masked_after"] = torch.tensor([max(1, s.masked_after) for s in steps])
    return outputs


@component("mar", "diffusion")
def diffusion(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    channels = config["target_channels"]
    net = TokenMLP(channels, config["z_channels"], config["width"], config["depth"], out_channels=2 * channels)
    net.load_state_dict(token_mlp(under(case.state32(), "net.")))
    head = DiffusionHead(net, spacing=config["num_sampling_steps"]).eval()

    def combine(scale: float) -> Any:
        return lambda stacked: Guidance(scale).combine(stacked, scale)

    outputs = {
        "net_out": net(given["net_x"], given["net_t"], given["net_c"]),
        "net_time_freq": timestep_sinusoid(given["net_t"]),
        "net_time_embed": net.time(given["net_t"]),
    }
    both = net(*(torch.cat([given[k], given[k]]) for k in ("net_x", "net_t")), torch.cat([given["net_c"], given["net_c"].flip(0)]))
    guided = combine(config["net_cfg_scale"])(both[:, :channels])
    outputs["net_cfg_out"] = torch.cat([guided.repeat(2, 1), both[:, channels:]], dim=1)

    start, noise = given["x_T"], given["step_noise"]
    for name, z, rows, temperature in (
        ("cfg", given["z"], combine(config["cfg"]), config["temperature"]),
        ("nocfg", given["z"][: len(start)], None, config["temperature_nocfg"]),
    ):
        outputs[f"sample_{name}"] = head.sample(z, start, noise.__getitem__, combine=rows, temperature=temperature).tokens
        outputs[f"trajectory_{name}"] = trajectory(head, z, start, noise, rows, temperature)

    chain, j = head.chain.respaced("100"), given["single_j"]
    x = given["single_x"]
    prediction, values = chain.split(net(x, torch.tensor(chain.timesteps)[j], given["single_c"]))
    outputs["single_pred_xstart"] = chain.predicted_x0(prediction, x, j)
    outputs["single_mean"] = chain.posterior_mean(outputs["single_pred_xstart"], x, j)
    outputs["single_log_variance"] = chain.log_variance(values, j, x)
    std = (0.5 * outputs["single_log_variance"]).exp() * (j > 0)[:, None]
    outputs["single_sample"] = outputs["single_mean"] + std * given["single_noise"] * 0.9
    return outputs


def trajectory(head: DiffusionHead, z: Tensor, start: Tensor, noise: Tensor, combine: Any, temperature: float) -> Tensor:
    """The sampler's state after every level, level 0 first: what it passes to the network, then its result."""
    seen: list[Tensor] = []
    handle = head.net.input.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][: len(start)]))
    sample = head.sample(z, start, noise.__getitem__, combine=combine, temperature=temperature)
    handle.remove()
    return torch.stack([sample.tokens, *reversed(seen[1:])])


def load_model(case: Case, **options: Any) -> MAR:
    config = case.config
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    with checkpoint_file(case.state32(), "model_ema") as path:
        return mar.load(
            path,
            grid=(side, side),
            encoder_heads=config["encoder_num_heads"],
            decoder_heads=config["decoder_num_heads"],
            head_steps=config["num_sampling_steps"],
            head_repeats=config["diffusion_batch_mul"],
            attn_dropout=config["attn_dropout"],
            dropout=config["proj_dropout"],
            condition_dropout=config["label_drop_prob"],
            **options,
        )


@component("mar", "forward")
def forward(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    patch, repeats = config["patch_size"], config["diffusion_batch_mul"]
    tokens = patchify(given["latents"], (patch, patch), channel_first=True)
    batch, cells, _ = tokens.shape
    masked = int(given["num_masked"])
    # a uniform draw of 0 stands for the lowest mask rate, here the recorded one
    model = load_model(case, mask_ratio_min=(masked - 0.5) / cells).train()

    def per_token(rows: Tensor) -> Tensor:
        return rows.reshape(repeats, batch, cells, *rows.shape[1:]).transpose(0, 1)

    def at_places(record: Tensor) -> Any:
        def serve(draw: Draw) -> Tensor:
            places, copies = draw.at
            places = places.expand(-1, repeats, -1)
            values = record.gather(2, places if record.dim() == 3 else places.unsqueeze(-1).expand(-1, -1, -1, record.shape[-1]))
            return values[:, copies.flatten()]

        return serve

    noise = RecordedNoise(
        {
            "mask_rate": torch.zeros(batch),
            "order": given["orders"],
            "condition_dropout": given["drop_uniform"],
            "timestep": at_places(per_token(given["t"])),
            "diffusion": at_places(per_token(given["noise"])),
        },
        batch,
    )
    condition = Condition(class_labels=given["labels"])

    # gradients with respect to the published tensors, through the (linear) conversion
    names = [k.removeprefix("grad/") for k in case.outputs if k.startswith("grad/")]
    published = {k: v.clone().requires_grad_(k in names) for k, v in case.state32().items()}
    arguments = (model, mar.convert(published), (tokens.reshape(batch, *model.space.token_shape), condition, noise))
    points = {"encoder_blocks_in": "encoder.pre_norm", "encoder_block0_out": "encoder.blocks.0", "encoder_out": "encoder"}
    points |= {"decoder_blocks_in": "decoder.pre_norm", "decoder_norm_out": "decoder"}
    training = Training(model)
    with capture(model, points) as taken:
        loss = torch.func.functional_call(training, {f"model.{k}": v for k, v in arguments[1].items()}, arguments[2])
    loss.backward()
    outputs: dict[str, Tensor] = {f"grad/{k}": published[k].grad for k in names}  # type: ignore[misc]
    outputs |= taken
    outputs["loss"] = loss.reshape(1)
    outputs["tokens"] = tokens
    mask = torch.zeros(batch, cells, dtype=torch.bool).scatter(1, given["orders"][:, :masked], True)
    outputs["mask"] = mask.float()
    outputs["z"] = z = taken["decoder_norm_out"][:, model.config.buffer_size :] + model.head_positions

    chain, t = model.head.chain, given["t"]
    x0, rows_z = (v.flatten(0, 1).repeat(repeats, 1) for v in (tokens, z))
    outputs["net_out"] = model.head.net(chain.add_noise(x0, given["noise"], t), t, rows_z)
    outputs["row_mse"], outputs["row_vb"] = chain.losses(outputs["net_out"], x0, given["noise"], t)
    outputs["row_loss"] = outputs["row_mse"] + outputs["row_vb"]
    return outputs


class Training(torch.nn.Module):
    """A model's loss as a forward pass, for calls with other parameters."""

    def __init__(self, model: MAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        return self.model.training_losses(*arguments)["loss"]


@component("mar", "generate")
def generate(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    model, patch = load_model(case), config["patch_size"]
    batch = len(given["labels"])

    def at_positions(draw: Draw) -> Tensor:
        positions = draw.at[0]
        record = given["start_noise"] if draw.name == "token_start" else given["step_noise"][draw.at[1]]
        return record.gather(1, positions.unsqueeze(-1).expand(-1, -1, record.shape[-1]))

    noise = RecordedNoise({"order": given["orders"], "token_start": at_positions, "token_step": at_positions}, batch)
    outputs: dict[str, Tensor] = {}
    for run in config["runs"]:
        name, guidance = run["name"], Guidance(run["cfg"], schedule=run["cfg_schedule"])
        before = [torch.zeros(batch, *model.space.token_shape)]
        tokens = model.generate(
            Condition(class_labels=given["labels"] if run["use_labels"] else None),
            batch_size=batch,
            noise=noise,
            guidance=guidance,
            sampling=Sampling(temperature=run["temperature"]),
            on_step=lambda info, before=before: before.append(info.tokens),
            steps=run["num_iter"],
        )
        grid = model.space.shape
        outputs[f"{name}_latents"] = unpatchify(tokens.flatten(1, 2), grid, (patch, patch), channel_first=True)
        outputs[f"{name}_tokens_before_step"] = torch.stack(before[:-1]).flatten(2, 3)
        steps = masked_steps(given["orders"], plan(math.prod(grid), run["num_iter"]))
        outputs[f"{name}_guidance"] = torch.tensor([guidance.at(s.progress) for s in steps], dtype=torch.float64)
    return outputs


@component("mar", "vae")
def vae(case: Case) -> dict[str, Tensor]:
    config, given = case.config, case.inputs
    image = given["image"]
    with checkpoint_file(case.state32(), "model") as path:
        tokenizer = kl16.load(path, sample_size=tuple(image.shape[2:]), norm_groups=32)
    assert tokenizer.config.latent_channels == config["autoencoder_kwargs"]["embed_dim"]
    points = {
        "encoder_level0_downsample": "encoder.levels.0.resample",
        "encoder_mid_attn": "encoder.mid.1",
        "encoder_out": "encoder",
    }
    noise = RecordedNoise({"posterior": given["posterior_noise"]}, len(image))
    with capture(tokenizer, points) as taken:
        moments = tokenizer.moments(image)
    posterior = DiagonalGaussian.from_moments(moments, dim=1)
    with capture(tokenizer, {"decoder_mid_block2": "decoder.mid.2"}) as painted:
        pixels = tokenizer.decode(given["tokens"].permute(0, 2, 3, 1))
    output = tokenizer(image, noise=noise)
    return {
        **taken,
        **painted,
        "moments": moments,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "kl": (output.losses["kl"] / tokenizer.config.kl_weight * image[0].numel()).reshape(1),
        "sample": tokenizer.space.denormalize(output.tokens).permute(0, 3, 1, 2),
        "latent_scaled": tokenizer.encode(image, noise=noise).permute(0, 3, 1, 2),
        "reconstruction": output.reconstruction,  # type: ignore[dict-item]
        "decoded_from_tokens": pixels,
    }
