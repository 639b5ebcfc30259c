"""Given frames of a clip: from what users pass to the condition of a model that continues them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vargen.condition import Condition
from vargen.errors import VargenError
from vargen.model import Generator, VisualTokenizer

Clips: TypeAlias = Tensor | np.ndarray | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]


def as_clips(video: Clips) -> Tensor:
    """Pixels ``(B, 3, T, H, W)`` in [-1, 1] of one clip or several.

    Args:
        video: pixels ``(3, T, H, W)`` or ``(B, 3, T, H, W)``, uint8 frames ``(T, H, W, 3)`` or ``(B, T, H, W, 3)``, a list of PIL
            frames, or a list of such lists.

    Raises:
        VargenError: anything else, frames of different sizes, clips of different lengths, or no frame.
    """
    if isinstance(video, Tensor):
        clips = video if video.dim() == 5 else video[None]
        if clips.dim() != 5 or clips.shape[1] != 3 or not clips.is_floating_point():
            raise VargenError(
                f"video {video.dtype} {tuple(video.shape)}: expected pixels (B, 3, T, H, W) or (3, T, H, W) in [-1, 1]"
            )
    elif isinstance(video, np.ndarray):
        if video.dtype != np.uint8 or video.ndim not in (4, 5) or video.shape[-1] != 3:
            raise VargenError(f"video {video.dtype} {video.shape}: expected uint8 frames (T, H, W, 3) or (B, T, H, W, 3)")
        frames = torch.from_numpy(video if video.ndim == 5 else video[None])
        clips = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    else:
        clips = as_clips(_stacked(list(video)))
    if not clips.numel():
        raise VargenError("video: expected at least one frame")
    if not torch.isfinite(clips).all():
        raise VargenError("video holds NaN or infinity: expected pixels in [-1, 1]")
    return clips


def _stacked(video: list[Any]) -> np.ndarray:
    """uint8 ``(B, T, H, W, 3)`` of lists of PIL frames."""
    clips = [list(clip) for clip in video] if video and not isinstance(video[0], Image.Image) else [video]
    if not all(isinstance(frame, Image.Image) for clip in clips for frame in clip) or not all(clips):
        raise VargenError(
            "video: expected pixels, uint8 frames, or a list of PIL images (or of such lists) with at least one frame"
        )
    sizes = {frame.size for clip in clips for frame in clip}
    lengths = {len(clip) for clip in clips}
    if len(sizes) > 1 or len(lengths) > 1:
        what = f"frames of different sizes {sorted(sizes)}" if len(sizes) > 1 else f"clips of different lengths {sorted(lengths)}"
        raise VargenError(f"video has {what}: expected the same of all")
    return np.stack([np.stack([np.asarray(frame.convert("RGB")) for frame in clip]) for clip in clips])


def check_given(model: Generator, tokenizer: VisualTokenizer, frames: int) -> None:
    """Raises VargenError unless the model can continue so many given frames, and says which number it takes."""
    name, painter = type(model).__name__, type(tokenizer).__name__
    if not tokenizer.video:
        raise VargenError(f"{painter} makes images: given frames need a model of videos")
    total, stride = tokenizer.sample_shape[0], tokenizer.causal_stride
    if "context" not in model.conditioning:
        if "tokens" not in model.conditioning:
            raise VargenError(f"{name} takes no given tokens, so that it cannot continue frames")
        if not stride:
            raise VargenError(f"a token of {painter} depends on the whole clip, so that {name} cannot continue its first frames")
        counts = list(range(1, total, stride))
        if frames not in counts:
            expected = f"1..{total - 1}" if stride == 1 else ", ".join(map(str, counts))
            raise VargenError(f"{frames} given frames of a clip of {total}: expected {expected}")
    elif not 1 <= frames < total:
        raise VargenError(f"{frames} given frames of a clip of {total}: expected 1..{total - 1}")


@torch.no_grad()
def continuation(model: Generator, tokenizer: VisualTokenizer, video: Clips) -> Condition:
    """The condition of given frames, to be joined with what else the model is conditioned on.

    Models that take ``tokens`` go on from the tokens of the frames; those that take a ``context`` (LARP) look at the tokens of a
    whole clip, whose last given frame is repeated to its end.

    Raises:
        VargenError: frames of another size or number than the model takes, or a model that cannot continue any.
    """
    clips = as_clips(video)
    check_given(model, tokenizer, clips.shape[2])
    total, *size = tokenizer.sample_shape
    if list(clips.shape[3:]) != size:
        height, width = clips.shape[3:]
        raise VargenError(f"given frames of {height}x{width} pixels: the model draws {size[0]}x{size[1]}; resize them first")
    clips = clips.to(tokenizer.device, tokenizer.dtype)
    if "context" in model.conditioning:
        rest = clips[:, :, -1:].expand(-1, -1, total - clips.shape[2], -1, -1)
        return Condition(context=tokenizer.encode(torch.cat([clips, rest], dim=2)))
    tokens = tokenizer.encode(clips).flatten(1)
    count = tokens.shape[1]
    # generators of given tokens carry their order; only one that ends every frame before the next begins has these cells first
    first = model.layout.order.cells[:count]  # type: ignore[union-attr, operator]
    if not torch.equal(first.sort().values, torch.arange(count)):
        raise VargenError(
            f"{type(model).__name__} begins later frames before it has ended the first ones, so that it cannot continue frames"
        )
    return Condition(tokens=tokens[:, first.to(tokens.device)])
