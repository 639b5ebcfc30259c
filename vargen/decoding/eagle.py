"""Drafts of an EAGLE drafter: trees that grow where it is confident (EAGLE-2, Li et al., 2024), and static trees (EAGLE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vargen.decoding.draft import Draft, Sample, Settled
from vargen.decoding.tree import StaticTree, Tree
from vargen.errors import ConfigError, VargenError
from vargen.nn.cache import KVCache


class Drafter(Protocol):
    """A model that predicts the target's next hidden state from its last one and the token that follows."""

    def start(self, rows: int, capacity: int) -> KVCache: ...

    def __call__(self, hidden: Tensor, ids: Tensor, cells: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """States ``(R, n, width)`` and the tokens ``(R, n)`` that follow them, of ``cells`` ``(n,)`` (-1 for none), to the
        predicted states of these tokens ``(R, n, width)``; entries are appended to the cache, ``mask`` is ``(1, 1, n, cached + n)``
        or None for plain causal."""

    def require(self, sample: Sample) -> None:
        """Raises VargenError unless it was made for such targets."""


class Shape(Protocol):
    """How a tree grows.

    Attributes:
        size: most nodes, the root included; fed: most entries that growing adds to the drafter's cache.
    """

    @property
    def size(self) -> int: ...

    @property
    def fed(self) -> int: ...

    def grow(self, work: EagleDrafting, state: Tensor, settled: Settled) -> Draft:
        """A draft below the root, of which ``state`` ``(R, 1, width)`` is the drafter's prediction."""


@dataclass(frozen=True)
class DynamicTree:
    """At each of ``depth`` steps the ``top_k`` most probable nodes of the last one get ``top_k`` children each; of all nodes the
    ``size - 1`` most probable ones, by the product of draft probabilities along their path, are proposed.

    Raises:
        ConfigError: sizes that leave no node.
    """

    size: int = 59
    depth: int = 4
    top_k: int = 10

    def __post_init__(self) -> None:
        if min(self.size - 1, self.depth + 1, self.top_k) < 1:
            raise ConfigError(f"{self}: expected a size above 1, a depth of at least 0 and a top_k of at least 1")

    @property
    def fed(self) -> int:
        return self.depth * self.top_k

    def grow(self, work: EagleDrafting, state: Tensor, settled: Settled) -> Draft:
        known = settled.known
        scores, ids = _largest(work.read(state, known).log_softmax(-1)[0], self.top_k)
        width, device = len(ids), ids.device
        # of all candidates: score, id, and the number of the candidate above; the frontier are those that get children next
        all_scores, all_ids, all_above = [scores], [ids], [torch.full((width,), -1, device=device)]
        frontier, states = torch.arange(width, device=device), state.expand(-1, width, -1)
        seen = torch.zeros(width, 0, dtype=torch.bool, device=device)
        for step in range(min(self.depth, settled.room - 1)):
            seen = torch.cat([seen, torch.eye(width, dtype=torch.bool, device=device)], dim=1)
            states = work.feed(states, ids, known + step, seen)
            values, children = _largest(work.read(states, known + step + 1).log_softmax(-1), width)
            cumulative = (values + scores.unsqueeze(1)).flatten()
            all_scores.append(cumulative)
            all_ids.append(children.flatten())
            all_above.append(frontier.repeat_interleave(width))
            scores, chosen = _largest(cumulative, width)
            parent = chosen // width
            ids, states, seen = children.flatten()[chosen], states[:, parent], seen[parent]
            frontier = chosen + width + step * width * width
        score, above = torch.cat(all_scores), torch.cat(all_above)
        # equal scores go by number, so that a child is never kept without its parent, which was numbered before it
        kept = score.sort(descending=True, stable=True).indices[: self.size - 1].sort().values
        parents = torch.where(above[kept] < 0, 0, torch.searchsorted(kept, above[kept]) + 1)
        if score.isnan().any():
            raise VargenError("the drafter produced NaN logits: its weights are broken")
        return Draft(Tree((-1, *parents.tolist()), by_leaf=work.greedy), torch.cat([settled.tokens[-1:], torch.cat(all_ids)[kept]]))


@dataclass(frozen=True, eq=False)
class FixedTree:
    """A static tree. The children of a node are drawn from the draft distribution in turn without replacement; in greedy mode they
    are its most probable tokens.
    """

    shape: StaticTree

    @property
    def size(self) -> int:
        return len(self.shape.tree)

    @property
    def fed(self) -> int:
        return self.size

    def grow(self, work: EagleDrafting, state: Tensor, settled: Settled) -> Draft:
        known, shape = settled.known, self.shape.limited(settled.room)
        tree, states, device = shape.tree, state, state.device
        tokens = settled.tokens[-1:].repeat(len(tree))
        proposals: dict[int, Tensor] = {}
        entries: list[int] = []
        for depth, nodes in enumerate(shape.expanded):
            if depth:
                entries += nodes
                above = [shape.expanded[depth - 1].index(tree.parents[node]) for node in nodes]
                seen = tree.mask[list(nodes)][:, entries].to(device)
                states = work.feed(states[:, above], tokens[list(nodes)], known + depth - 1, seen)
            logits = work.read(states, known + depth)
            if work.greedy:
                ids = _largest(logits, shape.width)[1]
            else:
                probs = logits.softmax(-1)
                rows = torch.arange(len(proposals), len(proposals) + len(nodes), device=device)
                uniform = work.sample.noise.uniform("children", (probs.shape[1],), at=(known, rows[None]), dtype=torch.float64)
                ids = without_replacement(probs, uniform[0], shape.width)
                proposals.update(zip(nodes, probs))
            for row, node in enumerate(nodes):
                children = list(tree.children[node])
                # of a vocabulary smaller than the number of children the last token repeats, then without any chance
                ranks = [min(shape.ranks[child], ids.shape[1] - 1) for child in children]
                tokens[children] = ids[row, ranks]
        if any(probs.isnan().any() for probs in proposals.values()):
            raise VargenError("the drafter produced NaN logits: its weights are broken")
        return Draft(tree, tokens, None if work.greedy else proposals)


def without_replacement(probs: Tensor, uniform: Tensor, count: int) -> Tensor:
    """``count`` tokens drawn in turn without replacement: the largest of log p plus Gumbel noise, in descending order.

    Args:
        probs: ``(n, V)``.
        uniform: float64 ``(n, V)`` in [0, 1).

    Returns:
        int64 ``(n, min(count, V))``.
    """
    return _largest(probs.double().log() - uniform.log().neg().log(), count)[1]


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    top = values.topk(min(count, values.shape[-1]), dim=-1)
    return top.values, top.indices


class EagleDrafting:
    """A drafter at work on one sample, see :class:`vargen.decoding.draft.Drafting`."""

    def __init__(self, drafter: Drafter, shape: Shape, sample: Sample) -> None:
        drafter.require(sample)
        self.drafter, self.shape, self.sample = drafter, shape, sample
        self.cache = drafter.start(sample.rows, sample.layout.num_inputs + shape.fed)
        self.stable = 0
        self.passes = 0

    @property
    def greedy(self) -> bool:
        return self.sample.read.sampling.greedy

    def read(self, states: Tensor, index: int) -> Tensor:
        """Logits ``(n, V)`` of token number ``index`` from predicted states ``(R, n, width)``."""
        return self.sample.read(states, [index] * states.shape[1])

    def feed(self, states: Tensor, ids: Tensor, index: int, seen: Tensor) -> Tensor:
        """Predicted states of tokens ``ids`` ``(n,)``, all at place ``index``, below nodes with predicted ``states``.

        ``seen``: bool ``(n, entries)``, which of the nodes fed for this draft, these last, each of them sees.
        """
        layout = self.sample.layout
        cells = layout.order.cells[index].repeat(len(ids))
        past = torch.ones(len(ids), self.stable, dtype=torch.bool, device=seen.device)
        return self._run(states, ids, cells, torch.cat([past, seen], dim=1)[None, None])

    def _run(self, states: Tensor, ids: Tensor, cells: Tensor, mask: Tensor | None) -> Tensor:
        self.passes += 1
        return self.drafter(states, ids.expand(self.sample.rows, -1), cells, mask, self.cache)

    def propose(self, settled: Settled) -> Draft:
        layout, count = self.sample.layout, len(settled.tokens)
        end = layout.prefix + settled.known
        predicted = self._run(settled.hidden, settled.tokens, layout.cell[end - count : end], None)
        self.stable = self.cache.length
        draft = self.shape.grow(self, predicted[:, -1:], settled)
        self.cache.truncate(self.stable)
        return draft


@dataclass(frozen=True, eq=False)
class Eagle:
    """Proposes trees of a drafter, see :class:`vargen.decoding.draft.Proposer`."""

    drafter: Drafter
    shape: Shape

    @property
    def size(self) -> int:
        return self.shape.size

    def start(self, sample: Sample) -> EagleDrafting:
        return EagleDrafting(self.drafter, self.shape, sample)
