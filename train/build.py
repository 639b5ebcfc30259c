"""From the blocks of a recipe to models, and small things that both kinds of task need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from vargen.checkpoint import check_model_directory, load_strictly, read_file
from vargen.config import check_keys
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.cache import CachedTokens
from vargen.data.loader import ordered_batches
from vargen.errors import CheckpointError, ConfigError, nearest
from vargen.model import Generator, VisualTokenizer
from vargen.nn.quantize import TRAINING_ARGUMENTS, TRAINING_STATE, VectorQuantizer
from vargen.registry import PUBLIC, load_public, system
from vargen.sample.load import load_tokenizer, resolve
from vargen.text import WordEncoder, load_text_encoder, split_words
from vargen.tokenizers.frames import FrameTokenizer
from vargen.tokenizers.grid import GridTokenizer
from vargen.tokenizers.pyramid import PyramidTokenizer

# captions that a word encoder's vocabulary is collected from
VOCABULARY_SAMPLES = 4096


def build_data(config: Any) -> tuple[VisualDataset, VisualDataset]:
    """Training and held-out data of a recipe.

    What ``validation.dataset`` leaves out is as in ``dataset``, except for the split, which is ``test`` by default. A validation
    set of another kind (pictures beside a cache) shares nothing with the training set.
    """
    training, validation = plain(config.dataset), plain(config.validation.dataset)
    another = validation.get("name", training.get("name")) != training.get("name")
    return build_dataset(training), build_dataset({**({} if another else training), "split": "test", **validation})


def build_tokenizer(config: Mapping[str, Any], dataset: VisualDataset) -> VisualTokenizer:
    """A fresh tokenizer of a system and preset with constructor arguments ``config``, or the one saved at ``path``.

    ``config`` changes arguments of a saved one as far as its weights allow, such as those that only training needs
    (``revive_after``), which finished tokenizers do not keep.

    Raises:
        ConfigError: neither or both, a system that is no tokenizer, or sizes that differ from the data's.
    """
    if (config["system"] is None) == (config["path"] is None):
        raise ConfigError("model: give exactly one of system (a fresh tokenizer) and path (one to train further)")
    if isinstance(dataset, CachedTokens):
        raise ConfigError("data set 'cache' holds tokens: a tokenizer learns from pictures, name the set that they come from")
    if config["path"] is not None:
        tokenizer = rebuilt(load_tokenizer(str(config["path"]), device="cpu"), config["config"])
    else:
        fresh = system(str(config["system"])).load_class()
        # a tokenizer that embeds words itself (SEED's first stage) takes those of the data unless the recipe says otherwise
        words = "words" in fresh._get_init_keys(fresh) and "words" not in config["config"] and dataset.has_captions
        tokenizer = build_model(config, "tokenizer", **({"words": vocabulary(dataset)} if words else {}))
    for part, path in config["parts"].items():
        load_part(tokenizer, str(part), str(path))
    if tuple(tokenizer.sample_shape) != tuple(dataset.sample_shape):
        raise ConfigError(
            f"the tokenizer is made for samples of {tuple(tokenizer.sample_shape)}, the data set has "
            f"{tuple(dataset.sample_shape)}: set model.config.sample_size and dataset.size alike"
        )
    return tokenizer


def build_model(config: Mapping[str, Any], kind: str, **given: Any) -> Any:
    """A freshly initialised model from ``system``, ``preset`` and constructor arguments ``config``; ``given`` fills gaps in them.

    Raises:
        ConfigError: unknown system or preset, a system of another kind, or an unknown argument.
    """
    found = system(str(config["system"]))
    if found.kind != kind:
        raise ConfigError(f"system '{found.name}' is a {found.kind}: expected a {kind}")
    model_class = found.load_class()
    known = sorted(model_class._get_init_keys(model_class))
    check_keys(config["config"], known, f"model.config of {found.name}")
    arguments = {**{k: v for k, v in given.items() if k in known}, **config["config"]}
    return model_class.from_preset(config["preset"], **arguments) if config["preset"] else model_class(**arguments)


def build_generator(config: Mapping[str, Any], tokenizer: VisualTokenizer, dataset: VisualDataset, text_encoder: Any) -> Generator:
    """A fresh generator for the tokenizer's space, or the one saved at ``path`` with some arguments changed, such as its grid.

    Arguments that ``config`` leaves out of a fresh one are filled from its surroundings: ``grid``, ``length``, ``codebook_size``
    and ``channels`` from the tokenizer, ``num_classes`` from the data, ``text_dim`` and ``text_length`` from the text encoder.
    """
    if (config["system"] is None) == (config["path"] is None):
        raise ConfigError("model: give exactly one of system (a fresh generator) and path (one to train further)")
    if config["path"] is not None:
        generator = rebuilt(load_generator(str(config["path"])), config["config"])
    else:
        space = tokenizer.space
        given: dict[str, Any] = {"grid": list(space.shape), "length": space.num_tokens}
        given |= {"codebook_size": space.codebook_size, "channels": space.channels}
        if text_encoder is None:
            given["num_classes"] = dataset.num_classes
        else:
            given.update(num_classes=None, text_dim=text_encoder.dim, text_length=text_encoder.max_length)
        generator = build_model(config, "generator", **given)
    generator.space.require(with_levels(tokenizer, generator).space)
    return generator


def for_videos(tokenizer: VisualTokenizer, dataset: VisualDataset) -> VisualTokenizer:
    """The tokenizer, frame by frame if it is one of images and the data are videos."""
    if tokenizer.video or len(dataset.sample_shape) == 2:
        return tokenizer
    frames, *size = dataset.sample_shape
    return FrameTokenizer.of(tokenizer, frames, size)


def with_levels(tokenizer: VisualTokenizer, generator: Generator) -> VisualTokenizer:
    """The tokenizer, made a pyramid if the generator models several levels of its tokens, or a grid if it lays them on one."""
    levels, space = generator.space.levels, tokenizer.space
    if len(levels) == 1 and len(space.shape) == 1 < len(levels[0]) and math.prod(levels[0]) == space.num_tokens:
        return GridTokenizer.of(tokenizer, levels[0])
    if len(levels) == 1 or tokenizer.space.discrete or tokenizer.space.levels != levels[-1:]:
        return tokenizer
    return PyramidTokenizer.of(tokenizer, levels, generator.coarse_from)


def require_cache(dataset: VisualDataset, held_out: VisualDataset, tokenizer: VisualTokenizer, text_encoder: Any) -> None:
    """Raises DataError or SpaceError unless those of the data sets that are caches were made by these models."""
    for data in (dataset, held_out):
        if isinstance(data, CachedTokens):
            data.require(tokenizer.base if derived(tokenizer) else tokenizer, text_encoder)


def derived(tokenizer: VisualTokenizer) -> TypeGuard[PyramidTokenizer | GridTokenizer]:
    """Its tokens are made of its base's tokens alone, by ``of_base``, so that a cache of the base serves it too."""
    return isinstance(tokenizer, GridTokenizer) or (
        isinstance(tokenizer, PyramidTokenizer) and tokenizer.config.source == "latents"
    )


def load_generator(path: str) -> Generator:
    """The generator in a model directory, or the one of a pipeline's directory or bundled name.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(resolve(path))
    if (folder / "model_index.json").is_file():
        folder = folder / "model"
    check_model_directory(folder)
    name = str(json.loads((folder / "config.json").read_text()).get("_class_name"))
    loaded = load_public(name) if name in PUBLIC else None
    if not (isinstance(loaded, type) and issubclass(loaded, Generator)):
        raise CheckpointError(f"'{path}' holds a {name}: expected a generator")
    return loaded.from_pretrained(folder)


def build_text_encoder(settings: Mapping[str, Any], dataset: VisualDataset) -> Any:
    """The text encoder of a recipe's ``text_encoder`` block, None where it names none.

    ``words``: arguments of a fresh :class:`WordEncoder` over the words of the data's captions; ``path``: a pretrained encoder.

    Raises:
        ConfigError: both are given, or the data has no captions.
    """
    if settings["words"] is None and settings["path"] is None:
        return None
    if settings["words"] is not None and settings["path"] is not None:
        raise ConfigError("text_encoder: give words (a fresh word encoder) or path (a pretrained one), not both")
    if not dataset.has_captions:
        raise ConfigError("text_encoder: the data set has no captions; leave the text encoder out and condition on classes")
    options = {} if settings["max_length"] is None else {"max_length": settings["max_length"]}
    if settings["path"] is not None:
        return load_text_encoder(settings["path"], **options)
    return WordEncoder(vocabulary(dataset), **settings["words"], **options)


def vocabulary(dataset: VisualDataset) -> list[str]:
    """The words of the first captions of a data set, sorted."""
    captions = (c for b in ordered_batches(dataset, 64, VOCABULARY_SAMPLES) for c in b["captions"])
    return sorted({word for caption in captions for word in split_words(caption)})


def plain(config: Any) -> Any:
    """A configuration node as plain dictionaries and lists."""
    return OmegaConf.to_container(config, resolve=True)


def frames(pixels: Tensor) -> Tensor:
    """Images as they are; of videos ``(B, 3, T, H, W)``, four frames over their length as images."""
    if pixels.dim() == 4:
        return pixels
    chosen = torch.linspace(0, pixels.shape[2] - 1, 4).round().long()
    return pixels[:, :, chosen].transpose(1, 2).flatten(0, 1)


def load_part(model: nn.Module, name: str, path: str) -> None:
    """Gives the submodule ``name`` the weights of a file, or of a directory with one, such as a released VAE of diffusers.

    A prefix that all keys of the file share and the submodule's do not have is dropped.

    Raises:
        ConfigError: no such submodule.
        CheckpointError: no readable file, or weights that do not fit.
    """
    part = getattr(model, name, None)
    if not isinstance(part, nn.Module):
        raise ConfigError(f"model.parts has '{name}'{nearest(name, [key for key, _ in model.named_children()])}")
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    if len(files) != 1:
        raise CheckpointError(f"'{path}' holds {len(files)} .safetensors files: name the one with the weights of '{name}'")
    state = read_file(files[0])
    while state.keys() != part.state_dict().keys() and len({key.partition(".")[0] for key in state}) == 1:
        state = {key.partition(".")[2]: value for key, value in state.items()}
    load_strictly(part, state, source=f"'{files[0]}' as model.parts.{name}")


def rebuilt(model: Any, changes: Mapping[str, Any]) -> Any:
    """The model with some constructor arguments changed and all its weights; state that only training needs starts afresh.

    Raises:
        ConfigError: an unknown argument.
        CheckpointError: weights that do not fit the changed model.
    """
    if not changes:
        return model
    name = type(model).__name__
    check_keys(changes, sorted(type(model)._get_init_keys(type(model))), f"model.config of {name}")
    changed = type(model)(**{**model.config_dict(), **changes})
    own = {key: value for key, value in changed.state_dict().items() if _of_training(key)}
    weights = {key: value for key, value in model.state_dict().items() if not _of_training(key)}
    load_strictly(changed, {**own, **weights}, source=f"the saved {name} with model.config changed")
    for module in changed.modules():
        if isinstance(module, VectorQuantizer) and module.ema_decay is not None:
            # the averages go on from the codes that were learned
            module.ema_sums.copy_(module.codes.detach())
    return changed


def finished(tokenizer: VisualTokenizer, weights: Mapping[str, Tensor]) -> VisualTokenizer:
    """A copy with ``weights`` and without what only training needs: counters of usage and revival, moving averages of codes."""
    copy = type(tokenizer)(**_without_training(tokenizer.config_dict()))
    load_strictly(copy, {key: value for key, value in weights.items() if not _of_training(key)}, source="the trained tokenizer")
    return copy.eval()


def _without_training(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments, also those of a base tokenizer inside, that make no training state."""
    return {
        key: TRAINING_ARGUMENTS[key] if key in TRAINING_ARGUMENTS else _without_training(value) if key == "base" else value
        for key, value in arguments.items()
    }


def _of_training(key: str) -> bool:
    return key.rpartition(".")[2] in TRAINING_STATE


def copy_with(model: Any, name: str, state: dict[str, Tensor]) -> Any:
    """A copy of ``model`` with its part ``name`` of ``state``."""
    prefix = f"{name}." if name else ""
    copy = type(model)(**model.config_dict())
    copy.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return copy.eval()
