"""``vargen bench``: what images cost, by system and by way of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import Device, Dtype, Quiet, parse_integers
from vargen.errors import VargenError


def bench(
    systems: Annotated[
        list[str] | None, typer.Option("--systems", "-s", help="Generators to measure, repeated or with commas; all by default.")
    ] = None,
    ways: Annotated[
        list[str] | None, typer.Option("--ways", "-w", help="Ways of decoding beside the plain one; all that apply by default.")
    ] = None,
    size: Annotated[str, typer.Option(help="tiny (1 M weights, 64 tokens) or base (LlamaGen-B's, 256 tokens).")] = "tiny",
    batch_sizes: Annotated[str, typer.Option(help="Images made together, with commas.")] = "1,8,64",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 needs no second row.")] = 1.0,
    training: Annotated[
        bool, typer.Option("--training", help="Measure training steps instead, at the largest batch size.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls after the first; their median counts.")] = 3,
    seconds: Annotated[
        float, typer.Option(help="What takes longer per call is not repeated, nor measured at larger batches.")
    ] = 30.0,
    minutes: Annotated[float | None, typer.Option(help="Rows that do not begin within this time are left out.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file, or a folder for <device>.json.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Measure generators of equal size with random weights, with and without each acceleration.

    Prints a Markdown table: passes, time, memory, and bytes and operations per second beside what the device reaches in plain
    copies and matrix products. Tokens only: no tokenizer runs.
    """
    import logging

    from vargen.bench.report import generation_table, heading, training_table, write
    from vargen.bench.run import Settings, bench_generation
    from vargen.bench.systems import SYSTEMS
    from vargen.bench.training import bench_training
    from vargen.bench.ways import WAYS
    from vargen.sample.load import pick_device, pick_dtype

    settings = Settings(
        systems=_names(systems) or SYSTEMS,
        ways=_names(ways) or tuple(WAYS),
        size=size,
        batch_sizes=parse_integers(batch_sizes, "batch sizes"),
        guidance_scale=guidance_scale,
        dtype=dtype,
        repeats=repeats,
        seconds=seconds,
        minutes=minutes,
    )
    pick_dtype(dtype)
    target = pick_device(device)
    if target.type not in ("cpu", "cuda"):
        raise VargenError(f"device '{device}': expected cpu or cuda")
    if output is not None and output.suffix != ".json" and not output.is_dir():
        raise VargenError(f"output '{output}': expected a .json file or a folder that is there")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vargen.bench").setLevel(logging.WARNING if quiet else logging.INFO)
    record = bench_training(settings, target) if training else bench_generation(settings, target)
    typer.echo(heading(record) + "\n")
    typer.echo(training_table(record["rows"]) if training else generation_table(record["rows"]))
    if output is not None:
        write(record, output, target)


def _names(texts: list[str] | None) -> tuple[str, ...]:
    return tuple(name.strip() for text in texts or () for name in text.split(",") if name.strip())
