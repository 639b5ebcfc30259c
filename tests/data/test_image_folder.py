"""Image folders, and the files that one meets in them."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from vargen.data.folder import ImageFolder, center_crop, read_image
from vargen.errors import DataError


def _picture(path, color=(200, 30, 30), size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def _break(path):
    """A file cut in the middle of its pixel data."""
    data = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(data).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.fixture
def folder(tmp_path):
    for name, color in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
        for i in range(5):
            _picture(tmp_path / name / f"{i}.png", color)
    return tmp_path


def test_class_folders(folder):
    data = ImageFolder(folder, size=16)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 5 + [1] * 5
    assert data[0]["pixels"].shape == (3, 16, 16)
    assert data[0]["pixels"][0].mean() == pytest.approx(200 / 127.5 - 1, abs=1e-3)
    assert "caption" not in data[0]
    assert not data.skipped


def test_flat_folder_and_numbered_classes(tmp_path):
    _picture(tmp_path / "flat" / "a.PNG")
    assert ImageFolder(tmp_path / "flat", size=16).classes == ["flat"]
    for name in ("10", "9", "0"):
        _picture(tmp_path / "numbers" / name / "x.jpg")
    assert ImageFolder(tmp_path / "numbers", size=16).classes == ["0", "9", "10"]


def test_label_order_can_be_given(folder):
    data = ImageFolder(folder, size=16, classes=["dog", "bird", "cat"])
    assert data.labels.tolist() == [0] * 5 + [2] * 5
    with pytest.raises(DataError, match="class folder 'dog'"):
        ImageFolder(folder, size=16, classes=["cat"])


@pytest.mark.parametrize("name", ["truncated.jpg", "truncated.png", "text.png", "zero.png"])
def test_broken_files_are_replaced_counted_and_named(folder, name, caplog):
    bad = folder / "cat" / name
    if name.startswith("truncated"):
        _break(bad)
    else:
        bad.write_bytes(b"" if name == "zero.png" else b"this is not an image")
    with caplog.at_level(logging.WARNING):
        data = ImageFolder(folder, size=16)
        items = [data[i] for i in range(len(data))]
    assert [i["class_label"] for i in items] == data.labels.tolist()
    assert all(i["pixels"][0].mean() > 0 for i in items if i["class_label"] == 0)
    assert list(data.skipped) == [f"cat/{name}"]
    assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_what_was_broken_does_not_depend_on_history(folder):
    _break(folder / "cat" / "2b.png")
    forward, backward = ImageFolder(folder, size=16), ImageFolder(folder, size=16)
    a = [forward[i]["pixels"] for i in range(len(forward))]
    b = [backward[i]["pixels"] for i in reversed(range(len(backward)))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert forward.verify() == backward.skipped


def test_empty_or_broken_folders_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no readable image"):
        ImageFolder(tmp_path / "empty")
    _break(tmp_path / "bad" / "x.png")
    with pytest.raises(DataError, match=r"none of the 1 image files is readable.*x\.png"):
        ImageFolder(tmp_path / "bad")
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder(tmp_path / "missing")
    _picture(tmp_path / "half" / "good" / "x.png")
    _break(tmp_path / "half" / "worse" / "x.png")
    data = ImageFolder(tmp_path / "half", size=16)
    with pytest.raises(DataError, match="every image of class 'worse' is broken"):
        data[1]


def test_loose_images_beside_classes_are_reported(folder):
    _picture(folder / "loose.png")
    assert "no class" in ImageFolder(folder, size=16).skipped["loose.png"]


def test_splits_by_name_and_by_folder(folder, tmp_path):
    train, test = (ImageFolder(folder, size=16, split=s, holdout=0.4) for s in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    assert not set(train.files) & set(test.files)
    assert train.classes == test.classes
    ready = tmp_path / "ready"
    _picture(ready / "train" / "cat" / "a.png")
    _picture(ready / "train" / "cat" / "b.png")
    _picture(ready / "val" / "cat" / "c.png")
    assert [len(ImageFolder(ready, size=16, split=s)) for s in ("train", "test", "all")] == [2, 1, 3]
    assert ImageFolder(ready, size=16, split="all").classes == ["cat"]


def test_random_crops_are_addressed_by_epoch_and_index(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(data).save(tmp_path / "a.png")
    folder, again = (ImageFolder(tmp_path, size=16, crop="random", flip=True) for _ in range(2))
    epochs = [folder.get(0, epoch)["pixels"] for epoch in range(4)]
    assert all(torch.equal(e, again.get(0, k)["pixels"]) for k, e in enumerate(epochs))
    assert not torch.equal(epochs[0], epochs[1])


def test_captions(folder, caplog):
    lines = [{"file_name": "cat/0.png", "text": "a cat"}, {"file_name": "dog/1.png", "caption": "a dog"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (folder / "cat" / "1.txt").write_text("another cat\n")
    data = ImageFolder(folder, size=16)
    assert [data[i]["caption"] for i in (0, 1, 2, 6)] == ["a cat", "another cat", "", "a dog"]
    (folder / "metadata.jsonl").unlink()
    assert ImageFolder(folder, size=16)[1]["caption"] == "another cat"
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/gone.png", "text": "a ghost"}))
    with caplog.at_level(logging.WARNING):
        ImageFolder(folder, size=16)
    assert "cat/gone.png" in caplog.text
    (folder / "metadata.jsonl").write_text("{broken")
    with pytest.raises(DataError, match="line 1"):
        ImageFolder(folder, size=16)


def test_kinds_of_images(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").getpixel((4, 4))[0] > 200
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((4, 4)) == (128, 128, 128)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").getpixel((4, 4)) == (255, 255, 255)
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((4, 4))[0] > 200
    sideways = Image.new("RGB", (8, 4))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "sideways.jpg", exif=exif)
    assert read_image(tmp_path / "sideways.jpg").size == (4, 8)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "float.tif")
    _picture(tmp_path / "sliver" / "x.png", size=(1, 900))
    assert ImageFolder(tmp_path / "sliver", size=16)[0]["pixels"].shape == (3, 16, 16)


@pytest.mark.parametrize("shape, size", [((50, 37), 25), ((37, 50), 25), ((130, 90), 25), ((20, 15), 32), ((1, 900), 16)])
def test_center_crops_are_those_of_the_field(shape, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    whole = picture
    while min(whole.size) >= 2 * size:
        whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
    scale = size / min(whole.size)
    whole = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    expected = np.asarray(whole.crop((left, top, left + size, top + size)), dtype=int)
    difference = np.abs(np.asarray(center_crop(picture, size), dtype=int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_exact_items_are_never_replaced(folder):
    _break(folder / "cat" / "0.png")
    data = ImageFolder(folder, size=16)
    assert data[0]["class_label"] == 0
    with pytest.raises(DataError, match=r"0\.png.*cannot be decoded"):
        data.exact(0)
    assert data.item_name(1) == "cat/1.png"
    assert torch.equal(data.exact(1)["pixels"], data[1]["pixels"])


def test_other_crops(tmp_path):
    ramp = np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None].repeat(20, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    stretched = ImageFolder(tmp_path, size=16, crop="stretch")[0]["pixels"]
    assert stretched[0, 0, 0] < -0.9
    assert stretched[0, 0, -1] > 0.9
    resized = [ImageFolder(tmp_path, size=16, crop="resized").get(0, epoch)["pixels"][0, 0] for epoch in range(8)]
    spans = [float(row[-1] - row[0]) for row in resized]
    assert len(set(spans)) == 8
    assert all(0.5 < span < 2 for span in spans)
    with pytest.raises(DataError, match="did you mean 'random'"):
        ImageFolder(tmp_path, crop="randon")
