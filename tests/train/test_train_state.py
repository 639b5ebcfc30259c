"""Checkpoints: written whole or not at all, checked when read, never pickled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vargen.errors import CheckpointError, ConfigError
from vargen.train.state import Checkpoints, find_damage, read_tree, write_tree


def write(value: int):
    def fill(folder: Path) -> None:
        write_tree(folder / "state.safetensors", {"value": torch.tensor(value)})
        (folder / "part").mkdir()
        (folder / "part" / "note.txt").write_text(str(value))

    return fill


def test_tree_round_trip(tmp_path):
    tree = {
        "state": {"layer.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "max": None}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "names": ["layer.weight"]}, {}],
        "half": torch.randn(4).bfloat16(),
        "transposed": torch.randn(2, 3).T,
    }
    write_tree(tmp_path / "tree.safetensors", tree)
    back = read_tree(tmp_path / "tree.safetensors")
    assert torch.equal(back["state"]["layer.weight"]["exp_avg"], tree["state"]["layer.weight"]["exp_avg"])
    assert back["state"]["layer.weight"]["max"] is None
    assert back["groups"] == [{"lr": 1e-3, "betas": [0.9, 0.95], "names": ["layer.weight"]}, {}]
    assert torch.equal(back["half"], tree["half"])
    assert torch.equal(back["transposed"], tree["transposed"])


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x10" * 200])
def test_unreadable_tree_is_refused(tmp_path, content):
    (tmp_path / "tree.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable training state"):
        read_tree(tmp_path / "tree.safetensors")


def test_last_k_are_kept(tmp_path):
    store = Checkpoints(tmp_path / "run", keep=2)
    assert store.latest() is None
    for step in (5, 10, 1000):
        store.save(step, write(step))
    assert store.steps() == [10, 1000]
    assert store.resolve("latest") == store.path(1000)
    assert store.resolve("checkpoint-00000010") == store.path(10)
    assert int(read_tree(store.path(10) / "state.safetensors")["value"]) == 10
    assert not list((tmp_path / "run").glob(".*"))
    with pytest.raises(ConfigError):
        Checkpoints(tmp_path, keep=0)


def test_a_failing_save_leaves_nothing(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, write(1))

    def fail(folder: Path) -> None:
        write(2)(folder)
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError):
        store.save(2, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, write(1))
    script = (
        "import os, signal, sys; from pathlib import Path; from vargen.train.state import Checkpoints\n"
        "def kill(folder):\n"
        "    (folder / 'half').write_text('x' * 100)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Checkpoints(sys.argv[1]).save(2, kill)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".checkpoint-*"))) == 1
    assert store.resolve("latest") == store.path(1)
    store.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage, words", [(truncate, "of"), (flip, "not as it was written"), (Path.unlink, "missing")])
@pytest.mark.parametrize("name", ["state.safetensors", "part/note.txt", "manifest.json"])
def test_damage_is_found_and_the_next_older_good_one_named(tmp_path, damage, words, name):
    store = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        store.save(step, write(step))
    truncate(store.path(2) / "state.safetensors")
    damage(store.path(3) / name)
    if (name, damage) != ("manifest.json", flip):
        assert words in str(find_damage(store.path(3))) or name == "manifest.json"
    with pytest.raises(CheckpointError, match=r"damaged.*checkpoint-00000001"):
        store.resolve("latest")
    truncate(store.path(1) / "state.safetensors")
    with pytest.raises(CheckpointError, match="no older one"):
        store.resolve("latest")


def test_missing_checkpoints_are_named(tmp_path):
    store = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        store.resolve("latest")
    store.save(7, write(7))
    with pytest.raises(CheckpointError, match=r"\[7\]"):
        store.resolve("checkpoint-00000008")


def test_later_checkpoints_are_forgotten(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        store.save(step, write(step))
    assert store.forget_after(1) == [2]
    assert store.steps() == [1]
