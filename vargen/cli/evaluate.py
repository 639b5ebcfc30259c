"""``vargen evaluate``: generated images or videos against real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import Device
from vargen.errors import VargenError


def evaluate(
    samples: Annotated[Path, typer.Argument(help="Folder of a sampling job, of images or of videos, or an .npz batch.")],
    dataset: Annotated[str, typer.Option(help="Real ones: digits, shapes, photos, shapes-video, or an image folder.")],
    split: Annotated[str, typer.Option(help="Its split; test is what our recipes do not train on.")] = "test",
    features: Annotated[
        str | None,
        typer.Option(help="Feature network: digits, shapes, shapes-video, or a directory; by default the data set's own."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only the first samples.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    device: Device = None,
) -> None:
    """Compare generated images or videos with real ones.

    Prints the Fréchet distance beside its floor, precision and recall, and conditional accuracy where labels or prompts are known.
    """
    if limit is not None and limit < 1:
        raise VargenError(f"limit {limit}: expected at least 1")

    from vargen.data.base import build_dataset
    from vargen.metrics.evaluate import evaluate_images, format_report
    from vargen.metrics.features import FEATURE_NETS, load_feature_net
    from vargen.metrics.samples import read_samples
    from vargen.sample.load import pick_device

    if features is None and dataset not in FEATURE_NETS:
        known = ", ".join(FEATURE_NETS)
        raise VargenError(f"data set '{dataset}' has no feature network of its own: give --features {known} or a directory")
    target = pick_device(device)
    extractor = load_feature_net(features or dataset, target)
    pixels = next(read_samples(samples, 1, extractor.frames is not None).batches())
    # real images at the size of the samples, so that both are resized alike for the network
    frames = {"frames": pixels.shape[2]} if pixels.dim() == 5 else {}
    reference = build_dataset(dataset, size=pixels.shape[-1], split=split, **frames)
    report = evaluate_images(samples, reference, extractor, limit=limit, device=target)
    typer.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else format_report(report))
