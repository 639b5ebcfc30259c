"""Dropping and restoring tokens under a mask, and the condition slots of masked models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.condition import Condition
from vargen.errors import VargenError
from vargen.nn.embed import ClassEmbedding


def positions_where(mask: Tensor, count: int) -> Tensor:
    """Increasing positions of the ``count`` True entries in every row of ``mask`` ``(B, N)``, int64 ``(B, count)``.

    ``count`` is given, rather than counted, so that nothing waits for the device.
    """
    return (~mask).int().argsort(dim=1, stable=True)[:, :count]


def take(x: Tensor, positions: Tensor) -> Tensor:
    """``(B, N, C)`` at ``(B, n)`` to ``(B, n, C)``."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put(x: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """A copy of ``x`` ``(B, N, C)`` with ``values`` ``(B, n, C)`` at ``positions`` ``(B, n)``."""
    return x.scatter(1, positions.unsqueeze(-1).expand_as(values), values.to(x.dtype))


def truncated_normal_rate(uniform: float, low: float, mean: float = 1.0, std: float = 0.25, high: float = 1.0) -> float:
    """Inverse CDF of the normal law cut to [low, high]: the mask rate of MAR for a uniform draw."""
    ends = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)
    start, stop = torch.special.ndtr(ends).tolist()
    quantile = torch.special.ndtri(torch.tensor(start + uniform * (stop - start), dtype=torch.float64))
    return min(max(mean + std * float(quantile), low), high)


class ConditionSlots(nn.Module):
    """The condition as ``slots`` tokens in front of a sequence: a class vector repeated (MAR), or projected text (Hi-MAR).

    Args:
        num_classes: classes, besides which there is a null class; None for text or no condition.
        text_dim: width of text features, of which the first ``slots`` valid tokens are kept, at the right end; a learned null token
            stands in every padded slot, and everywhere when the condition is dropped.

    Without either there is just the learned null vector.
    """

    def __init__(self, slots: int, dim: int, num_classes: int | None = None, text_dim: int | None = None) -> None:
        super().__init__()
        if num_classes is not None and text_dim is not None:
            raise VargenError("a model is conditioned on classes (num_classes) or on text (text_dim): give at most one")
        self.slots, self.text_dim = slots, text_dim
        if text_dim is None:
            self.classes = ClassEmbedding(num_classes or 0, dim)
        else:
            self.project = nn.Linear(text_dim, dim)
            self.null = nn.Parameter(torch.zeros(slots, dim))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of condition that it takes, as :attr:`vargen.model.Generator.conditioning`."""
        if self.text_dim is not None:
            return ("text",)
        return ("class",) if self.classes.num_classes else ()

    def forward(self, condition: Condition, drop: Tensor) -> Tensor:
        """``(R, slots, dim)``; rows where ``drop`` (bool ``(R,)``) is True, and missing conditions, take the null one."""
        if self.text_dim is None:
            labels = condition.class_labels
            labels = torch.full(drop.shape, -1, device=drop.device) if labels is None else labels.masked_fill(drop, -1)
            return self.classes(labels).unsqueeze(1).expand(-1, self.slots, -1)
        if condition.text is None:
            return self.null.expand(len(drop), -1, -1)
        if condition.text.features.shape[-1] != self.text_dim:
            raise VargenError(f"text features of width {condition.text.features.shape[-1]}: expected {self.text_dim}")
        text = condition.text.left_padded(self.slots).to(drop.device)
        shown = (text.mask & ~drop[:, None]).unsqueeze(-1)
        return torch.where(shown, self.project(text.features.to(self.project.weight.dtype)), self.null)


def drop_rows(rows: int, batch_size: int, device: torch.device) -> Tensor:
    """Which rows of a guided batch ``[condition, null]`` lose their condition: bool ``(rows * B,)``."""
    return torch.arange(rows * batch_size, device=device) >= batch_size


def pad_visible(mask: Tensor, slots: int) -> Tensor:
    """The mask of cells ``(B, L)`` behind ``slots`` condition slots, which are never masked: ``(B, slots + L)``."""
    return F.pad(mask, (slots, 0), value=False)
