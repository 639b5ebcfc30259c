"""Drafts without a draft model: speculative Jacobi decoding (Teng et al., 2024, arXiv 2410.01699)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vargen.decoding.draft import Draft, Sample, Settled
from vargen.decoding.tree import chain
from vargen.errors import ConfigError
from vargen.kernels.sample import inverse_cdf


@dataclass(frozen=True)
class Jacobi:
    """Proposes, for the next ``window`` tokens, draws from what the target's last pass said of their places.

    What it said was read behind guesses that have been replaced since; places that it has not seen take the distribution of the
    last one. The draws are from known distributions, so that :class:`vargen.decoding.acceptance.Acceptance` is exact.
    """

    window: int = 16

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"window {self.window}: expected at least one token")

    @property
    def size(self) -> int:
        return self.window + 1

    def start(self, sample: Sample) -> JacobiDrafting:
        return JacobiDrafting(sample, self.window)


class JacobiDrafting:
    """See :class:`vargen.decoding.draft.Drafting`."""

    def __init__(self, sample: Sample, window: int) -> None:
        self.sample, self.window = sample, window
        self.passes = 0

    def propose(self, settled: Settled) -> Draft:
        known, read = settled.known, self.sample.read
        count = min(self.window, settled.room)
        # the kept path's last row gave the new root; the rows behind it speak of the tokens after that
        rows = settled.logits[len(settled.path) :][:count]
        rows = torch.cat([rows, settled.logits[-1:].expand(count - len(rows), -1)])
        root, tree = settled.tokens[-1:], chain(count)
        if read.sampling.greedy:
            return Draft(tree, torch.cat([root, rows.argmax(-1)]))
        probs = rows.softmax(-1)
        places = torch.arange(count, device=rows.device)
        guesses = inverse_cdf(probs, self.sample.noise.uniform("guess", at=(known, places[None]))[0])
        return Draft(tree, torch.cat([root, guesses]), dict(enumerate(probs)))
