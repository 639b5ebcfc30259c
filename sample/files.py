"""Drawn samples as files: PNG images; videos as mp4, gif or a folder of PNG frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vargen.checkpoint import atomic_directory
from vargen.errors import DataError, VargenError
from vargen.sample.motion import frames_of, read_frames, save_gif, save_video
from vargen.sample.picture import save_image, to_images

VIDEO_FORMATS = ("mp4", "gif", "frames")


def pick_format(name: str | None, video: bool) -> str:
    """The format of a job: what the user asked for, else mp4 of videos and png of images.

    Raises:
        VargenError: a format that does not hold such samples.
    """
    known = VIDEO_FORMATS if video else ("png",)
    if name is not None and name not in known:
        raise VargenError(f"format '{name}': this model draws {'videos' if video else 'images'}, expected {' or '.join(known)}")
    return name or known[0]


def save_sample(pixels: Tensor, folder: Path, index: int, form: str, fps: float) -> str:
    """Writes sample ``index``, pixels ``(3, (T,) H, W)`` in [-1, 1], atomically; returns its name within ``folder``.

    Args:
        form: ``png`` of images; ``mp4``, ``gif`` (256 colours a frame) or ``frames`` (lossless) of videos.
        fps: frames per second of videos; folders of frames have no rate.
    """
    stem = f"{index:06d}"
    if form == "png":
        save_image(to_images(pixels[None])[0], folder / f"{stem}.png")
        return f"{stem}.png"
    frames = frames_of(pixels[None])[0]
    if form == "mp4":
        save_video(frames, folder / f"{stem}.mp4", fps)
        return f"{stem}.mp4"
    if form == "gif":
        save_gif([Image.fromarray(frame) for frame in frames], folder / f"{stem}.gif", fps, hold=0)
        return f"{stem}.gif"
    with atomic_directory(folder / stem) as temporary:
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(temporary / f"{number:04d}.png")
    return stem


def read_video(path: Path) -> np.ndarray:
    """Frames ``(T, H, W, 3)`` uint8 of a sample that :func:`save_sample` wrote in any of the video formats.

    Raises:
        DataError: it cannot be read.
    """
    if not path.is_dir():
        return read_frames(path)
    files = sorted(path.glob("*.png"))
    if not files:
        raise DataError(f"'{path}' holds no frame: delete it and run again")
    try:
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is not a readable folder of frames ({error}): delete it and run again") from error
