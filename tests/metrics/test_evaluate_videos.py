"""The evaluation of videos: samples from jobs, folders and arrays, features of whole clips, the rule for motion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vargen.data.shapes import MOTIONS, ShapesVideo
from vargen.data.shapes_reader import attributes_from_video_caption
from vargen.errors import DataError, VargenError
from vargen.metrics.evaluate import evaluate_images, format_report
from vargen.metrics.features import FeatureNet
from vargen.metrics.samples import read_samples
from vargen.sample.files import save_sample
from vargen.train.features import RECIPES, accuracy, train_features

SIZE = {"size": 24, "frames": 6}


def clips(count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    data = ShapesVideo(**SIZE, length=count, split=split)
    return torch.stack([data[i]["pixels"] for i in range(count)]), data.labels


def net() -> FeatureNet:
    torch.manual_seed(0)
    return FeatureNet({"class": list(MOTIONS)}, image_size=24, widths=(8, 8, 8, 8), dim=8, frames=6).eval()


def job(folder: Path, pixels: Tensor, labels: Tensor, form: str) -> Path:
    folder.mkdir()
    files = [save_sample(clip, folder, i, form, 8.0) for i, clip in enumerate(pixels)]
    records = [{"file": file, "index": i, "class_label": int(labels[i])} for i, file in enumerate(files)]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_every_source_of_clips_is_the_same(tmp_path: Path) -> None:
    pixels, labels = clips(9)
    exact = job(tmp_path / "frames", pixels, labels, "frames")
    arrays = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    np.savez(tmp_path / "clips.npz", arr_0=arrays, arr_1=labels.numpy())
    (exact / "manifest.jsonl").rename(tmp_path / "manifest.jsonl")
    folder = read_samples(exact, video=True)
    (tmp_path / "manifest.jsonl").rename(exact / "manifest.jsonl")
    sources = [folder, read_samples(exact, video=True), read_samples(tmp_path / "clips.npz", video=True)]
    expected = next(read_samples(pixels, video=True).batches())
    for samples in sources:
        torch.testing.assert_close(next(samples.batches()), expected, atol=0.004, rtol=0)
    assert sources[1].class_labels is not None
    assert torch.equal(sources[1].class_labels, labels)
    for form in ("mp4", "gif"):
        lossy = next(read_samples(job(tmp_path / form, pixels, labels, form), video=True).batches())
        assert lossy.shape == expected.shape
        assert (lossy - expected).abs().mean() < 0.06


def test_report_judges_the_motion(tmp_path: Path) -> None:
    pixels, labels = clips(24)
    report = evaluate_images(pixels, ShapesVideo(**SIZE, length=24, split="test"), net(), labels=labels)
    assert report["ground_truth"]["motion"]["share"] == 1.0
    assert report["settings"]["kind"] == "videos"
    assert "24 samples against 24 real videos" in format_report(report)
    wrong = evaluate_images(pixels, ShapesVideo(**SIZE, length=24, split="test"), net(), labels=(labels + 1) % 8)
    assert wrong["ground_truth"]["motion"]["share"] == 0.0
    # frames in reverse turn left into right and growing into shrinking
    opposite = torch.tensor([1, 0, 3, 2, 5, 4, 6, 7])[labels]
    back = evaluate_images(pixels.flip(2), ShapesVideo(**SIZE, length=24, split="test"), net(), labels=opposite)
    assert back["ground_truth"]["motion"]["share"] == 1.0


def test_unusable_clips_are_named(tmp_path: Path) -> None:
    pixels, labels = clips(2)
    folder = job(tmp_path / "out", pixels, labels, "frames")
    Image.new("RGB", (8, 8)).save(folder / "000001" / "0003.png")
    with pytest.raises(DataError, match=r"000001' has frames of different sizes"):
        list(read_samples(folder, video=True).batches())
    (folder / "000001" / "0003.png").unlink()
    with pytest.raises(DataError, match="different lengths"):
        list(read_samples(folder, video=True).batches())
    (folder / "000001" / "0002.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000001' has a frame '0002\.png' that cannot be decoded"):
        list(read_samples(folder, video=True).batches())
    with pytest.raises(DataError, match=r"expected \(N, 3, T, H, W\)"):
        read_samples(pixels[:, :, 0], video=True)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"expected uint8 \(N, T, H, W, 3\)"):
        read_samples(tmp_path / "images.npz", video=True)
    with pytest.raises(VargenError, match=r"expected \(B, 3, 6, H, W\)"):
        net()(torch.zeros(1, 3, 5, 24, 24))
    with pytest.raises(VargenError, match=r"expected \(B, 3, 6, H, W\)"):
        net()(torch.zeros(1, 3, 24, 24))


def test_captions_are_read_back() -> None:
    data = ShapesVideo(**SIZE)
    for i in range(16):
        words = attributes_from_video_caption(data[i]["caption"])
        assert words["motion"] == MOTIONS[i % 8]
    with pytest.raises(DataError, match="expected e.g"):
        attributes_from_video_caption("a red circle at the top on a navy background")


def test_training_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**RECIPES["shapes-video"]["data"], "length": 32}
    monkeypatch.setitem(RECIPES, "shapes-video", {**RECIPES["shapes-video"], "data": data})
    monkeypatch.setattr("vargen.train.features.TEST_LENGTH", 16)
    scores = train_features("shapes-video", tmp_path / "net", steps=2, batch_size=8)
    assert set(scores) == {"class", "color", "background", "shape"}
    trained = FeatureNet.from_pretrained(tmp_path / "net").eval()
    assert trained.frames == 6
    assert accuracy(trained, "shapes-video") == pytest.approx(scores)
