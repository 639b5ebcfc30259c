"""Separate projections of published checkpoints as the fused ones of :class:`vargen.nn.attention.Attention`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vargen.errors import CheckpointError


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], fused: str) -> dict[str, Tensor]:
    """``state`` with the tensors of the modules named by ``parts`` joined along their first axis under ``fused``, in this order.

    Args:
        parts: regular expressions of the ends of module paths, such as ``(r"attn\\.wq", r"attn\\.wk", r"attn\\.wv")``.
        fused: what takes their place, ``"attn.qkv"``.

    Raises:
        CheckpointError: one of the parts is missing.
    """
    rest = dict(state)
    found: dict[str, list[Tensor | None]] = {}
    for position, part in enumerate(parts):
        for key in state:
            match = re.fullmatch(rf"(.*\.)?{part}(\.weight|\.bias)", key)
            if match:
                place = f"{match.group(1) or ''}{fused}{match.group(2)}"
                found.setdefault(place, [None] * len(parts))[position] = rest.pop(key)
    for place, tensors in found.items():
        if any(t is None for t in tensors):
            raise CheckpointError(f"'{place}': expected all of {', '.join(parts)} in the checkpoint")
        rest[place] = torch.cat(tensors)
    return rest
