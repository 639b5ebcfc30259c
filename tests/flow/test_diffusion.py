"""The diffusion chain: published values, identities of its parametrisations, and both samplers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import ConfigError
from vargen.flow.diffusion import Diffusion, cosine_betas, ddim, ddpm, named_betas, respaced_timesteps, scaled_linear_betas

levels = st.floats(1e-5, 0.9999)


def two_levels(abar, following, prediction):
    """A chain whose last level has ``abar`` and whose level before has ``following``."""
    return Diffusion(torch.tensor([1 - following, 1 - abar / following]), prediction=prediction, variance="small")


def test_cosine_schedule_has_the_published_values():
    chain = Diffusion(cosine_betas())
    assert chain.betas[[0, 999]].tolist() == pytest.approx([4.12842e-5, 0.999], rel=1e-5)
    assert chain.alphas_cumprod[[499, 500, 999]].tolist() == pytest.approx([0.493844, 0.492285, 2.42877e-9], rel=1e-5)


def test_zero_terminal_snr_ends_in_pure_noise():
    abar = Diffusion(scaled_linear_betas(zero_terminal_snr=True), prediction="v", variance="small").alphas_cumprod
    expected = [0.99914998, 0.99074858, 0.88808566, 0.24235900, 0.03317145, 1.96796e-7]
    assert abar[[0, 9, 99, 499, 749, 998]].tolist() == pytest.approx(expected, rel=1e-4)
    assert abar[999] == 0


def test_spacings():
    assert respaced_timesteps(1000, "100")[:8] == [0, 10, 20, 30, 40, 50, 61, 71]
    assert respaced_timesteps(1000, "ddim5") == [0, 200, 400, 600, 800]
    assert respaced_timesteps(1000, "trailing100")[::99] == [9, 999]
    assert respaced_timesteps(10, "2,1") == [0, 4, 5]
    assert respaced_timesteps(7, "") == list(range(7))
    for wrong in ("0", "ddim", "ddim7,3", "x", "1001", "501,1", "trailing"):
        with pytest.raises(ConfigError, match="spacing"):
            respaced_timesteps(1000, wrong)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60))
def test_respacing_keeps_the_noise_levels(count):
    chain = Diffusion(named_betas("cosine"))
    short = chain.respaced(str(count))
    assert torch.allclose(short.alphas_cumprod, chain.alphas_cumprod[short.timesteps], rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(levels, levels)
def test_every_parametrisation_takes_the_same_step(a, b):
    abar, following = min(a, b), max(a, b) + 1e-6
    x0, noise = torch.randn(2, 5, dtype=torch.float64)
    results = []
    for prediction in ("eps", "v", "x0"):
        chain = two_levels(abar, following, prediction)
        x = chain.add_noise(x0, noise, 1)
        output = chain.target(x0, noise, 1)
        estimate = chain.predicted_x0(output, x, 1)
        results.append(chain.add_noise(estimate, chain.predicted_noise(output, x, 1), 0))
        assert torch.allclose(estimate, x0, atol=1e-6)
    assert torch.allclose(results[0], results[1], atol=1e-6)
    assert torch.allclose(results[0], results[2], atol=1e-6)


FACTORS = [
    (0.9, 0.95, 0.101286, 0.303859, 0.096089),
    (0.5, 0.6, 0.142141, 0.142141, 0.100509),
    (0.01, 0.02, 0.417175, 0.041928, 0.041718),
    (1e-4, 1e-3, 2.162620, 0.021627, 0.021626),
    (1e-6, 1e-3, 30.623261, 0.030623, 0.030623),
]


@pytest.mark.parametrize("abar, following, eps, x0, v", FACTORS)
def test_error_factors_of_a_ddim_step(abar, following, eps, x0, v):
    """How much of an error of the network reaches the next x (MMAR's argument for predicting v)."""
    measured = {}
    for prediction in ("eps", "x0", "v"):
        chain = two_levels(abar, following, prediction)
        x, output = torch.randn(2, 1, dtype=torch.float64)

        def step(value, chain=chain, x=x):
            return chain.add_noise(chain.predicted_x0(value, x, 1), chain.predicted_noise(value, x, 1), 0)

        measured[prediction] = float((step(output + 1) - step(output)).abs())
    assert [measured["eps"], measured["x0"], measured["v"]] == pytest.approx([eps, x0, v], rel=2e-5)
    assert 1 / measured["eps"] ** 2 + 1 / measured["x0"] ** 2 == pytest.approx(1 / measured["v"] ** 2)


def test_losses_of_parametrisations_differ_by_known_weights():
    x0, noise, wrong = torch.randn(3, 6, 4, dtype=torch.float64)
    t = torch.tensor([3, 500, 900, 100, 42, 700])
    errors = {}
    for prediction in ("eps", "x0", "v"):
        chain = Diffusion(cosine_betas(), prediction=prediction, variance="small")
        x = chain.add_noise(x0, noise, t)
        # the same belief about x0 in every parametrisation
        abar = chain.alphas_cumprod[t][:, None]
        belief_noise = (x - abar.sqrt() * wrong) / (1 - abar).sqrt()
        errors[prediction], bits = chain.losses(chain.target(wrong, belief_noise, t), x0, noise, t)
        assert (bits == 0).all()
    abar = abar.squeeze(1)
    assert torch.allclose(errors["v"], errors["eps"] / abar, rtol=1e-3)
    assert torch.allclose(errors["v"], errors["x0"] / (1 - abar), rtol=1e-3)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("count", ["1", "7", "trailing20"])
def test_ddim_with_an_oracle_finds_the_data(prediction, count):
    chain = Diffusion(cosine_betas(), prediction=prediction, variance="small").respaced(count)
    x0, start = torch.randn(2, 3, 5, dtype=torch.float64)

    def oracle(x, t):
        level = chain.timesteps.index(t)
        abar = chain.alphas_cumprod[level]
        return chain.target(x0, (x - abar.sqrt() * x0) / (1 - abar).sqrt(), level)

    sample = ddim(chain, oracle, start)
    assert torch.allclose(sample.tokens, x0, atol=1e-6)
    assert (sample.std == 0).all()


def test_ddpm_reports_what_its_noise_was():
    chain = Diffusion(cosine_betas()).respaced("ddim5")
    values, noise = torch.rand(4, 3) * 2 - 1, torch.randn(5, 4, 3)
    seen = []

    def predict(x, t):
        seen.append(t)
        return torch.cat([0.1 * x, values], dim=-1)

    sample = ddpm(chain, predict, torch.randn(4, 3), noise.__getitem__, temperature=0.5)
    assert seen == [800, 600, 400, 200, 0]
    log_std = torch.stack([0.5 * chain.log_variance(values, j, values) for j in range(5)])
    assert torch.allclose(sample.log_std_sum, log_std[1:].sum(0), atol=1e-5)
    assert torch.allclose(sample.std, 0.5 * log_std[0].exp())
    assert torch.equal(sample.mean, sample.tokens)


def test_ddpm_without_temperature_ignores_noise_and_keeps_known_tokens():
    chain = Diffusion(cosine_betas(), variance="large").respaced("ddim4")
    start, known = torch.randn(2, 6, 3)
    mask = torch.tensor([[True], [False]] * 3)
    entered = []

    def predict(x, t):
        entered.append((t, x[::2]))
        return 0.2 * x

    first = ddpm(chain, predict, start, lambda j: torch.randn(6, 3), 0.0, (mask, known))
    second = ddpm(chain, predict, start, lambda j: torch.randn(6, 3), 0.0, (mask, known))
    assert torch.equal(first.tokens, second.tokens)
    for t, x in entered:
        assert torch.allclose(x, chain.add_noise(known, start, chain.timesteps.index(t))[::2], atol=1e-6)


def test_variational_term_is_zero_for_the_true_posterior_and_reaches_only_the_variance():
    chain = Diffusion(cosine_betas())
    x0, noise = torch.randn(2, 5, 3)
    t = torch.tensor([1, 10, 400, 800, 999])
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=-1).requires_grad_()
    error, bits = chain.losses(output, x0, noise, t)
    assert error.abs().max() < 1e-10
    assert bits.abs().max() < 1e-4
    bits.sum().backward()
    assert (output.grad[:, :3] == 0).all()


def test_first_step_is_a_likelihood_in_bits():
    chain = Diffusion(cosine_betas())
    x0 = torch.tensor([[0.3, -2.0, 2.0]])
    noise = torch.zeros_like(x0)
    _, bits = chain.losses(torch.cat([noise, torch.ones_like(x0)], dim=-1), x0, noise, torch.tensor([0]))
    std = math.sqrt(float(chain.betas[0]))
    inside = math.erf(1 / 255 / std / math.sqrt(2))
    one_sided = 0.5 * (1 + math.erf(1 / 255 / std / math.sqrt(2)))
    expected = -(math.log2(inside) + 2 * math.log2(one_sided)) / 3
    assert float(bits) == pytest.approx(expected, rel=2e-2)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="prediction 'epsilon'"):
        Diffusion(cosine_betas(), prediction="epsilon")
    with pytest.raises(ConfigError, match="variance"):
        Diffusion(cosine_betas(), variance="tiny")
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        named_betas("cosin")
