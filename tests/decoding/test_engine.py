"""The engine's ways of running the same passes draw the same tokens."""

import shutil
import sys
from inspect import unwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backbones.test_causal_systems import CASES, build, labels, text
from vargen.backbones.flextok import FlexTokGenerator
from vargen.backbones.larp import LARPGenerator
from vargen.backbones.llamagen import LlamaGen
from vargen.backbones.nar import NAR
from vargen.backbones.nbp import NBP
from vargen.condition import Condition
from vargen.decoding.compiled import CompiledBlocks
from vargen.decoding.engine import Engine
from vargen.decoding.plan import Numbers, Plan
from vargen.decoding.quantize import int8_weights
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance, until
from vargen.layout import hybrid, neighboring, shifted
from vargen.model import Sampling
from vargen.noise import Noise
from vargen.order import Order

ALL = CASES | {
    "llamagen": (lambda: build(LlamaGen, grid=(3, 4), num_classes=4, mlp_hidden=40), labels, 12, True),
    "llamagen text": (lambda: build(LlamaGen, grid=(3, 3), text_dim=6, text_length=4, mlp_hidden=40), text, 9, True),
}
SAMPLINGS = (Sampling(), Sampling(temperature=0.0), Sampling(0.8, top_k=7, top_p=0.9))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("buckets", [1, 3])
def test_padded_passes_draw_what_exact_ones_draw(name, buckets):
    make, condition, _, guided = ALL[name]
    model, condition = make(), condition()
    for number, sampling in enumerate(SAMPLINGS):
        for guidance in (Guidance(), Guidance(2.5, schedule=until(4))) if guided else (Guidance(),):
            run = {"noise": Noise(number, 2), "guidance": guidance, "sampling": sampling}
            assert torch.equal(model.generate(condition, **run, decoding=Engine(buckets=buckets)), model.generate(condition, **run))


GIVEN = {
    "llamagen": (lambda: build(LlamaGen, grid=(3, 4), num_classes=4, mlp_hidden=40), 5),
    "nar": (lambda: build(NAR, grid=(3, 4), num_classes=4, mlp_hidden=40), 6),
    "nbp": (lambda: build(NBP, grid=(3, 2, 4), block_size=4), 12),
    "larp": (lambda: build(LARPGenerator, length=9, num_classes=4, mlp_hidden=40), 8),
    "flextok": (lambda: build(FlexTokGenerator, length=7, num_classes=4), 3),
}


@pytest.mark.parametrize("name", GIVEN)
def test_given_tokens_are_continued_as_if_they_had_been_drawn(name):
    make, count = GIVEN[name]
    model = make()
    start = labels() if name != "nbp" else Condition(tokens=torch.arange(8).reshape(2, 4))
    whole = model.generate(start, noise=Noise(4, 2))
    condition = Condition(start.class_labels, tokens=whole.flatten(1)[:, model.layout.order.cells[:count]])
    for engine in (Engine(), Engine(buckets=2)):
        assert torch.equal(model.generate(condition, noise=Noise(4, 2), decoding=engine), whole)


def test_padded_passes_stop_where_they_are_told_to():
    model = build(FlexTokGenerator, length=7, num_classes=4)
    whole = model.generate(labels(), noise=Noise(3, 2))
    for count in (1, 4, 7):
        tokens = model.generate(labels(), noise=Noise(3, 2), num_tokens=count, decoding=Engine(buckets=2))
        assert torch.equal(tokens, whole[:, :count])


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    prefix = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["raster", "neighbors", "hybrid"]))
    if kind == "hybrid":
        return hybrid(shape, shape[-1], prefix)
    return shifted(Order.raster(shape), prefix) if kind == "raster" else neighboring(Order.neighbors(shape), prefix)


@given(layouts(), st.sampled_from([None, 1, 2, 4]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_plans_hold_the_steps_of_their_layout_in_few_shapes(layout, buckets):
    plan = Plan.of(layout, buckets=buckets)
    written = torch.zeros(plan.capacity, dtype=torch.bool)
    for step, shape, row in zip(plan.steps, plan.shapes, plan.rows):
        numbers, n, t = Numbers.unpack(row, shape), len(step.inputs), len(step.targets)
        assert torch.equal(numbers.slots[:n], step.inputs)
        assert torch.equal(numbers.places, step.inputs[0] + torch.arange(shape.width))
        assert torch.equal(numbers.targets[:t], step.targets)
        assert (numbers.targets[t:] == layout.order.num_cells).all()
        assert torch.equal(numbers.source[:, :t], step.source)
        assert (numbers.source[:, t:] == -1).all()
        written[numbers.places] = True
        # whatever is read has been written, with a token or as padding, or is hidden by a mask
        assert written[: int(step.inputs[-1]) + 1].all()
        assert shape.masked or shape.stop == int(step.inputs[-1]) + 1
    if buckets is None:
        assert plan.capacity == layout.num_inputs
        assert [s.width for s in plan.shapes] == [len(s.inputs) for s in plan.steps]
    else:
        assert len({s.width for s in plan.shapes[1:]}) <= buckets
        assert len({s.stop for s in plan.shapes}) <= buckets
        assert layout.num_inputs <= plan.capacity <= layout.num_inputs + max(s.width for s in plan.shapes)


def test_nothing_of_the_last_call_is_left_to_the_next():
    model, engine = build(LlamaGen, grid=(3, 4), num_classes=4, mlp_hidden=40), Engine(buckets=2)
    first = model.generate(labels(), noise=Noise(0, 2), decoding=engine)
    kept = first.clone()
    model.generate(Condition(class_labels=torch.tensor([3])), noise=Noise(1, 1), decoding=engine)
    assert torch.equal(model.generate(labels(), noise=Noise(0, 2), decoding=engine), kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["llamagen text", "nar image", "flextok text", "nbp frames"])
def test_kept_buffers_take_other_samples(name, monkeypatch):
    monkeypatch.setattr("vargen.decoding.engine.GraphedPasses", lambda step, device: step)
    make, condition, _, guided = ALL[name]
    model, condition, engine = make(), condition(), Engine(graphs=True, buckets=2)
    runs = []
    for number, rows in enumerate(([0, 1], [1, 0], [1])):
        other = condition.select(torch.tensor(rows))
        run = {"noise": Noise(number, len(rows)), "guidance": Guidance(3 if guided else 1)}
        assert torch.equal(model.generate(other, **run, decoding=engine), model.generate(other, **run))
        runs.append(engine._kept[1])
    assert runs[0] is runs[1] is not runs[2]
    model.double()
    assert torch.equal(model.generate(other, **run, decoding=engine), model.generate(other, **run))


def test_nothing_is_drawn_where_all_tokens_are_given():
    for name in ("llamagen", "llamagen text"):
        make, condition, cells, _ = ALL[name]
        tokens = torch.arange(2 * cells).reshape(2, cells) % 13
        given = Condition(condition().class_labels, condition().text, tokens=tokens)
        assert torch.equal(make().generate(given).flatten(1), tokens)


def test_steps_are_reported_with_tokens_that_stay():
    model = build(NAR, grid=(3, 4), num_classes=4, mlp_hidden=40)
    seen = []
    tokens = model.generate(labels(), noise=Noise(0, 2), on_step=seen.append, decoding=Engine(buckets=2))
    assert [info.index for info in seen] == list(range(6))
    for info in seen:
        assert torch.equal(info.tokens, torch.where(info.known.bool(), tokens, 0))


def test_a_broken_model_is_reported_once_it_is_done():
    model = build(LlamaGen, grid=(3, 4), num_classes=4, mlp_hidden=40)
    torch.nn.init.constant_(model.output_heads[0].linear.weight, float("nan"))
    with pytest.raises(VargenError, match="NaN logits"):
        model.generate(labels(), decoding=Engine(buckets=2))


def test_what_cannot_run_here_is_refused(monkeypatch):
    model = build(LlamaGen, grid=(2, 2), num_classes=4, mlp_hidden=40)
    with pytest.raises(ConfigError, match="at least one size"):
        Engine(buckets=0)
    with pytest.raises(VargenError, match="needs a CUDA device"):
        model.generate(labels(), decoding=Engine(graphs=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(VargenError, match="needs a C\\+\\+ compiler, no-such-compiler"):
        model.generate(labels(), decoding=Engine(compile=True))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_draw_what_plain_ones_draw():
    model, engine = build(FlexTokGenerator, length=3, num_classes=4), Engine(compile=True, buckets=1)
    run = {"noise": Noise(0, 2), "guidance": Guidance(2.0)}
    tokens = model.generate(labels(), **run, decoding=engine)
    assert torch.equal(tokens, model.generate(labels(), **run))
    # all blocks and passes but the one over the prefix share one compiled shape, and another batch of that size takes it again
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model.generate(labels(), **run, decoding=engine), tokens)


def test_engines_do_not_share_what_they_compiled():
    codes = [unwrap(CompiledBlocks().compiled).__code__ for _ in range(2)]
    assert codes[0] == codes[1]
    assert codes[0] is not codes[1]


def test_int8_weights_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(VargenError, match="vargen\\[int8\\]"):
        int8_weights(build(LlamaGen, grid=(2, 2), num_classes=4, mlp_hidden=40))
