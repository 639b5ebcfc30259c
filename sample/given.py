"""The given frames of a sampling job: the first frames of video files or folders of frames, at the model's size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vargen.clips import check_given
from vargen.data.video import count_frames, read_clip
from vargen.errors import DataError, VargenError
from vargen.pipeline import VisualARPipeline
from vargen.sample.picture import from_image


@dataclass(frozen=True)
class Given:
    """The first frames of a clip.

    Attributes:
        file: a video file or a folder of frames.
        frames: how many of its frames are given.
        size: ``(height, width)`` that they are resized and cropped to.
        digest: short hash of their pixels, so that a job is not continued with a file that has changed.
    """

    file: str
    frames: int
    size: tuple[int, int]
    digest: str

    def pixels(self) -> Tensor:
        """``(3, frames, height, width)`` in [-1, 1]."""
        return _pixels(self.file, self.frames, self.size)


def read_given(pipe: VisualARPipeline, clips: Sequence[str | Path], frames: int | None) -> list[Given]:
    """The first ``frames`` frames of every clip, by default about the first half of what the model draws.

    Raises:
        DataError: no such file, no video, or fewer frames.
        VargenError: a model that cannot continue frames, or not so many.
    """
    if not clips:
        if frames is not None:
            raise VargenError("a number of given frames without a clip: give --frames CLIP")
        return []
    for clip in clips:
        if not Path(clip).exists():
            raise DataError(f"given frames: '{clip}' does not exist")
    tokenizer = pipe.visual_tokenizer
    frames = default_frames(pipe) if frames is None else frames
    check_given(pipe.model, tokenizer, frames)
    size = (int(tokenizer.sample_shape[1]), int(tokenizer.sample_shape[2]))
    given = []
    for clip in clips:
        pixels = _pixels(str(clip), frames, size)
        given.append(Given(str(clip), frames, size, hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).hexdigest()))
    return given


def default_frames(pipe: VisualARPipeline) -> int:
    """The largest number of frames up to half a clip that the model can be given: 4 of 8, or 5 of 9 where time is halved twice."""
    tokenizer = pipe.visual_tokenizer
    if not tokenizer.video:
        return 1
    total = tokenizer.sample_shape[0]
    stride = 1 if "context" in pipe.model.conditioning else tokenizer.causal_stride or 1
    return max(range(1, (total + 1) // 2 + 1, stride))


@lru_cache(maxsize=64)
def _pixels(file: str, frames: int, size: tuple[int, int]) -> Tensor:
    try:
        held = count_frames(file)
        if held < frames:
            raise DataError(f"holds {held} frames: expected at least {frames}; give fewer with --given")
        clip = read_clip(file, frames, pad=False)
    except DataError as error:
        raise DataError(f"given frames: '{file}' {error}") from error
    height, width = size
    fitted = [ImageOps.fit(frame, (width, height), Image.Resampling.BICUBIC) for frame in clip]
    return torch.stack([from_image(frame) for frame in fitted], dim=1)
