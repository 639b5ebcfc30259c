"""``vargen order``: a decoding order as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vargen.cli.options import parse_integers
from vargen.errors import ConfigError, nearest


def order(
    name: Annotated[str, typer.Argument(help="raster, neighbors, rows, frames, blocks, cells, subsamples, scales or image.")],
    shape: Annotated[
        list[str], typer.Argument(help="Grid such as 8x8 or 4x8x8 (several for scales), then options such as size=4.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file.")] = Path("order.png"),
    mask: Annotated[
        str | None, typer.Option(help="Draw the attention mask of this layout instead: shifted or neighboring.")
    ] = None,
    prefix: Annotated[int, typer.Option(help="Prefix slots of the layout.")] = 1,
) -> None:
    """Draw a decoding order as a picture.

    Cells are coloured and numbered by the step that generates them.

    Examples: `vargen order neighbors 8x8`, `vargen order blocks 8x8 size=4`, `vargen order cells 8x8 cell=2x2`.
    """
    levels = tuple(parse_integers(text, "shape") for text in shape if "=" not in text)
    options = dict(text.split("=", 1) for text in shape if "=" in text)
    if not levels:
        raise ConfigError("no shape: expected a grid such as 8x8")

    from vargen.layout import LAYOUTS
    from vargen.order import make_order
    from vargen.sample.picture import draw_mask, draw_order, save_image

    values = {key: parse_integers(value, key) for key, value in options.items()}
    try:
        drawn = make_order(name, levels, **{key: value[0] if key == "size" else value for key, value in values.items()})
    except TypeError as error:
        raise ConfigError(
            f"order '{name}' with options {list(options) or 'none'}: blocks needs size, cells cell, subsamples stride"
        ) from error
    if mask is not None and mask not in LAYOUTS:
        raise ConfigError(f"layout '{mask}'{nearest(mask, LAYOUTS)}")
    save_image(draw_order(drawn) if mask is None else draw_mask(LAYOUTS[mask](drawn, prefix)), output)
    typer.echo(f"{drawn.num_cells} cells in {drawn.num_steps} steps: {output}")
