from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import Run
from tests.tiny_pipelines import tiny_pipeline, tiny_tokenizer
from vargen import EagleDrafter, VQTokenizer, registry
from vargen.cli.main import main
from vargen.errors import VargenError
from vargen.metrics.features import FeatureNet
from vargen.official.llamagen_vq import to_official


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def in_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_is_instant_and_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['vargen', *{arguments}]\n"
        "from vargen.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = in_python(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert output.splitlines()[0].startswith("Usage:")
    assert output.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_package_is_light() -> None:
    assert in_python("import sys, vargen; print('torch' in sys.modules, vargen.__version__)").startswith("False ")


def test_usage_errors_exit_with_2(run: Run) -> None:
    for arguments in (["paint"], ["sample"], ["sample", "digits", "--num", "many"], ["sample", "digits", "--size", "3"]):
        code, _, error = run(*arguments)
        assert code == 2
        assert "Error" in error


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, "vargen 0.1.0\n")


def test_sample_writes_and_names_its_results(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, error = run(
        "sample", saved, "--class-labels", "digit 3,7", "--num", 3, "--batch-size", 4, "--output", tmp_path / "out", "-q", "--npz"
    )
    assert (code, error) == (0, "")
    assert out.splitlines() == [
        f"3 of 3 images in {tmp_path / 'out'}",
        str(tmp_path / "out/grid.png"),
        str(tmp_path / "out/samples.npz"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["class_label"] for line in lines] == [3, 7, 3]


def test_settings_and_shards(run: Run, saved: Path, tmp_path: Path) -> None:
    arguments = ["sample", saved, "-n", 4, "--batch-size", 2, "-o", tmp_path / "out", "-q", "--set", "guidance_schedule=linear"]
    assert run(*arguments, "--shard", "1/2")[1] == f"2 of 4 images in {tmp_path / 'out'}\n"
    assert run(*arguments)[1].splitlines()[1:] == [str(tmp_path / "out/grid.png")]
    assert json.loads((tmp_path / "out/job.json").read_text())["settings"]["guidance_schedule"] == "linear"


def test_speculation_says_what_it_gained(run: Run, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    EagleDrafter.for_target(tiny_pipeline().model).save_pretrained(tmp_path / "drafter")  # type: ignore[arg-type]
    relaxed = ["--lantern-k", 4, "--lantern-ratio", 5]
    for name, options in {
        "lossless": ["--drafter", tmp_path / "drafter"],
        "lantern": ["--drafter-path", tmp_path / "drafter", "--tree", "chain_5", *relaxed],
        "jacobi": ["--jacobi", *relaxed],
    }.items():
        code, out, _ = run("sample", saved, "-n", 1, "-o", tmp_path / name, "-q", *options)
        assert code == 0
        gain, done, grid = out.splitlines()
        assert re.fullmatch(r"\d\.\d\d tokens per target pass: \d+\.\d passes per image, not 16", gain)
        assert done == f"1 of 1 images in {tmp_path / name}"
        assert grid == str(tmp_path / name / "grid.png")


def test_prompts_from_a_file(run: Run, tmp_path: Path) -> None:
    tiny_pipeline(text=True).save_pretrained(tmp_path / "text")
    (tmp_path / "prompts.txt").write_text("a red circle\n\na small blue square\n")
    code, *_ = run(
        "sample", tmp_path / "text", "--prompt", "red", "--prompt-file", tmp_path / "prompts.txt", "-n", 3, "-o", tmp_path / "out"
    )
    assert code == 0
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["red", "a red circle", "a small blue square"]


def truncate(folder: Path) -> None:
    file = next((folder / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])


def pickled(folder: Path) -> None:
    next((folder / "model").glob("*.safetensors")).unlink()
    torch.save({}, folder / "model/model.pt")


def corrupted(folder: Path) -> None:
    next((folder / "visual_tokenizer").glob("*.safetensors")).write_bytes(b"\x00" * 4096)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is not a complete safetensors file"),
        (pickled, "model.pt is refused"),
        (corrupted, "is not a complete safetensors file"),
    ],
)
def test_damaged_checkpoints(run: Run, saved: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree(saved, tmp_path / "model")
    damage(tmp_path / "model")
    check_refused(run("sample", tmp_path / "model", "-o", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-labels", "10"], "class label 10: expected 0..9"),
        (["--class-labels", "digit3"], "did you mean 'digit 3'"),
        (["--prompt", "a cat"], "takes no prompts"),
        (["--num", "0"], "num 0"),
        (["--batch-size", "0"], "batch size 0"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-p", "2"], "top_p 2.0"),
        (["--set", "colour=red"], "colour"),
        (["--set", "colour"], "expected key=value"),
        (["--shard", "3/3"], "shard '3/3'"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--dtype", "int8"], "dtype 'int8'"),
        (["--prompt-file", "missing.txt"], "prompt file 'missing.txt'"),
        (["--jacobi", "--compile"], "--compile with --jacobi"),
        (["--jacobi", "--lantern-k", "40", "--lantern-delta", "0.1"], "expected 1..31"),
        (["--drafter", "missing"], "no drafter 'missing'"),
        (["--draft", "digits"], "LlamaGen is none"),
        (["--exact"], "--exact goes with --draft"),
        (["--cuda-graphs", "--device", "cpu"], "needs a CUDA device"),
        (["--set", "decoding=jacobi"], "decoding is no setting"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(
    run: Run, saved: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    check_refused(run("sample", saved, "-o", tmp_path / "out", *arguments), message)
    assert not (tmp_path / "out").exists()


def test_unknown_models(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check_refused(run("sample", "digts", "-o", tmp_path / "out"), "did you mean 'digits'")
    check_refused(run("sample", "nobody/no-such-model", "-o", tmp_path / "out"), "cannot load")
    check_refused(run("sample", tmp_path, "-o", tmp_path / "out"), "holds no model")
    assert not (tmp_path / "out").exists()


def test_unwritable_output(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    check_refused(run("sample", saved, "-o", tmp_path / "file"), "is not a folder")
    check_refused(run("sample", saved, "-o", tmp_path / "file/out"), "is not a folder")
    check_refused(run("sample", saved, "-o", "/proc/out", "-q"), "cannot write")
    check_refused(run("order", "raster", "4x4", "-o", tmp_path / "file/order.png"), "cannot write")
    assert (tmp_path / "file").read_text() == "mine"


def check_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, error = result
    assert code == 2
    assert out == ""
    assert error.startswith("vargen: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_system_errors_are_one_line_and_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def main_fails() -> None:
            raise error

        monkeypatch.setattr("vargen.cli.main.app", main_fails)

    fail(PermissionError(13, "Permission denied", "/root/x"))
    check_refused(run(), "Permission denied")
    fail(VargenError("two\nlines"))
    check_refused(run(), "two lines")
    fail(KeyError("a bug"))
    with pytest.raises(KeyError):
        main()


def test_reconstruct(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, _ = run("reconstruct", saved, "digits", "-n", 3, "-o", tmp_path / "out")
    assert code == 0
    assert out.splitlines()[1:] == [str(tmp_path / "out/reconstruct.png"), str(tmp_path / "out/report.json")]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["results"][0]["images"]) == 3
    assert f"PSNR {report['results'][0]['psnr']:.2f} dB" in out
    Image.open(tmp_path / "out/reconstruct.png").load()
    check_refused(run("reconstruct", saved, "digits", "--tokens", "1,4"), "no ordered tokens")
    check_refused(run("reconstruct", saved, "digit"), "did you mean 'digits'")
    check_refused(run("reconstruct", saved, "digits", "--tokens", "one"), "expected positive integers")


def test_order_draws_a_picture(run: Run, tmp_path: Path) -> None:
    assert run("order", "blocks", "4x4", "size=8", "-o", tmp_path / "a.png")[1] == f"16 cells in 2 steps: {tmp_path / 'a.png'}\n"
    assert run("order", "cells", "4x4", "cell=2x2", "-o", tmp_path / "a.png")[0] == 0
    assert run("order", "scales", "1x1", "2x2", "-o", tmp_path / "a.png")[0] == 0
    assert run("order", "neighbors", "4x4", "--mask", "neighboring", "-o", tmp_path / "a.png")[0] == 0
    check_refused(run("order", "raster", "4x4", "--mask", "shiftd"), "did you mean 'shifted'")
    check_refused(run("order", "neighbors", "4x4", "--mask", "shifted"), "equal size")
    check_refused(run("order", "raster", "4x4", "size=2"), "blocks needs size")
    check_refused(run("order", "blocks", "4x4"), "blocks needs size")
    check_refused(run("order", "raster", "size=2"), "no shape")
    check_refused(run("order", "zigzag", "4x4"), "unknown order")


def test_convert(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "vq.pt"
    torch.save({"model": to_official(tiny_tokenizer())}, file)
    code, out, _ = run("convert", "llamagen-vq", file, tmp_path / "out", "sample_size=32", "norm_groups=4")
    assert code == 0
    assert out.startswith("VQTokenizer with ")
    assert VQTokenizer.from_pretrained(tmp_path / "out").sample_shape == (32, 32)
    check_refused(run("convert", "llamagen-vq", file, tmp_path / "out"), "is not empty")
    check_refused(run("convert", "llamagen-vq", file, tmp_path / "new", "sample_sise=32"), "did you mean 'sample_size'")
    check_refused(run("convert", "llamagen-vqq", file, tmp_path / "new"), "did you mean 'llamagen-vq'")
    check_refused(run("convert", "llamagen-vq", tmp_path / "missing.pt", tmp_path / "new"), "does not exist")
    assert not (tmp_path / "new").exists()


def test_models_lists_everything(run: Run, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUNDLED", {"tiny": str(saved)})
    code, out, _ = run("models", "--json")
    assert code == 0
    listed = json.loads(out)
    assert [(model["name"], model["class"], model["takes"]) for model in listed["bundled"]] == [
        ("tiny", "LlamaGen", "10 classes, given tokens")
    ]
    assert [system["name"] for system in listed["systems"]] == list(registry.SYSTEMS)
    text = run("models")[1]
    for name in ("tiny", *registry.SYSTEMS):
        assert name in text


def test_evaluate(run: Run, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    digits = [str(number) for number in range(10)]
    FeatureNet({"class": digits}, image_size=16, widths=(4, 4, 4, 4), dim=8).save_pretrained(tmp_path / "net")
    assert run("sample", saved, "-n", 20, "--batch-size", 20, "-o", tmp_path / "out", "-q", "--npz")[0] == 0
    arguments = ["--dataset", "digits", "--features", tmp_path / "net"]
    code, text, _ = run("evaluate", tmp_path / "out", *arguments)
    assert code == 0
    for words in ("Fréchet distance", "two halves of the real set", "precision, recall", "conditional accuracy"):
        assert words in text
    report = json.loads(run("evaluate", tmp_path / "out", *arguments, "--json")[1])
    assert report["settings"]["num_samples"] == 20
    assert f"{report['frechet_distance']:.3f}" in text
    shuffled = json.loads(run("evaluate", tmp_path / "out/samples.npz", *arguments, "--json")[1])
    assert shuffled["conditional_accuracy"] == report["conditional_accuracy"]
    assert json.loads(run("evaluate", tmp_path / "out", *arguments, "--json", "--limit", 5)[1])["settings"]["num_samples"] == 5
    check_refused(run("evaluate", tmp_path / "out", "--dataset", "photos"), "has no feature network of its own")
    check_refused(run("evaluate", tmp_path / "out", *arguments, "--limit", 0), "limit 0")
    check_refused(run("evaluate", tmp_path / "none", *arguments), "expected a folder of images or an .npz batch")
    check_refused(run("evaluate", tmp_path / "out", *arguments, "--split", "val"), "expected one of train, test")
