"""``vargen models``: what there is to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vargen import registry


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the bundled models, and every system with its presets and released checkpoints."""
    bundled = [_bundled(name) for name in registry.BUNDLED]
    systems = [
        {
            "name": s.name,
            "kind": s.kind,
            "class": s.model,
            "paper": s.paper,
            "presets": list(s.presets),
            "released": list(s.released),
        }
        for s in registry.SYSTEMS.values()
    ]
    if as_json:
        typer.echo(json.dumps({"bundled": bundled, "systems": systems}, indent=2))
        return
    typer.echo("Bundled models (vargen sample NAME):")
    for entry in bundled:
        typer.echo(f"  {entry['name']:<10} {entry['megabytes']:5.1f} MB  {entry['model']}, conditioned on {entry['conditioning']}")
    typer.echo("\nSystems:")
    for system in systems:
        typer.echo(f"  {system['name']} ({system['kind']}, vargen.{system['class']})")
        typer.echo(f"    {system['paper']}")
        if system["presets"]:
            typer.echo(f"    presets: {', '.join(system['presets'])}")
        for released in system["released"]:
            typer.echo(f"    released: {released}")
