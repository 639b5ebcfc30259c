"""Flow matching over continuous tokens: straight paths, times, and the Euler and Euler-Maruyama samplers.

A path runs from ``start`` at t = 0 to ``end`` at t = 1 and ``dx/dt = velocity``; samplers integrate along any monotone list of
times. With data at 0 and noise at 1 (xAR, FlexTok, MingTok) they run from 1 to 0; ECAR's stages run from 0 to 1.
Sources: Lipman et al. 2023, Liu et al. 2023 (straight paths), Ma et al. 2024 (SiT: score from velocity, stochastic sampler).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vargen.errors import ConfigError, nearest
from vargen.flow.sample import HeadSample
from vargen.noise import Index, Noise

# (x, t) -> velocity, guidance included
Velocity = Callable[[Tensor, float], Tensor]


def straight_path(start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``((1 - t) start + t end, end - start)``: the point at time t and the velocity, which is constant; t's shape is a prefix."""
    t = t.reshape(t.shape + (1,) * (start.dim() - t.dim()))
    return (1 - t) * start + t * end, end - start


def draw_times(noise: Noise, name: str, law: str, shape: Sequence[int] = (), at: Sequence[Index] = ()) -> Tensor:
    """Training times, float32 ``(B, *shape)``: ``uniform`` in [0, 1), or ``logit-normal``, the sigmoid of a standard normal."""
    laws: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: noise.uniform(name, shape, at),
        "logit-normal": lambda: noise.normal(name, shape, at).sigmoid(),
    }
    if law not in laws:
        raise ConfigError(f"law of times '{law}'{nearest(law, laws)}")
    return laws[law]()


def uniform_times(steps: int, start: float = 1.0, stop: float = 0.0) -> list[float]:
    """``steps + 1`` equally spaced times.

    Raises:
        ConfigError: fewer than one step.
    """
    if steps < 1:
        raise ConfigError(f"{steps} sampling steps: expected at least 1")
    return torch.linspace(start, stop, steps + 1, dtype=torch.float64).tolist()


def shifted_times(times: Sequence[float], shift: float) -> list[float]:
    """Times of a run from noise at 1 to data at 0 with more steps near the noise: ``1 - u / (u + s - s u)`` with ``u = 1 - t``."""
    return [1 - (1 - t) / ((1 - t) + shift * t) for t in times]


def stochastic_times(steps: int, last: float = 0.04) -> list[float]:
    """SiT's grid: ``steps`` equally spaced times from 1 to ``last``, then 0.

    Raises:
        ConfigError: fewer than two steps.
    """
    if steps < 2:
        raise ConfigError(f"{steps} stochastic sampling steps: expected at least 2, the last one being without noise")
    return [*torch.linspace(1.0, last, steps, dtype=torch.float64).tolist(), 0.0]


def euler(velocity: Velocity, start: Tensor, times: Sequence[float]) -> HeadSample:
    """The ordinary differential equation by Euler steps along ``times``; x keeps the dtype of ``start``."""
    x = start
    for t, following in pairwise(times):
        x = x + velocity(x, t).to(x.dtype) * (following - t)
    return HeadSample.deterministic(x)


def euler_maruyama(
    velocity: Velocity,
    start: Tensor,
    times: Sequence[float],
    step_noise: Callable[[int], Tensor],
    diffusion: Callable[[float], float] = lambda t: 2 * t,
    temperature: float = 1.0,
) -> HeadSample:
    """The reverse stochastic equation on the straight path with data at 0 and noise at 1 (Ma et al., 2024, eq. 6), from 1 to 0.

    With ``w`` the diffusion coefficient and the score ``s = -(x + (1 - t) v) / t`` the drift is ``v - w s / 2``; every step but the
    last adds ``sqrt(w |dt|)`` times a draw. Guiding the velocity guides the drift, since all rows share x.

    Args:
        times: decreasing, see :func:`stochastic_times`; none but the last may be 0.
        step_noise: number of the step to standard normal draws like ``start``; the last step is never asked for.
        temperature: factor of the noise of every step.
    """
    x, log_std_sum = start, torch.zeros_like(start)
    std = 0.0
    for i, (t, following) in enumerate(pairwise(times)):
        w = diffusion(t)
        v = velocity(x, t).to(x.dtype)
        drift = v + 0.5 * w * (x + (1 - t) * v) / t
        x = x + (following - t) * drift
        std = (w * (t - following)) ** 0.5
        if i < len(times) - 2:
            x = x + std * temperature * step_noise(i).to(x.dtype)
            log_std_sum = log_std_sum + torch.tensor(std, dtype=torch.float64).log().to(x.dtype)
    return HeadSample(x, x, torch.full_like(x, std * temperature), log_std_sum)
