"""What decoding asks of a model. Speculative and plain drivers are written against these; models know nothing of drivers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from vargen.condition import Condition
from vargen.guidance import Guidance
from vargen.layout import Layout, Slots
from vargen.model import OnStep, Sampling
from vargen.nn.cache import CacheWindow, KVCache
from vargen.noise import Noise
from vargen.space import TokenSpace


class RunBlock(Protocol):
    """How a driver calls a block: as it is, or compiled."""

    def __call__(self, block: Any, x: Tensor, **arguments: Any) -> Tensor: ...


def run_block(block: Any, x: Tensor, **arguments: Any) -> Tensor:
    """Calls the block as it is."""
    return block(x, **arguments)


@dataclass
class State:
    """What a causal model carries from pass to pass.

    Attributes:
        prefix: embedded prefix slots ``(rows * B, P, width)``.
        cache: keys and values of the slots fed so far; its ``visible`` hides padded prefix slots.
        extras: further tensors of the model's own with a row per row of the batch, such as a context for cross-attention.
        window: where the next pass writes and what it reads, if not behind all valid entries of the cache.
        run: how the model calls its blocks.
    """

    prefix: Tensor
    cache: KVCache
    extras: dict[str, Any] = field(default_factory=dict)
    window: CacheWindow | None = None
    run: RunBlock = run_block


class CausalModel(Protocol):
    """A causal or block-causal model of discrete tokens."""

    @property
    def layout(self) -> Layout: ...

    @property
    def space(self) -> TokenSpace: ...

    @property
    def token_offset(self) -> int:
        """Vocabulary id of code 0; decoding runs over the whole vocabulary."""

    def start(self, condition: Condition, batch_size: int, rows: int = 1, capacity: int | None = None) -> State:
        """A state with an empty cache; ``rows`` 2 stacks [condition, null] for guidance.

        ``capacity`` is the number of cache slots, all inputs of the layout by default.
        """

    def forward(self, state: State, ids: Tensor, slots: Tensor | Slots, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Hidden states after each head's final norm, one ``(R, n, width)`` per head, of ``slots`` fed behind the cache.

        Args:
            ids: ``(R, n)`` token ids; read only at slots of cells.
            slots: CPU int64 ``(n,)``, or placed on the device; they fix position codes. Entries are appended to the cache, or
                written where its window says.
            mask: bool, broadcastable to ``(R, 1, n, cached + n)``; None lets every slot see everything visible in the cache.
        """

    def logits(self, hidden: Tensor, head: int = 0) -> Tensor:
        """float32 ``(..., V)`` of a head's hidden states."""


class Decoding(Protocol):
    """A way of decoding causal models other than one exact pass after the other."""

    def decode(
        self,
        model: CausalModel,
        condition: Condition,
        batch_size: int,
        noise: Noise,
        guidance: Guidance | None = None,
        sampling: Sampling | None = None,
        on_step: OnStep | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Tokens ``(B, *space.token_shape)``, see :meth:`vargen.decoding.engine.Engine.decode`."""
