"""The ``vargen`` command. Commands import what they need when they run, so that help is instant."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from vargen import __version__
from vargen.cli.bench import bench
from vargen.cli.convert import convert
from vargen.cli.evaluate import evaluate
from vargen.cli.models import models
from vargen.cli.order import order
from vargen.cli.reconstruct import reconstruct
from vargen.cli.sample import sample
from vargen.cli.tokenize import tokenize
from vargen.cli.train import train
from vargen.errors import VargenError

# plain help and errors: rich adds 0.2 s to a start of 0.3 s, and breaks lines in pipes
app = typer.Typer(
    name="vargen",
    help="Visual autoregressive generation: sample, train, evaluate and convert models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (sample, reconstruct, models, tokenize, train, evaluate, convert, order, bench):
    app.command()(command)


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vargen {__version__}")
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line: what the user can mend becomes one line on stderr and exit code 2, anything else a traceback."""
    if not sys.warnoptions:
        # what libraries announce to programmers is no help to whoever types a command; python -W brings it back
        warnings.simplefilter("ignore", FutureWarning)
    try:
        app()
    except (VargenError, OSError) as error:
        print(f"vargen: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
