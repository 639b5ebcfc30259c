import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vargen.checkpoint import atomic_directory, atomic_write, load_strictly, read_file, rename, unwrap
from vargen.errors import CheckpointError, VargenError


class Evil:
    def __reduce__(self):
        return os.system, ("touch never",)


def test_safe_files_are_read(tmp_path):
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    assert torch.equal(read_file(tmp_path / "a.safetensors")["a"], state["a"])
    assert torch.equal(unwrap(read_file(tmp_path / "a.pt"), ("model",))["a"], state["a"])


def test_code_is_never_unpickled(tmp_path):
    for name, write in (("a.pt", lambda f: torch.save({"x": Evil()}, f)), ("b.pkl", lambda f: f.write_bytes(pickle.dumps(Evil())))):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match="refused|not a readable"):
            read_file(tmp_path / name)


def test_damaged_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        content = (tmp_path / name).read_bytes()
        for length in (0, 10, len(content) - 50):
            (tmp_path / name).write_bytes(content[:length])
            with pytest.raises(CheckpointError) as error:
                read_file(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_file(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="expected a dictionary"):
        read_file(tmp_path / "list.pt")


def test_unwrap_follows_paths_and_refuses_what_is_no_state():
    tensor = torch.zeros(1)
    assert unwrap({"model": {"sd": {"w": tensor}}, "epoch": 3}, ("model.sd", "model"))["w"] is tensor
    assert unwrap({"w": tensor}, ("model",))["w"] is tensor
    for content in ({}, {"epoch": 3}, {"model": {"w": tensor, "name": "x"}}):
        with pytest.raises(CheckpointError, match="no state dict"):
            unwrap(content, ("model",))


def test_rename_uses_the_first_rule_that_matches_the_whole_key():
    rules = ((r"layers\.(\d+)\.w", r"blocks.\1.weight"), (r".*", "other"))
    assert list(rename({"layers.3.w": torch.zeros(1), "layers.3.wx": torch.zeros(1)}, rules)) == ["blocks.3.weight", "other"]


def test_strict_loading_lists_what_does_not_fit():
    model = nn.Linear(2, 3)
    state = dict(model.state_dict())
    load_strictly(model, {**state, "table": torch.zeros(1)}, ignore=("ta.*",))
    for broken, message in (
        ({"weight": state["weight"]}, "missing keys: bias"),
        ({**state, "extra": torch.zeros(1)}, "unknown keys: extra"),
        ({**state, "bias": torch.zeros(4)}, r"bias \(4,\) for \(3,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_strictly(model, broken)


def test_writes_are_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    atomic_write(target, lambda p: p.write_text("one"))

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(VargenError, match="No space left"):
        atomic_write(target, fail)
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]

    folder = tmp_path / "folder"
    with atomic_directory(folder) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(VargenError, match="No space left"), atomic_directory(folder) as temporary:
        fail(temporary / "a")
    assert (folder / "a").read_text() == "1"
    with atomic_directory(folder) as temporary:
        (temporary / "b").write_text("2")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]
