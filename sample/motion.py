"""Moving pictures: GIF animations, and mp4 videos through PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import GifImagePlugin, Image
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.errors import DataError, VargenError
from vargen.sample.picture import to_uint8

# the application extension that makes viewers repeat for ever
_ENDLESS = b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"


def frames_of(pixels: Tensor) -> np.ndarray:
    """Video pixels ``(B, 3, T, H, W)`` in [-1, 1] to uint8 frames ``(B, T, H, W, 3)``."""
    if pixels.dim() != 5:
        raise VargenError(f"video pixels of shape {tuple(pixels.shape)}: expected (B, 3, T, H, W)")
    return to_uint8(pixels.transpose(1, 2))


def save_gif(frames: Sequence[Image.Image], path: str | Path, fps: float = 8.0, hold: float = 1.0) -> None:
    """Writes an endless GIF whose last frame stays for ``hold`` seconds; frames have one size, and a palette each.

    Frames are written one by one, as Pillow's own animations melt equal frames into one and a still clip would lose its length.
    """
    if not frames:
        raise VargenError("an animation of no frames: expected at least one")
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(hold, 1 / fps))]
    flat = [frame if frame.mode == "P" else frame.convert("P", palette=Image.Palette.ADAPTIVE) for frame in frames]

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.writelines(GifImagePlugin.getheader(flat[0])[0])
            file.write(_ENDLESS)
            for frame, duration in zip(flat, durations):
                file.writelines(GifImagePlugin.getdata(frame, include_color_table=True, duration=duration))
            file.write(b";")

    atomic_write(path, write)


def save_video(frames: np.ndarray, path: str | Path, fps: float = 8.0) -> None:
    """Writes frames ``(T, H, W, 3)`` uint8 as H.264 mp4.

    The pixel format is 4:2:0 as players expect, for which an odd height or width is padded by repeating its last row or column.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VargenError(f"video frames {frames.dtype} {frames.shape}: expected uint8 (T, H, W, 3) with T >= 1")
    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    def write(temporary: Path) -> None:
        with av.open(str(temporary), mode="w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "12"})
            stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], "yuv420p"
            for frame in even:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())

    atomic_write(path, write)


def read_frames(path: str | Path) -> np.ndarray:
    """Frames ``(T, H, W, 3)`` uint8 of a video file's first stream.

    Raises:
        DataError: missing, unreadable, or without a frame.
    """
    try:
        with av.open(str(path)) as container:
            # each frame is copied before the container closes: PyAV reuses its buffers
            frames = [frame.to_ndarray(format="rgb24").copy() for frame in container.decode(video=0)]
    except (FFmpegError, OSError, IndexError) as error:
        raise DataError(f"'{path}' is not a readable video ({error})") from error
    if not frames:
        raise DataError(f"'{path}' holds no frame")
    return np.stack(frames)
