"""Any folder of videos: mp4, avi, webm, mov, mkv and gif files through PyAV, or folders of numbered frames."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vargen.data.folder import EXTENSIONS as IMAGES
from vargen.data.folder import ImageFolder, read_image
from vargen.errors import DataError
from vargen.noise import Noise

EXTENSIONS = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))


class VideoFolder(ImageFolder):
    """Clips of ``frames`` consecutive frames from the videos below ``root``, resized on the short side and cropped to a square.

    Classes, captions, splits and broken files are treated as in :class:`ImageFolder`. Inside a class folder a video is a file, or a
    folder of images whose sorted names are its frames.

    Args:
        root, size, split, crop, flip, holdout, classes, seed: as in :class:`ImageFolder`.
        frames: frames per clip; a shorter video repeats its last frame.
        stride: take every ``stride``-th frame.
        start: where a clip starts, ``random`` (by epoch and index), or ``first``.

    Raises:
        DataError: no such folder, no readable video, or sizes below one.
    """

    extensions = EXTENSIONS
    noun = "video"

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 128,
        frames: int = 16,
        stride: int = 1,
        start: str = "random",
        split: str = "all",
        crop: str = "center",
        flip: bool = False,
        holdout: float = 0.1,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if frames < 1 or stride < 1:
            raise DataError(f"frames {frames}, stride {stride}: expected at least 1")
        if start not in ("random", "first"):
            raise DataError(f"start '{start}': expected random or first")
        self.frames, self.stride, self.start = frames, stride, start
        super().__init__(root, size, split, crop, flip, holdout, classes, seed)
        self.sample_shape = (frames, size, size)

    def _files(self, folder: Path) -> list[Path]:
        """Video files, and folders that hold images, below a class folder."""
        found = []
        for place, _, names in os.walk(folder, followlinks=True):
            found += [Path(place) / n for n in names if Path(n).suffix.lower() in EXTENSIONS and not n.startswith(".")]
            if Path(place) != folder and any(Path(n).suffix.lower() in IMAGES - EXTENSIONS for n in names):
                found.append(Path(place))
        return sorted(found)

    def _load(self, path: Path, index: int, epoch: int) -> list[Image.Image]:
        u = Noise(self.seed, [index]).uniform("folder/start", at=(epoch,)).item() if self.start == "random" else 0.0
        return read_clip(path, self.frames, self.stride, u)

    def _pixels(self, media: Any, index: int, epoch: int) -> Tensor:
        return torch.stack([self._crop(frame, index, epoch) for frame in media], dim=1)


def read_clip(path: str | os.PathLike[str], frames: int, stride: int = 1, start: float = 0.0) -> list[Image.Image]:
    """``frames`` RGB frames, ``stride`` apart, of a video file or a folder of frames.

    Args:
        start: in [0, 1), where the clip starts among the places that leave room for it. A video that is too short repeats its
            last frame.

    Raises:
        DataError: the file is no video, is truncated before the clip, or holds no frame.
    """
    path = Path(path)
    span = (frames - 1) * stride + 1
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGES - EXTENSIONS), key=_number)
        first = math.floor(start * max(len(files) - span + 1, 1))
        clip = [read_image(p) for p in files[first : first + span : stride]]
    else:
        first = math.floor(start * max(count_frames(path) - span + 1, 1)) if start else 0
        clip = [Image.fromarray(f) for f in _decode(path, first, first + span, stride)]
    if not clip:
        raise DataError("holds no frames")
    return clip + [clip[-1]] * (frames - len(clip))


def count_frames(path: str | os.PathLike[str]) -> int:
    """Number of frames, from the file's header or else by counting packets; nothing is decoded.

    Raises:
        DataError: the file is no video.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def _decode(path: Path, first: int, stop: int, stride: int) -> Iterator[np.ndarray]:
    with _open(path) as container:
        try:
            for number, frame in enumerate(container.decode(container.streams.video[0])):
                if number >= stop:
                    return
                if number >= first and (number - first) % stride == 0:
                    # a copy: the decoder may reuse the frame's memory
                    yield frame.to_ndarray(format="rgb24").copy()
        except Exception as error:  # codecs raise errors of many kinds for damaged data
            raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:120] or type(error).__name__})") from error


def _open(path: str | os.PathLike[str]) -> Any:
    import av

    try:
        container = av.open(str(path))
    except (OSError, ValueError, av.FFmpegError) as error:
        raise DataError(f"is no video ({' '.join(str(error).split())[:120]})") from error
    if not container.streams.video:
        container.close()
        raise DataError("holds no video stream")
    return container


def _number(path: Path) -> tuple[int, str]:
    """Frames by number where names end in one (frame2 before frame10), else by name."""
    digits = "".join(c for c in path.stem if c.isdigit())
    return (int(digits) if digits else -1, path.name)
