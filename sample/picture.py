"""Pixels to pictures: 8-bit images, labelled grids, side-by-side sheets and drawings of orders."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.errors import VargenError
from vargen.layout import Layout
from vargen.order import Order

_MARGIN = 4
_FONT_SIZE = 12
_LABEL_LINES = 3
_PAPER, _INK = (232, 232, 236), (20, 20, 20)


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels in [-1, 1], ``(..., 3, H, W)``, to uint8 ``(..., H, W, 3)``.

    The value is ``clamp(127.5 x + 128, 0, 255)`` cut to an integer, as in LlamaGen's evaluation: ``127.5 (x + 1)`` rounded.

    Raises:
        VargenError: NaN or infinite pixels.
    """
    if pixels.dim() < 3 or pixels.shape[-3] != 3:
        raise VargenError(f"pixels of shape {tuple(pixels.shape)}: expected (..., 3, H, W)")
    if not torch.isfinite(pixels).all():
        raise VargenError("pixels hold NaN or infinity: sample in float32, or check that the model was trained")
    levels = (pixels.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).cpu().numpy()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels ``(B, 3, H, W)`` in [-1, 1] to one PIL image each."""
    return [Image.fromarray(array) for array in to_uint8(pixels)]


def from_image(image: Image.Image) -> Tensor:
    """A PIL image to pixels ``(3, H, W)`` in [-1, 1]: ``x / 127.5 - 1``, the inverse of :func:`to_uint8`."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG atomically."""
    atomic_write(path, lambda temporary: image.save(temporary, format="PNG"))


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """The image scaled by the largest whole factor (1 or more) that keeps its longer side within ``side``, pixels kept sharp."""
    factor = max(1, side // max(image.size))
    return image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def grid(
    images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None, side: int = 128
) -> Image.Image:
    """Images in reading order on one sheet, each with its label below it.

    Args:
        images: of one size.
        labels: a text for each, wrapped to the image's width; after three lines it is cut and ends in an ellipsis.
        columns: images in a row; without it the sheet is about square.
        side: small images are enlarged by a whole factor up to this many pixels.
    """
    if not images:
        raise VargenError("a grid of no images: expected at least one")
    if labels is not None and len(labels) != len(images):
        raise VargenError(f"{len(labels)} labels for {len(images)} images: expected one each")
    tiles = [enlarge(image, side) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrap(label, tile.width, font) for label, tile in zip(labels, tiles)] if labels else [""] * len(tiles)
    text_height = max(text.count("\n") + 1 for text in texts) * (_FONT_SIZE + _MARGIN) if labels else 0
    width = max(tile.width for tile in tiles) + _MARGIN
    height = max(tile.height for tile in tiles) + _MARGIN + text_height
    sheet = Image.new("RGB", (columns * width + _MARGIN, math.ceil(len(tiles) / columns) * height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (tile, text) in enumerate(zip(tiles, texts)):
        row, column = divmod(index, columns)
        left, top = column * width + _MARGIN, row * height + _MARGIN
        sheet.paste(tile, (left, top))
        draw.multiline_text((left + tile.width / 2, top + tile.height + 1), text, fill=_INK, font=font, anchor="ma", align="center")
    return sheet


def film(frames: Sequence[Image.Image], most: int = 8) -> Image.Image:
    """Frames of a clip beside each other; of more than ``most`` some at even distances, first and last among them."""
    chosen = [round(i * (len(frames) - 1) / (most - 1)) for i in range(most)] if len(frames) > most else range(len(frames))
    width, height = frames[0].size
    strip = Image.new("RGB", (len(chosen) * (width + 1) - 1, height), _PAPER)
    for place, number in enumerate(chosen):
        strip.paste(frames[number], (place * (width + 1), 0))
    return strip


def side_by_side(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], captions: Sequence[str], side: int = 128
) -> Image.Image:
    """A sheet with one row per sample and one column per ``title``; each row has its caption at the right.

    Args:
        rows: every row has ``len(titles)`` images of one size.
    """
    tiles = [[enlarge(image, side) for image in row] for row in rows]
    font = ImageFont.load_default(_FONT_SIZE)
    titles_width = max(math.ceil(font.getlength(title)) for title in titles)
    width = max(max(tile.width for row in tiles for tile in row), titles_width) + _MARGIN
    height = max(tile.height for row in tiles for tile in row) + _MARGIN
    beside = max((math.ceil(font.getlength(caption)) for caption in captions), default=0) + 2 * _MARGIN
    top = _FONT_SIZE + 2 * _MARGIN
    sheet = Image.new("RGB", (len(titles) * width + beside + _MARGIN, top + len(tiles) * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((column * width + _MARGIN, _MARGIN), title, fill=_INK, font=font)
    for index, (row, caption) in enumerate(zip(tiles, captions, strict=True)):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * width + _MARGIN, top + index * height))
        middle = top + index * height + (height - _MARGIN) / 2
        draw.text((len(titles) * width + _MARGIN, middle), caption, fill=_INK, font=font, anchor="lm")
    return sheet


def draw_order(order: Order, side: int = 32) -> Image.Image:
    """The cells of an order, coloured from violet (first) to red (last) by step and marked with its number.

    The planes of a third axis are drawn beside each other, several levels below each other.

    Args:
        side: width of a cell in pixels; below 16 the numbers are left out.
    """
    steps = order.step_of.tolist()
    total = order.num_steps
    font = ImageFont.load_default(max(8, side // 3))
    planes_of = [_planes(level) for level in order.levels]
    width = max(count * (columns * side + _MARGIN) for count, _, columns in planes_of) + _MARGIN
    height = sum(rows * side + _MARGIN for _, rows, _ in planes_of) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top, first = _MARGIN, 0
    for count, rows, columns in planes_of:
        for cell in range(count * rows * columns):
            plane, row, column = cell // (rows * columns), cell // columns % rows, cell % columns
            left, upper = _MARGIN + plane * (columns * side + _MARGIN) + column * side, top + row * side
            step = steps[first + cell]
            draw.rectangle((left, upper, left + side - 2, upper + side - 2), fill=_step_colour(step, total))
            if side >= 16:
                draw.text((left + side / 2 - 1, upper + side / 2 - 1), str(step), fill=_INK, font=font, anchor="mm")
        top += rows * side + _MARGIN
        first += count * rows * columns
    return sheet


def draw_mask(layout: Layout, side: int = 8) -> Image.Image:
    """Who sees whom: a row for each input slot as query, a column as key, dark where it is seen; ``side`` pixels per slot.

    Prefix slots are blue, extra slots red, so that they are told from cells.
    """
    slots = torch.arange(layout.num_inputs)
    colours = torch.full((layout.num_inputs, 3), 40)
    colours[layout.cell[slots] < 0] = torch.tensor([40, 90, 200])
    colours[layout.extra[slots] >= 0] = torch.tensor([200, 60, 50])
    picture = torch.where(layout.mask().unsqueeze(-1), colours, torch.full_like(colours, 240))
    image = Image.fromarray(picture.to(torch.uint8).numpy())
    return image.resize((image.width * side, image.height * side), Image.Resampling.NEAREST)


def _planes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Planes, rows and columns in which a grid of up to three axes is drawn; longer ones join their leading axes."""
    padded = (1, 1, *shape)
    return math.prod(padded[:-2]), padded[-2], padded[-1]


def _step_colour(step: int, total: int) -> tuple[int, int, int]:
    hue = 0.75 * (1.0 - step / max(total - 1, 1))
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.45, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text`` on lines of at most ``width`` pixels, broken between words; what a word or the last line has too much is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LABEL_LINES:
        lines = [*lines[: _LABEL_LINES - 1], " ".join(lines[_LABEL_LINES - 1 :])]
    return "\n".join(_cut(line, width, font) for line in lines)


def _cut(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
