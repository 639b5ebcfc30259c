from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import tiny_pipeline
from vargen import VisualARPipeline
from vargen.errors import VargenError
from vargen.sample.animation import partial_pixels
from vargen.sample.images import default_folder, sample
from vargen.sample.job import Job, draw, make_job, parse_labels, run_batch
from vargen.sample.load import fingerprint
from vargen.sample.manifest import Manifest

NAMES = ["tench, Tinca tinca", "goldfish", "shark"]


@pytest.fixture(scope="module")
def pipe() -> VisualARPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def text_pipe() -> VisualARPipeline:
    return tiny_pipeline(text=True)


@pytest.fixture(scope="module")
def model(pipe: VisualARPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return str(folder)


def job_of(pipe: VisualARPipeline, **changes: object) -> Job:
    settings = {"class_labels": (), "prompts": (), "seed": 3, "batch_size": 4, "dtype": "float32", "settings": {}}
    return make_job(pipe, "tiny", **{**settings, **changes})  # type: ignore[arg-type]


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_job_leaves_images_grid_and_manifest(model: str, tmp_path: Path) -> None:
    result = sample(
        model,
        class_labels=["3,7"],
        num=5,
        seed=1,
        batch_size=2,
        output=tmp_path / "out",
        settings={"temperature": 0.9},
        progress=False,
    )
    assert (result.done, result.num) == (5, 5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"{i:06d}.png" for i in range(5)),
        "grid.png",
        "job.json",
        "manifest.jsonl",
    ]
    records = lines(tmp_path / "out")
    assert [r["index"] for r in records] == list(range(5))
    assert [r["class_label"] for r in records] == [3, 7, 3, 7, 3]
    assert records[4]["file"] == "000004.png"
    assert records[0]["seed"] == 1
    assert records[0]["settings"] == {
        "guidance_scale": 1.5,
        "top_k": 16,
        "temperature": 0.9,
        "batch_size": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    assert Image.open(tmp_path / "out/000000.png").size == (16, 16)


def test_without_labels_all_classes_take_turns(pipe: VisualARPipeline) -> None:
    job = job_of(pipe)
    assert [job.condition(i)["class_label"] for i in range(12)] == [*range(10), 0, 1]


def test_images_do_not_depend_on_count_shards_or_restarts(model: str, tmp_path: Path) -> None:
    arguments = {"seed": 5, "batch_size": 4, "progress": False}
    sample(model, num=11, output=tmp_path / "whole", **arguments)
    whole = images(tmp_path / "whole")
    assert len(whole) == 11

    sample(model, num=3, output=tmp_path / "grown", **arguments)
    sample(model, num=11, output=tmp_path / "grown", **arguments)
    assert images(tmp_path / "grown") == whole

    parts = [sample(model, num=11, output=tmp_path / "shards", shard=(k, 3), **arguments) for k in (2, 0, 1)]
    assert [part.done for part in parts] == [3, 7, 11]
    assert [bool(part.files) for part in parts] == [False, False, True]
    assert images(tmp_path / "shards") == whole
    assert sorted(r["index"] for r in lines(tmp_path / "shards")) == list(range(11))


def test_prompts_of_different_lengths_do_not_touch_each_other(text_pipe: VisualARPipeline, tmp_path: Path) -> None:
    job = job_of(text_pipe, prompts=["red", "a small blue circle", "a large red square"], batch_size=3)
    together = run_batch(text_pipe, job, range(3))
    for index in range(3):
        assert torch.equal(run_batch(text_pipe, job, [index])[0], together[index])


def test_other_batch_shapes_agree_up_to_rounding(pipe: VisualARPipeline) -> None:
    one, four = (run_batch(pipe, job_of(pipe, batch_size=size), [0]) for size in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-3, atol=1e-3)


def test_seeds_differ(pipe: VisualARPipeline) -> None:
    assert not torch.equal(run_batch(pipe, job_of(pipe), [0]), run_batch(pipe, job_of(pipe, seed=4), [0]))


def test_killed_job_continues(pipe: VisualARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(pipe)
    draw(pipe, job, Manifest(tmp_path / "whole", asdict(job)), range(10), progress=False)

    class Killed(BaseException):
        pass

    folder = tmp_path / "killed"
    renames = 0
    rename = os.replace

    def stop(source: str, target: str) -> None:
        nonlocal renames
        renames += 1
        if renames == 8:  # job.json and six images are there, four of them recorded
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(Killed):
            draw(pipe, job, Manifest(folder, asdict(job)), range(10), progress=False)
    assert len(images(folder)) == 6
    assert [r["index"] for r in lines(folder)] == [0, 1, 2, 3]
    with open(folder / "manifest.jsonl", "a") as handle:
        handle.write('{"file": "000004.png", "ind')
    (folder / ".000006.png.0123abcd.png").write_bytes(b"half")

    manifest = Manifest(folder, asdict(job))
    draw(pipe, job, manifest, range(10), progress=False)
    manifest.sweep()
    assert images(folder) == images(tmp_path / "whole")
    assert lines(folder) == lines(tmp_path / "whole")
    assert not list(folder.glob(".*"))


def test_deleted_image_is_drawn_again_without_a_second_line(pipe: VisualARPipeline, tmp_path: Path) -> None:
    job = job_of(pipe)
    draw(pipe, job, Manifest(tmp_path / "job", asdict(job)), range(4), progress=False)
    before = images(tmp_path / "job")
    (tmp_path / "job/000002.png").unlink()
    draw(pipe, job, Manifest(tmp_path / "job", asdict(job)), range(4), progress=False)
    assert images(tmp_path / "job") == before
    assert len(lines(tmp_path / "job")) == 4


def test_other_settings_in_the_same_folder_are_refused(model: str, tmp_path: Path) -> None:
    arguments = {"num": 2, "output": tmp_path / "out", "progress": False}
    sample(model, seed=1, batch_size=2, **arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(VargenError, match="holds a job with seed 1, not 2"):
        sample(model, seed=2, batch_size=2, **arguments)
    with pytest.raises(VargenError, match="holds a job with batch_size 2, not 3"):
        sample(model, seed=1, batch_size=3, **arguments)
    with pytest.raises(VargenError, match=r"settings .*0\.5"):
        sample(model, seed=1, settings={"temperature": 0.5}, **arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sample(model, seed=1, **{**arguments, "num": 3}).done == 3, "the recorded batch size is kept where none is given"


def test_other_weights_have_another_fingerprint(pipe: VisualARPipeline) -> None:
    other = tiny_pipeline()
    assert fingerprint(pipe.components) == fingerprint(other.components)
    with torch.no_grad():
        next(other.visual_tokenizer.parameters())[0] += 1
    assert fingerprint(pipe.components) != fingerprint(other.components)


def test_nothing_is_written_before_the_first_batch_succeeds(model: str, tmp_path: Path) -> None:
    with pytest.raises(VargenError, match="temperature"):
        sample(model, output=tmp_path / "out", settings={"temperature": -1.0}, progress=False)
    with pytest.raises(VargenError, match="class label 10"):
        sample(model, output=tmp_path / "out", class_labels=["1,10"], progress=False)
    with pytest.raises(VargenError, match="takes no prompts"):
        sample(model, output=tmp_path / "out", prompts=["a cat"], progress=False)
    assert not (tmp_path / "out").exists()


def test_broken_model_is_reported(model: str, tmp_path: Path, pipe: VisualARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe), "paint", lambda self, tokens, *_, **__: torch.full((len(tokens), 3, 16, 16), torch.nan))
    with pytest.raises(VargenError, match="NaN"):
        sample(model, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("texts", "labels"),
    [(["0,2", "1"], [0, 2, 1]), (["GoldFish"], [1]), (["tench, tinca tinca"], [0]), (["shark, goldfish , 0"], [2, 1, 0])],
)
def test_class_names_and_numbers(texts: list[str], labels: list[int]) -> None:
    assert parse_labels(texts, 3, NAMES) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [("goldfsh", "did you mean 'goldfish'"), ("3", "class label 3: expected 0..2"), ("-1", "0..2"), ("1,", "''")],
)
def test_unknown_classes(text: str, message: str) -> None:
    with pytest.raises(VargenError, match=message):
        parse_labels([text], 3, NAMES)


def test_npz_is_shuffled_with_its_labels(model: str, tmp_path: Path) -> None:
    result = sample(model, num=40, seed=2, batch_size=20, output=tmp_path / "out", npz=True, progress=False)
    assert result.files[-1].name == "samples.npz"
    with np.load(result.files[-1], allow_pickle=False) as batch:
        pixels, labels = batch["arr_0"], batch["arr_1"]
    assert pixels.shape == (40, 16, 16, 3)
    assert pixels.dtype == np.uint8
    by_image = {(tmp_path / "out" / r["file"]): r["class_label"] for r in lines(tmp_path / "out")}
    drawn = {np.asarray(Image.open(file)).tobytes(): label for file, label in by_image.items()}
    assert [drawn[image.tobytes()] for image in pixels] == labels.tolist()
    assert sorted(labels) == sorted(by_image.values())
    # neither sorted nor the cycle of classes in which the images were drawn
    assert np.abs(np.diff(labels)).mean() > 2
    assert (np.diff(labels) % 10 == 1).mean() < 0.5


def test_animation_ends_with_the_images(model: str, tmp_path: Path) -> None:
    result = sample(model, num=4, batch_size=4, output=tmp_path / "out", animate=True, progress=False)
    with Image.open(result.files[-1]) as gif:
        assert gif.n_frames == 16
        assert gif.width == Image.open(tmp_path / "out/grid.png").width


def test_unknown_cells_are_grey(pipe: VisualARPipeline) -> None:
    known = torch.zeros(4, 4)
    known[0, :2] = 1
    pixels = partial_pixels(lambda tokens: torch.ones(len(tokens), 3, 16, 16), pipe.model.space, torch.zeros(2, 4, 4), known)
    assert pixels.shape == (2, 3, 16, 16)
    assert (pixels[:, :, :4, :8] == 1).all()
    assert (pixels[:, :, 4:] == 0.25).all()


def test_prefix_of_ordered_tokens_is_decoded(pipe: VisualARPipeline) -> None:
    space = replace(pipe.model.space, levels=((16,),), ordered=True)
    seen = []

    def paint(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.shape)
        return torch.zeros(2, 3, 16, 16)

    partial_pixels(paint, space, torch.zeros(2, 16), (torch.arange(16) < 5).float())
    assert seen == [(2, 5)]


def test_default_folder_names_the_settings() -> None:
    settings = {"guidance_scale": 2.0}
    assert default_folder("digits", ["3,7"], [], 0, None, "float32", settings) == Path("outputs/digits-class3,7-cfg2.0-seed0")
    one, two = (default_folder("runs/shapes", [], ["a red / circle", p], 1, 8, "bfloat16", {}) for p in ("x", "y"))
    assert one != two
    assert one.parent == Path("outputs")
    assert one.name.startswith("shapes-a_red_circle+1-")
