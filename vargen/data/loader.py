"""Batches as a function of (seed, step): resuming at any step and sharding over processes are exact by construction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vargen.data.base import Item, VisualDataset
from vargen.errors import DataError
from vargen.noise import Noise

Batch = dict[str, Any]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    return Noise(seed).permutation("loader/epoch", n, at=(epoch,))[0]


def batch_indices(seed: int, step: int, batch_size: int, n: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """Which items make the batch of a step.

    The items of epoch 0 in a random order, then those of epoch 1 in another and so on form one endless sequence, which steps cut
    into global batches of ``batch_size * world`` and ranks into local ones. So every item is seen once per epoch, no batch is
    short, and the global batch depends on its size only, not on the number of processes.

    Args:
        batch_size: items per rank.
        n: length of the data set.

    Returns:
        Item indices and their epochs, both int64 ``(batch_size,)``.
    """
    if n < 1 or batch_size < 1 or step < 0 or not 0 <= rank < world:
        raise DataError(
            f"batch {step} of {batch_size} items from {n}, rank {rank} of {world}: expected positive sizes and rank < world"
        )
    place = (step * world + rank) * batch_size + torch.arange(batch_size)
    epochs = place // n
    indices = torch.empty_like(place)
    for epoch in epochs.unique().tolist():
        rows = epochs == epoch
        indices[rows] = _epoch_order(seed, epoch, n)[place[rows] % n]
    return indices, epochs


def collate(items: list[Item]) -> Batch:
    """Items to a batch.

    ``pixels`` ``(B, 3, ...)``, or what caches hold in their place: ``tokens`` or ``moments``, and ``text_features`` with
    ``text_mask``; ``class_labels`` int64 ``(B,)``; ``captions`` list[str] if there are any.
    """
    batch: Batch = {"class_labels": torch.tensor([item["class_label"] for item in items])}
    for key in ("pixels", "tokens", "moments", "text_features", "text_mask"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    if "caption" in items[0]:
        batch["captions"] = [item["caption"] for item in items]
    return batch


class StepBatches(Dataset):
    """The training batches of a data set by step number: ``StepBatches(...)[step]``.

    Batches have the fields of :func:`collate` and ``index``, int64 ``(B,)``.

    Args:
        dataset: where items come from.
        batch_size: items per rank.
        seed: chooses the order.
        rank, world: this process and the number of processes.
    """

    def __init__(self, dataset: VisualDataset, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.batch_size, self.seed, self.rank, self.world = dataset, batch_size, seed, rank, world

    def __getitem__(self, step: int) -> Batch:
        indices, epochs = batch_indices(self.seed, step, self.batch_size, len(self.dataset), self.rank, self.world)
        batch = collate([self.dataset.get(i, e) for i, e in zip(indices.tolist(), epochs.tolist())])
        batch["index"] = indices
        # what this process has found broken so far; a worker's findings would otherwise be lost
        batch["skipped"] = dict(getattr(self.dataset, "skipped", {}))
        return batch


def training_batches(
    dataset: VisualDataset,
    batch_size: int,
    seed: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Endless batches from step ``start`` on, prefetched by ``num_workers`` processes; see :class:`StepBatches`.

    Broken files that workers find are added to ``dataset.skipped``.
    """
    steps = iter(range(start, 2**62))
    batches = StepBatches(dataset, batch_size, seed, rank, world)
    for batch in DataLoader(batches, batch_size=None, sampler=steps, num_workers=num_workers):  # type: ignore[arg-type]
        found = batch.pop("skipped")
        if found:
            dataset.skipped.update(found)  # type: ignore[attr-defined]
        yield batch


def ordered_batches(dataset: VisualDataset, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The first ``limit`` items once, in order; the last batch may be short."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for start in range(0, count, batch_size):
        yield collate([dataset[i] for i in range(start, min(start + batch_size, count))])
