"""Reductions over the processes of a distributed run; with a single process they return their argument."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes; carries no gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def all_mean(x: Tensor) -> Tensor:
    """Mean over processes; carries no gradient."""
    return x if world_size() == 1 else all_sum(x) / world_size()


def from_first(x: Tensor) -> Tensor:
    """The first process's value."""
    if world_size() > 1:
        x = x.detach().clone().contiguous()
        dist.broadcast(x, src=0)
    return x


def all_rows(x: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in the order of their ranks, and the number of rows before this process's own.

    Every process must have as many rows. The result carries a gradient in a single process only.
    """
    if world_size() == 1:
        return x, 0
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts), dist.get_rank() * len(x)
