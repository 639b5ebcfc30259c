import pytest
import torch

from vargen.decoding.acceptance import Acceptance, Relaxation, try_children
from vargen.decoding.draft import Draft, warp_logits
from vargen.decoding.eagle import without_replacement
from vargen.decoding.neighbors import nearest_codes
from vargen.decoding.tree import StaticTree, Tree
from vargen.errors import VargenError
from vargen.noise import Noise

V = 6


def chi_square(tokens, probs):
    """Statistic of Pearson's test; its mean is V - 1 and its deviation sqrt(2 (V - 1)) where the law holds."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    expected = probs.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    return float(((counts - expected)[kept].square() / expected[kept]).sum())


def distributions(seed):
    logits = 1.5 * torch.randn(2, V, generator=torch.Generator().manual_seed(seed))
    logits[0, 1] = -torch.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("children", [1, 3])
def test_the_first_token_has_the_targets_distribution(drawn, children):
    target, proposal = distributions(0)
    noise = Noise(children, 4000)
    draws = noise.uniform("accept", (children,)).tolist()
    last = noise.uniform("token", dtype=torch.float64)
    chosen = proposal.topk(children).indices.expand(4000, -1)
    if drawn:
        chosen = without_replacement(proposal.expand(4000, -1), noise.uniform("children", (V,), dtype=torch.float64), children)
    tokens = []
    for trial, (row, uniforms) in enumerate(zip(chosen.tolist(), draws)):
        index, rest = try_children(target, proposal if drawn else None, row, None, uniforms.__getitem__)
        tokens.append(row[index] if index is not None else int((rest.double().cumsum(0) <= last[trial] * rest.sum()).sum()))
    # a false alarm in ten million
    assert chi_square(tokens, target) < 41


def test_children_are_drawn_in_turn_without_replacement():
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0])
    rows = without_replacement(probs.expand(4000, -1), Noise(3, 4000).uniform("children", (4,), dtype=torch.float64), 2)
    pairs = (rows[:, 0] * 4 + rows[:, 1]).tolist()
    expected = torch.zeros(16)
    for a in range(3):
        for b in range(3):
            if a != b:
                expected[4 * a + b] = probs[a] * probs[b] / (1 - probs[a])
    assert chi_square(pairs, expected) < 41


def test_a_draft_like_the_target_is_always_accepted():
    target, _ = distributions(1)
    for uniform in (0.0, 0.5, 1 - 2**-24):
        for token in torch.nonzero(target).flatten().tolist():
            assert try_children(target, target, [token], None, lambda _, u=uniform: u)[0] == 0


def test_what_cannot_be_is_never_accepted():
    target, proposal = distributions(0)
    assert target[1] == 0
    index, rest = try_children(target, None, [1], None, lambda _: 0.0)
    assert index is None
    assert torch.equal(rest, target)
    # a token that the draft could not draw is passed over and takes nothing away
    impossible = torch.nn.functional.one_hot(torch.tensor(2), V).float()
    index, rest = try_children(target, impossible, [3], None, lambda _: 0.0)
    assert index is None
    assert torch.equal(rest, target)


def relaxation(k=2, **bound):
    return Relaxation(nearest_codes(torch.arange(V).float().square().unsqueeze(1), V - 1), k, **bound)


def test_pooled_mass_stays_within_its_bound():
    probs = torch.tensor([[0.05, 0.1, 0.15, 0.3, 0.4, 0.0]])
    x = torch.tensor([1])
    # the neighbours of 1 are 0, then 2
    for bound, expected in (
        ({"delta": 0.01}, (0.0, False)),
        ({"delta": 0.06}, (0.05, True)),
        ({"delta": 0.21}, (0.2, True)),
        ({"ratio": 1.4}, (0.0, False)),
        ({"ratio": 2.0}, (0.05, True)),
        ({"ratio": 4.0}, (0.2, True)),
    ):
        gain, within = relaxation(**bound).pooled(probs, x)
        assert (round(float(gain), 6), bool(within)) == expected


def test_relaxed_acceptance_and_what_a_rejection_takes_along():
    target = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4, 0.0])
    rule = relaxation(delta=0.3)
    assert try_children(target, None, [1], rule, lambda _: 0.29)[0] == 0
    index, rest = try_children(target, None, [1], rule, lambda _: 0.31)
    assert index is None
    # 1, its two pooled neighbours 0 and 2, and one more, 3
    torch.testing.assert_close(rest, torch.tensor([0, 0, 0, 0, 1.0, 0]))
    proposal = torch.tensor([0.1, 0.4, 0.1, 0.1, 0.2, 0.1])
    _, rest = try_children(target, proposal, [1], rule, lambda _: 0.9)
    # neighbours keep their mass, since the draft's is taken as none there
    torch.testing.assert_close(rest, torch.tensor([0.05, 0, 0.15, 0.3, 0.2, 0]) / 0.7)


def test_a_target_of_which_nothing_is_left_becomes_uniform():
    target = torch.nn.functional.one_hot(torch.tensor(0), V).float()
    _, rest = try_children(target, torch.full((V,), 1 / V), [1, 0], relaxation(k=2, delta=1.0), lambda _: 1 - 1e-7)
    assert rest.sum() == pytest.approx(1)
    _, rest = try_children(target, None, [1], relaxation(k=2, delta=0.0), lambda _: 0.5)
    torch.testing.assert_close(rest, target)


def greedy_draft():
    tree = StaticTree.of([[0], [1], [0, 0], [1, 0]]).tree
    logits = torch.zeros(5, V)
    logits[0, 4] = logits[2, 2] = logits[4, 5] = 3.0
    logits[1, 0] = 3.0
    return tree, logits


def test_greedy_keeps_the_longest_right_path():
    tree, logits = greedy_draft()
    draft = Draft(tree, torch.tensor([0, 3, 4, 0, 2]))
    verdict = Acceptance().accept(draft, logits, True, lambda *_: pytest.fail("drawn"))
    assert verdict.path == [0, 2, 4]
    assert verdict.probs.tolist() == [0, 0, 0, 0, 0, 1]


def test_relaxed_greedy_takes_neighbours_that_are_raised_to_the_top():
    tree, logits = greedy_draft()
    draft = Draft(tree, torch.tensor([0, 3, 4, 0, 2]))
    # 3 is right too once it counts 4's mass; of two equally long paths the first is kept
    assert Acceptance(relaxation(k=4, delta=1.0)).accept(draft, logits, True, lambda *_: 0.0).path == [0, 1, 3]
    assert Acceptance(relaxation(k=4, delta=0.1)).accept(draft, logits, True, lambda *_: 0.0).path == [0, 2, 4]


def test_paths_by_leaf_decide_between_equal_ones():
    # node 1 has the later leaf (5), node 2 the earlier one (4); lexicographic order prefers node 1
    for by_leaf, first in ((False, 1), (True, 2)):
        tree = Tree((-1, 0, 0, 1, 2, 3), by_leaf)
        logits = torch.zeros(6, V)
        logits[0, 4], logits[1:, 0] = 1.0, 9.0
        draft = Draft(tree, torch.tensor([0, 3, 4, 5, 5, 5]))
        assert Acceptance(relaxation(k=4, delta=1.0)).accept(draft, logits, True, lambda *_: 0.0).path[1] == first


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"delta": 0.1, "ratio": 2.0},
        {"delta": 1.5},
        {"ratio": 0.5},
        {"ratio": float("inf")},
        {"k": 9, "delta": 0.1},
        {"k": 0, "delta": 0.1},
    ],
)
def test_impossible_relaxations_are_refused(arguments):
    with pytest.raises(VargenError):
        relaxation(**arguments)


def test_a_table_of_another_codebook_is_refused():
    with pytest.raises(VargenError, match="table of 6 codes for a target of 7"):
        try_children(torch.full((7,), 1 / 7), None, [0], relaxation(delta=0.1), lambda _: 0.0)


def test_a_table_needs_one_column_more_than_neighbours():
    table = nearest_codes(torch.arange(9.0).unsqueeze(1), 3)
    assert Relaxation(table, 2, 0.1).around(4).tolist() == [3, 5, 2]
    with pytest.raises(VargenError, match=r"expected k \+ 1 columns"):
        Relaxation(table, 3, 0.1)


def test_warpers_drop_from_the_small_end():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert warp_logits(logits, top_p=0.85).isfinite().tolist() == [True, True, True, False]
    assert warp_logits(logits, top_p=1e-3).isfinite().tolist() == [True, False, False, False]
    assert warp_logits(logits, top_p=0.85, top_k=1).isfinite().tolist() == [True, False, False, False]
    torch.testing.assert_close(warp_logits(logits, temperature=0.5), 2 * logits)
