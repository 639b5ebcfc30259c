"""``vargen reconstruct``: a tokenizer's round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import Device, Dtype, parse_integers, parse_settings


def reconstruct(
    tokenizer: Annotated[str, typer.Argument(help="Tokenizer or pipeline: bundled name, directory or hub id.")],
    data: Annotated[str, typer.Argument(help="Data set that ships (digits, photos, shapes, shapes-video), or a folder or file.")],
    num: Annotated[int, typer.Option("--num", "-n", help="Number of samples.")] = 8,
    tokens: Annotated[str | None, typer.Option(help="Also decode prefixes, e.g. 1,4,16, where tokens are ordered.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default outputs/reconstruct-<...>.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="For tokenizers that take captions and are in no pipeline.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the decoder, e.g. num_inference_steps=10, guidance_scale=2."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Of videos: mp4, gif or frames (a folder of PNG files each).")
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of videos.")] = 8.0,
    seed: Annotated[int, typer.Option(help="For tokenizers that draw.")] = 0,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Show a tokenizer's round trip.

    Writes originals and reconstructions side by side, and their PSNR and SSIM; of videos also the reconstructed clips.
    """
    prefixes = parse_integers(tokens, "tokens") if tokens is not None else ()

    from vargen.sample.reconstruct import reconstruct as run

    trips, folder = run(
        tokenizer,
        data,
        num=num,
        prefixes=prefixes,
        output=output,
        text_encoder=text_encoder,
        settings=parse_settings(settings or ()),
        format=format,
        fps=fps,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    for trip in trips:
        typer.echo(f"{trip.tokens:5d} tokens: PSNR {float(trip.psnr.mean()):.2f} dB, SSIM {float(trip.ssim.mean()):.4f}")
    typer.echo(str(folder / "reconstruct.png"))
    typer.echo(str(folder / "report.json"))
