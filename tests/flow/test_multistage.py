"""The multistage flow: the numeric self-checks of its formulation."""

import math

import pytest
import torch

from vargen.errors import ConfigError
from vargen.flow.flow import euler, straight_path, uniform_times
from vargen.flow.multistage import endpoints, following_start, jump, pool, pyramid, schedule, upsample

ENDS = [0.25, 0.5, 0.75, 1.0]


def test_one_stage_is_rectified_flow():
    x, noise = torch.randn(2, 2, 4, 4, 3)
    [(start, end)] = schedule([1.0])
    x0, x1 = endpoints(None, x, start, end, noise)
    assert torch.equal(x0, noise)
    assert torch.equal(x1, x)
    assert torch.equal(straight_path(x0, x1, torch.rand(2))[1], x - noise)


def test_default_schedule():
    starts, ends = zip(*schedule(ENDS))
    assert starts == pytest.approx((0, 1 / 7, 1 / 3, 3 / 5))
    assert list(ends) == ENDS
    for wrong in ([], [0.5], [0.5, 0.4, 1.0], [0.0, 1.0], [0.5, 1.1]):
        with pytest.raises(ConfigError, match="ends of stages"):
            schedule(wrong)


def test_ends_share_their_noise_and_one_euler_step_is_exact():
    x = torch.randn(2, 8, 8, 3, dtype=torch.float64)
    maps = pyramid(x, 3)
    assert [m.shape[1] for m in maps] == [2, 4, 8]
    assert torch.allclose(maps[0], pool(maps[1]))
    noise = torch.randn_like(maps[1])
    x0, x1 = endpoints(maps[0], maps[1], 0.2, 0.6, noise)
    assert torch.allclose(x0, 0.2 * upsample(maps[0]) + 0.8 * noise)
    assert torch.allclose(x1, 0.6 * maps[1] + 0.4 * noise)
    for steps in (1, 5):
        assert torch.allclose(euler(lambda x, t: x1 - x0, x0, uniform_times(steps, 0.0, 1.0)).tokens, x1)


@pytest.mark.parametrize(
    "end, start, scale, factor",
    [
        (0.25, 0.142857, 0.571429, 0.742307),
        (0.5, 0.333333, 0.666667, 0.577350),
        (0.75, 0.6, 0.8, 0.346410),
        (0.9, 0.818182, 0.909091, 0.157459),
    ],
)
def test_jump_table(end, start, scale, factor):
    s = following_start(end)
    assert s == pytest.approx(start, abs=1e-6)
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert float(jump(ones, end, torch.zeros(1, 2, 2, 1, dtype=torch.float64))[0, 0, 0, 0]) == pytest.approx(scale, abs=1e-6)
    draws = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64).reshape(1, 2, 2, 1)
    assert float(jump(0 * ones, end, draws)[0, 0, 0, 0]) == pytest.approx(factor * math.sqrt(4 / 3), abs=1e-6)


@pytest.mark.parametrize("end, variance", [(0.25, 0.734694), (0.5, 0.444444), (0.75, 0.16)])
def test_jump_whitens_the_noise(end, variance):
    """The jump is linear, so its covariance follows exactly from the identity map of its inputs."""
    basis = torch.eye(5, dtype=torch.float64)
    noise, draws = basis[:, :1].reshape(5, 1, 1, 1) * (1 - end), basis[:, 1:].reshape(5, 2, 2, 1)
    linear = jump(noise, end, draws).flatten(1)
    covariance = linear.T @ linear
    assert torch.allclose(covariance, variance * torch.eye(4, dtype=torch.float64), atol=1e-6)
    assert variance == pytest.approx((1 - following_start(end)) ** 2, abs=1e-6)


def test_added_noise_sums_to_zero_in_blocks():
    x, draws = torch.randn(2, 3, 3, 4, dtype=torch.float64), torch.randn(2, 6, 6, 4, dtype=torch.float64)
    assert torch.allclose(pool(jump(x, 0.5, draws)), following_start(0.5) / 0.5 * x)
    assert torch.allclose(pool(upsample(x)), x)


@pytest.mark.parametrize("stages, steps", [(1, 1), (2, 3), (4, 1)])
def test_oracle_sampling_returns_the_data(stages, steps):
    x = torch.randn(2, 8, 8, 3, dtype=torch.float64)
    maps = pyramid(x, stages)
    times = schedule([(k + 1) / stages for k in range(stages)])
    state = torch.randn_like(maps[0])
    for k, (start, end) in enumerate(times):
        signal = 0 if k == 0 else start * upsample(maps[k - 1])
        noise = (state - signal) / (1 - start)
        x0, x1 = endpoints(maps[k - 1] if k else None, maps[k], start, end, noise)
        state = euler(lambda x, t, v=x1 - x0: v, state, uniform_times(steps, 0.0, 1.0)).tokens
        if k + 1 < stages:
            state = jump(state, end, torch.randn_like(maps[k + 1]))
    assert torch.allclose(state, x)


def test_gaussian_data_keep_their_variance_through_stages():
    """White data: in Haar modes of a block the optimal velocity is linear, so variances can be followed exactly."""
    sigma2, stages, steps = 2.0, 3, 4000
    times = schedule([(k + 1) / stages for k in range(stages)])
    for k, (s, e) in enumerate(times):
        data = sigma2 / 4 ** (stages - 1 - k)
        # (signal, noise) shares of x_0 by Haar mode of a block: the mean mode carries the coarse map, the detail modes do not
        for mode_start in ((s, 1 - s),) if k == 0 else ((s, 1 - s), (0.0, 1 - s)):
            variance = mode_start[0] ** 2 * data + mode_start[1] ** 2
            for i in range(steps):
                u = (i + 0.5) / steps
                at = [(1 - u) * a + u * b for a, b in zip(mode_start, (e, 1 - e))]
                slope = [b - a for a, b in zip(mode_start, (e, 1 - e))]
                gain = (at[0] * slope[0] * data + at[1] * slope[1]) / (at[0] ** 2 * data + at[1] ** 2)
                variance *= (1 + gain / steps) ** 2
            assert variance == pytest.approx(e**2 * data + (1 - e) ** 2, rel=1e-3)
        if k + 1 < stages:
            following, ratio = times[k + 1][0], times[k + 1][0] / e
            # upsampling multiplies the orthonormal mean mode by 2; the added noise has none of it
            mean_mode = ratio**2 * 4 * (e**2 * data + (1 - e) ** 2)
            assert mean_mode == pytest.approx(following**2 * 4 * data + (1 - following) ** 2)
            assert 0.75 * (1 - following) ** 2 * 4 / 3 == pytest.approx((1 - following) ** 2)
