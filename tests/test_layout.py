import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import VargenError
from vargen.layout import Layout, hybrid, neighboring, shifted
from vargen.order import Order


def layouts() -> list[Layout]:
    return [
        shifted(Order.raster((3, 3)), 1),
        shifted(Order.raster((6,)), 4),
        shifted(Order.rows((3, 4)), 4, prefix_causal=False),
        neighboring(Order.neighbors((3, 4)), 1),
        neighboring(Order.neighbors((2, 3, 3)), 2),
        hybrid((2, 2, 4), 4, 3),
        hybrid((2, 4), 2, 1),
    ]


@pytest.mark.parametrize("layout", layouts(), ids=range(len(layouts())))
def test_mask_follows_from_ranks(layout):
    slots = torch.arange(layout.num_slots)
    mask = layout.mask(slots, slots)
    for q in range(layout.num_slots):
        for k in range(layout.num_slots):
            assert mask[q, k] == (layout.rank[q] >= layout.rank[k] or q == k)
    assert (layout.rank.diff() >= 0).all()
    b = torch.zeros((), dtype=torch.int64)
    mod = layout.mask_mod()
    assert torch.equal(mod(b, b, slots[:, None], slots[None]), mask)


@pytest.mark.parametrize("layout", layouts(), ids=range(len(layouts())))
def test_steps_feed_every_slot_once_and_predict_every_cell_from_what_is_known(layout):
    steps = layout.steps()
    fed = torch.cat([s.inputs for s in steps])
    assert torch.equal(fed, torch.arange(layout.num_inputs))
    assert torch.equal(torch.cat([s.targets for s in steps]), layout.order.cells)
    known: set[int] = set()
    for step in steps:
        assert step.known == len(known)
        cells = layout.cell[step.inputs]
        assert set(cells[cells >= 0].tolist()) <= known
        for head in range(layout.num_heads):
            for target, source in zip(step.targets, step.source[head]):
                edge = layout.edges[head, target]
                assert source == -1 if edge < 0 else step.inputs[source] == edge
        known |= set(step.targets.tolist())


def test_numbers_of_forward_passes():
    assert len(shifted(Order.raster((16, 16)), 1).steps()) == 256
    assert len(neighboring(Order.neighbors((16, 16)), 1).steps()) == 31
    assert len(neighboring(Order.neighbors((4, 16, 16)), 1).steps()) == 34
    assert len(hybrid((5, 16, 16), 16, 8).steps()) == 95
    assert len(shifted(Order.blocks((5, 16, 16), 16), 0).steps(given=512)) == 48


def test_neighbour_edges_average_right_and_below():
    layout = neighboring(Order.neighbors((3, 3)), 1)
    slot = layout.slot_of
    assert layout.edges[:, 0].tolist() == [0, 0]
    assert layout.edges[:, 2].tolist() == [int(slot[1]), -1]
    assert layout.edges[:, 6].tolist() == [-1, int(slot[3])]
    assert layout.edges[:, 4].tolist() == [int(slot[3]), int(slot[1])]


def test_hybrid_layout_of_the_sheet():
    # [c][BOV][z0..z3][m1..m3][z4..z7][z8..z11], the first real block starts at z3
    layout = hybrid((3, 4), 4, 1)
    assert layout.cell.tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert layout.extra.tolist()[6:9] == [0, 1, 2]
    assert layout.num_inputs == 13
    assert layout.edges[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_layouts_of_any_grid(height, width, prefix):
    for layout in (shifted(Order.raster((height, width)), prefix), neighboring(Order.neighbors((height, width)), prefix)):
        assert torch.equal(torch.cat([s.targets for s in layout.steps()]), layout.order.cells)
        assert torch.equal(layout.cell[layout.slot_of], torch.arange(height * width))


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(VargenError, match="equal size"):
        shifted(Order.neighbors((3, 3)), 1)
    with pytest.raises(VargenError, match="comes after its neighbours"):
        neighboring(Order.rows((3, 3)), 1)
    with pytest.raises(VargenError, match="must be given"):
        shifted(Order.blocks((4, 4), 4), 0).steps()
    with pytest.raises(VargenError, match="inside a group"):
        shifted(Order.blocks((4, 4), 4), 0).steps(given=3)
    with pytest.raises(VargenError, match="earlier step"):
        neighboring(Order.raster((3, 3)), 1).steps()
