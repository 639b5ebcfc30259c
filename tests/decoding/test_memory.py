"""The formula of docs/speed.md against what is really allocated."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.backbones.test_causal_systems import build, labels, text
from vargen.backbones.flextok import FlexTokGenerator
from vargen.backbones.llamagen import LlamaGen
from vargen.backbones.nar import NAR
from vargen.backbones.nbp import NBP
from vargen.condition import Condition
from vargen.decoding.engine import Engine, Run
from vargen.decoding.memory import decoding_memory
from vargen.decoding.plan import Plan
from vargen.guidance import Guidance
from vargen.noise import Noise

MODELS = {
    "llamagen": lambda: build(LlamaGen, grid=(6, 6), codebook_size=64, dim=64, depth=3, heads=4, num_classes=4),
    "llamagen text": lambda: build(LlamaGen, grid=(3, 3), dim=64, text_dim=6, text_length=4),
    "large vocabulary": lambda: build(LlamaGen, grid=(2, 3), codebook_size=16384, num_classes=4),
    "nar": lambda: build(NAR, grid=(6, 6), codebook_size=64, dim=64, depth=3, heads=4, num_classes=4),
    "nbp": lambda: build(NBP, grid=(6, 6), block_size=6, codebook_size=64, dim=64, heads=4, condition_vocabulary=4),
    "flextok": lambda: build(FlexTokGenerator, length=12, codebook_size=64, dim=64, heads=4, num_classes=4, gated=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, rows, buckets", [(n, r, b) for n in MODELS for r in (1, 2) for b in (None, 2) if (n, r) != ("nbp", 2)]
)
def test_weights_cache_and_buffers_have_the_stated_sizes(name, rows, buckets, dtype):
    model, condition = MODELS[name]().to(dtype), text() if name == "llamagen text" else labels()
    plan = Plan.of(model.layout, buckets=buckets)
    run = Run(model, plan, condition, Noise(0, 2), rows)
    stated = decoding_memory(model, 2, rows, buckets=buckets)
    cache, prefix = run.state.cache, run.state.prefix
    assert stated["cache"] == cache.nbytes == cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    assert stated["weights"] == sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    held = [prefix, run.tokens, run.uniforms, run.entries, run.rank, *plan.rows]
    assert stated["buffers"] == sum(t.numel() * t.element_size() for t in held)
    assert decoding_memory(MODELS[name](), 2, rows, dtype, buckets=buckets) == stated


def peak(call) -> int:
    """Most bytes that were allocated at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "name, rows, buckets", [("llamagen", 2, None), ("large vocabulary", 1, None), ("nar", 2, 2), ("nbp", 1, 2)]
)
def test_the_peak_is_about_the_stated_total(name, rows, buckets):
    model, condition = MODELS[name](), Condition(class_labels=torch.arange(4))
    guidance = Guidance(1.0 if rows == 1 else 2.0)
    stated = decoding_memory(model, 4, rows, buckets=buckets)
    working = stated["total"] - stated["weights"]

    def call():
        model.generate(condition, noise=Noise(0, 4), guidance=guidance, decoding=Engine(buckets=buckets))

    call()
    assert 0.85 * working < peak(call) < 1.1 * working
