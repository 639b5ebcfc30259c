"""Which proposed tokens a target accepts: exact speculative sampling, LANTERN's relaxation of it, and their greedy forms.

Probabilities are handled as float32 rows on the CPU, one tree node at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vargen.decoding.draft import Draft, Uniforms, Verdict
from vargen.errors import VargenError


@dataclass(frozen=True, eq=False)
class Relaxation:
    """LANTERN's pooling: a token also counts the probability of the codes nearest to it, as far as a bound allows.

    With c_m the probability of the m nearest codes of x together, p(x) is raised by the largest c_m within the bound: ``delta``
    itself, so that the distribution moves by at most delta in total variation (LANTERN, section 4.2), or ``(ratio - 1) p(x)``, so
    that no probability grows more than ``ratio`` times (LANTERN++, section 3.3).

    Args:
        neighbors: integers ``(K, columns)``, nearest first, see :func:`vargen.decoding.neighbors.neighbor_table`; k + 1 columns, or
            all K - 1.
        k: number of neighbours that may be pooled.
        delta, ratio: the bound, one of them.

    Raises:
        VargenError: a table with too few columns, or not exactly one bound.
    """

    neighbors: Tensor
    k: int
    delta: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.delta is None) == (self.ratio is None):
            raise VargenError("relaxed acceptance needs one bound: delta (in total variation) or ratio (of probabilities)")
        if self.delta is not None and not 0 <= self.delta <= 1:
            raise VargenError(f"delta {self.delta}: expected a total variation in [0, 1]")
        if self.ratio is not None and not 1 <= self.ratio < float("inf"):
            raise VargenError(f"ratio {self.ratio}: expected a number >= 1")
        codes, columns = self.neighbors.shape
        if not 1 <= self.k < codes or columns < min(self.k + 1, codes - 1):
            raise VargenError(f"{self.k} neighbours from a table of {codes} codes and {columns} columns: expected k + 1 columns")

    def pooled(self, probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Probability that ``tokens`` ``(n,)`` gain, 0 where even the nearest code exceeds the bound, and whether it does not.

        Args:
            probs: ``(n, V)``, a distribution for each token.

        Raises:
            VargenError: a table of another number of codes.
        """
        if probs.shape[1] != len(self.neighbors):
            raise VargenError(
                f"neighbour table of {len(self.neighbors)} codes for a target of {probs.shape[1]}: it is of another codebook"
            )
        mass = probs.gather(1, self.neighbors[tokens, : self.k].long()).cumsum(1)
        bound = (self.ratio - 1) * probs.gather(1, tokens.unsqueeze(1)) if self.ratio is not None else self.delta
        within = mass <= bound
        return (mass * within).amax(1), within[:, 0]

    def around(self, token: int) -> Tensor:
        """What a rejected token takes with it: its k nearest codes and one more, whatever was pooled."""
        return self.neighbors[token, : self.k + 1].long()


@dataclass(frozen=True, eq=False)
class Acceptance:
    """Walks down the tree, trying the children of the last accepted node in turn (Leviathan et al., 2023; SpecInfer, 2024).

    Without a relaxation the tokens are distributed exactly as the target's, or, in greedy mode, equal its own.
    """

    relaxation: Relaxation | None = None

    def accept(self, draft: Draft, logits: Tensor, greedy: bool, uniforms: Uniforms) -> Verdict:
        """See :class:`vargen.decoding.draft.Acceptor`."""
        return self._greedy(draft, logits) if greedy else self._sample(draft, logits, uniforms)

    def _sample(self, draft: Draft, logits: Tensor, uniforms: Uniforms) -> Verdict:
        tokens, path = draft.tokens.tolist(), [0]
        while True:
            node = path[-1]
            target = logits[node].softmax(-1).cpu()
            children = draft.tree.children[node]
            proposal = None if draft.proposals is None or not children else draft.proposals[node].cpu()
            depth = len(path)
            index, residual = try_children(
                target,
                proposal,
                [tokens[child] for child in children],
                self.relaxation,
                lambda trial, depth=depth: uniforms(depth, trial),  # type: ignore[misc]
            )
            if index is None:
                return Verdict(path, residual)
            path.append(children[index])

    def _greedy(self, draft: Draft, logits: Tensor) -> Verdict:
        tree, tokens = draft.tree, draft.tokens.cpu()
        best = logits.argmax(-1).cpu()
        parents = torch.tensor(tree.parents).clamp(min=0)
        right = tokens == best[parents]
        if self.relaxation is not None:
            right |= self._raised_to_the_top(logits.softmax(-1).cpu()[parents], tokens, best[parents])
        reached = [True]
        for node in range(1, len(tree)):
            reached.append(reached[tree.parents[node]] and bool(right[node]))
        # the deepest node; of equally deep ones that on the first path
        last = max((n for n in range(len(tree)) if reached[n]), key=lambda n: (tree.depths[n], -tree.first_path[n]))
        path = [last]
        while path[-1]:
            path.append(tree.parents[path[-1]])
        return Verdict(path[::-1], torch.nn.functional.one_hot(best[last], logits.shape[-1]).float())

    def _raised_to_the_top(self, probs: Tensor, tokens: Tensor, best: Tensor) -> Tensor:
        """Whether ``tokens``, given the mass of their neighbours, are the most probable ones; the first of equal ones is."""
        assert self.relaxation is not None
        gain, _ = self.relaxation.pooled(probs, tokens)
        own = probs.gather(1, tokens.unsqueeze(1)).squeeze(1) + gain
        top = probs.gather(1, best.unsqueeze(1)).squeeze(1)
        return (own > top) | ((own == top) & (tokens < best))


def try_children(
    target: Tensor,
    proposal: Tensor | None,
    tokens: Sequence[int],
    relaxation: Relaxation | None,
    uniform: Callable[[int], float],
) -> tuple[int | None, Tensor]:
    """Tries sibling tokens in turn: the index of the first accepted one, or None and what is left of the target.

    Args:
        target: ``(V,)`` probabilities under the target.
        proposal: ``(V,)`` probabilities from which the tokens were drawn in turn without replacement; None if they were chosen
            without chance.
        uniform: number of the trial -> draw in [0, 1).

    Returns:
        (index or None, distribution ``(V,)`` that the next token has if none is accepted).
    """
    for trial, token in enumerate(tokens):
        draw, chance = uniform(trial), 1.0 if proposal is None else float(proposal[token])
        if chance <= 0:
            continue
        weight, near = float(target[token]), None
        if relaxation is not None:
            gain, pooled = relaxation.pooled(target.unsqueeze(0), torch.tensor([token]))
            weight += float(gain)
            near = relaxation.around(token) if pooled else None
        # draws lie in [0, 1): "less than" has the right probability and never accepts what cannot be
        if draw * chance < weight:
            return trial, target
        target, proposal = _without(target, proposal, token, near)
    return None, target


def _without(target: Tensor, proposal: Tensor | None, token: int, near: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Target and proposal after the rejection of ``token``, whose neighbours ``near`` were counted with it."""
    target = target.clone()
    if proposal is None:
        target[token] = 0
        if near is not None:
            target[near] = 0
        return _normalised(target), None
    taken = proposal.clone()
    if near is not None:
        taken[near] = 0
    rest = proposal.clone()
    rest[token] = 0
    return _normalised((target - taken).clamp(min=0)), rest / rest.sum().clamp(min=torch.finfo(rest.dtype).tiny)


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum()
    if total <= 0:
        return torch.full_like(weights, 1 / len(weights))
    return weights / total
