"""Speculative decoding of next-token models: a proposer drafts a tree of tokens, one pass of the target reads all of it, and an
acceptor keeps a path (Leviathan et al., 2023, arXiv 2211.17192; EAGLE, 2024, arXiv 2401.15077).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.condition import Condition
from vargen.decoding.draft import Acceptor, Draft, Proposer, Readout, Sample, Settled
from vargen.decoding.protocols import CausalModel, State
from vargen.decoding.tree import Tree, chain
from vargen.errors import VargenError
from vargen.guidance import Guidance
from vargen.kernels.sample import inverse_cdf
from vargen.layout import Layout
from vargen.model import OnStep, Sampling, StepInfo
from vargen.noise import Noise


@dataclass
class Statistics:
    """Counts of a call.

    Attributes:
        accepted: for each sample the number of accepted draft tokens of each round.
        draft_passes: forward passes of the draft model.
    """

    accepted: list[list[int]] = field(default_factory=list)
    draft_passes: int = 0

    @property
    def rounds(self) -> int:
        return sum(map(len, self.accepted))

    @property
    def target_passes(self) -> int:
        """Passes of the target: one over each prefix, and one per round."""
        return len(self.accepted) + self.rounds

    @property
    def tokens_per_round(self) -> float:
        """Accepted tokens and the one that the target adds, mean over rounds (the papers' step compression)."""
        return 1 + sum(map(sum, self.accepted)) / max(self.rounds, 1)


class Speculation:
    """A way of decoding, for ``generate(..., decoding=...)``: samples one after the other, each in rounds of draft and verdict.

    Draws are addressed, ("token", i) and ("accept", i, trial) for token i and whatever the proposer draws, so that a sample does
    not depend on its batch.

    Args:
        proposer, acceptor: what drafts, and what decides.
        top_p_first: see :class:`vargen.decoding.draft.Readout`.

    Attributes:
        statistics: of the last call.
    """

    def __init__(self, proposer: Proposer, acceptor: Acceptor, top_p_first: bool = False) -> None:
        self.proposer, self.acceptor, self.top_p_first = proposer, acceptor, top_p_first
        self.statistics = Statistics()

    @torch.no_grad()
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
        """Tokens ``(B, *space.token_shape)``, see :meth:`vargen.decoding.engine.Engine.decode`; ``on_step`` is called after each
        round.

        Raises:
            VargenError: a model that does not predict one token after another, or guidance with three rows.
        """
        require_next_token(model)
        guidance, sampling = guidance or Guidance(), sampling or Sampling()
        if guidance.rows > 2:
            raise VargenError(
                "guidance with a partial condition needs a model with three kinds of rows; this one has cond and null"
            )
        order, space = model.layout.order, model.space
        given = 0 if condition.tokens is None else condition.tokens.shape[1]
        total = order.num_cells if stop is None else stop
        read = Readout(model, guidance, sampling, given, total, self.top_p_first)
        grid = torch.zeros(batch_size, order.num_cells, dtype=torch.int64)
        known = torch.zeros(order.num_cells)
        self.statistics = Statistics()

        for row in range(batch_size):

            def report(tokens: Sequence[int], row: int = row) -> None:
                done = order.cells[: min(len(tokens), total)]
                grid[row, done] = torch.tensor(tokens[: len(done)])
                if on_step is not None:
                    share = known.index_fill(0, done, 1 / batch_size) + row / batch_size * (known == 0)
                    codes = grid.to(noise.device).unflatten(1, space.token_shape)
                    on_step(StepInfo(row * total + len(done) - 1, batch_size * total, codes, share.reshape(space.token_shape)))

            only = slice(row, row + 1)
            own = condition if condition.batch_size is None else condition.select(only)
            self._decode_one(Sample(model, read, guidance.rows, noise.select(only)), own, report)
        return grid.to(noise.device).unflatten(1, space.token_shape)

    def _decode_one(self, sample: Sample, condition: Condition, report: Callable[[Sequence[int]], None]) -> None:
        layout, read, noise = sample.layout, sample.read, sample.noise.to("cpu")
        prefix, cells = layout.prefix, layout.order.num_cells
        tokens: list[int] = [] if condition.tokens is None else condition.tokens.flatten().tolist()
        accepted: list[int] = []
        self.statistics.accepted.append(accepted)
        if len(tokens) >= read.total:
            return report(tokens)
        state = sample.model.start(condition, 1, sample.rows, layout.num_inputs + self.proposer.size)
        drafting = self.proposer.start(sample)

        slots = torch.arange(prefix + len(tokens))
        hidden = _feed(sample, state, [0] * prefix + tokens, slots, prefix_mask(layout, slots, state.cache.visible))
        logits = _readable(read(hidden[:, -1:], [len(tokens)]))
        path, probs = [0], _probabilities(logits[0], read.sampling.greedy)
        following = [0] * (prefix - 1) + tokens
        while True:
            root = int(inverse_cdf(probs, noise.uniform("token", at=(len(tokens),))[0]))
            tokens.append(root)
            report(tokens)
            known = len(tokens)
            if known >= read.total:
                break
            new = torch.tensor([*following, root], device=hidden.device)
            room = cells - 1 - known
            draft = drafting.propose(Settled(known, new, hidden, logits, path, room)) if room else Draft(chain(0), new[-1:])

            depths = draft.tree.depths
            slots = torch.tensor(depths) + (prefix + known - 1)
            start = state.cache.length
            hidden = _feed(sample, state, draft.tokens, slots, tree_mask(draft.tree, start, state.cache.visible))
            logits = _readable(read(hidden, [known + depth for depth in depths]))

            def uniform(depth: int, trial: int, known: int = known) -> float:
                return float(noise.uniform("accept", at=(known + depth - 1, trial)))

            verdict = self.acceptor.accept(draft, logits, read.sampling.greedy, uniform)
            path, probs = verdict.path, verdict.probs
            kept = torch.tensor(path, device=hidden.device)
            state.cache.gather(start + kept, start)
            hidden, following = hidden[:, kept], draft.tokens[kept[1:]].tolist()
            tokens += following
            accepted.append(len(following))
        self.statistics.draft_passes += drafting.passes


def require_next_token(model: CausalModel) -> None:
    """Raises VargenError, with the reason, unless every token is predicted from the slot of the token before it."""
    layout = model.layout
    cells, slots = layout.order.cells, layout.prefix + torch.arange(layout.order.num_cells)
    reason = None
    if layout.num_heads != 1:
        reason = f"{layout.num_heads} heads predict a token together"
    elif layout.order.num_steps != len(cells):
        reason = "a step draws several tokens at once"
    elif layout.prefix < 1 or (layout.edges[0, cells] != slots - 1).any() or (layout.slot_of[cells] != slots).any():
        reason = "tokens are not predicted from the slot before their own"
    elif model.token_offset:
        reason = "its vocabulary holds more than codes"
    if reason:
        raise VargenError(f"{type(model).__name__} cannot be decoded speculatively: {reason}; leave decoding out")


def prefix_mask(layout: Layout, slots: Tensor, visible: Tensor | None) -> Tensor | None:
    """Mask of the first ``slots``, bool ``(R or 1, 1, n, n)``.

    Padded slots, which nobody else sees, see all before them and all valid ones: so they do in LANTERN's base model, which hands
    their states to its drafter.
    """
    mask = layout.mask(slots, slots)[None, None]
    if visible is None:
        return mask if len(slots) > 1 else None
    mask, valid = mask.to(visible.device), visible[:, : len(slots)]
    return torch.where(valid[:, None, :, None], mask & valid[:, None, None, :], mask | valid[:, None, None, :])


def tree_mask(tree: Tree, cached: int, visible: Tensor | None) -> Tensor:
    """Bool ``(R or 1, 1, n, cached + n)``: nodes see what is visible of the cache, and their ancestors."""
    past = torch.ones(1, cached, dtype=torch.bool) if visible is None else visible[:, :cached]
    mask = tree.mask.to(past.device)[None, None]
    return torch.cat([past[:, None, None, :].expand(-1, 1, len(tree), -1), mask.expand(len(past), -1, -1, -1)], dim=3)


def _feed(sample: Sample, state: State, ids: Sequence[int] | Tensor, slots: Tensor, mask: Tensor | None) -> Tensor:
    fed = torch.as_tensor(ids, device=state.prefix.device).expand(sample.rows, -1)
    return sample.model.forward(state, fed, slots, mask)[0]


def _probabilities(logits: Tensor, greedy: bool) -> Tensor:
    """A row of logits ``(V,)`` as probabilities on the CPU, in greedy mode all on the first of the largest ones."""
    return F.one_hot(logits.argmax().cpu(), logits.numel()).float() if greedy else logits.softmax(-1).cpu()


def _readable(logits: Tensor) -> Tensor:
    if not logits.amax(-1).isfinite().all():
        raise VargenError("the model produced NaN logits: its weights or its condition are broken")
    return logits
