"""Kernel Inception Distance: unbiased squared MMD under a cubic kernel (Binkowski et al., 2018, arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vargen.errors import VargenError


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of ``(m, D)`` and ``(n, D)`` features under ``(x.y / D + 1)^3``, in float64."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def off_diagonal_mean(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def draw_subsets(count1: int, count2: int, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Tensor:
    """Rows of ``num_subsets`` pairs of subsets without replacement, int64 ``(S, 2, m)``, in torch-fidelity's draw order.

    ``m`` is the subset size, or the size of the smaller set.
    """
    size = min(count1, count2, subset_size)
    if size < 2:
        raise VargenError(f"sets of {count1} and {count2} samples: expected at least 2 in each")
    rng = np.random.RandomState(seed)
    pairs = [[rng.choice(n, size, replace=False) for n in (count1, count2)] for _ in range(num_subsets)]
    return torch.from_numpy(np.array(pairs)).long()


def kernel_distance(features1: Tensor, features2: Tensor, subsets: Tensor | None = None) -> tuple[float, float]:
    """Mean and population standard deviation of the squared MMD over subsets (papers often print 1000 times the mean).

    Args:
        features1, features2: ``(N, D)`` and ``(M, D)``.
        subsets: rows into the two sets, ``(S, 2, m)``; by default :func:`draw_subsets`.
    """
    rows = draw_subsets(len(features1), len(features2)) if subsets is None else subsets
    values = torch.tensor([polynomial_mmd(features1[a], features2[b]) for a, b in rows], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))
