from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vargen.errors import DataError, VargenError
from vargen.layout import hybrid
from vargen.order import Order
from vargen.sample.motion import frames_of, read_frames, save_gif, save_video
from vargen.sample.picture import (
    draw_mask,
    draw_order,
    enlarge,
    from_image,
    grid,
    save_image,
    side_by_side,
    to_images,
    to_uint8,
)


def test_conversion_clamps_and_truncates() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 3.0, -1 + 1 / 255, -1 + 0.99 / 255])
    pixels = values.expand(3, 1, -1)
    assert to_uint8(pixels)[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255, 1, 0]


def test_all_bytes_survive_a_round_trip() -> None:
    array = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert (to_uint8(from_image(Image.fromarray(array))) == array).all()


def test_batches_and_videos_put_channels_last() -> None:
    pixels = torch.rand(2, 3, 4, 5, 6) * 2 - 1
    frames = frames_of(pixels)
    assert frames.shape == (2, 4, 5, 6, 3)
    assert (frames[1, 2] == to_uint8(pixels[1, :, 2])).all()
    assert to_images(pixels[:, :, 0])[0].size == (6, 5)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 4, 4), torch.zeros(2, 1, 4, 4), torch.full((3, 4, 4), torch.nan)])
def test_unusable_pixels_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(VargenError):
        to_uint8(pixels)


def test_small_images_are_enlarged_by_whole_factors() -> None:
    assert enlarge(Image.new("RGB", (30, 20)), 128).size == (120, 80)
    assert enlarge(Image.new("RGB", (300, 20)), 128).size == (300, 20)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_grid_shows_every_image_in_reading_order(count: int) -> None:
    colors = [(20 * i + 10, 0, 0) for i in range(count)]
    sheet = grid([Image.new("RGB", (8, 8), color) for color in colors], side=8)
    seen = []
    for y in range(4, sheet.height, 12):
        for x in range(4, sheet.width, 12):
            color = sheet.getpixel((x + 4, y + 4)) if x + 4 < sheet.width and y + 4 < sheet.height else None
            if color in colors:
                seen.append(color)
    assert seen == colors


def test_grid_labels_need_one_each_and_may_be_long() -> None:
    image = Image.new("RGB", (32, 32))
    with pytest.raises(VargenError, match="1 labels for 2 images"):
        grid([image, image], ["a"])
    with pytest.raises(VargenError, match="no images"):
        grid([])
    short, long = grid([image], ["a"]), grid([image], ["word " * 50 + "x" * 500])
    assert short.width == long.width
    assert short.height < long.height < short.height + 40


def test_side_by_side_has_a_row_for_each_sample() -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    sheet = side_by_side([[red, blue], [blue, red]], ["original", "again"], ["first", "second"])
    colors = sheet.getcolors(100000)
    counts = {color: count for count, color in colors}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 2 * 128 * 128


@pytest.mark.parametrize(
    ("order", "size"),
    [
        (Order.neighbors((4, 6)), (6 * 20 + 8, 4 * 20 + 8)),
        (Order.raster((5,)), (5 * 20 + 8, 28)),
        (Order.frames((3, 2, 2)), (3 * 44 + 4, 2 * 20 + 8)),
        (Order.scales([(1, 1), (2, 2)]), (2 * 20 + 8, 20 + 4 + 40 + 8)),
    ],
)
def test_orders_are_drawn(order: Order, size: tuple[int, int]) -> None:
    picture = draw_order(order, side=20)
    assert picture.size == size
    # cells of one step share a colour, and every step has its own
    corners = {picture.getpixel((x, y)) for y in range(4, picture.height, 4) for x in range(4, picture.width, 4)}
    assert len(corners) > order.num_steps


def test_files_are_written_atomically(tmp_path: Path) -> None:
    save_image(Image.new("RGB", (4, 4), "red"), tmp_path / "deep/er/a.png")
    assert Image.open(tmp_path / "deep/er/a.png").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(VargenError, match="cannot write"):
        save_image(Image.new("RGB", (4, 4)), tmp_path / "file/a.png")
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == ["a.png"]


def test_gif_keeps_every_frame_and_holds_the_last(tmp_path: Path) -> None:
    save_gif([Image.new("RGB", (8, 8), (80 * i, 0, 0)) for i in range(3)], tmp_path / "a.gif", fps=10, hold=1.5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3
        durations = []
        for index in range(3):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert durations == [100, 100, 1500]


def test_still_clips_keep_their_frames(tmp_path: Path) -> None:
    still = [Image.new("RGB", (8, 8), (200, 100, 50))] * 5
    save_gif(still, tmp_path / "a.gif", fps=10, hold=0)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["duration"] == 100
        assert gif.info["loop"] == 0
    frames = read_frames(tmp_path / "a.gif")
    assert frames.shape == (5, 8, 8, 3)
    assert np.abs(frames.astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("size", [(32, 48), (33, 17)])
def test_video_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(*size, 1).repeat(3, axis=2)
    frames = np.stack([np.roll(ramp, 3 * t, axis=0) for t in range(5)]).astype(np.uint8)
    save_video(frames, tmp_path / "a.mp4", fps=12.5)
    read = read_frames(tmp_path / "a.mp4")[:, : size[0], : size[1]]
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 8


def test_unreadable_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for name in ("a.mp4", "missing.mp4"):
        with pytest.raises(DataError, match="not a readable video"):
            read_frames(tmp_path / name)
    with pytest.raises(VargenError, match="expected uint8"):
        save_video(np.zeros((2, 8, 8, 3)), tmp_path / "b.mp4")


def test_a_mask_is_dark_where_a_slot_is_seen():
    layout = hybrid((2, 4), 4, 1)
    picture = np.asarray(draw_mask(layout, side=1)).astype(int)
    assert picture.shape == (layout.num_inputs, layout.num_inputs, 3)
    seen = picture.min(-1) < 240
    assert (seen == layout.mask().numpy()).all()
    blue, red = picture[-1, 0], picture[-1, layout.num_inputs - 1]
    assert blue[2] > blue[0]
    assert red[0] > red[2]
