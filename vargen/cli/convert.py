"""``vargen convert``: released checkpoints to safetensors."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen import registry
from vargen.cli.options import parse_settings
from vargen.errors import VargenError


def convert(
    system: Annotated[str, typer.Argument(help="System of the checkpoint (see `vargen models`).")],
    file: Annotated[Path, typer.Argument(help="Released checkpoint: .pt, .pth or .safetensors.")],
    output: Annotated[Path, typer.Argument(help="New folder for config.json and safetensors weights.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value arguments of the system's loader.")] = None,
) -> None:
    """Convert a released checkpoint.

    Every key must be known, and nothing but tensors is unpickled.
    """
    entry = registry.system(system)
    if entry.official is None:
        raise VargenError(f"system '{system}' has no released checkpoint to convert")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise VargenError(f"'{output}' exists and is not empty: choose a new folder")
    load = importlib.import_module(entry.official).load

    from vargen.checkpoint import atomic_directory

    model = load(file, **_arguments(options or [], load, entry))
    with atomic_directory(output) as folder:
        model.save_pretrained(folder, safe_serialization=True)
    typer.echo(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters in {output}")


def _arguments(options: list[str], load: Any, entry: registry.System) -> dict[str, Any]:
    """``key=value`` texts as keyword arguments of ``load``; unknown ones are refused with the nearest known one."""
    from vargen.config import check_keys

    arguments = parse_settings(options)
    parameters = inspect.signature(load).parameters.values()
    known = [p.name for p in parameters if p.name != "path" and p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known += list(inspect.signature(entry.load_class()).parameters)
    check_keys(arguments, known, f"the loader of '{entry.name}'")
    return arguments
