import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import SpaceError, VargenError
from vargen.order import Order, cosine_schedule, make_order

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def assert_partition(order: Order) -> None:
    together = torch.cat(order.groups)
    assert torch.equal(together.sort().values, torch.arange(order.num_cells))
    assert torch.equal(together, order.cells)
    for step, group in enumerate(order.groups):
        assert (order.step_of[group] == step).all()
        assert (group.diff() > 0).all()


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_every_order_is_a_partition(shape):
    orders = [Order.raster(shape), Order.neighbors(shape), Order.rows(shape), Order.frames(shape), Order.image(shape)]
    orders += [Order.blocks(shape, size) for size in range(1, 6) if math.prod(shape) % size == 0]
    orders.append(Order.cells_of(shape, tuple(1 if n % 2 else 2 for n in shape)))
    orders.append(Order.subsamples(shape, tuple(1 if n % 2 else 2 for n in shape)))
    orders.append(Order.scales([(1,) * len(shape), shape]))
    orders.append(Order.raster((2,)).then(Order.neighbors(shape)))
    for order in orders:
        assert_partition(order)


@given(st.integers(1, 80), st.data())
@settings(max_examples=40, deadline=None)
def test_cosine_schedule_reveals_at_least_one_token_per_step(tokens, data):
    steps = data.draw(st.integers(1, tokens))
    after = cosine_schedule(tokens, steps)
    counts = [tokens, *after]
    assert len(after) == steps
    assert after[-1] == 0
    assert all(a > b for a, b in pairwise(counts))


def test_cosine_schedule_is_mars():
    revealed = [a - b for a, b in zip([256, *cosine_schedule(256, 16)], cosine_schedule(256, 16))]
    assert revealed == [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]
    assert cosine_schedule(64, 32)[-4:] == [9, 6, 3, 0]
    assert cosine_schedule(256, 4) == [236, 181, 97, 0]


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_random_masked_consumes_its_permutation_from_the_end(height, width, seed):
    cells = height * width
    permutation = torch.randperm(cells, generator=torch.Generator().manual_seed(seed))
    after = cosine_schedule(cells, min(4, cells))
    order = Order.random_masked((height, width), permutation, after)
    assert_partition(order)
    for step, masked in enumerate(after):
        assert set(torch.nonzero(order.step_of > step).flatten().tolist()) == set(permutation[:masked].tolist())


def test_orders_of_the_papers():
    assert [g.tolist() for g in Order.neighbors((2, 3)).groups] == [[0], [1, 3], [2, 4], [5]]
    assert Order.neighbors((4, 16, 16)).num_steps == 4 + 16 + 16 - 2
    assert Order.neighbors((16, 16)).num_steps == 31
    cells = Order.cells_of((4, 4), (2, 2))
    assert [g.tolist() for g in cells.groups] == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    subsamples = Order.subsamples((4, 4), (2, 2))
    assert [g.tolist() for g in subsamples.groups] == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    pyramid = Order.scales([(1, 1), (2, 2)])
    assert pyramid.level_of.tolist() == [0, 1, 1, 1, 1]
    assert pyramid.num_steps == 2


def test_orders_that_cannot_be_are_refused():
    with pytest.raises(VargenError, match="divisor of the 16 tokens"):
        Order.blocks((4, 4), 5)
    with pytest.raises(VargenError, match="divides the grid"):
        Order.cells_of((4, 4), (3, 2))
    with pytest.raises(VargenError, match="expected 1..16"):
        cosine_schedule(16, 17)
    with pytest.raises(VargenError, match="did you mean 'neighbors'"):
        make_order("neighbours", ((4, 4),))
    with pytest.raises(VargenError, match="2 levels"):
        make_order("raster", ((2, 2), (4, 4)))
    with pytest.raises(SpaceError, match="without gaps"):
        Order(((2, 2),), torch.tensor([0, 2, 2, 0]))
    with pytest.raises(VargenError, match="end in 0"):
        Order.random_masked((2, 2), torch.arange(4), [2, 1])


def test_make_order_passes_options():
    assert make_order("blocks", ((2, 4),), size=2).num_steps == 4
    assert make_order("scales", ((1, 1), (2, 2))).num_steps == 2
