import av
import numpy as np
import pytest
import torch
from PIL import Image

from vargen.data.base import build_dataset
from vargen.data.video import VideoFolder, count_frames, read_clip
from vargen.errors import DataError


def frames(count, width=24, height=16):
    """Frames whose grey level tells their number."""
    return [np.full((height, width, 3), 10 * i, dtype=np.uint8) for i in range(count)]


def write(path, count=12, codec="libx264", pixel_format="yuv420p"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 24, 16, pixel_format
        for image in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
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
    return [round(float(np.asarray(f, dtype=float).mean()) / 10) for f in clip]


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
    assert item["pixels"].mean((0, 2, 3)).diff().min() > 0.05


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
