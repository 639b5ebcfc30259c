"""The diffusion head: tokens from p(token | z) by denoising, with any network and any chain (Li et al., 2024, MAR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vargen.flow.diffusion import Diffusion, StepNoise, ddim, ddpm, named_betas
from vargen.flow.sample import HeadSample
from vargen.heads.mlp import Denoiser
from vargen.noise import Index, Noise

Combine = Callable[[Tensor], Tensor]


class DiffusionHead(nn.Module):
    """A denoising network with the chain that it is trained on and the steps that it samples with.

    Args:
        net: network over integer timesteps; its output has ``2 * channels`` for a learned variance.
        schedule: name of the betas, see :func:`vargen.flow.diffusion.named_betas`.
        prediction, variance: see :class:`vargen.flow.diffusion.Diffusion`.
        spacing: timesteps that sampling keeps, see :func:`vargen.flow.diffusion.respaced_timesteps`.
        sampler: ``ddpm`` (ancestral) or ``ddim`` (deterministic).
    """

    def __init__(
        self,
        net: Denoiser,
        *,
        schedule: str = "cosine",
        prediction: str = "eps",
        variance: str = "learned",
        spacing: str = "100",
        sampler: str = "ddpm",
    ) -> None:
        super().__init__()
        self.net = net
        self.chain = Diffusion(named_betas(schedule), prediction=prediction, variance=variance)
        self.sampling_chain = self.chain.respaced(spacing)
        self.sampler = sampler

    def losses(self, x: Tensor, z: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and variational bits of every token.

        Args:
            x, noise: clean tokens and draws ``(..., C)``; z: hidden states ``(..., D)``.
            t: int64 timesteps of the training chain, of a shape that broadcasts to ``(...)``.

        Returns:
            two tensors ``(...)``, whose sum is the loss of the token; see :meth:`vargen.flow.diffusion.Diffusion.losses`.
        """
        output = self.net(self.chain.add_noise(x, noise, t), t, z).float()
        return self.chain.losses(output, x, noise, t)

    def loss(self, x: Tensor, z: Tensor, noise: Noise, at: Sequence[Index]) -> Tensor:
        """Loss of every token, with its own timestep and noise, for networks of single tokens.

        Args:
            x, z: ``(B, ..., C)`` and ``(B, ..., D)``, broadcastable to each other.
            noise: draws, addressed by ``at``, whose shape together is ``(B, ...)``.
        """
        t = noise.integers("timestep", len(self.chain), (), at)
        error, bits = self.losses(x, z, noise.normal("diffusion", x.shape[-1:], at), t)
        return error + bits

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        start: Tensor,
        step_noise: StepNoise,
        *,
        combine: Combine | None = None,
        steps: int | str | None = None,
        temperature: float = 1.0,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> HeadSample:
        """Draws tokens.

        Args:
            z: ``(rows * B, ..., D)``, rows of guidance stacked.
            start: standard normal draws ``(B, ..., C)``; step_noise: level of the sampling chain to such draws.
            combine: predictions ``(rows * B, ..., C)`` of all rows, at the same x, to the guided ``(B, ..., C)``; variance values
                are those of the first row.
            steps: spacing of the sampling steps, if not the head's own.
            temperature: factor of the noise of every step, not of ``start``.
            known: tokens to hold fixed, see :func:`vargen.flow.diffusion.ddpm`.
        """
        chain = self.sampling_chain if steps is None else self.chain.respaced(str(steps))
        predict = guided_network(self.net, z, start, combine, torch.tensor(chain.timesteps, device=z.device))
        if self.sampler == "ddim":
            return ddim(chain, predict, start)
        return ddpm(chain, predict, start, step_noise, temperature, known)


def guided_network(
    net: Denoiser, z: Tensor, start: Tensor, combine: Combine | None, times: Tensor
) -> Callable[[Tensor, float], Tensor]:
    """The network as a function of x ``(B, ..., C)`` and one of ``times``; z and all times are embedded once."""
    rows = len(z) // len(start)
    hidden = net.cond(z)
    embedded = dict(zip(times.tolist(), net.time(times)))

    def predict(x: Tensor, t: float) -> Tensor:
        stacked = x.to(z.dtype)
        stacked = stacked.repeat(rows, *(1,) * (x.dim() - 1)) if rows > 1 else stacked
        output = net.denoise(stacked, hidden + embedded[t]).float()
        if combine is None:
            return output
        guided = combine(output[..., : net.channels])
        return torch.cat([guided, output[: len(guided), ..., net.channels :]], dim=-1)

    return predict
