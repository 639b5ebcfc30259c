"""Editing: from a picture and a mask to the tokens that a generator keeps (inpainting, outpainting, class-conditional editing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import reduce
from PIL import Image
from torch import Tensor

from vargen.condition import Condition, TextFeatures
from vargen.errors import VargenError
from vargen.model import Generator, VisualTokenizer
from vargen.noise import Noise

Pictures: TypeAlias = Tensor | np.ndarray | Image.Image | Sequence[Image.Image]
ADVICE = "edit with a masked system such as MAR, Hi-MAR or MaskGIT"


@dataclass(frozen=True)
class Edit:
    """A picture of which a part is drawn anew.

    Attributes:
        pixels: ``(B, 3, H, W)`` in [-1, 1]; mask: bool ``(B, 1, H, W)``, True where it is drawn anew.
        known: bool ``(B, *grid)``, the tokens that are kept: those whose whole patch lies outside the mask.
        tokens: ``(B, *token_shape)``, of the whole picture.
    """

    pixels: Tensor
    mask: Tensor
    known: Tensor
    tokens: Tensor

    def arguments(self, model: Generator, condition: Condition) -> tuple[Condition, dict[str, Any]]:
        """The condition and options that make ``model.generate`` keep the known tokens.

        Raises:
            VargenError: a model that cannot keep them.
        """
        name = type(model).__name__
        if model.edits:
            return condition, {"known": self.known, "tokens": self.tokens}
        if "tokens" not in model.conditioning or not hasattr(model, "layout"):
            raise VargenError(f"{name} cannot keep a part of a picture: {ADVICE}")
        order = model.layout.order  # type: ignore[union-attr]
        known, count = self.known.flatten(1), int(self.known[0].sum())
        first = order.cells[:count].to(known.device)
        if not (known.sum(1) == count).all() or not known[:, first].all():
            raise VargenError(
                f"{name} draws its tokens in a fixed order and can only go on from its first ones, which the part to keep is not: "
                + ADVICE
            )
        return replace(condition, tokens=self.tokens.flatten(1)[:, first]), {}

    def paste(self, painted: Tensor) -> Tensor:
        """Painted pixels ``(B, 3, H, W)`` inside the mask, the picture's own outside."""
        return torch.where(self.mask, painted, self.pixels.to(painted.dtype))


@torch.no_grad()
def read_edit(
    tokenizer: VisualTokenizer, image: Pictures | None, mask: Any, batch_size: int, text: TextFeatures | None, noise: Noise
) -> Edit:
    """Encodes a picture and finds which of its tokens are known.

    One picture or mask serves the whole batch. All of the picture is encoded, also what lies under the mask: tokens just outside of
    it have seen some pixels inside, as far as the tokenizer's encoder looks.

    Args:
        image: see :func:`as_pictures`; mask: see :func:`as_masks`; both of the size that the tokenizer is made for.

    Raises:
        VargenError: one without the other, sizes or numbers that do not fit, a mask that is empty or leaves no whole token, or a
            tokenizer whose tokens have no place in the picture.
    """
    if image is None or mask is None:
        raise VargenError("editing needs both image=... and mask=..., which is white (or True) where the picture is drawn anew")
    name, size, grid = type(tokenizer).__name__, tuple(tokenizer.sample_shape), tokenizer.space.shape
    if tokenizer.video:
        raise VargenError("this model draws videos: image and mask edit images")
    if len(grid) != len(size) or any(side % cells for side, cells in zip(size, grid)):
        raise VargenError(f"the tokens of {name} do not stand for patches of the picture, so that no part of it can be kept")
    pixels, hole = as_pictures(image), as_masks(mask)
    for what, shape in (("image", pixels.shape[2:]), ("mask", hole.shape[1:])):
        if tuple(shape) != size:
            raise VargenError(f"{what} of {'x'.join(map(str, shape))} pixels: expected {'x'.join(map(str, size))}; resize it first")
    for what, count in (("images", len(pixels)), ("masks", len(hole))):
        if count not in (1, batch_size):
            raise VargenError(f"{count} {what} for {batch_size} samples: expected one, or one each")
    known = known_cells(hole, grid)
    if not hole.flatten(1).any(1).all():
        raise VargenError("the mask is empty: nothing would be drawn anew; it is white (or True) where it is to be drawn")
    if not known.flatten(1).any(1).all():
        patch = "x".join(str(side // cells) for side, cells in zip(size, grid))
        raise VargenError(f"the mask touches every patch of {patch} pixels, so that nothing is kept: sample without image and mask")
    device = tokenizer.device
    pixels = pixels.to(device).expand(batch_size, -1, -1, -1)
    tokens = tokenizer.encode(pixels.to(tokenizer.dtype), text if tokenizer.takes_text else None, noise)
    hole, known = (v.to(device).expand(batch_size, -1, -1) for v in (hole, known))
    return Edit(pixels, hole.unsqueeze(1), known, tokens)


def known_cells(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens none of whose pixels is masked: bool ``(B, h, w)`` of a mask ``(B, H, W)``."""
    touched = reduce(mask.float(), "b (h p) (w q) -> b h w", "max", h=grid[0], w=grid[1])
    return touched == 0


def as_pictures(image: Pictures) -> Tensor:
    """Pixels ``(B, 3, H, W)`` in [-1, 1].

    Args:
        image: pixels ``(3, H, W)`` or ``(B, 3, H, W)`` in [-1, 1], an array ``(H, W, 3)`` or ``(B, H, W, 3)`` of uint8 or of floats
            in [0, 1], a PIL image, or a list of PIL images of one size.

    Raises:
        VargenError: anything else, or NaN.
    """
    if isinstance(image, Tensor):
        pixels = image if image.dim() == 4 else image[None]
        if pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise VargenError(f"image {image.dtype} {tuple(image.shape)}: expected pixels (B, 3, H, W) or (3, H, W) in [-1, 1]")
    elif isinstance(image, np.ndarray):
        array = image if image.ndim == 4 else image[None]
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype.kind not in "uf":
            raise VargenError(f"image {image.dtype} {image.shape}: expected (B, H, W, 3) or (H, W, 3), uint8 or floats in [0, 1]")
        values = torch.from_numpy(np.ascontiguousarray(array)).float() / (255 if array.dtype.kind == "u" else 1)
        pixels = values.permute(0, 3, 1, 2) * 2 - 1
    else:
        return as_pictures(np.stack(_arrays(image, "RGB", "image")))
    if not torch.isfinite(pixels).all():
        raise VargenError("image holds NaN or infinity: expected pixels in [-1, 1]")
    return pixels.float().clamp(-1, 1)


def as_masks(mask: Any) -> Tensor:
    """bool ``(B, H, W)``, True where the picture is drawn anew.

    Args:
        mask: a bool tensor or array ``(H, W)`` or ``(B, H, W)``; numbers, of which those from the middle of [0, 1] (of [0, 255] for
            uint8) on are True; a PIL image, whose white is True; or a list of PIL images of one size.

    Raises:
        VargenError: anything else, or NaN.
    """
    if not isinstance(mask, Tensor | np.ndarray):
        return as_masks(np.stack(_arrays(mask, "L", "mask")))
    values = torch.as_tensor(mask)
    values = values if values.dim() == 3 else values[None]
    if values.dim() != 3 or values.is_complex():
        raise VargenError(f"mask {mask.dtype} {tuple(mask.shape)}: expected (B, H, W) or (H, W)")
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise VargenError("mask holds NaN or infinity: expected True or 1 where the picture is drawn anew, False or 0 elsewhere")
    return values if values.dtype == torch.bool else values >= (128 if values.dtype == torch.uint8 else 0.5)


def _arrays(images: Any, mode: str, what: str) -> list[np.ndarray]:
    """uint8 arrays of PIL images of one size."""
    pictures = [images] if isinstance(images, Image.Image) else list(images) if isinstance(images, Sequence) else []
    if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
        raise VargenError(f"{what} is a {type(images).__name__}: expected a PIL image, a list of PIL images, an array or a tensor")
    if len({picture.size for picture in pictures}) > 1:
        raise VargenError(f"{what}: expected pictures of one size, got {sorted({picture.size for picture in pictures})}")
    return [np.asarray(picture.convert(mode)) for picture in pictures]
