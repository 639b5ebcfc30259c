"""Flow matching: paths, grids of times, both samplers."""

import math

import pytest
import torch

from vargen.errors import ConfigError
from vargen.flow.flow import draw_times, euler, euler_maruyama, shifted_times, stochastic_times, straight_path, uniform_times
from vargen.noise import Noise


def test_path_has_its_ends_and_a_constant_velocity():
    start, end = torch.randn(2, 3, 4, 5)
    for t in (0.0, 0.25, 1.0):
        x, velocity = straight_path(start, end, torch.full((3,), t))
        assert torch.allclose(x, start + t * (end - start), atol=1e-6)
        assert torch.equal(velocity, end - start)


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (0.0, 1.0)])
def test_euler_with_the_true_velocity_is_exact(steps, ends):
    a, b = torch.randn(2, 4, 3, dtype=torch.float64)
    start, stop = (b, a) if ends[0] == 1.0 else (a, b)
    times = uniform_times(steps, *ends)
    sample = euler(lambda x, t: b - a, start, times)
    assert torch.allclose(sample.tokens, stop)
    assert len(times) == steps + 1


def test_stochastic_grid_and_its_integer_times():
    times = stochastic_times(4)
    assert times == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    assert [int(torch.tensor(t, dtype=torch.float32) * 1000) for t in times[:-1]] == [1000, 680, 360, 40]
    with pytest.raises(ConfigError, match="at least 2"):
        stochastic_times(1)
    with pytest.raises(ConfigError, match="at least 1"):
        uniform_times(0)


def test_stochastic_sampler_follows_its_formula_and_reports_its_noise():
    times, noise = stochastic_times(3), torch.randn(2, 4, 3, dtype=torch.float64)
    start = torch.randn(4, 3, dtype=torch.float64)
    velocity = lambda x, t: 0.3 * x + t  # noqa: E731
    sample = euler_maruyama(velocity, start, times, noise.__getitem__, temperature=0.7)
    x, log_std = start, 0.0
    for i in range(3):
        t, dt = times[i], times[i + 1] - times[i]
        x = x + dt * ((2 - t) * velocity(x, t) + x)
        if i < 2:
            std = math.sqrt(2 * t) * math.sqrt(-dt)
            x, log_std = x + 0.7 * std * noise[i], log_std + math.log(std)
    assert torch.allclose(sample.tokens, x)
    assert torch.allclose(sample.log_std_sum, torch.full_like(x, log_std))
    assert torch.allclose(sample.std, torch.full_like(x, 0.7 * math.sqrt(2 * 0.04 * 0.04)))


def test_stochastic_sampler_keeps_a_gaussian():
    """Data N(0, 1): the optimal velocity is linear, and the reverse equation must end near variance 1."""
    generator = torch.Generator().manual_seed(0)

    def velocity(x, t):
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x

    def draw(_):
        return torch.randn(20000, generator=generator, dtype=torch.float64)

    sample = euler_maruyama(velocity, draw(0), stochastic_times(60), draw)
    assert float(sample.tokens.var()) == pytest.approx(1.0, abs=0.06)


def test_shifted_times():
    times = uniform_times(5)
    assert shifted_times(times, 1.0) == pytest.approx(times)
    shifted = shifted_times(times, 3.0)
    u = [k / 5 / (k / 5 + 3 - 3 * k / 5) for k in range(6)]
    assert shifted == pytest.approx([1 - v for v in u])


def test_laws_of_times():
    noise = Noise(0, 500)
    assert 0.4 < float(draw_times(noise, "t", "uniform").mean()) < 0.6
    times = draw_times(noise, "t", "logit-normal", (4,))
    assert times.shape == (500, 4)
    assert float(times.logit().std()) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ConfigError, match="law of times"):
        draw_times(noise, "t", "beta")
