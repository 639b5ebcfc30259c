"""LARP's released tokenizer: ``config.json`` + ``model.safetensors`` from the hub, or a training checkpoint (``.pth``)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError
from vargen.losses.discriminators import TransformerDiscriminator
from vargen.official.fuse import fuse
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.larp_prior import PRIORS

WRAPPERS = ("model.sd", "sd", "model")

_BLOCKS: tuple[tuple[str, str], ...] = (
    (r"(encoder|decoder)\.(blocks\.\d+\.attn)\.proj\.(.*)", r"\1.\2.out.\3"),
    (r"(encoder|decoder)\.(blocks\.\d+\.mlp)\.fc1\.(.*)", r"\1.\2.up.\3"),
    (r"(encoder|decoder)\.(blocks\.\d+\.mlp)\.fc2\.(.*)", r"\1.\2.down.\3"),
)
RULES: tuple[tuple[str, str], ...] = (
    *_BLOCKS,
    (r"x_embedder\.(proj\..*)", r"embed.\1"),
    (r"encoder_latent_query_embed", "queries"),
    (r"decoder_patch_query_token_type_embed", "patch_type"),
    (r"bottleneck\.in_linear\.(.*)", r"to_code.\1"),
    (r"bottleneck\.regularizer\.embedding\.weight", "quantizer.codebook"),
    (r"bottleneck\.out_linear\.(.*)", r"from_code.\1"),
    (r"final_layer\.norm_final\.(.*)", r"norm_out.\1"),
    (r"final_layer\.linear\.(.*)", r"to_patch.\1"),
    (r"prior_model\.pos_emb", "prior_model.positions"),
    (r"prior_model\.input_proj\.(.*)", r"prior_model.embed.\1"),
    (r"prior_model\.ln_f\.(.*)", r"prior_model.transformer.final_norm.\1"),
    (r"prior_model\.(blocks\.\d+)\.ln([12])\.(.*)", r"prior_model.transformer.\1.norm\2.\3"),
    (r"prior_model\.(blocks\.\d+\.attn\.qkv)\.(.*)", r"prior_model.transformer.\1.\2"),
    (r"prior_model\.(blocks\.\d+\.attn)\.proj\.(.*)", r"prior_model.transformer.\1.out.\2"),
    (r"prior_model\.(blocks\.\d+\.mlp)\.0\.(.*)", r"prior_model.transformer.\1.up.\2"),
    (r"prior_model\.(blocks\.\d+\.mlp)\.2\.(.*)", r"prior_model.transformer.\1.down.\2"),
)
# the discriminator of training checkpoints (``loss.sd``)
DISCRIMINATOR_RULES: tuple[tuple[str, str], ...] = (
    (r"discriminator\.x_embedder\.(.*)", r"patches.\1"),
    (r"discriminator\.cls_token", "class_token"),
    (r"discriminator\.transformer_encoder\.(blocks\.\d+\.(?:norm[12]|attn\.qkv)\..*)", r"transformer.\1"),
    (r"discriminator\.transformer_encoder\.(blocks\.\d+\.attn)\.proj\.(.*)", r"transformer.\1.out.\2"),
    (r"discriminator\.transformer_encoder\.(blocks\.\d+\.mlp)\.fc1\.(.*)", r"transformer.\1.up.\2"),
    (r"discriminator\.transformer_encoder\.(blocks\.\d+\.mlp)\.fc2\.(.*)", r"transformer.\1.down.\2"),
    (r"discriminator\.norm_final\.(.*)", r"norm.\1"),
    (r"discriminator\.fc\.(.*)", r"head.\1"),
)
# tables that the model computes; a file that holds others is refused
TABLES = {
    "encoder_patch_pe": "encoder_positions",
    "decoder_patch_query_embed": "patch_positions",
    "decoder_latent_pe": "latent_positions",
}
# the official constructor's switches, at the values that the released model has and this one implements
SWITCHES: dict[str, Any] = {
    "transformer_name": "transformer_encoder_parallel",
    "encoder_name": "none",
    "decoder_name": "none",
    "in_channels": 3,
    "learned_encoder_patch_pe": False,
    "learned_encoder_latent_query_embed": True,
    "learned_decoder_latent_pe": False,
    "learned_decoder_patch_query_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_decoder_latent_token_type_embed": False,
    "use_decoder_patch_query_token_type_embed": True,
}


def load(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
) -> LARPTokenizer:
    """A LARP tokenizer from a hub folder, its ``model.safetensors``, or a training checkpoint.

    Args:
        config: the official constructor's arguments; by default from the checkpoint, or from ``config.json`` beside it.
        prior: arguments of :class:`LatentPrior` that win over what the configuration says, for priors without a published name.
        norm_eps: of the blocks' norms. The published code takes timm's default, which was 1e-5 when the models were trained and is
            1e-6 in recent versions.

    Raises:
        CheckpointError: unreadable file, no configuration, an architecture switch of no released model, keys that do not fit.
    """
    file = Path(path)
    file = file / "model.safetensors" if file.is_dir() else file
    content = read_file(file)
    state = unwrap(content, WRAPPERS)
    official = config if config is not None else _find_config(content, file)
    model = LARPTokenizer(**read_config(official, state, prior), norm_eps=norm_eps)
    renamed = rename_keys(state)
    for name, buffer in TABLES.items():
        _check_table(renamed.pop(name, None), getattr(model, buffer), name)
    load_strictly(model, renamed, source=str(file))
    return model.eval()


def rename_keys(state: Mapping[str, Tensor]) -> State:
    """Official keys to ours, with the prior's separate projections fused; axes of length one are dropped."""
    attention = [rf"attn\.{name}" for name in ("query", "key", "value")]
    renamed = rename(fuse(state, attention, "attn.qkv"), RULES)
    for name in ("patch_type", "prior_model.positions"):
        if name in renamed:
            renamed[name] = renamed[name].squeeze()
    return renamed


def load_discriminator(model: TransformerDiscriminator, state: Mapping[str, Tensor]) -> TransformerDiscriminator:
    """Fills ``model`` with the discriminator of a training checkpoint's loss, keys ``discriminator.*``."""
    renamed = rename(state, DISCRIMINATOR_RULES)
    if "class_token" in renamed:
        renamed["class_token"] = renamed["class_token"].squeeze(0)
    _check_table(renamed.pop("discriminator.encoder_pos_embed", None), model.positions, "discriminator.encoder_pos_embed")
    load_strictly(model, renamed, (r"lecam_ema_.*", r"perceptual_loss\..*"), "discriminator")
    return model


def read_config(official: Mapping[str, Any], state: Mapping[str, Tensor], prior: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Constructor arguments of :class:`LARPTokenizer` from the official ones."""
    for name, value in SWITCHES.items():
        if official.get(name, value) != value:
            raise CheckpointError(
                f"LARP tokenizer with {name}={official[name]}: only {value} is supported, as in the released model"
            )
    try:
        bottleneck = official["bottleneck"]["args"]
        quantizer = bottleneck["regularizer"]["args"]
        names = {
            "sample_size": "input_size",
            "frames": "frame_num",
            "patch_size": "patch_size",
            "temporal_patch_size": "temporal_patch_size",
            "num_tokens": "bottleneck_token_num",
            "position_base": "latent_pe_scale_factor",
            **{f"{part}_dim": f"{part}_hidden_size" for part in ("encoder", "decoder")},
            **{f"{part}_{size}": f"{part}_{'num_' if size == 'heads' else ''}{size}" for part in ("encoder", "decoder")
               for size in ("heads", "depth")},
        }  # fmt: skip
        config = {ours: official[theirs] for ours, theirs in names.items()}
        config |= {
            "codebook_size": quantizer["codebook_size"],
            "code_dim": bottleneck["bottleneck_dim"],
            "temperature": quantizer["stochastic_temperature"],
            "commitment_weight": quantizer["commitment_loss_weight"],
        }
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"configuration of a LARP tokenizer lacks {error}: expected the official constructor's arguments"
        ) from error
    if not (quantizer.get("l2_normalized", True) and quantizer.get("stochastic", True)) or bottleneck.get("norm", "none") != "none":
        raise CheckpointError("LARP tokenizer: only the stochastic, l2-normalised quantizer without bottleneck norm is supported")
    if any(official.get(f"decoder_{name}", official[name]) != official[name] for name in ("patch_size", "temporal_patch_size")):
        raise CheckpointError("LARP tokenizer: encoder and decoder patch sizes differ, no released model has that")
    if any(key.startswith("prior_model.") for key in state):
        config["prior"] = _read_prior(official.get("prior_model") or {}, state, prior or {})
    return config


def _read_prior(official: Mapping[str, Any], state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    size = PRIORS.get(str(official.get("name", "")).removeprefix("gptc-"), {})
    prior = {
        **size,
        "max_tokens": state["prior_model.pos_emb"].shape[1],
        "rounds": official.get("n_rounds", 2) if official.get("use_mix_ss", True) else 1,
        "max_ratio": official.get("mix_ss_max_ratio", 0.5),
        "ramp": official.get("mix_ss_peak_steps_ratio", 0.3),
        "temperature": official.get("latent_ce_temperature", 1.0),
        "dropout": 0.0 if official.get("no_dropout", False) else 0.1,
        **overrides,
    }
    if "heads" not in prior:
        raise CheckpointError(
            f"prior '{official.get('name')}': pass prior with its depth, heads and dim; known: {', '.join(PRIORS)}"
        )
    return prior


def _find_config(content: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    inner = content.get("model")
    if isinstance(inner, Mapping) and isinstance(inner.get("args"), Mapping):
        return inner["args"]
    beside = file.with_name("config.json")
    if not beside.is_file():
        raise CheckpointError(
            f"'{file}': its config.json must lie beside it (or pass config, the official constructor's arguments)"
        )
    try:
        config = json.loads(beside.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{beside}' is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{beside}': expected a JSON object")
    return config


def _check_table(theirs: Tensor | None, ours: Tensor, name: str) -> None:
    if theirs is not None and (theirs.shape[1:] != ours.shape or not torch.allclose(theirs[0].float(), ours, atol=1e-4)):
        raise CheckpointError(f"'{name}' of the checkpoint is not the sine-cosine table of its configuration")
