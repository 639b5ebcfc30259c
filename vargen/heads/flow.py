"""The flow-matching head: tokens from p(token | z) by integrating a velocity, with any network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vargen.errors import ConfigError
from vargen.flow.diffusion import StepNoise
from vargen.flow.flow import draw_times, euler, euler_maruyama, stochastic_times, straight_path, uniform_times
from vargen.flow.sample import HeadSample
from vargen.heads.diffusion import Combine, guided_network
from vargen.heads.mlp import Denoiser
from vargen.noise import Index, Noise


class FlowHead(nn.Module):
    """A velocity network on straight paths from t = 0 to t = 1.

    ``loss`` and ``sample`` put data at 0 and noise at 1; ``losses`` and ``integrate`` leave the ends to their caller.

    Args:
        net: network over times in [0, 1] (``time_scale`` 1000).
        law: of the training times, see :func:`vargen.flow.flow.draw_times`.
        steps: sampling steps; sampler: ``ode`` (Euler) or ``sde`` (Euler-Maruyama).
    """

    def __init__(self, net: Denoiser, *, law: str = "uniform", steps: int = 25, sampler: str = "ode") -> None:
        super().__init__()
        if sampler not in ("ode", "sde"):
            raise ConfigError(f"flow sampler '{sampler}': expected 'ode' or 'sde'")
        self.net, self.law, self.steps, self.sampler = net, law, steps, sampler

    def losses(self, start: Tensor, end: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Squared error of the velocity, averaged over channels.

        Args:
            start, end: ends of the path ``(..., C)``; z: hidden states ``(..., D)``; t: times that broadcast to ``(...)``.

        Returns:
            ``(...)``.
        """
        x, velocity = straight_path(start, end, t)
        return (self.net(x, t, z).float() - velocity).square().mean(-1)

    def loss(self, x: Tensor, z: Tensor, noise: Noise, at: Sequence[Index]) -> Tensor:
        """Loss of every token, as :meth:`vargen.heads.diffusion.DiffusionHead.loss`."""
        return self.losses(x, noise.normal("diffusion", x.shape[-1:], at), z, draw_times(noise, "time", self.law, (), at))

    @torch.no_grad()
    def integrate(
        self,
        z: Tensor,
        start: Tensor,
        times: Sequence[float],
        *,
        combine: Combine | None = None,
        step_noise: StepNoise | None = None,
        temperature: float = 1.0,
    ) -> HeadSample:
        """Integrates from ``start`` along ``times``.

        Args:
            z: ``(rows * B, ..., D)``, rows of guidance stacked; start: ``(B, ..., C)``.
            combine: velocities ``(rows * B, ..., C)`` of all rows, at the same x, to the guided ``(B, ..., C)``.
            step_noise: draws of every step for the stochastic sampler (noise at t = 1), scaled by ``temperature``; Euler without.
        """
        velocity = guided_network(self.net, z, start, combine, torch.tensor(times[:-1], dtype=torch.float64, device=z.device))
        if step_noise is None:
            return euler(velocity, start, times)
        return euler_maruyama(velocity, start, times, step_noise, temperature=temperature)

    def sample(
        self,
        z: Tensor,
        start: Tensor,
        step_noise: StepNoise,
        *,
        combine: Combine | None = None,
        steps: int | str | None = None,
        temperature: float = 1.0,
    ) -> HeadSample:
        """Draws tokens, as :meth:`vargen.heads.diffusion.DiffusionHead.sample`; with Euler the temperature scales ``start``."""
        count = self.steps if steps is None else int(steps)
        if self.sampler == "ode":
            return self.integrate(z, start * temperature, uniform_times(count), combine=combine)
        times = stochastic_times(count)
        return self.integrate(z, start, times, combine=combine, step_noise=step_noise, temperature=temperature)
