"""Captions as the word ids that SEED's first stage embeds by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.condition import TextFeatures
from vargen.errors import CheckpointError
from vargen.text import check_texts, split_words

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
PAD, BEGIN, UNKNOWN = range(3)
SPECIAL = 3


def clean_caption(text: str, most: int = 50) -> str:
    """Lower case, punctuation as spaces, at most 50 words: BLIP-2's preparation of captions."""
    return " ".join(PUNCTUATION.sub(" ", text.lower()).split()[:most])


class CaptionIds:
    """Word ids as text features ``(B, L, 1)``.

    Args:
        words: a closed vocabulary; or
        tokenizer: directory or hub id of a tokenizer of transformers, loaded when it is first used.
        max_length: tokens per caption, the first one being a begin token; longer captions are cut.
    """

    dim = 1

    def __init__(self, words: Sequence[str] | None = None, tokenizer: str | None = None, max_length: int = 32) -> None:
        self.max_length, self._source = max_length, tokenizer
        self._tokenizer: Any = None
        self._ids = None if words is None else {word: i for i, word in enumerate(words, start=SPECIAL)}

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Ids ``(B, max_length, 1)`` as float32, padded on the right with zeros."""
        texts = [clean_caption(t) for t in check_texts(texts)]
        ids, mask = self._closed(texts) if self._ids is not None else self._pretrained(texts)
        return TextFeatures(ids.unsqueeze(-1).float(), mask)

    def _closed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        assert self._ids is not None
        ids = torch.full((len(texts), self.max_length), PAD)
        for row, text in enumerate(texts):
            tokens = [BEGIN, *(self._ids.get(word, UNKNOWN) for word in split_words(text))][: self.max_length]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return ids, ids != PAD

    def _pretrained(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if self._tokenizer is None:
            self._tokenizer = _load(str(self._source))
        batch = self._tokenizer(texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


def _load(source: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # hub and tokenizer errors have no common base
        raise CheckpointError(f"caption tokenizer '{source}': neither a directory nor one that can be fetched") from error
