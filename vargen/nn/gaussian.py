"""Diagonal Gaussian bottleneck (Kingma and Welling, 2014)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A posterior N(mean, exp(logvar)), both of one shape.

    The log-variance is clamped to [-30, 20] by :meth:`from_moments`, as in every latent diffusion autoencoder.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor, dim: int = -1) -> DiagonalGaussian:
        """From mean and log-variance concatenated along ``dim``."""
        mean, logvar = moments.chunk(2, dim=dim)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(self, normal: Tensor) -> Tensor:
        """The sample that standard normal draws of the mean's shape lead to."""
        return self.mean + (0.5 * self.logvar).exp() * normal

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) of every element, in nats."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)
