"""What a training loop needs to know of a task: its network, its data and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vargen.data.base import VisualDataset
from vargen.data.loader import Batch, training_batches
from vargen.model import VargenModel
from vargen.noise import Noise


@dataclass(frozen=True)
class Facts:
    """What a finished run can say of itself, for the model card.

    Attributes:
        step, samples: optimizer steps made and samples seen.
        scores: of the last validation.
        metrics: lines of ``metrics.jsonl``.
        recipe: the whole recipe as YAML.
    """

    step: int
    samples: int
    scores: dict[str, float]
    metrics: list[dict[str, Any]]
    recipe: str


class Task(ABC):
    """A network to train and what surrounds it.

    Attributes:
        network: all that the main optimizer trains; ``network(...)`` is the forward pass that :meth:`losses` calls.
        adversary: module with the parameters that the second optimizer trains, or None.
        fixed: modules that are used but not trained.
        dataset: training data.
        total_steps: of the run, set by the trainer.
    """

    network: nn.Module
    adversary: nn.Module | None = None
    fixed: Sequence[nn.Module] = ()
    dataset: VisualDataset
    total_steps: int

    @abstractmethod
    def models(self) -> dict[str, VargenModel]:
        """The models that checkpoints hold, by the name of the attribute of ``network`` that they are."""

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch, noise: Noise, step: int) -> dict[str, Tensor]:
        """Scalars of a batch: the total loss under ``"loss"``, and whatever else the log should show the means of.

        ``network`` is the prepared (wrapped, sharded) form of our own. The loss must not reach parameters of the adversary.
        """

    def adversary_losses(self, step: int) -> dict[str, Tensor] | None:
        """Losses of the second optimizer on what the last :meth:`losses` made; None where it pauses."""
        return None

    def setup(self, device: torch.device) -> None:
        """Moves fixed modules to ``device``; called once before training, the place to prepare data too."""
        for module in self.fixed:
            module.requires_grad_(False).eval().to(device)

    def batches(self, seed: int, start: int, batch_size: int, rank: int, world: int, num_workers: int) -> Iterator[Batch]:
        """Endless training batches of ``batch_size`` samples per process, from step ``start`` (counted from 0) on."""
        return training_batches(self.dataset, batch_size, seed, start, rank, world, num_workers)

    def validate(self) -> dict[str, float]:
        """Scores on held-out data with the weights that the network holds now."""
        return {}

    def reference(self) -> Tensor | None:
        """Images that previews stand beside, ``(N, 3, H, W)`` in [-1, 1]."""
        return None

    def preview(self) -> Tensor | None:
        """Images made with the weights that the network holds now, ``(N, 3, H, W)`` in [-1, 1]."""
        return None

    @abstractmethod
    def export(self, folder: Path, state: dict[str, Tensor], facts: Facts) -> None:
        """Writes the finished model with the weights ``state`` of ``network``, and its model card, into ``folder``."""


def micro_batches(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into ``parts`` equal batches; every entry of it has the samples as its first axis."""
    size = len(batch["index"]) // parts
    return [{key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(parts)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
