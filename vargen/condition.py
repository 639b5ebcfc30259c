"""What a generator is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vargen.errors import VargenError


@dataclass(frozen=True)
class TextFeatures:
    """Features of a batch of texts.

    Attributes:
        features: ``(B, L, C)``; padded places hold zeros.
        mask: bool ``(B, L)``, True at valid tokens. Padding may stand on either side.
    """

    features: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.features.dim() != 3 or self.mask.shape != self.features.shape[:2]:
            raise VargenError(
                f"text features {tuple(self.features.shape)} with mask {tuple(self.mask.shape)}: expected (B, L, C) and (B, L)"
            )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextFeatures:
        return TextFeatures(self.features.to(device, dtype), self.mask.to(device))

    def select(self, rows: slice | Tensor) -> TextFeatures:
        return TextFeatures(self.features[rows], self.mask[rows])

    def left_padded(self, length: int) -> TextFeatures:
        """Valid tokens moved to the right end of ``length`` places (cut to the first ``length``), zeros before them."""
        features = self.features.new_zeros(len(self.mask), length, self.features.shape[-1])
        mask = self.mask.new_zeros(len(self.mask), length)
        for row in range(len(self.mask)):
            valid = self.features[row][self.mask[row]][:length]
            if len(valid):
                features[row, length - len(valid) :] = valid
                mask[row, length - len(valid) :] = True
        return TextFeatures(features, mask)


@dataclass(frozen=True)
class Condition:
    """The condition of a batch: class labels, text, or given tokens; every part has the batch as its first axis.

    Attributes:
        class_labels: int64 ``(B,)``.
        text: features of prompts or captions.
        tokens: given tokens ``(B, n, ...)`` in the model's space, such as the first frames of a video.
    """

    class_labels: Tensor | None = None
    text: TextFeatures | None = None
    tokens: Tensor | None = None

    @property
    def batch_size(self) -> int | None:
        """Number of samples, or None for the empty (unconditional) condition."""
        for part in (self.class_labels, self.tokens, self.text.mask if self.text else None):
            if part is not None:
                return part.shape[0]
        return None

    def to(self, device: torch.device | str) -> Condition:
        return Condition(
            None if self.class_labels is None else self.class_labels.to(device),
            None if self.text is None else self.text.to(device),
            None if self.tokens is None else self.tokens.to(device),
        )

    def select(self, rows: slice | Tensor) -> Condition:
        return Condition(
            None if self.class_labels is None else self.class_labels[rows],
            None if self.text is None else self.text.select(rows),
            None if self.tokens is None else self.tokens[rows],
        )

    def with_labels(self, class_labels: Tensor) -> Condition:
        return replace(self, class_labels=class_labels)
