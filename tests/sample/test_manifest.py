from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from vargen.errors import VargenError
from vargen.sample.manifest import Manifest

JOB = {"model": "digits", "seed": 1, "prompts": ["x" * 100]}


def record(index: int) -> dict:
    return {"file": f"{index:06d}.png", "index": index}


def started(folder: Path) -> Manifest:
    manifest = Manifest(folder, JOB)
    manifest.start()
    return manifest


def write_all(folder: Path, start: int) -> None:
    manifest = started(folder)
    for index in range(start, start + 30):
        manifest.append([record(index)])


def test_several_processes_write_one_manifest(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_all, args=(tmp_path / "job", start)) for start in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "job/manifest.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(70)), "nothing lost, nothing doubled where ranges overlap"


@pytest.mark.parametrize("torn", ['{"file": "0000', "{", '{"file": "000001.png", "index": 1}'])
def test_torn_last_line_is_healed(tmp_path: Path, torn: str) -> None:
    manifest = started(tmp_path / "job")
    manifest.append([record(0)])
    with open(manifest.path, "a") as handle:
        handle.write(torn)
    again = Manifest(tmp_path / "job", JOB)
    assert set(again.records) == {0}
    again.append([record(1), record(2)])
    assert [json.loads(line)["index"] for line in manifest.path.read_text().splitlines()] == [0, 1, 2]


def test_damaged_line_is_reported(tmp_path: Path) -> None:
    manifest = started(tmp_path / "job")
    manifest.path.write_text("nonsense\n")
    with pytest.raises(VargenError, match="damaged line at byte 0"):
        Manifest(tmp_path / "job", JOB)


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(VargenError, match=r"holds 'thesis\.tex'"):
        Manifest(tmp_path, JOB)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_under_a_file_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/a/b"):
        with pytest.raises(VargenError, match="is not a folder"):
            Manifest(folder, JOB)


def test_opening_writes_nothing_and_a_killed_start_is_resumed(tmp_path: Path) -> None:
    Manifest(tmp_path / "job", JOB)
    assert not (tmp_path / "job").exists()
    (tmp_path / "job").mkdir()
    (tmp_path / "job/manifest.jsonl").touch()
    assert started(tmp_path / "job").records == {}


def test_difference_is_named_briefly(tmp_path: Path) -> None:
    started(tmp_path / "job")
    with pytest.raises(VargenError, match="seed 1, not 2"):
        Manifest(tmp_path / "job", {**JOB, "seed": 2})
    with pytest.raises(VargenError, match="prompts") as error:
        Manifest(tmp_path / "job", {**JOB, "prompts": []})
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_unreadable_job_file(tmp_path: Path) -> None:
    started(tmp_path / "job")
    for text in ("{", "[]"):
        (tmp_path / "job/job.json").write_text(text)
        with pytest.raises(VargenError, match=r"job\.json"):
            Manifest(tmp_path / "job", JOB)
