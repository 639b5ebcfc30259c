"""``vargen models``: what there is to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen import registry


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List bundled models and known systems.

    Systems are shown with their presets and the released checkpoints that `vargen convert` reads.
    """
    bundled = [_bundled(name) for name in registry.BUNDLED]
    systems = [
        {
            "name": s.name,
            "kind": s.kind,
            "class": s.model,
            "paper": s.paper,
            "presets": list(s.presets),
            "checkpoints": list(s.checkpoints),
        }
        for s in registry.SYSTEMS.values()
    ]
    if as_json:
        typer.echo(json.dumps({"bundled": bundled, "systems": systems}, indent=2))
        return
    typer.echo("Bundled models (vargen sample NAME):")
    for entry in bundled:
        typer.echo(f"  {entry['name']:<10} {entry['megabytes']:5.1f} MB  {entry['class']}, {entry['takes']}")
    typer.echo("\nSystems:")
    for system in systems:
        typer.echo(f"  {system['name']} ({system['kind']}, vargen.{system['class']})")
        typer.echo(f"    {system['paper']}")
        if system["presets"]:
            typer.echo(f"    presets: {', '.join(system['presets'])}")
        for released in system["checkpoints"]:
            typer.echo(f"    released: {released}")


def _bundled(name: str) -> dict[str, Any]:
    """Size and conditioning of a model that ships."""
    from vargen.sample.load import load_pipeline, resolve

    pipe = load_pipeline(name, device="cpu")
    size = sum(path.stat().st_size for path in Path(resolve(name)).rglob("*") if path.is_file())
    kinds = {"class": f"{pipe.model.num_classes} classes", "text": "text", "tokens": "given tokens"}
    takes = ", ".join(kinds[kind] for kind in pipe.model.conditioning) or "unconditional"
    return {"name": name, "class": type(pipe.model).__name__, "megabytes": round(size / 1e6, 2), "takes": takes}
