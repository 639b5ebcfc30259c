"""Jobs of videos: formats, sheets, animations, restarts, and given frames from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import tiny_pipeline, tiny_video_pipeline
from vargen.errors import DataError, VargenError
from vargen.pipeline import to_output
from vargen.sample import given
from vargen.sample.files import read_video
from vargen.sample.given import default_frames
from vargen.sample.images import sample
from vargen.sample.motion import save_video


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny-video"
    tiny_video_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prediction(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny-prediction"
    tiny_video_pipeline("nbp-prediction").save_pretrained(folder)
    return str(folder)


def clip(path: Path, count: int = 6, step: int = 30) -> Path:
    frames = np.stack([np.full((20, 28, 3), step * t, dtype=np.uint8) for t in range(count)])
    save_video(frames, path)
    return path


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def frames_of(result_folder: Path) -> list[np.ndarray]:
    return [read_video(result_folder / record["file"]) for record in records(result_folder)]


def test_every_format_holds_the_same_clips(model: str, tmp_path: Path) -> None:
    arguments = {"class_labels": ["left", "still"], "num": 2, "batch_size": 2, "seed": 4, "progress": False}
    drawn = {form: sample(model, output=tmp_path / form, format=form, **arguments) for form in ("frames", "mp4", "gif")}
    exact = frames_of(tmp_path / "frames")
    assert [f.shape for f in exact] == [(4, 16, 16, 3)] * 2
    pipe = tiny_video_pipeline()
    again = to_output(torch.tensor(np.stack(exact)).permute(0, 4, 1, 2, 3) / 127.5 - 1, "np")
    direct = pipe(class_labels=["left", "still"], generator=4, output_type="np").images
    assert np.abs(again - direct).max() < 0.01
    for form, tolerance in (("mp4", 40), ("gif", 40)):
        assert [Path(r["file"]).suffix for r in records(tmp_path / form)] == [f".{form}"] * 2
        for lossy, frames in zip(frames_of(tmp_path / form), exact):
            assert lossy.shape == frames.shape
            assert np.abs(lossy.astype(float) - frames).mean() < tolerance
    assert [p.name for p in drawn["frames"].files] == ["grid.gif", "sheet.png"]
    assert drawn["mp4"].noun == "videos"
    assert sorted(p.name for p in (tmp_path / "frames").iterdir()) == [
        "000000", "000001", "grid.gif", "job.json", "manifest.jsonl", "sheet.png",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["mp4", "frames"])
def test_a_job_is_continued_and_swept(model: str, tmp_path: Path, form: str) -> None:
    arguments = {"output": tmp_path / "out", "batch_size": 2, "format": form, "progress": False}
    sample(model, num=1, **arguments)
    first = frames_of(tmp_path / "out")[0]
    (tmp_path / "out" / ".000000.left-over").mkdir()
    result = sample(model, num=3, **arguments)
    assert result.done == 3
    assert np.array_equal(frames_of(tmp_path / "out")[0], first)
    assert not list((tmp_path / "out").glob(".*"))
    with pytest.raises(VargenError, match="format"):
        sample(model, num=3, **{**arguments, "format": "gif"})


def test_rate_of_the_files(model: str, tmp_path: Path) -> None:
    import av

    sample(model, num=1, output=tmp_path / "out", fps=12.5, progress=False)
    with av.open(str(tmp_path / "out/000000.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5
    with pytest.raises(VargenError, match="fps 0"):
        sample(model, num=1, output=tmp_path / "new", fps=0, progress=False)


def test_animation_shows_space_and_time(model: str, tmp_path: Path) -> None:
    result = sample(model, num=2, batch_size=2, output=tmp_path / "out", animate=True, progress=False)
    with Image.open(result.files[-1]) as gif:
        # a frame for every step, the last one the finished clips: 4 frames of 16 pixels, enlarged, one clip per row
        assert gif.n_frames == 64 // 4 + 3
        assert gif.width > 3 * gif.height / 2
        gif.seek(1)
        early = np.asarray(gif.convert("RGB"))
    grey = round(0.25 * 127.5 + 127.5)
    right = early[8:100, -100:-8]
    assert np.abs(right.astype(int) - grey).max() <= 2, "the last frame is not begun when the first one is"


def test_given_frames_from_a_file_and_a_folder(model: str, tmp_path: Path) -> None:
    file = clip(tmp_path / "ramp.mp4")
    folder = tmp_path / "ramp"
    folder.mkdir()
    for t, frame in enumerate(read_video(file)):
        Image.fromarray(frame).save(folder / f"{t}.png")
    arguments = {"class_labels": ["left"], "num": 2, "batch_size": 2, "format": "frames", "progress": False}
    sample(model, clips=[file, folder], frames=2, output=tmp_path / "out", **arguments)
    drawn = records(tmp_path / "out")
    assert [r["given"] for r in drawn] == [{"file": str(file), "frames": 2}, {"file": str(folder), "frames": 2}]
    first, second = frames_of(tmp_path / "out")
    assert np.array_equal(first[:2], second[:2])
    job = json.loads((tmp_path / "out/job.json").read_text())
    assert job["given"][0]["size"] == [16, 16]
    clip(file, step=20)
    given._pixels.cache_clear()
    with pytest.raises(VargenError, match="holds a job with given"):
        sample(model, clips=[file, folder], frames=2, output=tmp_path / "out", **arguments)


def test_default_number_of_given_frames() -> None:
    assert default_frames(tiny_video_pipeline()) == 2
    assert default_frames(tiny_video_pipeline("larp-prediction")) == 2
    assert default_frames(tiny_video_pipeline(frames=5)) == 3


def test_given_frames_that_cannot_be_used(model: str, prediction: str, tmp_path: Path) -> None:
    file, short = clip(tmp_path / "clip.mp4"), clip(tmp_path / "short.mp4", 1)
    (tmp_path / "text.mp4").write_text("no video")
    still = tmp_path / "image-model"
    tiny_pipeline().save_pretrained(still)
    for name, arguments, message in (
        (model, {"clips": [tmp_path / "none.mp4"]}, "none.mp4' does not exist"),
        (model, {"clips": [tmp_path / "text.mp4"]}, "text.mp4' is no video"),
        (model, {"clips": [short]}, "holds 1 frames: expected at least 2; give fewer with --given"),
        (model, {"clips": [file], "frames": 4}, r"4 given frames of a clip of 4: expected 1\.\.3"),
        (model, {"frames": 2}, "without a clip"),
        (model, {"format": "png"}, "draws videos, expected mp4 or gif or frames"),
        (model, {"npz": True}, "draws videos: leave --npz out"),
        (str(still), {"clips": [file]}, "makes images"),
        (str(still), {"format": "mp4"}, "draws images, expected png"),
        (prediction, {}, "continues given frames: give --frames CLIP"),
    ):
        with pytest.raises((VargenError, DataError), match=message):
            sample(name, output=tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()
    assert sample(prediction, output=tmp_path / "out", clips=[file], num=1, batch_size=1, progress=False).done == 1
