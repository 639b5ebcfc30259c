"""Tokens appearing in their order, in space and time: every decoding step of a batch as a frame of a GIF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vargen.model import StepInfo
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.sample.decoding import Decoder
from vargen.sample.job import Job, run_batch
from vargen.sample.motion import save_gif
from vargen.sample.picture import film, grid, to_images
from vargen.space import TokenSpace

SHOWN, SHOWN_VIDEOS = 16, 4
FILM_WIDTH = 640
FRAMES = 48
_UNKNOWN = 0.25  # pixel value of cells that have no token yet: a light grey


def write_animation(pipe: VisualARPipeline, job: Job, folder: Path, num: int, decoder: Decoder | None = None) -> Path:
    """``animation.gif`` of the job's first images (at most 16) in about 48 frames; of videos (at most 4), all frames of each clip
    are shown beside each other, so that one sees which of them are begun before others are done.

    The first batch is drawn again, which the job's fixed batch shape makes identical to the images on disk.
    """
    batch = range(job.batch_size)
    shown = min(num, job.batch_size, SHOWN_VIDEOS if pipe.visual_tokenizer.video else SHOWN)
    condition, _ = pipe.condition(**job.conditions(batch))
    condition, noise = condition.select(slice(shown)), Noise(job.seed, batch, pipe.device).select(slice(shown))
    paint = partial(pipe.paint, condition=condition, noise=noise)
    frames: list[Image.Image] = []

    def on_step(step: StepInfo) -> None:
        if step.index % max(1, step.total // FRAMES) == 0 and step.index + 1 < step.total:
            frames.append(_still(partial_pixels(paint, pipe.model.space, step.tokens[:shown], step.known)))

    frames.append(_still(run_batch(pipe, job, batch, on_step, decoder)[:shown]))
    path = folder / "animation.gif"
    save_gif(frames, path, hold=2.0)
    return path


def partial_pixels(paint: Callable[[Tensor], Tensor], space: TokenSpace, tokens: Tensor, known: Tensor) -> Tensor:
    """Pixels of unfinished tokens: decoded as they are, and grey as far as their cells are not ``known``.

    Tokens of an ordered space are decoded as the prefix that is known. Those of other 1D tokenizers, and of several levels, have no
    place of their own in the picture, which is then shown whole.

    Args:
        paint: decodes tokens to pixels ``(B, 3, (T,) H, W)``.
        tokens: ``(B, *token_shape)``, zeros where nothing is known.
        known: ``(*grid)`` in [0, 1].
    """
    if space.ordered:
        return paint(tokens[:, : max(1, int(known.sum()))])
    pixels = paint(tokens)
    if known.dim() != pixels.dim() - 2:
        return pixels
    mask = torch.nn.functional.interpolate(known[None, None].to(pixels), size=pixels.shape[2:], mode="nearest")
    return torch.lerp(torch.full_like(pixels, _UNKNOWN), pixels, mask)


def _still(pixels: Tensor) -> Image.Image:
    """A palette picture, so that many frames stay small in memory."""
    if pixels.dim() == 4:
        return grid(to_images(pixels)).quantize()
    films = [film(to_images(clip.transpose(0, 1))) for clip in pixels]
    return grid(films, columns=1, side=FILM_WIDTH).quantize()
