"""What a generator is conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """The condition of a batch; every part has the batch as its first axis.

    Attributes:
        class_labels: int64 ``(B,)``.
        text: features of prompts or captions.
        text_ids: int64 ``(B, L)``, ids of a text tokenizer, for models that embed text themselves.
        tokens: given tokens ``(B, n, ...)`` that the model continues, the first n cells of its order.
        context: tokens ``(B, *token_shape)`` of another image or clip that the model looks at.
    """

    class_labels: Tensor | None = None
    text: TextFeatures | None = None
    text_ids: Tensor | None = None
    tokens: Tensor | None = None
    context: Tensor | None = None

    @property
    def batch_size(self) -> int | None:
        """Number of samples, or None for the empty (unconditional) condition."""
        sizes = {part.shape[0] for part in (self.class_labels, self.text_ids, self.tokens, self.context) if part is not None}
        if self.text is not None:
            sizes.add(self.text.mask.shape[0])
        if len(sizes) > 1:
            raise VargenError(f"parts of the condition have {sorted(sizes)} samples: expected the same number in each")
        return sizes.pop() if sizes else None

    def _map(self, tensor: Callable[[Tensor], Tensor], text: Callable[[TextFeatures], TextFeatures]) -> Condition:
        parts = (self.class_labels, self.text_ids, self.tokens, self.context)
        labels, ids, tokens, context = (None if part is None else tensor(part) for part in parts)
        return Condition(labels, None if self.text is None else text(self.text), ids, tokens, context)

    def to(self, device: torch.device | str) -> Condition:
        return self._map(lambda x: x.to(device), lambda text: text.to(device))

    def select(self, rows: slice | Tensor) -> Condition:
        """Some of the samples."""
        return self._map(lambda x: x[rows], lambda text: text.select(rows))
