from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from vargen.data.base import build_dataset
from vargen.data.video import VideoFolder, count_frames, frame_times, read_clip
from vargen.errors import DataError


def frames(count, width=24, height=16):
    """Frames whose grey level tells their number."""
    return [np.full((height, width, 3), 8 * i, dtype=np.uint8) for i in range(count)]


def write(path, count=12, codec="libx264", pixel_format="yuv420p", rate=8, times=None, options=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 24, 16, pixel_format
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(frames(count)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "left" / "a.mp4")
    write(tmp_path / "left" / "b.avi", codec="mpeg4")
    write(tmp_path / "right" / "c.webm", codec="libvpx")
    gif = [Image.fromarray(f) for f in frames(5)]
    gif[0].save(tmp_path / "right" / "d.gif", save_all=True, append_images=gif[1:], duration=100)
    clip = tmp_path / "right" / "e"
    clip.mkdir()
    for i, f in enumerate(frames(11)):
        Image.fromarray(f).save(clip / f"frame{i}.png")
    return tmp_path


def levels(clip):
    return [round(float(np.asarray(f, dtype=float).mean()) / 8) for f in clip]


def test_every_container_and_a_folder_of_frames(folder):
    for name in ("left/a.mp4", "left/b.avi", "right/c.webm", "right/d.gif", "right/e"):
        assert levels(read_clip(folder / name, 4)) == [0, 1, 2, 3], name
        assert levels(read_clip(folder / name, 3, stride=2)) == [0, 2, 4], name
    assert count_frames(folder / "left" / "a.mp4") == 12
    assert levels(read_clip(folder / "left" / "a.mp4", 4, start=0.999)) == [8, 9, 10, 11]
    assert levels(read_clip(folder / "right" / "e", 4, start=0.5)) == [4, 5, 6, 7]
    assert levels(read_clip(folder / "right" / "d.gif", 7)) == [0, 1, 2, 3, 4, 4, 4], "short clips repeat their last frame"


def test_items_are_clips_with_labels(folder):
    dataset = build_dataset("video", root=folder, size=8, frames=4, start="first")
    assert dataset.classes == ["left", "right"]
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1]
    assert dataset.sample_shape == (4, 8, 8)
    item = dataset[0]
    assert item["pixels"].shape == (3, 4, 8, 8)
    assert item["class_label"] == 0
    assert item["pixels"].mean((0, 2, 3)).diff().min() > 0.04


def test_random_starts_depend_on_index_and_epoch_alone(folder):
    dataset = VideoFolder(folder, size=8, frames=2, crop="random", flip=True)
    first = [dataset.get(0, epoch)["pixels"] for epoch in range(8)]
    again = VideoFolder(folder, size=8, frames=2, crop="random", flip=True)
    assert all(torch.equal(a, again.get(0, epoch)["pixels"]) for epoch, a in enumerate(first))
    assert len({round(float(a.mean()), 2) for a in first}) > 2


def test_broken_videos_are_replaced_and_counted(folder):
    content = (folder / "left" / "a.mp4").read_bytes()
    (folder / "left" / "broken.mp4").write_bytes(content[:200])
    (folder / "left" / "empty.mp4").write_bytes(b"")
    (folder / "left" / "text.mp4").write_text("no video")
    dataset = VideoFolder(folder, size=8, frames=2, start="first")
    items = [dataset[i] for i in range(len(dataset))]
    assert all(item["pixels"].isfinite().all() for item in items)
    assert set(dataset.skipped) == {"left/broken.mp4", "left/empty.mp4", "left/text.mp4"}


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        VideoFolder(tmp_path / "none")
    with pytest.raises(DataError, match="no readable video"):
        VideoFolder(tmp_path)
    with pytest.raises(DataError, match="at least 1"):
        VideoFolder(tmp_path, frames=0)
    with pytest.raises(DataError, match="random or first"):
        VideoFolder(tmp_path, start="last")


def test_frames_are_taken_by_their_time(tmp_path):
    write(tmp_path / "ntsc.mp4", 30, rate=Fraction(30000, 1001))
    assert np.diff(frame_times(tmp_path / "ntsc.mp4")) == pytest.approx(1001 / 30000, abs=1e-4)
    assert levels(read_clip(tmp_path / "ntsc.mp4", 4, fps=Fraction(10000, 1001)))[:4] == [0, 3, 6, 9]
    assert levels(read_clip(tmp_path / "ntsc.mp4", 4, fps=10, start=0.5)) == [10, 13, 16, 18]
    # a rate above the file's own shows frames twice; one that runs past the end repeats the last
    write(tmp_path / "slow.avi", 4, codec="mpeg4", rate=4)
    assert levels(read_clip(tmp_path / "slow.avi", 6, fps=8)) == [0, 0, 1, 1, 2, 2]
    assert levels(read_clip(tmp_path / "slow.avi", 6, fps=2)) == [0, 2, 2, 2, 2, 2]
    # frames that stay on screen for different times
    times = [0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2]
    write(tmp_path / "uneven.mkv", 7, times=times)
    assert frame_times(tmp_path / "uneven.mkv") == pytest.approx(times, abs=2e-3)
    assert levels(read_clip(tmp_path / "uneven.mkv", 5, fps=4)) == [0, 2, 3, 3, 4]
    gif = [Image.fromarray(f) for f in frames(4)]
    gif[0].save(tmp_path / "uneven.gif", save_all=True, append_images=gif[1:], duration=[100, 400, 100, 100])
    assert levels(read_clip(tmp_path / "uneven.gif", 4, fps=5)) == [0, 1, 1, 3]
    dataset = VideoFolder(tmp_path, size=8, frames=3, fps=5, start="first")
    assert all(dataset[i]["pixels"].shape == (3, 3, 8, 8) for i in range(len(dataset)))
    for options in ({"fps": 0}, {"fps": float("inf")}, {"fps": 8, "stride": 2}):
        with pytest.raises(DataError, match="expected a positive rate"):
            VideoFolder(tmp_path, **options)


def test_truncated_files_say_how_much_is_left(tmp_path):
    rng = np.random.default_rng(0)
    for name, codec, options in (
        ("a.mp4", "libx264", {"movflags": "faststart"}),
        ("b.avi", "mpeg4", {}),
        ("c.webm", "libvpx", {}),
        ("d.mkv", "libx264", {}),
    ):
        with av.open(str(tmp_path / name), "w", options=options) as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(24):
                image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert len(read_clip(tmp_path / name, 4)) == 4, "what comes before the damage can be read"
        with pytest.raises(DataError, match="truncated|cannot be decoded|holds [0-9]+ frames") as caught:
            read_clip(tmp_path / name, 24, pad=False)
        assert "\n" not in str(caught.value)


def test_files_without_frames_are_refused(tmp_path):
    with av.open(str(tmp_path / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames(1)[0], format="rgb24")))
        container.mux(stream.encode())
    content = (tmp_path / "none.mp4").read_bytes()
    (tmp_path / "none.mp4").write_bytes(content[: content.index(b"mdat")])
    with av.open(str(tmp_path / "sound.avi"), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        samples.rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    (tmp_path / "folder").mkdir()
    for name in ("none.mp4", "sound.avi", "folder"):
        with pytest.raises(DataError, match="is no video|no video stream|holds no frames"):
            read_clip(tmp_path / name, 4)
    write(tmp_path / "short.mp4", 3)
    assert levels(read_clip(tmp_path / "short.mp4", 3, pad=False)) == [0, 1, 2]
    with pytest.raises(DataError, match="holds 3 frames: expected at least 4"):
        read_clip(tmp_path / "short.mp4", 4, pad=False)


def test_frames_of_different_sizes_are_cropped_alike(tmp_path):
    clip = tmp_path / "left" / "clip"
    clip.mkdir(parents=True)
    for number, size in enumerate(((24, 16), (48, 32), (16, 16), (17, 31))):
        Image.new("RGB", size, (60 * number, 0, 0)).save(clip / f"{number}.png")
    pixels = VideoFolder(tmp_path, size=8, frames=4)[0]["pixels"]
    assert pixels.shape == (3, 4, 8, 8)
    assert ((pixels[0].mean((1, 2)) + 1) * 127.5).tolist() == pytest.approx([0, 60, 120, 180])
    (clip / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"frame '2\.png' that cannot be decoded"):
        read_clip(clip, 4)
    assert len(read_clip(clip, 2)) == 2
