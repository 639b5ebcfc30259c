"""The data sets that ship and how they are built."""

import pytest
import torch

from vargen.data.base import DATASETS, build_dataset
from vargen.data.digits import Digits, jitter
from vargen.data.photos import Photos
from vargen.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["digits", "photos", "shapes", "shapes-video"])
def test_items_are_deterministic_and_in_range(name):
    train, again = build_dataset(name, size=32), build_dataset({"name": name, "size": 32})
    for index in (0, 7, len(train) - 1):
        item = train[index]
        assert item["pixels"].shape == (3, *train.sample_shape)
        assert item["pixels"].dtype == torch.float32
        assert -1 <= item["pixels"].min() <= item["pixels"].max() <= 1
        assert item["class_label"] == train.labels[index]
        assert 0 <= item["class_label"] < train.num_classes
        assert item["caption"]
        assert torch.equal(item["pixels"], again[index]["pixels"])
    assert torch.equal(train[-1]["pixels"], train[len(train) - 1]["pixels"])
    with pytest.raises(IndexError):
        train[len(train)]


@pytest.mark.parametrize("name", ["digits", "photos", "shapes", "shapes-video"])
def test_splits_share_no_item(name):
    train, test = (build_dataset(name, size=16, split=split) for split in ("train", "test"))
    count = min(len(train), len(test), 40)
    a = torch.stack([train[i]["pixels"] for i in range(count)]).flatten(1)
    b = torch.stack([test[i]["pixels"] for i in range(count)]).flatten(1)
    assert torch.cdist(a, b).min() > 0


def test_digits_are_all_there_and_stratified():
    train, test = Digits(), Digits(split="test")
    assert (len(train), len(test)) == (1438, 359)
    assert test.labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert train.classes == [str(d) for d in range(10)]


def test_augmented_digits_differ_by_epoch_but_little():
    plain, moved = Digits(size=32), Digits(size=32, augment=True)
    assert torch.equal(plain[5]["pixels"], moved[5]["pixels"])
    one, two = moved.get(5, 1)["pixels"], moved.get(5, 2)["pixels"]
    assert torch.equal(one, moved.get(5, 1)["pixels"])
    assert 0 < (one - two).abs().mean() < 0.3
    still = jitter(plain[5]["pixels"], torch.full((4,), 0.5))
    torch.testing.assert_close(still, plain[5]["pixels"], rtol=0, atol=1e-5)


def test_items_do_not_share_memory():
    digits = Digits(size=16)
    digits[3]["pixels"].zero_()
    assert digits[3]["pixels"].abs().sum() > 0


def test_photos_do_not_depend_on_length():
    assert torch.equal(Photos(size=16, length=10)[9]["pixels"], Photos(size=16, length=1000)[9]["pixels"])


def test_registry_names_every_class():
    for name in DATASETS:
        if name not in ("cache", "folder", "video"):
            assert len(build_dataset(name, size=16)) > 0


@pytest.mark.parametrize(
    "config, error, message",
    [
        ("digit", ConfigError, "did you mean 'digits'"),
        ({"name": "digits", "sise": 3}, ConfigError, "did you mean 'size'"),
        ({"name": "folder"}, ConfigError, "needs root"),
        ({"name": "digits", "split": "validation"}, DataError, "train, test"),
        ({"name": "digits", "size": 0}, DataError, "at least 8"),
        ({"name": "shapes", "length": 0}, DataError, "at least 1"),
        ({"name": "shapes-video", "frames": 2}, DataError, "at least 3"),
        ({"root": "/no/such/folder"}, DataError, "does not exist"),
    ],
)
def test_errors_say_what_was_expected(config, error, message):
    with pytest.raises(error, match=message):
        build_dataset(config)
