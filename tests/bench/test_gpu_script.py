"""``benchmarks/gpu.sh`` with a stand-in for Python that writes small records, and what joins them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vargen.bench.report import collect
from vargen.errors import DataError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
RECORD = {"device": {"type": "cpu", "name": "Some CPU"}, "versions": {"torch": "3"}, "platform": "Linux", "rows": [1]}
STAND_IN = """#!/usr/bin/env bash
echo "$@" >> "{log}"
case "$*" in
  *vargen.bench.report*) exec {python} "$@" ;;
  *tests/kernels*) exit {code} ;;
esac
while (($#)); do [ "$1" = --output ] && echo '{record}' > "$2"; shift; done
"""


def run(tmp_path, *arguments, code=0):
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(STAND_IN.format(log=log, python=sys.executable, record=json.dumps(RECORD), code=code))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )
    return done, log.read_text().splitlines() if log.exists() else []


def test_all_parts_run_and_are_joined(tmp_path):
    done, calls = run(tmp_path, "--device", "cpu", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [("tests/kernels" in c, "kernel_times.py" in c, " bench --device" in c, "--training" in c) for c in calls[:4]] == [
        (True, False, False, False), (False, True, False, False), (False, False, True, False), (False, False, False, True),
    ]  # fmt: skip
    assert all("cpu" in call for call in calls[1:4])
    record = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert record["device"] == RECORD["device"]
    assert record["failed"] == []
    assert record["generation"] == record["training"] == record["kernels"] == {"rows": [1]}
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "cpu.json")


def test_a_part_that_fails_is_named(tmp_path):
    done, _ = run(tmp_path, "--device", "cpu", "--output", tmp_path / "out", code=1)
    assert done.returncode == 1
    assert json.loads((tmp_path / "out" / "cpu.json").read_text())["failed"] == ["tests of the kernels"]


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--fast"]])
def test_wrong_arguments_are_refused(tmp_path, arguments):
    done, calls = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu.sh: ")
    assert calls == []


def test_records_of_one_device_are_named_by_it(tmp_path):
    with pytest.raises(DataError, match="records of 0 devices"):
        collect(tmp_path, tmp_path)
    record = {**RECORD, "device": {"type": "cuda", "name": "NVIDIA H200"}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert collect(tmp_path, tmp_path).name == "nvidia-h200.json"
    (tmp_path / "b.json").write_text(json.dumps(RECORD))
    with pytest.raises(DataError, match="expected those of one"):
        collect(tmp_path, tmp_path)
