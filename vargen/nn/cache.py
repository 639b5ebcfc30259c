"""Key-value cache of a causal decoder: an object that decoding owns, never an attribute of a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vargen.errors import VargenError


class KVCache:
    """Keys and values of all layers in preallocated tensors ``(layers, B, heads, capacity, head_dim)``.

    A forward pass of ``n`` slots calls :meth:`update` once per layer and then :meth:`advance`. Entries beyond
    ``length`` are scratch.

    Attributes:
        length: number of valid entries.
        visible: bool ``(B, capacity)``, keys that may be seen in each row; None if all may.
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, batch_size, heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.visible: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Memory of keys and values: 2 * layers * B * heads * capacity * head_dim * bytes per number."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``(B, heads, n, head_dim)`` behind the valid entries; returns all keys and values up to and with them."""
        stop = self.length + key.shape[2]
        if stop > self.capacity:
            raise VargenError(f"cache of {self.capacity} slots cannot take slot {stop - 1}: allocate it for the whole sequence")
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, count: int) -> None:
        """Makes the ``count`` entries just written valid."""
        self.length += count

    def window(self, places: Tensor, stop: int) -> CacheWindow:
        """The cache of a pass that writes at ``places`` and sees the first ``stop`` entries."""
        return CacheWindow(self.keys.unbind(), self.values.unbind(), places, stop)

    def truncate(self, length: int) -> None:
        """Forgets all entries from ``length`` on."""
        if not 0 <= length <= self.length:
            raise VargenError(f"cannot truncate a cache of {self.length} entries to {length}")
        self.length = length

    def gather(self, slots: Tensor, start: int) -> None:
        """Keeps, from entry ``start`` on, only the entries ``slots`` (ascending), moved together: a tree's accepted path."""
        stop = start + slots.numel()
        self.keys[:, :, :, start:stop] = self.keys[:, :, :, slots]
        self.values[:, :, :, start:stop] = self.values[:, :, :, slots]
        self.length = stop

    def repeat_rows(self, times: int) -> None:
        """Every row ``times`` times, as whole copies of the batch one after the other (guidance branches of one prefill)."""
        self.keys = self.keys.repeat(1, times, 1, 1, 1)
        self.values = self.values.repeat(1, times, 1, 1, 1)
        if self.visible is not None:
            self.visible = self.visible.repeat(times, 1)

    def select_rows(self, rows: slice | Tensor) -> None:
        """Keeps some rows of the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        if self.visible is not None:
            self.visible = self.visible[rows]


class CacheWindow:
    """What a pass of fixed shape sees of a cache: it writes at places that the device knows, and reads a fixed number of entries.

    Nothing of it changes from pass to pass but the numbers in ``places``, so that one compiled pass serves many; which of the
    entries are valid is up to the mask.

    Args:
        keys, values: a tensor ``(B, heads, capacity, head_dim)`` for each layer.
        places: int64 ``(n,)``, on the device.
        stop: number of entries read.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], places: Tensor, stop: int) -> None:
        self.keys, self.values, self.places, self.stop = keys, values, places, stop

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes ``(B, heads, n, head_dim)`` at the places; returns the first ``stop`` keys and values."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.places, key)
        values.index_copy_(2, self.places, value)
        return keys[:, :, : self.stop], values[:, :, : self.stop]
