"""What the parts of speculative decoding say to each other: drafts, verdicts, and the protocols of proposers and acceptors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vargen.decoding.protocols import CausalModel
from vargen.decoding.tree import Tree
from vargen.guidance import Guidance, Progress
from vargen.kernels.sample import filter_logits, guided_logits
from vargen.layout import Layout
from vargen.model import Sampling
from vargen.noise import Noise

# (depth of a node, number of the candidate tried there) -> uniform draw in [0, 1)
Uniforms = Callable[[int, int], float]


@dataclass(frozen=True, eq=False)
class Draft:
    """Proposed tokens.

    Attributes:
        tree: how they hang together; its root is the last token known.
        tokens: int64 ``(n,)`` ids of all nodes, the root's first.
        proposals: for each node with children, the distribution ``(V,)`` from which these were drawn in turn without replacement;
            None where children were chosen without chance.
    """

    tree: Tree
    tokens: Tensor
    proposals: Mapping[int, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Verdict:
    """What an acceptor says of a draft.

    Attributes:
        path: nodes that are kept, from the root down.
        probs: distribution ``(V,)`` of the token behind the last of them, on the CPU; all on one token in greedy mode.
    """

    path: list[int]
    probs: Tensor


@dataclass(frozen=True, eq=False)
class Settled:
    """What a pass of the target has settled.

    Attributes:
        known: number of tokens known now; the last of them, the root of the next draft, has not been fed yet.
        tokens: int64 ``(m,)``, the token that follows each slot which was fed and kept (0 within the prefix), the new root last.
        hidden: ``(rows, m, width)``, the target's hidden states of these slots.
        logits: float32 ``(n, V)``, guided and filtered, behind every node of the pass; of the prefix only behind its last slot.
        path: nodes of the pass that were kept, ``[0]`` for the prefix.
        room: most tokens that may follow the root on a path of the draft, at least 1. The last token of all is never drafted, since
            nothing is predicted from it: it comes from the target.
    """

    known: int
    tokens: Tensor
    hidden: Tensor
    logits: Tensor
    path: list[int]
    room: int


@dataclass(frozen=True, eq=False)
class Readout:
    """From hidden states to guided and filtered logits, the same for the target and for drafters that share its head.

    Attributes:
        given, total: tokens given beforehand, and tokens to be known in the end.
        top_p_first: top-p before top-k (LANTERN's code), else after it (LlamaGen); in greedy mode nothing is filtered.
    """

    model: CausalModel
    guidance: Guidance
    sampling: Sampling
    given: int
    total: int
    top_p_first: bool

    def __call__(self, hidden: Tensor, known: Sequence[int]) -> Tensor:
        """``(rows, n, width)`` to float32 ``(n, V)``; ``known``: tokens known before each of the predicted ones."""
        cond, *null = self.model.logits(hidden)
        if null:
            scales = {k: self.guidance.at(self._progress(k)) for k in set(known)}
            scale = torch.tensor([scales[k] for k in known], device=cond.device).unsqueeze(1)
            logits = guided_logits(cond, null[0], scale)  # type: ignore[arg-type]
        else:
            logits = guided_logits(cond, None, 1.0)
        settings = self.sampling
        if settings.greedy:
            return logits
        if self.top_p_first:
            return warp_logits(logits, settings.temperature, settings.top_p, settings.top_k)
        return filter_logits(logits, settings.temperature, settings.top_k, settings.top_p)

    def _progress(self, known: int) -> Progress:
        return Progress(known - self.given, self.total - self.given, known, known + 1, self.model.layout.order.num_cells)


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample that is being decoded.

    Attributes:
        rows: rows of the batch that it takes: 2 with guidance, [condition, null], else 1.
        noise: its draws, on the model's device.
    """

    model: CausalModel
    read: Readout
    rows: int
    noise: Noise

    @property
    def layout(self) -> Layout:
        return self.model.layout


class Drafting(Protocol):
    """A proposer at work on one sample.

    Attributes:
        passes: forward passes of a draft model so far.
    """

    passes: int

    def propose(self, settled: Settled) -> Draft:
        """A draft, of which a lone root is the least. Called after every pass of the target that leaves room for one."""


class Proposer(Protocol):
    """Drafts tokens.

    Attributes:
        size: most nodes of a draft, the root included.
    """

    @property
    def size(self) -> int: ...

    def start(self, sample: Sample) -> Drafting: ...


class Acceptor(Protocol):
    """Decides what is kept of a draft."""

    def accept(self, draft: Draft, logits: Tensor, greedy: bool, uniforms: Uniforms) -> Verdict:
        """A verdict.

        Args:
            logits: float32 ``(n, V)``, the target's guided and filtered logits behind every node.
            greedy: the target takes its most probable token instead of drawing.
        """


def warp_logits(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Temperature, then top-p, then top-k, as transformers' warpers do and LANTERN with them.

    Top-p drops tokens, from the least probable on, as long as they hold no more than 1 - p together; the most probable one stays.
    Top-k drops values strictly below the k-th largest. Returns float32 ``(..., V)``.
    """
    logits = logits.float() / temperature
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, stable=True)
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return filter_logits(logits, top_k=top_k)
