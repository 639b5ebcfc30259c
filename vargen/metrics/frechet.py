"""Fréchet distance between Gaussians fitted to features (Heusel et al., 2017, arXiv 1706.08500), in float64 throughout."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.errors import VargenError

logger = logging.getLogger(__name__)


@dataclass
class FeatureStatistics:
    """Count, mean and scatter of a stream of features; two streams merge exactly (Chan et al., 1983).

    Attributes:
        count: number of samples.
        mean: float64 ``(D,)``.
        scatter: float64 ``(D, D)``, sum of outer products of centered samples.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Statistics of ``(N, D)`` features, N >= 1."""
        if features.dim() != 2 or not len(features):
            raise VargenError(f"features of shape {tuple(features.shape)}: expected (N, D) with at least one sample")
        if not torch.isfinite(features).all():
            raise VargenError("features hold NaN or infinity: check the images and the feature network")
        values = features.detach().cpu().double()
        mean = values.mean(0)
        centered = values - mean
        return cls(len(values), mean, centered.T @ centered)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both streams together."""
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, scatter)

    def update(self, features: Tensor) -> None:
        """Takes in ``(N, D)`` more features."""
        merged = self.merge(FeatureStatistics.of(features))
        self.count, self.mean, self.scatter = merged.count, merged.mean, merged.scatter

    def covariance(self, unbiased: bool = True) -> Tensor:
        """Scatter over N - 1 (clean-fid, ADM, torch-fidelity), or over N (StyleGAN, LARP) if not ``unbiased``."""
        divisor = self.count - 1 if unbiased else self.count
        if divisor < 1:
            raise VargenError(f"covariance of {self.count} samples: expected at least {2 if unbiased else 1}")
        return self.scatter / divisor


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor, eps: float = 1e-6) -> float:
    """``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``.

    The trace of the root is the sum of the roots of the eigenvalues of ``C1^(1/2) C2 C1^(1/2)``, which are those of ``C1 C2`` but
    real; ``eps`` is added to both diagonals only if the decomposition fails.
    """
    m1, c1, m2, c2 = (t.detach().cpu().double() for t in (mean1, covariance1, mean2, covariance2))
    if m1.shape != m2.shape or c1.shape != c2.shape or c1.shape != (len(m1), len(m1)):
        raise VargenError(f"statistics of {len(m1)} and {len(m2)} dimensions: expected the same features on both sides")
    if not all(torch.isfinite(t).all() for t in (m1, c1, m2, c2)):
        raise VargenError("statistics hold NaN or infinity: check the images and the feature network")
    try:
        root = _trace_of_root(c1, c2)
    except torch.linalg.LinAlgError:
        logger.warning("eigenvalues did not converge; %g is added to the diagonals of both covariances", eps)
        offset = eps * torch.eye(len(m1), dtype=torch.float64)
        root = _trace_of_root(c1 + offset, c2 + offset)
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root)


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((a + a.T) / 2)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = half @ b @ half
    return torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()


def frechet_from_features(features1: Tensor, features2: Tensor, unbiased: bool = True) -> float:
    """Distance between two sets of features ``(N, D)`` and ``(M, D)``."""
    a, b = FeatureStatistics.of(features1), FeatureStatistics.of(features2)
    return frechet_distance(a.mean, a.covariance(unbiased), b.mean, b.covariance(unbiased))
