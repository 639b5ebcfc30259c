"""Videos through the commands: sample, continue given frames, reconstruct, evaluate, orders of three axes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.conftest import Run
from tests.tiny_pipelines import tiny_video_pipeline
from vargen.data.shapes import MOTIONS, ShapesVideo
from vargen.metrics.features import FeatureNet
from vargen.sample.files import read_video
from vargen.sample.motion import save_video


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-video"
    tiny_video_pipeline().save_pretrained(folder)
    return folder


def test_sample_by_class_and_continue(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, _ = run("sample", saved, "--class", "left", "-n", 2, "--format", "frames", "-o", tmp_path / "out", "-q")
    assert code == 0
    assert out.splitlines() == [
        f"2 of 2 videos in {tmp_path / 'out'}",
        str(tmp_path / "out/grid.gif"),
        str(tmp_path / "out/sheet.png"),
    ]
    first = tmp_path / "out" / "000000"
    code, _, _ = run(
        "sample",
        saved,
        "--class",
        "left",
        "--frames",
        first,
        "--given",
        3,
        "-n",
        1,
        "--format",
        "frames",
        "-o",
        tmp_path / "on",
        "-q",
    )
    assert code == 0
    given, continued = read_video(first), read_video(tmp_path / "on/000000")
    pipe = tiny_video_pipeline()
    pixels = torch.from_numpy(given).permute(3, 0, 1, 2)[None, :, :3].float() / 127.5 - 1
    expected = pipe.visual_tokenizer.decode(pipe.visual_tokenizer.encode(pixels))
    shown = torch.from_numpy(continued).permute(3, 0, 1, 2)[None, :, :3].float() / 127.5 - 1
    assert (shown - expected.clamp(-1, 1)).abs().max() < 0.01


def test_wrong_requests_are_one_line(run: Run, saved: Path, tmp_path: Path) -> None:
    save_video(np.zeros((2, 16, 16, 3), dtype=np.uint8), tmp_path / "short.mp4")
    for arguments, message in (
        (["--frames", tmp_path / "short.mp4", "--given", 3], "holds 2 frames: expected at least 3; give fewer with --given"),
        (["--frames", tmp_path / "none.mp4"], "does not exist"),
        (["--format", "avi"], "expected mp4 or gif or frames"),
        (["--fps", "-1"], "fps -1.0: expected a positive rate"),
    ):
        code, _, err = run("sample", saved, *arguments, "-o", tmp_path / "out", "-q")
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert message in err
    assert not (tmp_path / "out").exists()


def test_evaluate_and_reconstruct(run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = {"class": list(MOTIONS[:3])}
    FeatureNet(properties, image_size=16, widths=(4, 4, 4, 4), dim=4, frames=4, name="net").save_pretrained(tmp_path / "net")
    assert run("sample", saved, "-n", 8, "--batch-size", 8, "-o", tmp_path / "out", "-q")[0] == 0
    options = ["--dataset", "shapes-video", "--features", tmp_path / "net", "--json"]
    # a short reference keeps the test short
    defaults = ShapesVideo.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(ShapesVideo.__init__, "__defaults__", (*defaults[:2], 16, *defaults[3:]))
    code, out, _ = run("evaluate", tmp_path / "out", *options)
    assert code == 0
    report = json.loads(out)
    assert report["settings"]["kind"] == "videos"
    assert 0 <= report["ground_truth"]["motion"]["share"] <= 1
    code, _, _ = run("reconstruct", saved, "shapes-video", "-n", 2, "-o", tmp_path / "trip")
    assert code == 0
    assert (tmp_path / "trip/reconstruct.png").is_file()


def test_orders_of_videos_are_drawn(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("order", "neighbors", "4x8x8", "-o", tmp_path / "order.png")
    assert code == 0
    assert "256 cells in 18 steps" in out
    # the frames stand beside each other
    image = Image.open(tmp_path / "order.png")
    assert image.width > 3.8 * image.height
    code, out, _ = run("order", "frames", "4x8x8", "-o", tmp_path / "mask.png", "--mask", "shifted", "--prefix", 64)
    assert code == 0
    assert Image.open(tmp_path / "mask.png").size == (8 * (64 + 3 * 64), 8 * (64 + 3 * 64))
