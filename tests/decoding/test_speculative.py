import itertools
from dataclasses import dataclass, field

import pytest
import torch

from tests.decoding.test_acceptance import chi_square
from vargen.backbones.drafter import EagleDrafter
from vargen.backbones.flextok import FlexTokGenerator
from vargen.backbones.larp import LARPGenerator
from vargen.backbones.llamagen import LlamaGen
from vargen.backbones.nar import NAR
from vargen.backbones.nbp import NBP
from vargen.condition import Condition, TextFeatures
from vargen.decoding.acceptance import Acceptance
from vargen.decoding.draft import Draft
from vargen.decoding.eagle import DynamicTree
from vargen.decoding.jacobi import Jacobi
from vargen.decoding.lantern import Lantern
from vargen.decoding.neighbors import nearest_codes
from vargen.decoding.speculative import Speculation
from vargen.decoding.tree import chain
from vargen.errors import ConfigError, VargenError
from vargen.guidance import Guidance
from vargen.model import Sampling
from vargen.noise import Noise

GREEDY = Sampling(0.0)
TREES = {"dynamic": DynamicTree(12, 2, 3), "static": "mc_sim_7b_63", "paths": [[0], [1], [0, 0]]}


def ready(model):
    """Random weights large enough that every token depends on those before it."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(part.weight, std=0.5)
    if hasattr(model, "position_table"):
        torch.nn.init.normal_(model.position_table, std=0.5)
    return model.eval()


def llamagen(**more):
    torch.manual_seed(0)
    sizes = {"grid": (3, 4), "codebook_size": 11, "dim": 32, "depth": 2, "heads": 2, "mlp_hidden": 48, "num_classes": 5}
    return ready(LlamaGen(**{**sizes, **more}))


def text(*lengths):
    torch.manual_seed(3)
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    return TextFeatures(torch.randn(len(lengths), 4, 6) * mask.unsqueeze(-1), mask)


def systems():
    labels, tokens = torch.tensor([2, 3]), torch.arange(10).reshape(2, 5)
    small = {"length": 7, "codebook_size": 11, "dim": 32, "depth": 1, "heads": 2, "mlp_hidden": 48}
    yield "llamagen", llamagen(), Condition(class_labels=labels)
    yield "llamagen-text", llamagen(num_classes=None, text_dim=6, text_length=4), Condition(text=text(2, 4))
    yield "llamagen-given", llamagen(), Condition(class_labels=labels, tokens=tokens)
    yield "flextok", ready(FlexTokGenerator(**small, num_classes=5)), Condition(class_labels=labels)
    yield "flextok-text", ready(FlexTokGenerator(**small, text_dim=6)), Condition(text=text(1, 3))
    yield "larp", ready(LARPGenerator(**small, num_classes=5)), Condition(class_labels=labels)
    yield "larp-frames", ready(LARPGenerator(**small)), Condition(context=torch.arange(14).reshape(2, 7) % 11)


SYSTEMS = {name: (model, condition) for name, model, condition in systems()}


def ways(model):
    torch.manual_seed(7)
    drafter = EagleDrafter.for_target(model).eval()
    return {**{name: Lantern(drafter, tree=tree) for name, tree in TREES.items()}, "jacobi": Speculation(Jacobi(4), Acceptance())}


@pytest.mark.parametrize("system", SYSTEMS)
def test_greedy_speculation_equals_plain_decoding(system):
    model, condition = SYSTEMS[system]
    guidance = Guidance(1.0 if system == "larp-frames" else 2.5, schedule="linear")
    plain = model.generate(condition, guidance=guidance, sampling=GREEDY)
    assert len(plain.unique()) >= 3
    for way in ways(model).values():
        assert torch.equal(model.generate(condition, guidance=guidance, sampling=GREEDY, decoding=way), plain)
        assert way.statistics.target_passes <= plain.numel()


@pytest.mark.parametrize("guided", [False, True])
def test_a_sample_does_not_depend_on_its_batch(guided):
    model = llamagen()
    guidance, labels = Guidance(2.0 if guided else 1.0), torch.tensor([0, 1, 2])
    table = nearest_codes(torch.randn(11, 2, generator=torch.Generator().manual_seed(0)), 10)
    drafter = EagleDrafter.for_target(model)
    for way in (
        *ways(model).values(),
        Lantern(drafter, table, 4, delta=0.2),
        Lantern(drafter, table, 4, ratio=3.0, tree="chain_5"),
    ):
        together = model.generate(Condition(class_labels=labels), noise=Noise(9, 3), guidance=guidance, decoding=way)
        alone = model.generate(Condition(class_labels=labels[1:2]), noise=Noise(9, [1]), guidance=guidance, decoding=way)
        assert torch.equal(alone[0], together[1])
        assert 0 <= int(together.min()) <= int(together.max()) < 11


def exact_distribution(model, guidance, sampling):
    """Probability of each of the 32 pictures of five cells of two codes, by plain passes over all of them."""
    tokens = torch.tensor(list(itertools.product(range(2), repeat=5)))
    labels = Condition(class_labels=torch.zeros(32, dtype=torch.int64))
    cond, null = (model.assemble(model.sequence(tokens, labels, torch.full((32,), drop))) for drop in (False, True))
    logits = (null + guidance.scale * (cond - null)) / sampling.temperature
    return logits.softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2).prod(1).detach()


@pytest.mark.parametrize("way", ["dynamic", "static", "jacobi"])
def test_lossless_speculation_has_the_targets_distribution(way):
    model = llamagen(grid=(1, 5), codebook_size=2, dim=16, heads=2, depth=1, mlp_hidden=8)
    guidance, sampling, count = Guidance(1.5), Sampling(0.8), 120
    tokens = model.generate(
        Condition(class_labels=torch.zeros(count, dtype=torch.int64)),
        noise=Noise(5, count),
        guidance=guidance,
        sampling=sampling,
        decoding=ways(model)[way],
    )
    expected = exact_distribution(model, guidance, sampling)
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    pictures = (tokens.flatten(1) * torch.tensor([16, 8, 4, 2, 1])).sum(1).tolist()
    # pictures that are expected less than three times count together; at most 31 degrees of freedom, a false alarm in a million
    common = expected * count >= 3
    number = common.cumsum(0) * common
    pooled = torch.zeros(int(common.sum()) + 1).index_add(0, number, expected)
    assert chi_square(number[pictures].tolist(), pooled) < 87


@dataclass
class Oracle:
    """Proposes the next tokens of a known sequence, of which every ``wrong``-th is off: any proposer may take a drafter's place."""

    tokens: list[int]
    length: int
    wrong: int = 1000
    passes: int = 0
    seen: list = field(default_factory=list)

    @property
    def size(self):
        return self.length + 1

    def start(self, sample):
        return self

    def propose(self, settled):
        self.seen.append(settled)
        upcoming = self.tokens[settled.known : settled.known + min(self.length, settled.room)]
        guesses = [(t + (i % self.wrong == 0)) % 11 for i, t in enumerate(upcoming, start=settled.known)]
        return Draft(chain(len(guesses)), torch.cat([settled.tokens[-1:], torch.tensor(guesses, dtype=torch.int64)]))


def test_rounds_are_counted_and_reported():
    model = llamagen()
    condition, steps = Condition(class_labels=torch.tensor([2])), []
    plain = model.generate(condition, guidance=Guidance(2.0), sampling=GREEDY)
    oracle = Oracle(plain.flatten().tolist(), 4)
    way = Speculation(oracle, Acceptance())
    passes = []
    handle = model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    tokens = model.generate(condition, guidance=Guidance(2.0), sampling=GREEDY, decoding=way, on_step=steps.append)
    handle.remove()
    assert torch.equal(tokens, plain)
    # the prefix gives one token, two rounds five each; the last token is not drafted
    assert way.statistics.accepted == [[4, 4, 0]]
    assert len(passes) == way.statistics.target_passes == 4
    assert way.statistics.tokens_per_round == pytest.approx(11 / 3)
    assert [int(step.known.sum()) for step in steps] == [1, 6, 11, 12]
    assert [step.index for step in steps] == [0, 5, 10, 11]
    assert steps[-1].total == 12
    assert torch.equal(steps[-1].tokens, plain)


def test_a_wrong_guess_ends_a_round_and_leaves_no_trace():
    model = llamagen(num_classes=None, text_dim=6, text_length=4)
    condition = Condition(text=text(2))
    plain = model.generate(condition, guidance=Guidance(2.0), sampling=GREEDY)
    oracle = Oracle(plain.flatten().tolist(), 4, wrong=4)
    way = Speculation(oracle, Acceptance())
    assert torch.equal(model.generate(condition, guidance=Guidance(2.0), sampling=GREEDY, decoding=way), plain)
    assert way.statistics.accepted == [[3, 3, 2]]
    # what proposers are told: the token behind each kept slot and that slot's state, as one pass over all would have it
    after_prefix, later = oracle.seen[0], oracle.seen[2]
    assert after_prefix.tokens.tolist() == [0, 0, 0, int(plain[0, 0, 0])]
    assert later.tokens.tolist() == plain.flatten()[5:9].tolist()
    hidden = model.sequence(plain.flatten(1), condition, torch.tensor([False]))[0]
    torch.testing.assert_close(later.hidden[:1], hidden[:, 8:12], atol=1e-4, rtol=1e-4)


def test_a_batch_is_reported_as_a_whole():
    model, steps = llamagen(), []
    model.generate(Condition(class_labels=torch.tensor([1, 2])), decoding=ways(model)["dynamic"], on_step=steps.append)
    shares = [float(step.known.mean()) for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert max(float(step.known.max()) for step in steps) <= 1


def test_a_prefix_of_ordered_tokens():
    model, condition = SYSTEMS["flextok"]
    plain = model.generate(condition, sampling=GREEDY, num_tokens=4)
    for way in ways(model).values():
        assert torch.equal(model.generate(condition, sampling=GREEDY, num_tokens=4, decoding=way), plain)


def test_all_tokens_given():
    model = llamagen()
    given = torch.arange(12)[None] % 11
    condition = Condition(class_labels=torch.tensor([1]), tokens=given)
    assert torch.equal(model.generate(condition, decoding=ways(model)["dynamic"]).flatten(1), given)


def test_a_relaxed_run_accepts_more():
    model = llamagen(grid=(4, 6))
    table, condition = nearest_codes(torch.randn(11, 2), 10), Condition(class_labels=torch.zeros(4, dtype=torch.int64))
    drafter, counts = EagleDrafter.for_target(model), []
    for bound in ({}, {"neighbors": table, "k": 9, "delta": 0.5}, {"neighbors": table, "k": 9, "delta": 1.0}):
        way = Lantern(drafter, **bound)
        model.generate(condition, noise=Noise(0, 4), decoding=way)
        counts.append(way.statistics.tokens_per_round)
    assert counts[0] < counts[1] < counts[2]


def test_models_with_several_tokens_or_heads_a_step_are_refused():
    nar = NAR(grid=(2, 2), codebook_size=5, dim=16, depth=1, heads=2, num_classes=3)
    nbp = NBP(grid=(2, 2, 2), codebook_size=5, block_size=2, dim=16, depth=1, heads=2)
    way = Speculation(Jacobi(), Acceptance())
    for model, condition, reason in (
        (nar, Condition(class_labels=torch.tensor([0])), "NAR cannot be decoded speculatively: 2 heads"),
        (nbp, Condition(tokens=torch.zeros(1, 2, dtype=torch.int64)), "NBP cannot be decoded speculatively: a step draws several"),
    ):
        with pytest.raises(VargenError, match=reason):
            model.generate(condition, decoding=way)


def test_what_does_not_fit_is_refused():
    model = llamagen()
    condition = Condition(class_labels=torch.tensor([0]))
    for other in (llamagen(codebook_size=12), llamagen(grid=(2, 4)), llamagen(dim=64)):
        with pytest.raises(VargenError, match="the drafter"):
            model.generate(condition, decoding=Lantern(EagleDrafter.for_target(other)))
    with pytest.raises(VargenError, match="needs neighbors"):
        Lantern(EagleDrafter.for_target(model), delta=0.1)
    with pytest.raises(VargenError, match="partial condition"):
        model.generate(condition, guidance=Guidance(2.0, partial_scale=1.5), decoding=ways(model)["jacobi"])
    with pytest.raises(ConfigError, match="window 0"):
        Jacobi(0)
    with pytest.raises(ConfigError, match="size above 1"):
        DynamicTree(1)


def test_broken_weights_are_reported():
    model = llamagen()
    condition = Condition(class_labels=torch.tensor([0]))
    drafter = EagleDrafter.for_target(model)
    drafter.join.bias.data[0] = float("nan")
    for tree in TREES.values():
        with pytest.raises(VargenError, match="drafter produced NaN"):
            model.generate(condition, decoding=Lantern(drafter, tree=tree))
    model.tokens.weight.data.fill_(float("nan"))
    with pytest.raises(VargenError, match="model produced NaN"):
        model.generate(condition, decoding=ways(model)["jacobi"])
