"""Plans of masked decoding, known cells, and what editing refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.decoding.masked import given_tokens, masked_steps, plan, refuse_editing
from vargen.errors import SpaceError, VargenError
from vargen.guidance import Guidance
from vargen.nn.masking import positions_where, put, take, truncated_normal_rate
from vargen.noise import Noise
from vargen.space import TokenSpace


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_unknown_cell_is_revealed_once_and_known_ones_never(data):
    cells = data.draw(st.integers(1, 40))
    steps = data.draw(st.integers(1, cells))
    kept = data.draw(st.integers(0, cells))
    noise = Noise(data.draw(st.integers(0, 99)), 3)
    known = torch.zeros(3, cells, dtype=torch.bool).scatter(1, noise.permutation("known", cells)[:, :kept], True)
    seen = torch.zeros(3, cells, dtype=torch.int64)
    for step in masked_steps(noise.permutation("order", cells), plan(cells, steps, known), known):
        assert step.positions.shape[1] == step.masked - step.masked_after >= 1
        assert (step.positions.diff(dim=1) > 0).all()
        assert step.mask.gather(1, step.positions).all()
        assert not step.mask_after.gather(1, step.positions).any()
        assert not (step.mask & known).any()
        seen.scatter_add_(1, step.positions, torch.ones_like(step.positions))
    assert torch.equal(seen, (~known).long())


def test_the_order_is_consumed_from_its_end():
    order = torch.tensor([[3, 1, 0, 2]])
    revealed = [s.positions.tolist() for s in masked_steps(order, [3, 1, 0])]
    assert revealed == [[[2]], [[0, 1]], [[3]]]
    known = torch.tensor([[False, True, False, False]])
    revealed = [s.positions.tolist() for s in masked_steps(order, [2, 0], known)]
    assert revealed == [[[2]], [[0, 3]]]


def test_plan():
    assert plan(256, 4) == [236, 181, 97, 0]
    assert plan(16, 16) == list(range(15, -1, -1))
    assert plan(4, 4, torch.tensor([[True, True, True, False]])) == [0]
    assert plan(4, 2, torch.ones(1, 4, dtype=torch.bool)) == []
    for steps in (0, 5):
        with pytest.raises(VargenError, match=f"{steps} decoding steps for 4 tokens"):
            plan(4, steps)


def test_linear_guidance_stays_below_its_end():
    guidance = Guidance(3.0, schedule="linear")
    scales = [guidance.at(s.progress) for s in masked_steps(torch.arange(16)[None], plan(16, 6))]
    assert scales == [1.125, 1.375, 1.625, 2.0, 2.5, 2.875]


SPACE = TokenSpace(((2, 3),), channels=4)


def test_given_tokens():
    known, tokens = torch.tensor([[True, False, False], [False, False, True]]), torch.randn(1, 2, 3, 4)
    mask, values = given_tokens(SPACE, 2, known, tokens)
    assert mask.shape == (2, 6)
    assert values.shape == (2, 2, 3, 4)
    assert given_tokens(SPACE, 2, None, None) == (None, None)


@pytest.mark.parametrize(
    "known, tokens, message",
    [
        (None, torch.zeros(1, 2, 3, 4), "both tokens"),
        (torch.zeros(2, 3, dtype=torch.bool), None, "both tokens"),
        (torch.zeros(2, 3), torch.zeros(1, 2, 3, 4), "bool mask"),
        (torch.zeros(3, 2, dtype=torch.bool), torch.zeros(1, 2, 3, 4), "known of shape"),
        (
            torch.eye(2, 3)[None].repeat(2, 1, 1).bool() & torch.tensor([[[1]], [[0]]]).bool(),
            torch.zeros(2, 2, 3, 4),
            "one at a time",
        ),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 2, 3, 4), "3 samples of given tokens"),
    ],
)
def test_bad_editing_arguments_are_refused(known, tokens, message):
    with pytest.raises(VargenError, match=message):
        given_tokens(SPACE, 2, known, tokens)


def test_given_tokens_must_lie_in_the_space():
    with pytest.raises(SpaceError, match="tokens of shape"):
        given_tokens(SPACE, 1, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 3, 2, 4))


def test_systems_that_cannot_edit_say_why():
    refuse_editing({"known": None, "steps": 3}, "ECAR", "reasons")
    with pytest.raises(VargenError, match=r"ECAR cannot keep given tokens \(reasons\).*MAR"):
        refuse_editing({"known": torch.ones(2)}, "ECAR", "reasons")


def test_take_and_put():
    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]]).bool()
    positions = positions_where(mask, 3)
    assert positions.tolist() == [[0, 2, 4], [1, 2, 3]]
    assert torch.equal(take(x, positions), x[mask].reshape(2, 3, 3))
    changed = put(x, positions, torch.zeros(2, 3, 3))
    assert (changed[mask] == 0).all()
    assert torch.equal(changed[~mask], x[~mask])


def test_mask_rates_follow_the_truncated_normal():
    rates = torch.tensor([truncated_normal_rate((i + 0.5) / 400, 0.7) for i in range(400)])
    assert rates.min() >= 0.7
    assert rates.max() <= 1.0
    # mean of N(1, 0.25^2) cut to [0.7, 1]
    assert float(rates.mean()) == pytest.approx(0.8666, abs=2e-3)
    assert truncated_normal_rate(0.0, 0.7) == pytest.approx(0.7)
