"""``vargen tokenize``: caches of tokens or latents, which training then reads in place of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import Device, Dtype, Quiet, parse_integers, parse_settings, parse_shard
from vargen.errors import ConfigError


def tokenize(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer or pipeline: bundled name, directory or hub id.")],
    dataset: Annotated[str, typer.Argument(help="Data set that ships, folder, video, or the path of an image folder.")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value arguments of the data set, e.g. root=IMAGENET.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; each split goes into its own below it.")] = ...,  # type: ignore[assignment]
    split: Annotated[str, typer.Option(help="Splits; those after the first are written plainly, one view each.")] = "train,test",
    scheme: Annotated[
        str, typer.Option(help="center, moments, moments-flip (MAR), ten-crop (LlamaGen), or random: --views random augmentations.")
    ] = "center",
    views: Annotated[int, typer.Option(help="Views of scheme random.")] = 1,
    crop_range: Annotated[str, typer.Option(help="Of scheme ten-crop: picture sides in crop sides, e.g. 1.1 or 1.1,1.05.")] = "1.1",
    format: Annotated[str, typer.Option(help="safetensors or webdataset.")] = "safetensors",
    half: Annotated[bool, typer.Option("--half", help="Store continuous values in half precision.")] = False,
    coarse: Annotated[
        list[str] | None, typer.Option(help="A coarser grid, e.g. 8x8, encoded from the resized picture too (Hi-MAR's pivots).")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample/--no-sample", help="Draw where the tokenizer draws, or take its most probable tokens (LARP).")
    ] = True,
    text_encoder: Annotated[str | None, typer.Option(help="For captions: directory or hub id.")] = None,
    text_features: Annotated[bool, typer.Option("--text-features", help="Store the captions' features too.")] = False,
    shard_size: Annotated[int, typer.Option(help="Samples per shard.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Pictures per pass; the cache keeps to it.")] = 32,
    seed: Annotated[int, typer.Option(help="For tokenizers that draw.")] = 0,
    broken: Annotated[str, typer.Option(help="Broken files: skip (reported) or stop.")] = "skip",
    check: Annotated[
        bool, typer.Option("--check", help="Compare finished shards with their SHA-256; make damaged ones anew.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that read files.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="k/n: write only the shards k modulo n; by default by the launcher's rank.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Encode a data set once, for training from the cache.

    A job that was stopped continues when the same command is run again. Train with `dataset.name=cache dataset.path=OUTPUT`.
    """
    settings = parse_settings(options or ())
    part = parse_shard(shard) if shard is not None else None
    grids = [parse_integers(text, "coarse") for text in coarse or ()]
    try:
        ranges = tuple(float(text) for text in crop_range.split(","))
    except ValueError as error:
        raise ConfigError(f"crop-range '{crop_range}': expected numbers such as 1.1,1.05") from error

    from vargen.sample.tokenize import Scheme
    from vargen.sample.tokenize import tokenize as run

    results = run(
        tokenizer,
        dataset,
        output,
        settings,
        splits=[name.strip() for name in split.split(",")],
        scheme=Scheme(scheme, views, ranges),
        format=format,
        half=half,
        coarse=grids,
        sample=sample,
        text_encoder=text_encoder,
        text_features=text_features,
        shard_size=shard_size,
        batch_size=batch_size,
        seed=seed,
        broken=broken,
        check=check,
        workers=workers,
        shard=part,
        device=device,
        dtype=dtype,
        progress=not quiet,
    )
    for result in results:
        for name, reason in result.skipped.items():
            typer.echo(f"skipped {name}: {reason}", err=True)
        skipped = f", {len(result.skipped)} broken files left out" if result.skipped else ""
        typer.echo(f"{result.samples} samples in {result.done} of {result.shards} shards{skipped}: {result.folder}")
