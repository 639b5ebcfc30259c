"""Any folder of videos: mp4, avi, webm, mov, mkv and gif files through PyAV, or folders of numbered frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
        stride: take every ``stride``-th frame; or
        fps: take frames at this rate by their time in the file, whatever its own rate is, constant or not. Folders of frames have
            no times and are taken frame by frame.
        start: where a clip starts, ``random`` (by epoch and index), or ``first``.

    Raises:
        DataError: no such folder, no readable video, sizes below one, or both a stride and a rate.
    """

    extensions = EXTENSIONS
    noun = "video"

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 128,
        frames: int = 16,
        stride: int = 1,
        fps: float | None = None,
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
        if fps is not None and (stride != 1 or not 0 < fps < math.inf):
            raise DataError(f"fps {fps}, stride {stride}: expected a positive rate and no stride beside it")
        self.frames, self.stride, self.fps, self.start = frames, stride, fps, start
        super().__init__(root, size, split, crop, flip, holdout, classes, seed)
        self.sample_shape = (frames, size, size)

    def _files(self, folder: Path) -> list[Path]:
        """Video files, and folders that hold images, below a class folder."""
        return video_files(folder)

    def _load(self, path: Path, index: int, epoch: int) -> list[Image.Image]:
        u = Noise(self.seed, [index]).uniform("folder/start", at=(epoch,)).item() if self.start == "random" else 0.0
        return read_clip(path, self.frames, self.stride, u, self.fps)

    def _pixels(self, media: Any, index: int, epoch: int) -> Tensor:
        return torch.stack([self._crop(frame, index, epoch) for frame in media], dim=1)


def video_files(folder: Path) -> list[Path]:
    """Video files, and folders that hold images, below ``folder``, sorted."""
    found = []
    for place, _, names in os.walk(folder, followlinks=True):
        found += [Path(place) / n for n in names if Path(n).suffix.lower() in EXTENSIONS and not n.startswith(".")]
        if Path(place) != folder and any(Path(n).suffix.lower() in IMAGES - EXTENSIONS for n in names):
            found.append(Path(place))
    return sorted(found)


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """All frames ``(T, H, W, 3)`` uint8 of a video file or a folder of frames.

    Raises:
        DataError: no video, damaged, without frames, or with frames of different sizes.
    """
    path = Path(path)
    clip = [_read_frame(p) for p in _frame_files(path)] if path.is_dir() else _decode(path, range(count_frames(path)))
    if not clip:
        raise DataError("holds no frames")
    if len({frame.size for frame in clip}) > 1:
        raise DataError(f"has frames of different sizes {sorted({frame.size for frame in clip})}")
    return np.stack([np.asarray(frame) for frame in clip])


def read_clip(
    path: str | os.PathLike[str], frames: int, stride: int = 1, start: float = 0.0, fps: float | None = None, pad: bool = True
) -> list[Image.Image]:
    """``frames`` RGB frames, ``stride`` apart or at ``fps`` frames a second, of a video file or a folder of frames.

    Args:
        start: in [0, 1), where the clip starts among the places that leave room for it.
        pad: a video that is too short repeats its last frame; without it is refused.

    Raises:
        DataError: the file is no video, is truncated before the end of the clip, or holds no frame, or too few.
    """
    path = Path(path)
    span = (frames - 1) * stride + 1
    if path.is_dir():
        files = _frame_files(path)
        first = math.floor(start * max(len(files) - span + 1, 1))
        clip = [_read_frame(p) for p in files[first : first + span : stride]]
    elif fps is not None:
        clip = _decode(path, _at_rate(frame_times(path), frames, fps, start))
    else:
        first = math.floor(start * max(count_frames(path) - span + 1, 1)) if start else 0
        clip = _decode(path, range(first, first + span, stride))
    if not clip:
        raise DataError("holds no frames")
    if len(clip) < frames and not pad:
        raise DataError(f"holds {len(clip)} frames: expected at least {frames}")
    return clip + [clip[-1]] * (frames - len(clip))


def count_frames(path: str | os.PathLike[str]) -> int:
    """Number of frames, from the file's header or else by counting packets; nothing is decoded.

    Raises:
        DataError: the file is no video.
    """
    if Path(path).is_dir():
        return len(_frame_files(Path(path)))
    with _open(path) as container:
        stream = container.streams.video[0]
        return stream.frames or sum(1 for packet in container.demux(stream) if packet.size)


def frame_times(path: str | os.PathLike[str]) -> np.ndarray:
    """When each frame of a video file is shown, seconds in rising order, by the packets' time stamps; nothing is decoded.

    Raises:
        DataError: the file is no video, or its packets have no times.
    """
    with _open(path) as container:
        stream = container.streams.video[0]
        stamps = [p.pts if p.pts is not None else p.dts for p in container.demux(stream) if p.size]
        if any(stamp is None for stamp in stamps):
            raise DataError("has frames without time stamps: read it without fps")
        return np.sort(np.array(stamps, dtype=np.float64)) * float(stream.time_base)


def _at_rate(times: np.ndarray, frames: int, fps: float, start: float) -> list[int]:
    """Numbers of the frames that are on screen at up to ``frames`` moments, 1 / fps apart; those past the end are left out."""
    if not len(times):
        return []
    length = (frames - 1) / fps
    moments = times[0] + start * max(times[-1] - times[0] - length, 0.0) + np.arange(frames) / fps
    # a moment that is a frame's own time up to rounding is that frame's
    slack = 1e-3 / fps
    return (np.searchsorted(times, moments[moments <= times[-1] + slack] + slack, side="right") - 1).tolist()


def _decode(path: Path, numbers: Sequence[int]) -> list[Image.Image]:
    """The frames of a video file with these numbers, in rising order; those past its end are left out."""
    clip: list[Image.Image] = []
    with _open(path) as container:
        stream = container.streams.video[0]
        declared, count = stream.frames, 0
        try:
            for frame in container.decode(stream):
                # a copy: the decoder may reuse the frame's memory
                image = Image.fromarray(frame.to_ndarray(format="rgb24").copy()) if count == numbers[len(clip)] else None
                while image is not None and len(clip) < len(numbers) and numbers[len(clip)] == count:
                    clip.append(image)
                count += 1
                if len(clip) == len(numbers):
                    break
        except Exception as error:  # codecs raise errors of many kinds for damaged data
            raise DataError(f"cannot be decoded ({' '.join(str(error).split())[:120] or type(error).__name__})") from error
    if len(clip) < len(numbers) and count < declared:
        raise DataError(f"is truncated: {count} of its {declared} frames can be read")
    return clip


def _read_frame(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except DataError as error:
        raise DataError(f"has a frame '{path.name}' that {error}") from error


def _frame_files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES - EXTENSIONS), key=_number)


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
