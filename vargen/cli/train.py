"""``vargen train``: a tokenizer, a generator or a drafter from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe that ships, such as digits/tokenizer, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes as key=value, e.g. training.batch_size=32.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--output-dir", "-o", help="Run directory; default: the recipe's output_dir.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume", "--resume-from-checkpoint", help="latest, auto (latest if there is one), or a checkpoint to continue from."
        ),
    ] = None,
) -> None:
    """Train a tokenizer, a generator, or a drafter for speculative decoding.

    Launch it as it is, or with `torchrun --nproc_per_node=N -m vargen.cli.main train ...` or `accelerate launch -m vargen.cli.main
    train ...` on several devices. Ctrl-C saves a checkpoint and stops.
    """
    from vargen.train.run import train as run

    final = run(recipe, overrides or [], output, resume)
    if final is not None:
        typer.echo(str(final))
