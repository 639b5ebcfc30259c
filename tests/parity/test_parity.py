"""The committed cases pass, and the runner fails when it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity import runner
from tests.parity.runner import COMPONENTS, RecordedNoise, capture, checkpoint_file, component, main, run_case
from vargen.checkpoint import read_file
from vargen.errors import VargenError
from vargen.noise import Noise, as_noise

CASES = sorted((Path(__file__).parent / "cases").glob("*.safetensors"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path):
    failures = [str(result) for result in run_case(path) if not result.passed]
    assert not failures, "\n".join(failures)


def test_all_system_modules_import():
    assert runner.load_components()
    assert not runner.BROKEN_MODULES


@pytest.fixture
def double():
    """A component whose outputs are what ``answers`` says."""
    answers = {}
    component("test-system", "double")(lambda case: answers or {"y": case.inputs["x"] * 2})
    yield answers
    del COMPONENTS[("test-system", "double")]


def write_case(folder, outputs, name="double", **record):
    x = torch.tensor([1.0, 2.0, float("inf")])
    case = {"system": "test-system", "component": name, "config": {}, "tolerance": {"atol": 1e-4, "rtol": 0.0}, **record}
    path = folder / f"{name}.safetensors"
    save_file({"in/x": x, **{f"out/{k}": v.clone() for k, v in outputs.items()}}, path, metadata={"case": json.dumps(case)})
    return str(path)


Y = torch.tensor([2.0, 4.0, float("inf")])


def test_right_values_pass(double, tmp_path, capsys):
    assert main([write_case(tmp_path, {"y": Y})]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["test-system", "double", "y"]
    assert lines[0].endswith("PASS")
    assert lines[-1] == "1 passed, 0 failed"


@pytest.mark.parametrize(
    "answer, reason",
    [
        (Y + torch.tensor([0.0, 0.1, 0.0]), "1 of 3 beyond"),
        (torch.tensor([2.0, float("nan"), float("inf")]), "1 of 3 beyond"),
        (torch.tensor([2.0, float("inf"), float("inf")]), "1 of 3 beyond"),
        (torch.tensor([2.0, 4.0, 8.0]), "1 of 3 beyond"),
        (torch.tensor([2.0, 4.0, -float("inf")]), "1 of 3 beyond"),
        (Y[None], "shape (1, 3)"),
        (Y[:2].long(), "dtype torch.int64"),
        (Y.to("meta"), "a meta tensor"),
        ([2.0, 4.0], "a list"),
    ],
)
def test_wrong_values_fail(double, tmp_path, capsys, answer, reason):
    double["y"] = answer
    assert main([write_case(tmp_path, {"y": Y})]) == 1
    output = capsys.readouterr().out
    assert "FAIL" in output
    assert reason in output
    assert "0 passed, 1 failed" in output


def test_integers_must_be_equal(double, tmp_path):
    double["n"] = torch.tensor([1000000, 2])
    path = write_case(tmp_path, {"n": torch.tensor([1000001, 2])}, tolerance={"atol": 5, "rtol": 1})
    assert [r.passed for r in run_case(path)] == [False]


def test_tolerance_of_one_output(double, tmp_path):
    double.update(y=Y + 0.01, z=Y + 0.01)
    tolerance = {"atol": 1e-4, "rtol": 0.0, "per_output": {"z": {"atol": 0.1}}}
    path = write_case(tmp_path, {"y": Y, "z": Y}, tolerance=tolerance)
    assert {r.tensor: r.passed for r in run_case(path)} == {"y": False, "z": True}


def test_missing_output_fails(double, tmp_path):
    path = write_case(tmp_path, {"y": Y, "z": Y})
    assert {r.tensor: r.reason for r in run_case(path)} == {"y": None, "z": "not recomputed"}


def test_unknown_component_fails(double, tmp_path):
    (result,) = run_case(write_case(tmp_path, {"y": Y}, name="dubble"))
    assert "unknown component; did you mean 'double'?" in result.reason


def test_exception_fails_and_the_rest_goes_on(double, tmp_path, capsys):
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir(), good.mkdir()
    component("test-system", "broken")(lambda case: {"y": case.outputs["y"].sum().item()})
    try:
        assert main([write_case(bad, {"y": Y}, name="broken"), write_case(good, {"y": Y})]) == 1
    finally:
        del COMPONENTS[("test-system", "broken")]
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 1 failed"


@pytest.mark.parametrize("content", [None, b"", b"not safetensors" * 9])
def test_unreadable_file_fails(tmp_path, content):
    path = tmp_path / "case.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 1


def test_file_that_is_no_case_fails(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert main([str(tmp_path / "weights.safetensors")]) == 1
    assert main([write_case(tmp_path, {})]) == 1
    assert main([write_case(tmp_path, {"y": Y}, tolerance={})]) == 1
    assert main([]) == 2


def test_capture_and_checkpoint_file():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with capture(net, {"first": "0"}) as taken:
        net(x)
    assert torch.equal(taken["first"], net[0](x))
    state = net.state_dict()
    with checkpoint_file(state) as path:
        assert torch.equal(read_file(path)["0.weight"], state["0.weight"])
    with checkpoint_file(state, "model") as path:
        assert torch.equal(read_file(path)["model"]["0.bias"], state["0.bias"])


def test_recorded_noise_serves_by_name_and_address():
    record = torch.arange(24.0).reshape(3, 2, 4)
    draws = {"eps": record, "flat": record[0], "order": torch.tensor([[1, 0], [0, 1]]), "late": lambda d: d.probs[..., 0].long()}
    noise = RecordedNoise(draws, 2)
    assert isinstance(noise, Noise)
    assert torch.equal(noise.normal("eps", (4,), at=(1,)), record[1])
    assert torch.equal(noise.at(2).normal("eps", (4,)), record[2])
    assert torch.equal(noise.uniform("flat", (4,), at=(7,)), record[0])
    assert torch.equal(noise.select(torch.tensor([1])).normal("flat", (4,)), record[0, 1:])
    assert torch.equal(noise.permutation("order", 2), torch.tensor([[1, 0], [0, 1]]))
    assert noise.categorical("late", torch.ones(2, 5)).tolist() == [1, 1]
    assert noise.bernoulli("flat", 4.5, (4,)).sum() == 5
    assert as_noise(noise, 2, "cpu").batch_size == 2
    with pytest.raises(VargenError, match="no recorded draw 'psi'"):
        noise.normal("psi")
    with pytest.raises(VargenError, match="expected"):
        noise.normal("flat", (3,))
