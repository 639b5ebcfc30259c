"""Inception Score from class logits (Salimans et al., 2016, arXiv 1606.03498); conventions differ in the grouping of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vargen.errors import VargenError


def part_score(logits: Tensor) -> Tensor:
    """``exp(mean_i KL(p_i || mean_j p_j))`` of the softmax of ``(N, K)`` logits."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    log_mean = p.mean(0, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny).log()
    return (p * (log_p - log_mean)).sum(1).mean().exp()


def inception_score(
    logits: Tensor, splits: int = 10, split_size: int | None = None, permutation: Tensor | None = None
) -> tuple[float, float]:
    """Mean and population standard deviation of the scores of consecutive parts, in float64.

    Args:
        logits: ``(N, K)``; for the usual network the product of pool features and class weights, without the bias.
        splits: number of parts, bounded at ``floor(i N / splits)`` (torch-fidelity, StyleGAN).
        split_size: or the length of every part but the last (ADM: 5000); class-sorted samples then score far too low.
        permutation: order of the rows before parting (torch-fidelity: ``RandomState(2020).permutation(N)``).
    """
    count = len(logits)
    rows = (logits if permutation is None else logits[permutation]).detach().double()
    parts = rows.split(split_size) if split_size else rows.tensor_split([i * count // splits for i in range(1, splits)])
    if not all(map(len, parts)):
        raise VargenError(f"{count} samples in {len(parts)} parts: expected at least one sample in each")
    scores = torch.stack([part_score(part) for part in parts])
    return float(scores.mean()), float(scores.std(correction=0))
