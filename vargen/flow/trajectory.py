"""Whole denoising trajectories and their densities, which exact speculation compares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vargen.flow.diffusion import Diffusion, Predict, StepNoise


def transition(chain: Diffusion, predict: Predict, x: Tensor, level: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(..., C)`` of the step from ``level`` at ``x``."""
    prediction, values = chain.split(predict(x, chain.timesteps[level]))
    mean = chain.posterior_mean(chain.predicted_x0(prediction, x, level), x, level)
    return mean, (0.5 * chain.log_variance(values, level, x)).exp() * temperature


def draw_trajectory(chain: Diffusion, predict: Predict, start: Tensor, noise: StepNoise, temperature: float) -> list[Tensor]:
    """The states of ancestral sampling down to the last random one, from ``start`` on: S tensors ``(..., C)``."""
    states = [start]
    for level in reversed(range(1, len(chain))):
        mean, std = transition(chain, predict, states[-1], level, temperature)
        states.append(mean + std * noise(level))
    return states


def score_trajectory(chain: Diffusion, predict: Predict, states: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Log density of a trajectory given its start, float64 ``(...)`` summed over channels and steps, and the token it ends in.

    The last step adds no noise, so the token is a function of the last random state: its mean there.
    """
    total = torch.zeros(states[0].shape[:-1], dtype=torch.float64, device=states[0].device)
    for x, after, level in zip(states, states[1:], reversed(range(1, len(chain)))):
        mean, std = transition(chain, predict, x, level, temperature)
        z = ((after - mean) / std).double()
        total += (-0.5 * z.square() - std.double().log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    token, _ = transition(chain, predict, states[-1], 0, temperature)
    return total, token
