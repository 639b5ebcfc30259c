"""The bench end to end at its smallest, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from vargen.backbones.llamagen import LlamaGen
from vargen.bench import device as bench_device
from vargen.bench import report, run, training
from vargen.bench.device import PeakMemory, ceilings
from vargen.bench.run import Settings, bench_generation, relate
from vargen.bench.systems import SIZES, SYSTEMS, Subject
from vargen.bench.uncached import Uncached
from vargen.bench.ways import WAYS, CompiledBlocks
from vargen.cli.main import main
from vargen.condition import Condition
from vargen.decoding.counting import counting
from vargen.errors import ConfigError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise
from vargen.registry import system

CPU = torch.device("cpu")
MEASURED = {"milliseconds_per_image", "images_per_second", "peak_memory_bytes", "flops", "weight_bytes", "other_bytes",
            "flops_per_second", "bytes_per_second", "share_of_bytes_per_second", "share_of_flops_per_second", "passes",
            "times_as_fast_as_next_token", "parameters", "seconds_of_calls"}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Everything at a few thousand weights; ceilings from small operations."""
    llama = {"codebook_size": 16, "dim": 16, "depth": 2, "heads": 2, "mlp_hidden": 32, "num_classes": 3}
    sizes = {name: dict(arguments) for name, arguments in SIZES["tiny"].items()}
    for name in ("llamagen", "nar"):
        sizes[name] = {"grid": [3, 3], **llama}
    sizes["nbp"] |= {"grid": [3, 3], "codebook_size": 16, "block_size": 3, "dim": 16, "depth": 2, "heads": 2}
    sizes["larp"] = sizes["flextok-ar"] = {"length": 9, **llama}
    sizes["maskgit"] |= {"grid": [3, 3], "codebook_size": 16, "dim": 16, "depth": 4, "heads": 2, "mlp_hidden": 32}
    sizes["mar"] |= {"grid": [2, 2], "encoder_dim": 16, "decoder_dim": 16, "head_width": 16, "head_steps": "2"}
    monkeypatch.setitem(SIZES, "tiny", sizes)
    monkeypatch.setattr("vargen.bench.systems.OPTIONS", {"tiny": {"mar": {"steps": 3}}, "base": {}})
    monkeypatch.setattr("vargen.bench.systems.DRAFTS", {"tiny": {"encoder_dim": 8, "decoder_dim": 8, "head_width": 8}})
    for module in (run, training):
        monkeypatch.setattr(module, "ceilings", lambda device, dtype, scale=1.0: ceilings(device, dtype, 1, 1e-4))


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["vargen", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr()
    return stopped.value.code or 0, output.out, output.err


def test_the_command_prints_a_table_and_writes_the_record(monkeypatch, capsys, tmp_path):
    code, out, _ = command(
        monkeypatch, capsys, "--systems", "llamagen,mar", "--batch-sizes", "1,2", "--repeats", 1, "--output", tmp_path, "--quiet",
        "--ways", "no-cache,static,lossless-dynamic,lossless-static,lantern,lantern++,jacobi,continuous", "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert {"device", "versions", "platform", "settings", "ceilings", "rows"} == set(record)
    assert record["device"]["name"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["ceilings"]["flops_per_second"] > 0
    rows = {(row["system"], row["way"], row["batch_size"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 2 * (8 + 2)
    assert out.count("\n| ") == 1 + len(rows)
    for (_, way, batch), row in rows.items():
        if batch == 2 and way not in ("plain", "no-cache", "static", "continuous"):
            assert "one after the other" in row["left_out"]
            continue
        assert set(row) >= MEASURED, (way, row)
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in MEASURED - {"seconds_of_calls"})
        assert row["images_per_second"] == pytest.approx(1000 / row["milliseconds_per_image"])
    assert rows["llamagen", "plain", 1]["times_as_fast_as_next_token"] == 1
    assert rows["llamagen", "plain", 1]["passes"] == rows["llamagen", "no-cache", 1]["passes"] == 9
    assert rows["llamagen", "lantern", 1]["passes"] == rows["llamagen", "lantern", 1]["target_passes"] < 9
    assert rows["llamagen", "lantern", 1]["modelled"]["tokens_per_target_pass"] > 1
    assert rows["mar", "plain", 1]["passes"] == 3
    # without a cache everything is computed again
    assert rows["llamagen", "no-cache", 1]["flops"] > 2 * rows["llamagen", "plain", 1]["flops"]


def test_every_way_is_tried_on_every_system_that_it_applies_to():
    names = {}
    for name in SYSTEMS:
        subject = Subject.build(name, "tiny", CPU, torch.float32)
        names[name] = {way for way, make in WAYS.items() if make(subject) is not None}
    speculative = {"jacobi", "lossless-dynamic", "lossless-static", "lantern", "lantern++"}
    for name in ("llamagen", "larp", "flextok-ar"):
        assert names[name] >= {"plain", "no-cache", "static", "compiled"} | speculative
    for name in ("nar", "nbp"):
        assert names[name] >= {"plain", "no-cache"}
        assert not names[name] & speculative
    assert names["mar"] == {"plain", "compiled", "continuous"}
    assert names["ecar"] == names["xar"] == names["himar"] == names["maskgit"] == {"plain", "compiled"}


@pytest.mark.parametrize("size", SIZES)
def test_systems_are_of_equal_size(size, monkeypatch):
    monkeypatch.undo()
    counts = {}
    # xAR and ECAR lay out their entities on the default device, which cannot be "meta"
    for name in SYSTEMS if size == "tiny" else sorted({*SYSTEMS} - {"xar", "ecar"}):
        with torch.device("cpu" if size == "tiny" else "meta"):
            model = system(name).load_class()(**SIZES[size][name])
        counts[name] = model.num_parameters_
    assert all(abs(count / counts["llamagen"] - 1) < 0.2 for count in counts.values()), counts


@pytest.mark.parametrize("name", ["llamagen", "nar", "nbp"])
def test_decoding_without_a_cache_draws_the_same(name):
    subject = Subject.build(name, "tiny", CPU, torch.float32, 2.0)
    for part in subject.model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(part.weight, std=0.3)
    assert torch.equal(subject.generate(2), subject.generate(2, decoding=Uncached()))


def test_compiled_blocks_are_compiled_only_within():
    calls = []
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    holder = torch.nn.Sequential()
    holder.blocks = model
    blocks = CompiledBlocks(holder)
    for block in model:
        block.compile = lambda block=block: setattr(block, "_compiled_call_impl", lambda x: calls.append(1) or x)
    with blocks():
        model[0](torch.zeros(1, 2))
    model[0](torch.zeros(1, 2))
    assert calls == [1]


def test_costs_of_a_linear_layer():
    layer = torch.nn.Linear(8, 4)
    with torch.no_grad(), counting(layer) as cost:
        layer(torch.zeros(3, 8))
    assert cost.flops == 2 * 3 * 8 * 4
    assert cost.weight_bytes == 4 * (8 * 4 + 4)
    assert cost.other_bytes == 4 * 3 * (8 + 4)
    assert cost.bytes == cost.weight_bytes + cost.other_bytes


def test_weights_are_read_once_per_pass():
    torch.manual_seed(0)
    model = LlamaGen(grid=(2, 3), codebook_size=7, dim=16, depth=1, heads=2, mlp_hidden=24, num_classes=2).eval()
    condition = Condition(class_labels=torch.tensor([0]))
    with torch.no_grad(), counting(model) as cost:
        model.generate(condition, noise=Noise(0), guidance=Guidance(1.0), sampling=Sampling(0.0))
    weights = sum(
        p.numel() * 4 for name, p in model.named_parameters() if p.dim() == 2 and "tokens" not in name and "classes" not in name
    )
    assert cost.weight_bytes == 6 * weights


def test_slow_ways_and_late_rows_are_left_out():
    rows = bench_generation(Settings(("nar",), ("plain",), "tiny", (1, 2), seconds=1e-9, repeats=1), CPU)["rows"]
    assert [row.get("left_out", "")[:6] for row in rows] == ["", "slower", "", "slower"]
    rows = bench_generation(Settings(("nar",), ("plain",), "tiny", (1,), minutes=1e-9), CPU)["rows"]
    assert [row["left_out"] for row in rows] == ["no time left"] * 2
    assert "no time left" in report.generation_table(rows)


def test_a_way_that_fails_does_not_end_the_bench(monkeypatch):
    def broken(_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(WAYS, "no-cache", lambda subject: run.Run(broken, (subject.model,)))
    rows = bench_generation(Settings(("llamagen",), ("no-cache",), "tiny", (1,), repeats=1), CPU)["rows"]
    assert rows[1]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert "out of memory" in report.generation_table(rows)


def test_training_steps_are_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(training, "compile_network", lambda *_: False)
    arguments = ["--training", "--systems", "llamagen,mar", "--batch-sizes", "1,2", "--repeats", 1, "-o", tmp_path / "t.json", "-q"]
    code, out, _ = command(monkeypatch, capsys, *arguments, "--device", "cpu")
    assert code == 0
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert [(row["system"], row["mode"]) for row in rows] == [(s, m) for s in ("llamagen", "mar") for m in ("eager", "compiled")]
    for row in rows[::2]:
        assert row["batch_size"] == 2
        assert row["model_flop_utilisation"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["images_per_second"] * (9 if row["system"] == "llamagen" else 4))
    assert rows[1]["left_out"] == "nothing can be compiled here"
    assert out.count("\n| ") == 1 + 4


def test_training_counts_forward_and_backward():
    step = training.Step("llamagen", Settings(("llamagen",), size="tiny"), 2, CPU)
    with counting(step.model) as forward, torch.no_grad():
        step.loss()
    with counting(step.model) as whole:
        step.loss().backward()
    assert 2.5 < whole.flops / forward.flops < 3.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--systems", "lamagen"], "unknown system 'lamagen'; did you mean 'llamagen'?"),
        (["--ways", "lantren"], "unknown way 'lantren'; did you mean 'lantern'?"),
        (["--size", "bas"], "size 'bas'"),
        (["--batch-sizes", "1,0"], "batch sizes '1,0': expected positive integers"),
        (["--repeats", "0"], "nothing to measure"),
        (["--seconds", "-1"], "expected positive numbers"),
        (["--dtype", "float8"], "dtype 'float8'"),
        (["--device", "tpu"], "device 'tpu' cannot be used"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--output", "nowhere/"], "output 'nowhere': expected a .json file or a folder that is there"),
    ],
)
def test_bad_input_is_refused_in_one_line(monkeypatch, capsys, arguments, message):
    code, _, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_ratios_need_a_reference():
    rows = [{"system": "nar", "way": "plain", "batch_size": 1, "milliseconds_per_image": 2.0}, {"system": "nar", "left_out": "x"}]
    relate(rows, {})
    assert "times_as_fast_as_next_token" not in rows[0]
    with pytest.raises(ConfigError):
        Settings(systems=())


def test_peak_memory_of_the_process():
    with PeakMemory(CPU) as small:
        pass
    with PeakMemory(CPU) as large:
        torch.ones(2**24).sum()
    assert large.bytes >= small.bytes + 2**25


def test_where_there_is_no_proc(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(bench_device.Path, "read_text", missing)
    monkeypatch.setattr(bench_device.Path, "write_text", missing)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.bytes > 2**20
    assert bench_device.device_name(CPU)
