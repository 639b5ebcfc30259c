"""Trees of proposed tokens: which node stands under which, who sees whom, and the fixed shapes of static trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vargen.errors import ConfigError, nearest

# ranks of the children on the way from the root; naive_extend_57 is LANTERN++'s, mc_sim_7b_63 EAGLE's
STATIC_TREES: dict[str, str] = {
    "naive_extend_57": "0 1 2 3 4 00 01 02 03 10 11 12 20 21 22 30 31 40 000 001 002 003 010 011 012 020 021 022 030 031 100 101 "
    "110 200 0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 00000 00001 00002 00010 00011 00100 00101 "
    "00110 00200",
    "mc_sim_7b_63": "0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001",
    "chain_5": "0 00 000 0000 00000",
}


@dataclass(frozen=True, eq=False)
class Tree:
    """Nodes numbered so that parents come first; node 0 is the root, a token that is already decided.

    Attributes:
        parents: parent of every node, -1 for the root.
        by_leaf: order of :attr:`paths`: by the number of the leaf, or lexicographic.
    """

    parents: tuple[int, ...]
    by_leaf: bool = False

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of every node from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def mask(self) -> Tensor:
        """Bool ``(n, n)``: a node sees itself and its ancestors."""
        sees = np.eye(len(self), dtype=bool)
        for node, parent in enumerate(self.parents[1:], start=1):
            sees[node] |= sees[parent]
        return torch.from_numpy(sees)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node, in the order in which they are tried."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(node)
        return tuple(tuple(nodes) for nodes in found)

    @cached_property
    def paths(self) -> Tensor:
        """Ways from the root to each leaf, int64 ``(leaves, depth + 1)``, padded with -1."""
        rows = []
        for leaf in (node for node in range(len(self)) if not self.children[node]):
            row = [leaf]
            while row[-1]:
                row.append(self.parents[row[-1]])
            rows.append(row[::-1])
        if not self.by_leaf:
            rows.sort()
        width = max(len(row) for row in rows)
        return torch.tensor([row + [-1] * (width - len(row)) for row in rows])

    @cached_property
    def first_path(self) -> tuple[int, ...]:
        """For every node the first of :attr:`paths` that leads through it."""
        first = [0] * len(self)
        for number in range(len(self.paths) - 1, -1, -1):
            for node in self.paths[number].tolist():
                if node >= 0:
                    first[node] = number
        return tuple(first)


def chain(length: int) -> Tree:
    """A root with ``length`` nodes below it, one under the other."""
    return Tree(tuple(range(-1, length)))


@dataclass(frozen=True, eq=False)
class StaticTree:
    """A tree of fixed shape: which of a node's children, ranked by the draft, are proposed (EAGLE; LANTERN++, section 3.2).

    Attributes:
        tree: its nodes, by depth and then in order of their ranks.
        ranks: rank of every node among its siblings, -1 for the root.
        expanded: for each depth, the nodes that have children.
    """

    tree: Tree
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, shape: str | Sequence[Sequence[int]]) -> StaticTree:
        """A tree by its name in ``STATIC_TREES`` or from its paths, each the ranks on the way from the root to a node.

        Raises:
            ConfigError: an unknown name, a node whose parent is missing, or children whose ranks leave a gap.
        """
        if isinstance(shape, str):
            if shape not in STATIC_TREES:
                raise ConfigError(f"static tree '{shape}'{nearest(shape, STATIC_TREES)}")
            shape = [[int(rank) for rank in path] for path in STATIC_TREES[shape].split()]
        paths = sorted({tuple(path) for path in shape} - {()}, key=lambda path: (len(path), path))
        number = {(): 0} | {path: i for i, path in enumerate(paths, start=1)}
        for path in paths:
            # a child is drawn after those of lower rank, so that these belong to the tree
            needed = path[:-1] if path[-1] == 0 else (*path[:-1], path[-1] - 1)
            if path[-1] < 0 or needed not in number:
                raise ConfigError(f"static tree has the node {list(path)} but not {list(needed)}: expected all nodes before it")
        return cls(Tree((-1, *(number[path[:-1]] for path in paths))), (-1, *(path[-1] for path in paths)))

    @property
    def depth(self) -> int:
        return self.tree.depths[-1]

    @property
    def width(self) -> int:
        """Most children of a node."""
        return max(self.ranks) + 1

    @cached_property
    def expanded(self) -> tuple[tuple[int, ...], ...]:
        levels: list[list[int]] = [[] for _ in range(self.depth)]
        for node, children in enumerate(self.tree.children):
            if children:
                levels[self.tree.depths[node]].append(node)
        return tuple(tuple(level) for level in levels)

    def limited(self, depth: int) -> StaticTree:
        """The nodes down to ``depth``."""
        if depth >= self.depth:
            return self
        count = sum(d <= depth for d in self.tree.depths)
        return StaticTree(Tree(self.tree.parents[:count]), self.ranks[:count])
