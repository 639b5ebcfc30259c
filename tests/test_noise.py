import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vargen.errors import VargenError
from vargen.noise import Noise, as_noise, inverse_cdf

seeds = st.integers(-(2**70), 2**70)


@given(seeds, st.lists(st.integers(0, 10**9), min_size=1, max_size=5, unique=True))
@settings(max_examples=20, deadline=None)
def test_a_sample_draws_the_same_in_any_batch_and_order(seed, index):
    together = Noise(seed, index)
    first = together.normal("a", (3, 2), at=(5,))
    together.uniform("b", (4,))
    for row, i in enumerate(index):
        alone = Noise(seed, [i])
        assert torch.equal(alone.normal("a", (3, 2), at=(5,))[0], first[row])
        assert torch.equal(alone.permutation("p", 7)[0], together.permutation("p", 7)[row])


def test_tensor_addresses_equal_integer_addresses():
    noise = Noise(3, 2)
    at = torch.tensor([[0, 4, 9], [7, 4, 1]])
    drawn = noise.normal("step", (5,), at=(2, at))
    assert drawn.shape == (2, 3, 5)
    for row in range(2):
        for place in range(3):
            assert torch.equal(drawn[row, place], noise.normal("step", (5,), at=(2, int(at[row, place])))[row])


def test_addresses_names_and_seeds_differ():
    noise = Noise(0, 1)
    draws = [
        noise.uniform("a", (64,)),
        noise.uniform("b", (64,)),
        noise.uniform("a", (64,), at=(0,)),
        noise.uniform("a", (64,), at=(1,)),
        noise.uniform("a", (64,), at=(0, 1)),
        noise.uniform("a", (64,), at=(1, 0)),
        noise.at(1).uniform("a", (64,)),
        Noise(1, 1).uniform("a", (64,)),
        Noise(0, [1]).uniform("a", (64,)),
    ]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.equal(a, b)
            assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 0.5


def test_distributions():
    noise = Noise(11, 1)
    assert stats.kstest(noise.uniform("u", (20000,), dtype=torch.float64)[0], "uniform").pvalue > 1e-3
    assert stats.kstest(noise.normal("n", (20000,), dtype=torch.float64)[0], "norm").pvalue > 1e-3
    counts = noise.integers("i", 10, (20000,))[0].bincount(minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3
    across = Noise(11, 20000).uniform("u", dtype=torch.float64)
    assert stats.kstest(across, "uniform").pvalue > 1e-3
    assert abs(noise.bernoulli("b", 0.3, (20000,)).float().mean() - 0.3) < 0.02


def test_categorical_is_the_inverse_cdf_of_one_uniform():
    probs = torch.tensor([[0.0, 2.0, 1.0, 0.0, 1.0]])
    drawn = inverse_cdf(probs.expand(6, 5), torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24]))
    assert drawn.tolist() == [1, 1, 2, 2, 4, 4]
    noise = Noise(5, 30000)
    counts = noise.categorical("c", probs.expand(30000, 5)).bincount(minlength=5)
    assert counts[0] == counts[3] == 0
    assert stats.chisquare(counts[[1, 2, 4]], [15000, 7500, 7500]).pvalue > 1e-3


@given(st.integers(1, 20), seeds)
@settings(max_examples=20, deadline=None)
def test_permutations_are_permutations(n, seed):
    assert torch.equal(Noise(seed, 3).permutation("p", n).sort(-1).values, torch.arange(n).expand(3, n))


def test_public_generator_argument():
    assert torch.equal(as_noise(7, 3, "cpu").keys, Noise(7, 3).keys)
    a = as_noise(torch.Generator().manual_seed(1), 2, "cpu")
    b = as_noise(torch.Generator().manual_seed(1), 2, "cpu")
    assert torch.equal(a.keys, b.keys)
    assert a.keys[0] != a.keys[1]
    listed = as_noise([torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)], 2, "cpu")
    assert listed.keys[0] == listed.keys[1]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert not torch.equal(as_noise(None, 1, "cpu").keys, as_noise(None, 1, "cpu").keys)
    assert torch.equal(torch.rand(1), expected), "torch's own generator is left alone"
    with pytest.raises(VargenError, match="3 samples: expected 2"):
        as_noise(Noise(0, 3), 2, "cpu")
    with pytest.raises(VargenError, match="1 generators for 2 samples"):
        as_noise([torch.Generator()], 2, "cpu")


def test_select_and_sub_address():
    noise = Noise(2, 4)
    assert torch.equal(noise.select(slice(1, 3)).uniform("x", (2,)), noise.uniform("x", (2,))[1:3])
    assert torch.equal(noise.at(3, 4).uniform("x"), noise.at(3).at(4).uniform("x"))
