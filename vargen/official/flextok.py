"""FlexTok's released checkpoints, built from the configuration that each carries in its header (or in ``config.json`` beside it).

The configuration lists the modules of encoder and decoder in the order of execution, by dotted class path. Nothing of it is
instantiated: known class names are read for their sizes, and anything else is refused.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vargen.checkpoint import State, load_strictly, read_file, rename
from vargen.errors import CheckpointError
from vargen.official.fuse import fuse
from vargen.tokenizers.flextok import RELEASED_VAE, FlexTok

Config = Mapping[str, Any]

# our six chunks (shift, scale, gate of attention, then of the MLP) in the order of theirs
CHUNKS = (2, 3, 0, 4, 5, 1)
_BLOCKS = (
    (r"(blocks\.\d+\.attn)\.qkv\.(.*)", r"\1.qkv.\2"),
    (r"(blocks\.\d+\.attn)\.proj\.(.*)", r"\1.out.\2"),
    (r"(blocks\.\d+\.mlp)\.fc1\.(.*)", r"\1.gate.\2"),
    (r"(blocks\.\d+\.mlp)\.fc3\.(.*)", r"\1.up.\2"),
    (r"(blocks\.\d+\.mlp)\.fc2\.(.*)", r"\1.down.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(.*)", r"modulations.\1.linear.\2"),
)
# classes that hold no weights of ours: permutations, packing and the like
STRUCTURE = {"PerSampleOp", "PerSampleReducer", "DictKeyFilter", "SequenceUnpacker"}
ENCODER = ("PatchEmbedder", "PositionalEmbeddingAdder", "Registers1D", "BlockWiseSequencePacker", "FlexTransformer", "LinearHead")
DECODER = (
    "LinearLayer",
    "PositionalEmbeddingAdder",
    "MaskedNestedDropout",
    "LearnedNullCond",
    "PatchEmbedder",
    "PositionalEmbeddingAdder",
    "BlockWiseSequencePacker",
    "TimestepEmbedder",
    "FlexTransformer",
    "ToPatchesLinearHead",
)


class Module(dict[str, Any]):
    """One entry of a module dictionary: its arguments, with the class name and the prefix of its keys."""

    def __init__(self, kind: str, prefix: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        self.kind, self.prefix = kind, prefix

    def require(self, **values: Any) -> None:
        """Raises CheckpointError unless the arguments that are given have these values."""
        for name, value in values.items():
            if self.get(name, value) != value:
                raise CheckpointError(f"{self.prefix} ({self.kind}) has {name}={self[name]}: only {value} is supported")

    def number(self, name: str) -> int:
        if not isinstance(self.get(name), int):
            raise CheckpointError(f"{self.prefix} ({self.kind}) lacks the integer '{name}'")
        return self[name]


def load(path: str | os.PathLike[str], config: Config | None = None, vae: Config | None = None) -> FlexTok:
    """A FlexTok from a hub folder or its ``model.safetensors``.

    Args:
        config: the configuration, for files that do not carry it.
        vae: arguments of ``AutoencoderKL`` that differ from the released ones, which the configuration does not list.

    Raises:
        CheckpointError: unreadable file, no configuration, a class or option that no released model uses, keys that do not fit.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    state = read_file(file)
    config = config if config is not None else read_configuration(file)
    arguments, names = read_config(config, vae)
    model = FlexTok(**arguments)
    load_strictly(model, rename_keys(state, names, model), (r"unused\..*",), str(file))
    return model.eval()


def read_configuration(file: Path) -> Config:
    """The configuration in the header of a safetensors file, else in ``config.json`` beside it."""
    try:
        with safe_open(file, framework="pt") as handle:
            header = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{file}' is not a readable safetensors file ({error})") from error
    config: Any = {key: _literal(value) for key, value in header.items()}
    beside = file.with_name("config.json")
    if "encoder" not in config and beside.is_file():
        try:
            config = json.loads(beside.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{beside}' is not valid JSON ({error})") from error
        config = config.get("config", config) if isinstance(config, dict) else config
    if not isinstance(config, dict) or "encoder" not in config:
        raise CheckpointError(f"'{file}' carries no configuration, and there is none in config.json beside it: pass config")
    return config


def _literal(text: str) -> Any:
    """Header values are the text of Python literals, or plain strings."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def modules(config: Any, part: str, expected: tuple[str, ...]) -> list[Module]:
    """The modules of ``part`` that hold weights or order the tokens; CheckpointError unless they are the expected ones."""
    try:
        entries = config[part]["module_dict"].items()
        found = [Module(entry["_target_"].rsplit(".", 1)[-1], f"{part}.module_dict.{name}", entry) for name, entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"configuration of FlexTok: '{part}' has no module_dict of classes ({error!r})") from error
    kept = [m for m in found if m.kind not in STRUCTURE and not (m.kind == "MLPHead" and "repa" in m.prefix)]
    kinds = tuple(m.kind.replace("ZeroNullCond", "LearnedNullCond") for m in kept)
    kinds = tuple("PositionalEmbeddingAdder" if k == "PositionalEmbedding" else k for k in kinds)
    if kinds != expected:
        raise CheckpointError(
            f"FlexTok's {part} is a sequence of {', '.join(m.kind for m in kept)}: expected {', '.join(expected)}"
        )
    return kept


def read_config(config: Config, vae: Config | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Constructor arguments of :class:`FlexTok`, and the official prefix of each of its parts."""
    encoder, encoder_names = read_encoder(config)
    decoder, decoder_names = read_decoder(config)
    for name in encoder.keys() & decoder.keys():
        if encoder[name] != decoder[name]:
            raise CheckpointError(
                f"FlexTok's encoder has {name} {encoder[name]} and its decoder {decoder[name]}: expected the same"
            )
    front = read_vae(config, vae)
    arguments = with_front({**encoder, **decoder}, front)
    arguments["scaling_factor"] = (config.get("vae") or {}).get("scaling_factor")
    return arguments, encoder_names | decoder_names


def with_front(sizes: Mapping[str, Any], vae: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments with a VAE (None for pixels), which turns the grid of patches into a size in pixels."""
    arguments = dict(sizes)
    grid, channels = arguments.pop("grid"), arguments.pop("channels")
    latent = 3 if vae is None else vae["latent_channels"]
    if latent != channels or len(set(grid)) != 1:
        raise CheckpointError(f"FlexTok over {channels} channels on a grid of {grid}: expected {latent} channels and a square grid")
    stride = 1 if vae is None else 2 ** (len(vae["block_out_channels"]) - 1)
    return {**arguments, "vae": vae, "sample_size": grid[0] * arguments["patch_size"] * stride}


def read_encoder(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """What the encoder's modules tell: constructor arguments, and ``grid`` and ``channels`` of the latents."""
    embed, positions, registers, packer, trunk, head = modules(config, "encoder", ENCODER)
    packer.require(mask_mode="causal_last")
    arguments = {
        **_patches(embed, positions),
        "num_registers": registers.number("n_max"),
        "levels": list((config.get("regularizer") or {}).get("levels", [8, 8, 8, 5, 5, 5])),
        "encoder_dim": trunk.number("dim"),
        "encoder_depth": trunk.number("depth"),
        "head_dim": trunk.get("head_dim", 64),
    }
    parts = {"patches": embed, "positions": positions, "registers": registers, "trunk": trunk, "head": head}
    return arguments, {f"encoder.{part}": module.prefix for part, module in parts.items()}


def read_decoder(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """What the decoder's modules tell; see :func:`read_encoder`."""
    linear, places, nested, null, embed, positions, packer, time, trunk, head = modules(config, "decoder", DECODER)
    packer.require(mask_mode="full", per_subseq_embs=True)
    places.require(posemb_type="learnable_sum", posemb_scaling="absolute")
    trunk.require(adaLN_expansion=2)
    head.require(patch_sizes=embed["patch_sizes"], channels_out=embed["channels_in"])
    arguments = {
        **_patches(embed, positions),
        "num_registers": places["max_sizes"][0],
        "decoder_dim": trunk.number("dim"),
        "decoder_depth": trunk.number("depth"),
        "head_dim": trunk.get("head_dim", 64),
        # what the class does where the configuration is silent
        "max_timestep": float(time.get("max_timestep", 1000.0)),
        "learned_null": null.kind == "LearnedNullCond",
        "nested": nested.get("size_sampling_mode", "uniform"),
        "condition_dropout": float(null.get("dropout_prob", 0.0)),
    }
    parts = {"from_code": linear, "places": places, "nested": nested, "null": null, "patches": embed, "positions": positions,
             "time": time, "trunk": trunk, "head": head}  # fmt: skip
    return arguments, {f"decoder.{part}": module.prefix for part, module in parts.items()}


def _patches(embed: Module, positions: Module) -> dict[str, Any]:
    positions.require(posemb_scaling="absolute")
    kinds = {"sincos": "sincos", "learnable_sum": "learned"}
    kind, patch = positions.get("posemb_type", "sincos"), embed.get("patch_sizes")
    if kind not in kinds or not isinstance(patch, list | tuple) or len(set(patch)) != 1:
        raise CheckpointError(
            f"{embed.prefix}: patches of {patch} with '{kind}' positions; expected a square and one of {list(kinds)}"
        )
    return {
        "patch_size": patch[0],
        "channels": embed.number("channels_in"),
        "grid": list(positions["max_sizes"]),
        "positions": kinds[kind],
    }


def read_vae(config: Config, overrides: Config | None) -> dict[str, Any] | None:
    """Arguments of ``AutoencoderKL``; the released ones but for the number of latent channels, which the configuration has."""
    wrapper = config.get("vae")
    if wrapper is None:
        return None
    latent = {"latent_channels": wrapper["latent_channels"]} if wrapper.get("latent_channels") else {}
    return {**RELEASED_VAE, **latent, **(overrides or {})}


def rename_keys(state: Mapping[str, Tensor], names: Mapping[str, str], model: FlexTok) -> State:
    """Official keys to ours; ``names`` are the official prefixes of the parts, keys of other modules go to ``unused.*``."""
    state = fuse(state, [rf"attn\.{name}" for name in ("wq", "wk", "wv")], "attn.qkv")
    found: State = {}
    places = {prefix: part for part, prefix in names.items()}
    for key, value in state.items():
        prefix = next((p for p in places if key.startswith(f"{p}.")), None)
        if key.startswith("vae."):
            found[f"front.{key.removeprefix('vae.').removeprefix('vae.')}"] = value
        elif prefix is None:
            found[f"unused.{key}"] = value
        else:
            found[f"{places[prefix]}.{key.removeprefix(f'{prefix}.')}"] = value
    rules = [(rf"(encoder|decoder)\.trunk\.{theirs}", _shift_groups(ours)) for theirs, ours in _BLOCKS]
    found = rename(found, [*rules, *RULES])
    for name in [k for k in found if k.startswith("decoder.modulations.")]:
        found[name] = found[name].unflatten(0, (2, 6, -1))[:, list(CHUNKS)].flatten(0, 2)
    for part in ("encoder", "decoder"):
        table = found.pop(f"{part}.positions.posembs", None)
        if table is not None:
            _place_table(found, f"{part}.patches.positions", table, model)
    if "decoder.register_positions" in found:
        found["decoder.register_positions"] = found["decoder.register_positions"][0, 0].T
    return found


RULES = (
    (r"encoder\.patches\.patch_proj\.(.*)", r"encoder.patches.proj.\1"),
    (r"encoder\.registers\.registers", "encoder.registers"),
    (r"encoder\.head\.proj\.(.*)", r"encoder.to_code.\1"),
    (r"decoder\.from_code\.proj\.(.*)", r"decoder.from_code.\1"),
    (r"decoder\.places\.posembs", "decoder.register_positions"),
    (r"decoder\.nested\.dropout_mask_token", "decoder.dropped"),
    (r"decoder\.null\.nullcond", "decoder.null"),
    (r"decoder\.patches\.patch_proj\.(.*)", r"decoder.patches.proj.\1"),
    (r"decoder\.time\.mlp\.0\.(.*)", r"decoder.time.mlp.up.\1"),
    (r"decoder\.time\.mlp\.2\.(.*)", r"decoder.time.mlp.down.\1"),
    (r"decoder\.head\.adaLN_modulation\.1\.(.*)", r"decoder.modulation_out.linear.\1"),
    (r"decoder\.head\.proj\.(.*)", r"decoder.to_patch.\1"),
)


def _shift_groups(replacement: str) -> str:
    """A replacement whose groups follow one more, that of encoder or decoder."""
    return r"\1." + replacement.replace(r"\2", r"\3").replace(r"\1", r"\2")


def _place_table(found: State, name: str, table: Tensor, model: FlexTok) -> None:
    """Learned tables are kept, a row's and a column's added up; fixed ones must be those that the model computes."""
    ours = model.get_parameter(name) if model.config.positions == "learned" else model.get_buffer(name)
    if table.shape[0] == 2:
        rows, columns = table[0, 0].T, table[1, 0].T
        table = rows[: ours.shape[0], None] + columns[None, : ours.shape[1]]
    else:
        table = table[0].permute(1, 2, 0)
    if model.config.positions == "learned":
        found[name] = table
    elif table.shape != ours.shape or not torch.allclose(table.float(), ours, atol=1e-4):
        raise CheckpointError(f"'{name}' of the checkpoint is not the sine-cosine table of its configuration")
