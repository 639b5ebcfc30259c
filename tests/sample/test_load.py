from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny_pipelines import tiny_pipeline
from vargen import VQTokenizer
from vargen.errors import CheckpointError, VargenError
from vargen.sample.load import load_pipeline, load_tokenizer, pick_device, resolve


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def weights(folder: Path) -> Path:
    return next((folder / "model").glob("*.safetensors"))


def truncate(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    torch.save({"x": torch.zeros(1)}, folder / "model/pytorch_model.bin")
    weights(folder).unlink()


def remove_part(folder: Path) -> None:
    shutil.rmtree(folder / "visual_tokenizer")


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def break_config(folder: Path) -> None:
    (folder / "model/config.json").write_text("[")


def add_unknown_key(folder: Path) -> None:
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "depht": 3}))


def change_size(folder: Path) -> None:
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps({**config, "depth": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "not a complete safetensors file"),
        (pickle_weights, r"pytorch_model\.bin is refused"),
        (remove_part, "visual_tokenizer"),
        (break_index, r"model_index\.json"),
        (break_config, "not valid JSON"),
        (add_unknown_key, "did you mean 'depth'"),
        (change_size, "missing keys"),
    ],
)
def test_damaged_models_are_refused_in_one_line(damaged: Path, damage: object, message: str) -> None:
    damage(damaged)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as error:
        load_pipeline(str(damaged), "cpu")
    assert "\n" not in str(error.value)


def test_pickle_is_never_run(damaged: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (damaged / "executed",))

    (damaged / "model/pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    weights(damaged).unlink()
    with pytest.raises(CheckpointError):
        load_pipeline(str(damaged), "cpu")
    assert not (damaged / "executed").exists()


def test_names_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "file.pt").touch()
    assert resolve("digits").endswith("assets/digits")
    assert resolve("./digits") == "./digits"
    assert resolve("own") == "own"
    assert resolve("owner/some-model") == "owner/some-model"
    with pytest.raises(CheckpointError, match="did you mean 'digits'"):
        resolve("digit")
    with pytest.raises(CheckpointError, match="vargen convert"):
        resolve("file.pt")


def test_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model.*model_index\.json"):
        load_pipeline(str(tmp_path), "cpu")


def test_tokenizers_load_alone_and_from_pipelines(saved: Path) -> None:
    for folder in (saved, saved / "visual_tokenizer"):
        assert isinstance(load_tokenizer(str(folder), "cpu"), VQTokenizer)
    with pytest.raises(CheckpointError, match="holds a LlamaGen, not a tokenizer"):
        load_tokenizer(str(saved / "model"), "cpu")
    with pytest.raises(CheckpointError, match="a single model, not a pipeline"):
        load_pipeline(str(saved / "model"), "cpu")


def test_device_and_dtype(saved: Path) -> None:
    assert load_pipeline(str(saved), "cpu", "bfloat16").model.dtype == torch.bfloat16
    for device in ("gpu", "cuda:99"):
        with pytest.raises(VargenError, match="cannot be used"):
            pick_device(device)
    with pytest.raises(VargenError, match="expected one of float32"):
        load_pipeline(str(saved), "cpu", "fp32")
