"""Contrastive loss between paired features of two kinds (Radford et al., CLIP, 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.nn.sync import all_rows


def contrastive_loss(first: Tensor, second: Tensor, temperature: Tensor | float, label_smoothing: float = 0.0) -> Tensor:
    """Mean of the cross entropies of finding each row's partner among the other kind's rows of all processes, both ways.

    Args:
        first, second: unit features ``(B, C)``; row i of one belongs to row i of the other.
        temperature: divides the cosines.
    """
    loss = first.new_zeros(())
    for query, key in ((first, second), (second, first)):
        keys, before = all_rows(key)
        partners = before + torch.arange(len(query), device=query.device)
        logits = query @ keys.T / temperature
        loss = loss + F.cross_entropy(logits, partners, label_smoothing=label_smoothing) / 2
    return loss


def retrieval_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """Share of rows of ``first`` ``(B, C)`` whose nearest unit feature among ``second`` is their partner; chance is 1 / B."""
    return ((first @ second.T).argmax(-1) == torch.arange(len(first), device=first.device)).float().mean()
