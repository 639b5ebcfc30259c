"""``vargen convert``: released checkpoints to safetensors."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen import registry
from vargen.errors import ConfigError, VargenError


def convert(
    system: Annotated[str, typer.Argument(help="System of the checkpoint (see `vargen models`).")],
    file: Annotated[Path, typer.Argument(help="Released checkpoint: .pt, .pth or .safetensors.")],
    output: Annotated[Path, typer.Argument(help="New folder for config.json and safetensors weights.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value arguments of the system's loader.")] = None,
) -> None:
    """Convert a released checkpoint: every key must be known, nothing is unpickled but tensors."""
    entry = registry.system(system)
    if entry.official is None:
        raise VargenError(f"system '{system}' has no released checkpoint to convert")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VargenError(f"'{output}' exists and is not empty: choose a new folder")
    load = importlib.import_module(entry.official).load

    from vargen.checkpoint import atomic_directory

    model = load(file, **_arguments(options or [], load, system))
    with atomic_directory(output) as folder:
        model.save_pretrained(folder, safe_serialization=True)
    typer.echo(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters in {output}")


def _arguments(options: list[str], load: Any, system: str) -> dict[str, Any]:
    """``key=value`` texts as keyword arguments of ``load``; values are read as YAML scalars."""
    from omegaconf import OmegaConf

    from vargen.config import check_keys

    for option in options:
        if "=" not in option.lstrip("="):
            raise ConfigError(f"option '{option}': expected key=value")
    arguments = dict(OmegaConf.to_container(OmegaConf.from_dotlist(options)))  # type: ignore[arg-type]
    known = [name for name in inspect.signature(load).parameters if name != "path"]
    check_keys(arguments, known, f"the loader of '{system}'")
    return {str(key): value for key, value in arguments.items()}
