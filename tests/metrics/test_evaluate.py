"""The evaluation report, its sources of samples, and the feature networks that ship."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vargen.data.digits import Digits
from vargen.data.loader import ordered_batches
from vargen.data.shapes import Shapes
from vargen.errors import CheckpointError, ConfigError, DataError, VargenError
from vargen.metrics.evaluate import evaluate_images, format_report
from vargen.metrics.features import FeatureExtractor, FeatureNet, extract, load_feature_net
from vargen.metrics.samples import read_samples
from vargen.train.features import RECIPES, accuracy, train_features


@pytest.fixture(scope="module")
def digits():
    return load_feature_net("digits")


def _images(dataset, rows):
    items = [dataset[i] for i in rows]
    return torch.stack([i["pixels"] for i in items]), torch.tensor([i["class_label"] for i in items])


def _job(folder, pixels, labels=None, prompts=None):
    folder.mkdir()
    lines = []
    for i, image in enumerate(pixels):
        array = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{i:06d}.png")
        condition = {"class_label": int(labels[i])} if labels is not None else {"prompt": prompts[i]}
        lines.append(json.dumps({"file": f"{i:06d}.png", "index": i, **condition, "seed": 0}) + "\n")
    # several writers record images in the order they finish, and a killed one leaves a torn line
    (folder / "manifest.jsonl").write_text("".join(reversed(lines)) + '{"file": "9')
    return folder


def test_shipped_networks_know_held_out_pictures(digits):
    assert accuracy(digits, "digits")["class"] >= 0.97
    shapes = load_feature_net("shapes")
    pixels, labels = _images(Shapes(size=64, split="test"), range(160))
    assert (shapes(pixels).logits["class"].argmax(1) == labels).float().mean() >= 0.97
    assert set(shapes.config["properties"]) == {"class", "color", "background", "size", "position"}
    assert isinstance(shapes, FeatureExtractor)


def test_real_digits_score_near_the_floor_and_noise_far_from_it(digits):
    test = Digits(split="test")
    pixels, labels = _images(Digits(), range(300))
    real = evaluate_images(pixels, test, digits, labels=labels, more_real=Digits())
    assert real["frechet_distance"] < 3 * real["frechet_floor_same_sizes"]
    assert real["frechet_floor"] < real["frechet_floor_same_sizes"]
    assert real["settings"]["floor_sizes"] == {"halves": [898, 899], "same_sizes": [300, 359]}
    assert real["conditional_accuracy"] >= 0.97
    assert real["precision"] > 0.7
    assert real["recall"] > 0.7
    noise = evaluate_images(torch.rand(300, 3, 32, 32) * 2 - 1, test, digits)
    assert noise["frechet_distance"] > 10 * real["frechet_distance"]
    assert noise["precision"] < 0.05
    assert "conditional_accuracy" not in noise
    assert json.loads(json.dumps(real)) == real
    assert "± " in format_report(real)


def test_one_digit_only_costs_recall(digits):
    train = Digits()
    rows = (train.labels == 3).nonzero().flatten().tolist()
    pixels, _ = _images(train, rows)
    report = evaluate_images(pixels, Digits(split="test"), digits, labels=[4] * len(rows))
    assert report["recall"] < 0.3
    assert report["conditional_accuracy"] < 0.1
    assert report["class_accuracy"] == {"4": report["conditional_accuracy"]}


def test_every_source_gives_the_same_report(digits, tmp_path):
    pixels, labels = _images(Digits(), range(40))
    folder = _job(tmp_path / "job", pixels, labels)
    array = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=array, arr_1=labels.numpy())
    test = Digits(split="test")
    reports = [evaluate_images(source, test, digits) for source in (folder, str(tmp_path / "samples.npz"))]
    reports.append(evaluate_images(pixels.split(15), test, digits, labels=labels))
    for report in reports:
        assert report["frechet_distance"] == pytest.approx(reports[0]["frechet_distance"], rel=1e-5)
        assert all(report[key] == reports[0][key] for key in ("precision", "recall", "conditional_accuracy", "class_accuracy"))
    plain = tmp_path / "plain"
    plain.mkdir()
    (folder / "000000.png").rename(plain / "a.png")
    assert read_samples(plain).class_labels is None


def test_conditional_accuracy_is_that_of_the_class_alone(digits, caplog):
    data = Shapes(size=32, length=96, split="test")
    pixels, labels = _images(data, range(96))
    report = evaluate_images(pixels, data, load_feature_net("shapes"), labels=labels)
    assert report["conditional_accuracy"] >= 0.97
    assert report["ground_truth"]["shape"]["share"] >= 0.97
    # a network of other classes measures distances, but no accuracy
    assert "conditional_accuracy" not in evaluate_images(pixels, data, digits, labels=labels)
    assert "tells 10 classes, the reference has 8" in caplog.text


def test_prompts_are_checked_by_the_rules_of_the_set(tmp_path):
    data = Shapes(size=32, length=32, split="test")
    batch = next(ordered_batches(data, 32))
    net = load_feature_net("shapes")
    right = evaluate_images(_job(tmp_path / "right", batch["pixels"], prompts=batch["captions"]), data, net)
    assert right["ground_truth"]["all"]["share"] >= 0.95
    wrong = evaluate_images(batch["pixels"], data, net, prompts=batch["captions"][1:] + batch["captions"][:1])
    assert wrong["ground_truth"]["all"]["share"] < 0.1
    assert "shows the color" in format_report(wrong)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "nothing", "expected a folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no images"),
        (lambda p: torch.zeros(4, 1, 8, 8), r"expected \(N, 3, H, W\)"),
        (lambda p: [], "no images"),
        (lambda p: np.savez(p / "a.npz", arr_0=np.zeros((2, 8, 8), np.uint8)) or p / "a.npz", r"uint8 \(N, H, W, 3\)"),
        (lambda p: (p / "b.npz").write_bytes(b"no") and p / "b.npz", "not an .npz batch"),
    ],
)
def test_unusable_samples_are_named(make, message, tmp_path, digits):
    with pytest.raises(DataError, match=message):
        evaluate_images(make(tmp_path), Digits(split="test"), digits)


def test_unusable_conditions_and_references(tmp_path, digits):
    pixels, labels = _images(Digits(), range(10))
    with pytest.raises(DataError, match="4 labels for 10 samples"):
        evaluate_images(pixels, Digits(split="test"), digits, labels=labels[:4])
    with pytest.raises(DataError, match="reference of 4"):
        evaluate_images(pixels, Shapes(size=16, length=4), digits)
    folder = _job(tmp_path / "job", pixels, labels)
    (folder / "000003.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 10 .*000003\.png"):
        evaluate_images(folder, Digits(split="test"), digits)


def test_feature_network_refuses_wrong_pixels_and_names(digits, tmp_path):
    with pytest.raises(VargenError, match="expected"):
        digits(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_feature_net("digit")
    with pytest.raises(CheckpointError):
        load_feature_net(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 8"):
        FeatureNet({"class": ["a", "b"]}, image_size=30)
    with pytest.raises(VargenError, match="no images"):
        extract(digits, [])


def test_training_writes_a_whole_model(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES["digits"], "network", {"image_size": 16, "widths": [4, 4, 8, 8], "dim": 8})
    first = train_features("digits", tmp_path / "a", steps=3, batch_size=8)
    second = train_features("digits", tmp_path / "b", steps=3, batch_size=8)
    assert first == second
    assert 0 <= first["class"] <= 1
    weights = [load_feature_net(tmp_path / name).state_dict() for name in "ab"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "359 held-out digits" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no feature recipe"):
        train_features("photo", tmp_path / "c")
