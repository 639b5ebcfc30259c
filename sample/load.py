"""From the MODEL that a user names to a loaded pipeline, tokenizer or drafter: a bundled name, a directory or a hub id."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from vargen import registry
from vargen.backbones.drafter import EagleDrafter
from vargen.checkpoint import check_model_directory
from vargen.errors import CheckpointError, VargenError, nearest
from vargen.model import VisualTokenizer
from vargen.pipeline import VisualARPipeline

ASSETS = Path(registry.__file__).parent / "assets"
PIPELINE_FILE = "model_index.json"
TOKENIZER_SLOT = "visual_tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model: str) -> str:
    """The directory or hub id behind ``model``.

    A bundled name wins over a directory of that name, which can be given as ``./name``.

    Raises:
        CheckpointError: neither; names the nearest bundled model.
    """
    if model in registry.BUNDLED:
        return str(ASSETS / registry.BUNDLED[model])
    if Path(model).exists():
        if not Path(model).is_dir():
            raise CheckpointError(f"'{model}' is a file: expected a model directory (official files are read by `vargen convert`)")
        return model
    if _HUB_ID.fullmatch(model):
        return model
    raise CheckpointError(
        f"no model '{model}': expected a directory, a hub id (owner/name) or a bundled name{nearest(model, registry.BUNDLED)}"
    )


def pick_device(device: str | None) -> torch.device:
    """The device called ``device``; without a name the GPU where there is one, else the CPU."""
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise VargenError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return picked


def pick_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise VargenError(f"dtype '{dtype}': expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_pipeline(model: str, device: str | None = None, dtype: str = "float32") -> VisualARPipeline:
    """The pipeline behind ``model``, on its device.

    Raises:
        CheckpointError: no such model, or its files are incomplete, pickled or do not fit.
    """
    source, torch_dtype, target = resolve(model), pick_dtype(dtype), pick_device(device)
    if Path(source).is_dir():
        _check_pipeline_directory(Path(source))
    with _quietly():
        return VisualARPipeline.from_pretrained(source, torch_dtype=torch_dtype).to(target)


def load_tokenizer(model: str, device: str | None = None, dtype: str = "float32") -> VisualTokenizer:
    """The tokenizer behind ``model``: of a tokenizer's own directory or hub id, or the one in a pipeline's.

    Raises:
        CheckpointError: no such model, not a tokenizer, or its files are incomplete, pickled or do not fit.
    """
    source, torch_dtype, target = resolve(model), pick_dtype(dtype), pick_device(device)
    folder = Path(source)
    options: dict[str, Any] = {"torch_dtype": torch_dtype}
    if folder.is_dir() and (folder / PIPELINE_FILE).is_file():
        folder = folder / TOKENIZER_SLOT
        source = str(folder)
    if folder.is_dir():
        check_model_directory(folder)
    try:
        config = VisualTokenizer.load_config(source)
    except OSError as error:
        try:
            config = VisualTokenizer.load_config(source, subfolder=TOKENIZER_SLOT)
            options["subfolder"] = TOKENIZER_SLOT
        except OSError:
            raise CheckpointError(f"cannot load '{model}': {' '.join(str(error).split())[:300]}") from error
    name = str(config.get("_class_name"))
    loaded = registry.load_public(name) if name in registry.PUBLIC else None
    if not (isinstance(loaded, type) and issubclass(loaded, VisualTokenizer)):
        raise CheckpointError(f"'{model}' holds a {name}, not a tokenizer{nearest(name, _tokenizer_classes())}")
    return loaded.from_pretrained(source, **options).to(target).eval()


def load_drafter(source: str, device: str | None = None, dtype: str = "float32") -> EagleDrafter:
    """The EAGLE drafter in a directory or behind a hub id, as ``vargen train`` and ``vargen convert`` write it.

    Raises:
        CheckpointError: nothing there, another model, or its files are incomplete or pickled.
    """
    torch_dtype, target, folder = pick_dtype(dtype), pick_device(device), Path(source)
    if not folder.is_dir() and not _HUB_ID.fullmatch(source):
        raise CheckpointError(f"no drafter '{source}': expected a directory or a hub id (owner/name)")
    if folder.is_dir():
        check_model_directory(folder)
    try:
        name = EagleDrafter.load_config(source).get("_class_name")
    except OSError as error:
        raise CheckpointError(f"cannot load the drafter '{source}': {' '.join(str(error).split())[:300]}") from error
    if name != EagleDrafter.__name__:
        raise CheckpointError(f"'{source}' holds a {name}, not a drafter: expected what `vargen train digits/drafter` writes")
    return EagleDrafter.from_pretrained(source, torch_dtype=torch_dtype).to(target).eval()


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A short hash of every weight's name, shape and first values, the same on every device; ``parts`` that are no modules have
    none."""
    digest = hashlib.blake2b(digest_size=8)
    for slot, module in sorted(parts.items()):
        if isinstance(module, nn.Module):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{slot}.{name}{tuple(value.shape)}".encode())
                digest.update(value.flatten()[:64].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """Loading shows no bar of its own, which would stand between a command's lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer_classes() -> list[str]:
    return [system.model for system in registry.SYSTEMS.values() if system.kind == "tokenizer"]


def _check_pipeline_directory(folder: Path) -> None:
    """Raises CheckpointError unless every model that the pipeline's index names is complete."""
    index = folder / PIPELINE_FILE
    if not index.is_file():
        what = "a single model, not a pipeline" if (folder / "config.json").is_file() else "no model"
        raise CheckpointError(f"'{folder}' holds {what}: expected a directory with {PIPELINE_FILE}")
    try:
        slots = json.loads(index.read_text(encoding="utf-8"))
        parts = [name for name, entry in slots.items() if isinstance(entry, list) and entry[:1] == ["vargen"]]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"'{index}' is not a readable pipeline index ({error})") from error
    for name in parts:
        if not (folder / name).is_dir():
            raise CheckpointError(f"'{folder}' has no folder '{name}', which its {PIPELINE_FILE} names")
        check_model_directory(folder / name)
