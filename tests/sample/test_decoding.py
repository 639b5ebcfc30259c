"""Fast decoding of sampling jobs: what goes together, what is recorded, and what is drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny_pipelines import tiny_pipeline, tiny_video_pipeline
from vargen import MAR, EagleDrafter, KLTokenizer, VisualARPipeline
from vargen.decoding.continuous import ContinuousSpeculation
from vargen.decoding.engine import Engine
from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.sample.decoding import Decoder, DecodingChoice
from vargen.sample.images import JobResult, sample


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Neighbour tables of these tests stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def pipe() -> VisualARPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def model(pipe: VisualARPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return str(folder)


def save_drafter(pipe: VisualARPipeline, folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    EagleDrafter.for_target(pipe.model).save_pretrained(folder)  # type: ignore[arg-type]
    return str(folder)


@pytest.fixture(scope="module")
def drafter(pipe: VisualARPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_drafter(pipe, tmp_path_factory.mktemp("drafter") / "final", 0)


def mar_pipeline(grid: int = 4, num_classes: int = 3, decoder_depth: int = 1) -> VisualARPipeline:
    torch.manual_seed(decoder_depth)
    stacks = {f"{stack}_{key}": value for stack in ("encoder", "decoder") for key, value in (("dim", 16), ("heads", 2))}
    model = MAR(
        grid=(grid, grid), channels=3, num_classes=num_classes, buffer_size=2, head_width=16, head_depth=1, head_steps="ddim4",
        encoder_depth=2, decoder_depth=decoder_depth, **stacks,
    )  # fmt: skip
    tokenizer = KLTokenizer(
        sample_size=4 * grid, widths=[4, 4, 4], encoder_blocks=1, decoder_blocks=1, encoder_attention_levels=[], latent_channels=3,
        norm_groups=2,
    )  # fmt: skip
    return VisualARPipeline(model.eval(), tokenizer, defaults={"steps": 12})


@pytest.fixture(scope="module")
def mar(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mar") / "large"
    mar_pipeline(decoder_depth=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small_mar(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mar") / "small"
    mar_pipeline().save_pretrained(folder)
    return str(folder)


def draw(model: str, folder: Path, num: int = 3, **options: object) -> JobResult:
    return sample(model, num=num, output=folder, progress=False, **options)  # type: ignore[arg-type]


def images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("[0-9]*.png"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "d", "jacobi": True}, "--jacobi with --drafter"),
        ({"draft": "m", "drafter": "d"}, "--draft with --drafter"),
        ({"drafter": "d", "compile": True}, "--compile with --drafter"),
        ({"jacobi": True, "cuda_graphs": True}, "--cuda-graphs with --jacobi"),
        ({"draft": "m", "int8": True}, "--int8 with --draft"),
        ({"tree": "chain_5"}, "--tree goes with --drafter"),
        ({"tree": "chain_5", "jacobi": True}, "--tree goes with --drafter"),
        ({"drafter": "d", "tree": "chain5"}, "did you mean 'chain_5'"),
        ({"lantern_k": 10, "lantern_ratio": 5.0}, "--lantern-k goes with --drafter or --jacobi"),
        ({"lantern_delta": 0.0}, "--lantern-delta goes with --drafter or --jacobi"),
        ({"jacobi": True, "lantern_k": 10}, "--lantern-k 10 needs a bound"),
        ({"jacobi": True, "lantern_delta": 0.0}, "give --lantern-k"),
        ({"jacobi": True, "lantern_k": 10, "lantern_delta": 0.1, "lantern_ratio": 5.0}, "expected one bound"),
        ({"jacobi": True, "lantern_k": 10, "lantern_delta": 5.0}, "is --lantern-ratio"),
        ({"jacobi": True, "lantern_k": 10, "lantern_ratio": 0.5}, "--lantern-ratio 0.5: expected"),
        ({"exact": True}, "--exact goes with --draft"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodingChoice(**options)


def test_names_of_choices() -> None:
    assert DecodingChoice().name == ""
    assert DecodingChoice().chosen == {}
    assert DecodingChoice(int8=True).chosen == {"compile": True, "int8": True}
    choice = DecodingChoice(drafter="runs/drafter/final", tree="chain_5", lantern_k=10, lantern_delta=0.0)
    assert choice.name == "drafter_final+tree_chain_5+lantern_k_10+lantern_delta_0.0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drafter": "d"}, "--drafter is for models that draw token after token"),
        ({"jacobi": True}, "MAR is none"),
        ({"cuda_graphs": True}, "--cuda-graphs is for"),
        ({"int8": True}, "--int8 is for"),
    ],
)
def test_causal_ways_are_refused_for_masked_models(options: dict, message: str) -> None:
    with pytest.raises(VargenError, match=message):
        Decoder(DecodingChoice(**options), mar_pipeline())


def test_models_devices_and_installations_that_do_not_fit(
    pipe: VisualARPipeline, drafter: str, small_mar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(options: dict, pipeline: VisualARPipeline = pipe) -> str:
        with pytest.raises(VargenError) as error:
            Decoder(DecodingChoice(**options), pipeline)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "needs a CUDA device, the model is on 'cpu'" in refused({"cuda_graphs": True})
    assert "is for MAR models; LlamaGen is none" in refused({"draft": small_mar})
    assert "expected 1..31, the tokenizer has 32 codes" in refused({"jacobi": True, "lantern_k": 32, "lantern_delta": 0.1})
    assert "cannot be decoded speculatively" in refused({"jacobi": True}, tiny_video_pipeline("nar"))
    pipe.save_pretrained(tmp_path / "causal")
    mar_pipeline(num_classes=4).save_pretrained(tmp_path / "classes")
    mar_pipeline(grid=2).save_pretrained(tmp_path / "grid")
    target = mar_pipeline()
    assert "holds a LlamaGen: expected a smaller MAR" in refused({"draft": str(tmp_path / "causal")}, target)
    assert "class (4 classes), the model on class (3 classes)" in refused({"draft": str(tmp_path / "classes")}, target)
    with pytest.raises(SpaceError, match="levels"):
        Decoder(DecodingChoice(draft=str(tmp_path / "grid")), target)
    monkeypatch.setattr("vargen.sample.decoding.compiler_failure", lambda device: "no compiler")
    assert "leave --compile and --int8 out: no compiler" in refused({"compile": True})


def test_int8_needs_torchao(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vargen.sample.decoding.compiler_failure", lambda device: None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(VargenError, match=r"pip install 'vargen\[int8\]'"):
        draw(model, tmp_path / "out", decoding=DecodingChoice(int8=True))
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_no_drafter(pipe: VisualARPipeline, model: str, tmp_path: Path) -> None:
    for source, message in (
        ("no-such", "no drafter 'no-such': expected a directory or a hub id"),
        (str(Path(model) / "model"), "holds a LlamaGen, not a drafter"),
        (str(tmp_path), "config"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Decoder(DecodingChoice(drafter=source), pipe)


def test_greedy_speculation_draws_the_same_images(model: str, drafter: str, tmp_path: Path) -> None:
    greedy = {"settings": {"temperature": 0.0}, "batch_size": 1}
    assert draw(model, tmp_path / "plain", **greedy).gain is None
    for name, choice in {
        "jacobi": DecodingChoice(jacobi=True),
        "dynamic": DecodingChoice(drafter=drafter),
        "static": DecodingChoice(drafter=drafter, tree="chain_5"),
    }.items():
        result = draw(model, tmp_path / name, decoding=choice, **greedy)
        assert images(tmp_path / name) == images(tmp_path / "plain")
        assert result.gain is not None
        assert result.gain.endswith("passes per image, not 16")


def test_the_job_records_its_decoding_and_keeps_others_out(
    pipe: VisualARPipeline, model: str, drafter: str, tmp_path: Path, own_cache: Path
) -> None:
    relaxed = DecodingChoice(drafter=drafter, tree="chain_5", lantern_k=4, lantern_ratio=5.0)
    result = draw(model, tmp_path / "out", num=2, decoding=relaxed)
    assert result.gain is not None
    assert list(own_cache.rglob("*.npy")), "the tokenizer's table is kept for the next time"
    job = json.loads((tmp_path / "out/job.json").read_text())
    assert job["batch_size"] == 1, "samples are decoded one by one, and none is padding"
    mark = job["decoding"].pop("fingerprint")
    assert job["decoding"] == {"drafter": drafter, "tree": "chain_5", "lantern_k": 4, "lantern_ratio": 5.0}
    line = json.loads((tmp_path / "out/manifest.jsonl").read_text().splitlines()[0])
    assert line["settings"]["decoding"] == {**job["decoding"], "fingerprint": mark}
    before = images(tmp_path / "out")
    other = save_drafter(pipe, tmp_path / "other", 1)
    for choice in (
        None,
        DecodingChoice(jacobi=True),
        DecodingChoice(drafter=drafter, tree="chain_5"),
        DecodingChoice(drafter=drafter, tree="chain_5", lantern_k=4, lantern_ratio=6.0),
        DecodingChoice(drafter=other, tree="chain_5", lantern_k=4, lantern_ratio=5.0),
    ):
        with pytest.raises(VargenError, match="holds a job with"):
            draw(model, tmp_path / "out", num=2, batch_size=1, decoding=choice)
    again = draw(model, tmp_path / "out", num=2, decoding=relaxed)
    assert again.gain is None, "nothing was drawn"
    assert images(tmp_path / "out") == before


def test_a_drafter_trained_on_is_another_job(pipe: VisualARPipeline, model: str, tmp_path: Path) -> None:
    choice = DecodingChoice(drafter=save_drafter(pipe, tmp_path / "drafter", 0))
    draw(model, tmp_path / "out", num=1, decoding=choice)
    save_drafter(pipe, tmp_path / "drafter", 1)
    with pytest.raises(VargenError, match="holds a job with decoding"):
        draw(model, tmp_path / "out", num=1, decoding=choice)


def test_plain_folders_have_no_decoding(model: str, tmp_path: Path) -> None:
    draw(model, tmp_path / "out", num=1, batch_size=1)
    assert json.loads((tmp_path / "out/job.json").read_text())["decoding"] is None
    with pytest.raises(VargenError, match="holds a job with decoding null"):
        draw(model, tmp_path / "out", num=1, decoding=DecodingChoice(jacobi=True))
    with pytest.raises(VargenError, match="decoding is no setting"):
        draw(model, tmp_path / "set", num=1, settings={"decoding": "jacobi"})


def test_padded_batches_restarts_and_the_animation(model: str, tmp_path: Path) -> None:
    choice = DecodingChoice(jacobi=True)
    whole = draw(model, tmp_path / "whole", num=5, batch_size=4, decoding=choice, animate=True)
    assert whole.files[-1].name == "animation.gif"
    parts = [draw(model, tmp_path / "parts", num=num, batch_size=4, decoding=choice) for num in (1, 5)]
    assert images(tmp_path / "parts") == images(tmp_path / "whole")
    assert all(part.gain is not None for part in parts)
    # padding repeats the last image, which must not be counted
    alone = draw(model, tmp_path / "alone", num=1, batch_size=1, decoding=choice)
    assert parts[0].gain == alone.gain


def test_the_default_folder_names_the_decoding(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    choice = DecodingChoice(jacobi=True, lantern_k=2, lantern_delta=0.1)
    result = sample(model, num=1, progress=False, decoding=choice)
    assert result.folder == Path("outputs/tiny-jacobi+lantern_k_2+lantern_delta_0.1-seed0")


def test_a_draft_model_speculates_for_mar(mar: str, small_mar: str, tmp_path: Path) -> None:
    result = draw(mar, tmp_path / "out", num=2, batch_size=2, decoding=DecodingChoice(draft=small_mar))
    # of 12 steps the model takes the first two, the draft ten, and two tests of eight and two drafted steps
    assert result.gain is not None
    assert result.gain.endswith("4.0 target passes and 10.0 draft passes per batch")
    record = json.loads((tmp_path / "out/job.json").read_text())["decoding"]
    assert record == {"draft": small_mar, "fingerprint": record["fingerprint"]}
    assert not Decoder(DecodingChoice(draft=small_mar), mar_pipeline()).one_by_one


def test_the_exact_rule(mar: str, small_mar: str) -> None:
    decoder = Decoder(DecodingChoice(draft=small_mar, exact=True), mar_pipeline(decoder_depth=2))
    driver = decoder.arguments()["decoding"]
    assert isinstance(driver, ContinuousSpeculation)
    assert driver.rule == "exact"
    assert decoder.one_by_one


def test_compiled_blocks(pipe: VisualARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vargen.sample.decoding.compiler_failure", lambda device: None)
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *_, **__: compiled.append(self))
    causal = Decoder(DecodingChoice(compile=True), pipe)
    causal.prepare()
    driver = causal.arguments()["decoding"]
    assert isinstance(driver, Engine)
    assert (driver.compile, driver.graphs, compiled) == (True, False, [])
    masked = Decoder(DecodingChoice(compile=True), mar_pipeline())
    masked.prepare()
    assert masked.arguments() == {}
    # two blocks of the encoder; the decoder and the head have one each
    assert {type(block).__name__ for block in compiled} == {"TransformerBlock"}
    assert len(compiled) == 2
    assert causal.record == masked.record == {"compile": True}
    assert not causal.one_by_one
