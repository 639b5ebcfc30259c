"""LANTERN (Jang et al., 2025, arXiv 2410.03355) and LANTERN++ (Park et al., 2025, arXiv 2502.06352) as one strategy of decoding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vargen.decoding.acceptance import Acceptance, Relaxation
from vargen.decoding.eagle import Drafter, DynamicTree, Eagle, FixedTree
from vargen.decoding.speculative import Speculation
from vargen.decoding.tree import StaticTree
from vargen.errors import VargenError


class Lantern(Speculation):
    """Speculative decoding with an EAGLE drafter, lossless or relaxed over neighbouring codes.

    ``Lantern(drafter)`` is EAGLE-2 and samples exactly what plain decoding samples; ``Lantern(drafter, table, k=1000, delta=0.1)``
    is LANTERN; ``Lantern(drafter, table, k=10, ratio=5, tree="naive_extend_57")`` is LANTERN++.

    Args:
        drafter: an :class:`vargen.EagleDrafter` of the target.
        neighbors: table of nearest codes, at least ``k`` columns and better k + 1, see
            :func:`vargen.decoding.neighbors.neighbor_table`; None for lossless decoding.
        k, delta, ratio: see :class:`vargen.decoding.acceptance.Relaxation`.
        tree: a :class:`~vargen.decoding.eagle.DynamicTree`, or a static tree's name or paths.
        top_p_first: filter by top-p before top-k as LANTERN's code does, else after it as plain decoding does.
    """

    def __init__(
        self,
        drafter: Drafter,
        neighbors: Tensor | None = None,
        k: int = 1000,
        delta: float | None = None,
        ratio: float | None = None,
        tree: DynamicTree | str | Sequence[Sequence[int]] | None = None,
        top_p_first: bool = False,
    ) -> None:
        shape = tree if isinstance(tree, DynamicTree) else DynamicTree() if tree is None else FixedTree(StaticTree.of(tree))
        if neighbors is None and (delta is not None or ratio is not None):
            raise VargenError("relaxed decoding (delta or ratio) needs neighbors: a table from vargen.decoding.neighbors")
        relaxation = None if neighbors is None else Relaxation(neighbors, k, delta, ratio)
        super().__init__(Eagle(drafter, shape), Acceptance(relaxation), top_p_first)
