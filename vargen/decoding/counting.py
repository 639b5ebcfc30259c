"""Operations and memory traffic of the matrix products in a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vargen.nn.attention import attention_backend


@dataclass
class Cost:
    """Of matrix products (convolutions and attention included) that ran while it was counted.

    Attributes:
        flops: floating-point operations, a multiply-add counts 2.
        weight_bytes: bytes of parameters that were read, once per product.
        other_bytes: bytes of all their other operands and of their results: activations, keys and values.
    """

    flops: int = 0
    weight_bytes: int = 0
    other_bytes: int = 0
    _weights: set[int] = field(default_factory=set, repr=False)

    @property
    def bytes(self) -> int:
        """What must move if nothing stays in a cache between products, and nothing else is written out."""
        return self.weight_bytes + self.other_bytes


@contextmanager
def counting(*models: nn.Module) -> Iterator[Cost]:
    """Counts the matrix products inside the block; operands are weights if they belong to ``models``.

    Fused attention kernels do not say what they read, so that attention runs as plain products meanwhile. Compiled code and
    captured graphs are not seen.
    """
    cost = Cost()
    cost._weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    with attention_backend("eager"), _CostMode(cost):
        yield cost


class _CostMode(TorchDispatchMode):
    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost = cost

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if count is not None:
            self.cost.flops += count(*args, **kwargs, out_val=out)
            for tensor in tree_leaves((args, kwargs, out)):
                if isinstance(tensor, Tensor):
                    size = tensor.numel() * tensor.element_size()
                    if tensor.untyped_storage().data_ptr() in self.cost._weights:
                        self.cost.weight_bytes += size
                    else:
                        self.cost.other_bytes += size
        return out


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operation is written in terms of others, among which there may be products."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
