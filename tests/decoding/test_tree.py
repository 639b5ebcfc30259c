import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.decoding.tree import STATIC_TREES, StaticTree, Tree, chain
from vargen.errors import ConfigError


@st.composite
def trees(draw):
    size = draw(st.integers(1, 12))
    return Tree((-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))), draw(st.booleans()))


def ancestors(tree, node):
    return [node] if node == 0 else [*ancestors(tree, tree.parents[node]), node]


@given(trees())
@settings(max_examples=40, deadline=None)
def test_masks_depths_and_paths_follow_from_parents(tree):
    for node in range(len(tree)):
        line = ancestors(tree, node)
        assert torch.nonzero(tree.mask[node]).flatten().tolist() == line
        assert tree.depths[node] == len(line) - 1
        first = next(i for i, row in enumerate(tree.paths.tolist()) if node in row)
        assert tree.first_path[node] == first
        assert tree.paths[first, : len(line)].tolist() == line
    rows = [[n for n in row if n >= 0] for row in tree.paths.tolist()]
    leaves = [row[-1] for row in rows]
    assert sorted(leaves) == [n for n in range(len(tree)) if not tree.children[n]]
    assert rows == sorted(rows) if not tree.by_leaf else leaves == sorted(leaves)


def test_chain():
    assert chain(3).depths == (0, 1, 2, 3)
    assert len(chain(0)) == 1


@pytest.mark.parametrize(
    "name, levels", [("naive_extend_57", [5, 13, 16, 14, 9]), ("mc_sim_7b_63", [4, 8, 8, 3, 2]), ("chain_5", [1] * 5)]
)
def test_published_static_trees(name, levels):
    shape = StaticTree.of(name)
    assert [shape.tree.depths.count(d) for d in range(1, 6)] == levels
    assert len(shape.expanded) == shape.depth == 5
    assert shape.expanded[0] == (0,)
    assert sum(map(len, shape.expanded)) == sum(bool(c) for c in shape.tree.children)


def test_a_static_tree_from_paths():
    shape = StaticTree.of([[0, 0], [1], [0], [0, 1], [1, 0]])
    assert shape.tree.parents == (-1, 0, 0, 1, 1, 2)
    assert shape.ranks == (-1, 0, 1, 0, 1, 0)
    assert shape.width == 2
    assert shape.expanded == ((0,), (1, 2))


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_limited_trees_keep_the_upper_nodes(depth):
    whole = StaticTree.of("mc_sim_7b_63")
    limited = whole.limited(depth)
    assert limited.depth == min(depth, 5)
    assert limited.tree.parents == whole.tree.parents[: len(limited.tree)]
    assert limited.width == whole.width


@pytest.mark.parametrize(
    "shape, message",
    [
        ("naive_extend", "did you mean 'naive_extend_57'"),
        ([[1]], "but not \\[0\\]"),
        ([[0], [1, 0]], "but not \\[1\\]"),
        ([[-1]], "-1"),
    ],
)
def test_trees_with_gaps_are_refused(shape, message):
    with pytest.raises(ConfigError, match=message):
        StaticTree.of(shape)


def test_names_are_paths_of_digits():
    assert all(set(paths) <= set("0123456789 ") for paths in STATIC_TREES.values())
