"""Precision and recall by k-nearest-neighbour manifolds (Kynkaanniemi et al., 2019, arXiv 1904.06991)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.errors import VargenError


@dataclass(frozen=True)
class ManifoldScores:
    """How two sets of features cover each other.

    Attributes:
        precision: share of generated samples inside at least one ball of the real set.
        recall: share of real samples inside at least one ball of the generated set.
        inside: bool ``(N,)``, which generated samples are inside.
        realism: ``(N,)``, largest ``radius^2 / (distance^2 + 1e-5)`` over the real balls.
    """

    precision: float
    recall: float
    inside: Tensor
    realism: Tensor


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``max(|a|^2 - 2 a.b + |b|^2, 0)`` of ``(N, D)`` and ``(M, D)``, shape ``(N, M)``."""
    return (a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)).clamp_min(0)


def squared_radii(features: Tensor, k: int = 3, block: int = 4096) -> Tensor:
    """Squared distance of every sample to its k-th nearest neighbour in the same set, ``(N,)``.

    That is the (k + 1)-th smallest distance, the sample itself included.
    """
    if not 1 <= k < len(features):
        raise VargenError(f"{len(features)} samples for neighbour number {k}: expected more samples than neighbours")
    return torch.cat([squared_distances(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(block)])


def manifold_scores(real: Tensor, generated: Tensor, k: int = 3, block: int = 4096) -> ManifoldScores:
    """Precision, recall and realism of ``generated`` ``(N, D)`` against ``real`` ``(M, D)``.

    Distances are computed block by block in the dtype of the features; both decisions include the surface of a ball.
    """
    if real.dim() != 2 or generated.dim() != 2 or real.shape[1] != generated.shape[1]:
        raise VargenError(f"features {tuple(real.shape)} and {tuple(generated.shape)}: expected (M, D) and (N, D)")
    real_radii, generated_radii = squared_radii(real, k, block), squared_radii(generated, k, block)
    inside, realism = [], []
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start in range(0, len(generated), block):
        rows = slice(start, start + block)
        distances = squared_distances(generated[rows], real)
        inside.append((distances <= real_radii).any(1))
        realism.append((real_radii / (distances + 1e-5)).amax(1))
        covered |= (distances <= generated_radii[rows, None]).any(0)
    inside_all = torch.cat(inside)
    return ManifoldScores(float(inside_all.double().mean()), float(covered.double().mean()), inside_all, torch.cat(realism))
