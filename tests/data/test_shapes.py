"""Shapes say what they show: captions and pixels agree by rules that only look at pixels."""

import pytest
import torch

from vargen.data.shapes import MOTIONS, POSITIONS, SHAPES, SIZES, Shapes, ShapesVideo, coverage, inside
from vargen.data.shapes_reader import (
    attributes_from_caption,
    attributes_from_pixels,
    check_captions,
    motion_from_pixels,
)
from vargen.errors import DataError


def _batch(dataset, count):
    items = [dataset[i] for i in range(count)]
    return torch.stack([i["pixels"] for i in items]), [i["caption"] for i in items], torch.tensor([i["class_label"] for i in items])


def _accuracy(verdicts):
    return {name: float(right.float().mean()) for name, right in verdicts.items()}


@pytest.mark.parametrize("size", [32, 64])
def test_pixels_show_what_captions_say(size):
    pixels, captions, labels = _batch(Shapes(size=size), 300)
    accuracy = _accuracy(Shapes().judge(pixels, captions=captions))
    assert min(accuracy.values()) >= 0.99, accuracy
    assert _accuracy(Shapes().judge(pixels, labels))["shape"] >= 0.99
    assert not Shapes().judge(pixels)


def test_rules_bear_noise_and_blur():
    pixels, captions, _ = _batch(Shapes(size=48), 200)
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    noisy = blurred + 0.05 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    accuracy = _accuracy(check_captions(noisy, captions))
    assert min(value for name, value in accuracy.items() if name != "all") >= 0.97, accuracy


def test_class_is_the_shape_of_the_caption():
    data = Shapes(size=16)
    assert data.classes == list(SHAPES)
    assert all(attributes_from_caption(data.scene(i)[1]).shape == SHAPES[i % 8] for i in range(64))


def test_every_word_occurs():
    seen = [attributes_from_caption(Shapes(size=16).scene(i)[1]) for i in range(400)]
    assert {s.size for s in seen} == set(SIZES)
    assert {s.position for s in seen} == set(POSITIONS)
    assert len({s.color for s in seen}) == 8
    assert len({s.background for s in seen}) == 6


@pytest.mark.parametrize("frames", [3, 8])
def test_videos_move_as_their_class_says(frames):
    data = ShapesVideo(size=32, frames=frames)
    pixels, captions, labels = _batch(data, 104)
    assert pixels.shape == (104, 3, frames, 32, 32)
    assert _accuracy(data.judge(pixels, labels))["motion"] >= 0.99
    assert all(MOTIONS[c] in text for c, text in zip(labels.tolist(), captions))


def test_same_scene_at_any_size_and_length():
    small, large = Shapes(size=32, length=8)[5]["pixels"], Shapes(size=64, length=900)[5]["pixels"]
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_box(shape):
    ticks = torch.linspace(-1.2, 1.2, 481)
    hits = inside(shape, ticks[None, :], ticks[:, None])
    rows, columns = (ticks[hits.any(dim)] for dim in (1, 0))
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) == pytest.approx(2, abs=0.02)
    assert rows.max() + rows.min() == pytest.approx(0, abs=0.02)
    assert columns.max() + columns.min() == pytest.approx(0, abs=0.02)
    assert 0 < coverage(shape, (0.5, 0.5), 0.3, 0.0, 32).mean() < 0.37


def test_nothing_is_read_from_nothing():
    assert attributes_from_pixels(torch.zeros(3, 32, 32)) is None
    assert motion_from_pixels(torch.zeros(3, 4, 32, 32)) is None
    noise = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    read = attributes_from_pixels(noise)
    assert read is None or read.match < 0.7


def test_errors():
    with pytest.raises(DataError, match=r"expected one image"):
        attributes_from_pixels(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match="3 frames or more"):
        motion_from_pixels(torch.zeros(3, 2, 32, 32))
    with pytest.raises(DataError, match="a large red circle"):
        attributes_from_caption("a photo of a cat")
    with pytest.raises(DataError, match="one each"):
        check_captions(torch.zeros(2, 3, 32, 32), ["a"])
