"""Ways of decoding that are measured: the plain one of every system, and each acceleration where it applies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vargen.backbones.causal import CausalGenerator
from vargen.backbones.mar import MAR
from vargen.bench.systems import Subject
from vargen.bench.uncached import Uncached
from vargen.decoding.acceptance import Acceptance
from vargen.decoding.continuous import ContinuousSpeculation
from vargen.decoding.draft import Acceptor, Draft, Uniforms, Verdict
from vargen.decoding.engine import Engine
from vargen.decoding.jacobi import Jacobi
from vargen.decoding.lantern import Lantern
from vargen.decoding.neighbors import nearest_codes
from vargen.decoding.speculative import Speculation, require_next_token
from vargen.errors import VargenError
from vargen.kernels.dispatch import kernels
from vargen.train.compiling import repeated_blocks

PLAIN = "plain"
STATIC = "naive_extend_57"
# of LANTERN's relaxation, cut where a codebook is small
NEIGHBORS = 1000
# tokens per target pass that the bundled digits model and its trained drafter reach, see docs/speculation.md
TOKENS = {"jacobi": 2.27, "lossless-dynamic": 3.36, "lossless-static": 4.35, "lantern": 3.62, "lantern++": 4.93}


@dataclass
class Run:
    """One way of making a subject's images.

    Attributes:
        call: batch size to tokens.
        models: networks that it runs, the subject's own first.
        one_by_one: samples are decoded one after the other, so that larger batches cost as much per image.
        modelled: what is assumed rather than measured, for the record.
        countable: its products run one by one and can be counted; where not, they are those of the plain way.
        weight_size: bytes of a weight in products relative to the plain way's.
        statistics: what a driver counted in the last call, for the record.
    """

    call: Callable[[int], Tensor]
    models: tuple[nn.Module, ...]
    one_by_one: bool = False
    countable: bool = True
    weight_size: float = 1.0
    statistics: Callable[[], dict[str, Any]] = field(default=dict)
    modelled: dict[str, Any] = field(default_factory=dict)


Way = Callable[[Subject], Run | None]


def plain(subject: Subject) -> Run:
    """The loop as it stands without any option: with a cache where the system has one, eager."""
    return Run(subject.generate, (subject.model,))


def no_cache(subject: Subject) -> Run | None:
    if not isinstance(subject.model, CausalGenerator):
        return None
    return Run(partial(subject.generate, decoding=Uncached()), (subject.model,))


def static(subject: Subject) -> Run | None:
    """Passes padded to a few fixed shapes."""
    if not isinstance(subject.model, CausalGenerator):
        return None
    return Run(partial(subject.generate, decoding=Engine(buckets=4)), (subject.model,))


def graphs(subject: Subject, compile: bool) -> Run | None:
    """Passes of fixed shape as CUDA graphs."""
    if not isinstance(subject.model, CausalGenerator) or subject.model.device.type != "cuda":
        return None
    engine = Engine(compile=compile, graphs=True)
    return Run(partial(subject.generate, decoding=engine), (subject.model,), countable=False)


def compiled(subject: Subject) -> Run | None:
    """Blocks through torch.compile: by the engine, or in place in masked and flow systems."""
    if isinstance(subject.model, CausalGenerator):
        return Run(partial(subject.generate, decoding=Engine(compile=True)), (subject.model,), countable=False)
    swap = CompiledBlocks(subject.model)
    return Run(partial(_within, swap, subject.generate), (subject.model,), countable=False)


def int8(subject: Subject) -> Run | None:
    """Weights of 8 bits, read by compiled blocks."""
    if not isinstance(subject.model, CausalGenerator) or find_spec("torchao") is None:
        return None
    from vargen.decoding.quantize import int8_weights

    small = replace(subject, model=int8_weights(copy.deepcopy(subject.model)))  # type: ignore[arg-type]
    run = partial(small.generate, decoding=Engine(compile=True))
    return Run(run, (small.model,), countable=False, weight_size=1 / subject.model.dtype.itemsize)


def triton(subject: Subject) -> Run | None:
    """Our kernels in place of their plain references."""
    if subject.model.device.type != "cuda":
        return None
    return Run(partial(_within, partial(kernels, "triton"), subject.generate), (subject.model,), countable=False)


class Modelled:
    """An acceptor that does another one's work and then keeps as many tokens as it is told to.

    Fresh weights predict next to nothing, so that what a draft of theirs is worth says nothing about trained ones.

    Args:
        tokens: mean of accepted tokens and the one that the target adds, per round.
    """

    def __init__(self, acceptor: Acceptor, tokens: float) -> None:
        self.acceptor, self.tokens, self.owed = acceptor, tokens, 0.0

    def accept(self, draft: Draft, logits: Tensor, greedy: bool, uniforms: Uniforms) -> Verdict:
        """See :class:`vargen.decoding.draft.Acceptor`."""
        self.acceptor.accept(draft, logits, greedy, uniforms)
        self.owed += self.tokens - 1
        path = [0]
        while self.owed >= 1 and draft.tree.children[path[-1]]:
            path.append(draft.tree.children[path[-1]][0])
            self.owed -= 1
        return Verdict(path, logits[path[-1]].softmax(-1).cpu())


def speculative(
    subject: Subject, tokens: float, make: Callable[[Subject], tuple[Speculation, tuple[nn.Module, ...]]]
) -> Run | None:
    """Speculation that keeps ``tokens`` per round, whatever the drafts are worth."""
    if not _predicts_next_token(subject):
        return None
    way, more = make(subject)
    way.acceptor = Modelled(way.acceptor, tokens)

    def statistics() -> dict[str, Any]:
        return {"target_passes": way.statistics.target_passes, "draft_passes": way.statistics.draft_passes}

    run = partial(subject.generate, decoding=way)
    modelled = {"tokens_per_target_pass": tokens}
    return Run(run, (subject.model, *more), one_by_one=True, statistics=statistics, modelled=modelled)


def _eagle(subject: Subject, **options: Any) -> tuple[Speculation, tuple[nn.Module, ...]]:
    drafter = subject.drafter()
    return Lantern(drafter, **options), (drafter,)


def _relaxed(subject: Subject, k: int, **options: Any) -> tuple[Speculation, tuple[nn.Module, ...]]:
    assert isinstance(subject.model, CausalGenerator)
    size = subject.model.output_heads[0].linear.weight.shape[0]  # type: ignore[union-attr]
    codebook = torch.randn(int(size), 8, generator=torch.Generator().manual_seed(0))
    k = min(k, len(codebook) // 4)
    return _eagle(subject, neighbors=nearest_codes(codebook, k + 1), k=k, **options)


def _jacobi(subject: Subject) -> tuple[Speculation, tuple[nn.Module, ...]]:
    return Speculation(Jacobi(), Acceptance()), ()


def continuous(subject: Subject) -> Run | None:
    """The published rule, whose passes do not depend on what is accepted."""
    if not isinstance(subject.model, MAR):
        return None
    draft = subject.draft()
    way = ContinuousSpeculation(draft)

    def statistics() -> dict[str, Any]:
        return {"target_passes": way.statistics.target_passes, "draft_passes": way.statistics.draft_passes}

    return Run(partial(subject.generate, decoding=way), (subject.model, draft), statistics=statistics)


WAYS: dict[str, Way] = {
    PLAIN: plain,
    "no-cache": no_cache,
    "static": static,
    "compiled": compiled,
    "graphs": partial(graphs, compile=False),
    "compiled-graphs": partial(graphs, compile=True),
    "int8": int8,
    "triton": triton,
    "jacobi": partial(speculative, tokens=TOKENS["jacobi"], make=_jacobi),
    "lossless-dynamic": partial(speculative, tokens=TOKENS["lossless-dynamic"], make=_eagle),
    "lossless-static": partial(speculative, tokens=TOKENS["lossless-static"], make=partial(_eagle, tree=STATIC)),
    "lantern": partial(speculative, tokens=TOKENS["lantern"], make=partial(_relaxed, k=NEIGHBORS, delta=0.4)),
    "lantern++": partial(speculative, tokens=TOKENS["lantern++"], make=partial(_relaxed, k=10, ratio=5.0, tree=STATIC)),
    "continuous": continuous,
}


class CompiledBlocks:
    """Within ``with blocks():`` the repeated blocks of a model run compiled, outside as they are; compiled once."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = repeated_blocks(model)
        self.compiled: list[Any] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.compiled:
            for block in self.blocks:
                block.compile()
            self.compiled = [block._compiled_call_impl for block in self.blocks]
        for block, call in zip(self.blocks, self.compiled):
            block._compiled_call_impl = call
        try:
            yield
        finally:
            for block in self.blocks:
                block._compiled_call_impl = None


def _within(context: Callable[[], AbstractContextManager[None]], call: Callable[[int], Tensor], batch_size: int) -> Tensor:
    with context():
        return call(batch_size)


def _predicts_next_token(subject: Subject) -> bool:
    try:
        require_next_token(subject.model)  # type: ignore[arg-type]
    except (VargenError, AttributeError):
        return False
    return True
