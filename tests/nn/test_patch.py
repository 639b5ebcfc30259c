import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vargen.errors import VargenError
from vargen.nn.patch import PatchEmbed, patch_grid, patchify, resize_positions, unpatchify

sizes = st.integers(1, 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(sizes, sizes), min_size=2, max_size=3), sizes, st.booleans())
def test_unpatchify_inverts_patchify(axes, channels, channel_first):
    grid, patch = zip(*axes)
    x = torch.randn(2, channels, *(g * p for g, p in axes))
    patches = patchify(x, patch, channel_first)
    assert patches.shape == (2, x[0, 0].numel() // torch.Size(patch).numel(), torch.Size(patch).numel() * channels)
    assert torch.equal(unpatchify(patches, grid, patch, channel_first), x)


def test_channel_is_fastest_and_patches_are_in_raster_order():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    patches = patchify(x, (2, 2))
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert patchify(x, (2, 2), channel_first=True)[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


@pytest.mark.parametrize("patch", [(2, 3), (2, 2, 3)])
def test_embedding_is_linear_on_channel_first_patches(patch):
    embed = PatchEmbed(3, 5, patch)
    x = torch.randn(2, 3, *(2 * p for p in patch))
    expected = patchify(x, patch, channel_first=True) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert torch.allclose(embed(x), expected, atol=1e-5)


def test_wrong_sizes_are_refused():
    with pytest.raises(VargenError, match="size 5x4: expected multiples of the patch size 2x2"):
        PatchEmbed(3, 4, (2, 2))(torch.zeros(1, 3, 5, 4))
    with pytest.raises(VargenError, match="multiples"):
        patch_grid((0, 4), (2, 2))


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_resize(offset):
    rows = torch.arange(4.0).repeat_interleave(4)[:, None]
    assert resize_positions(rows, (4, 4), (4, 4), offset) is rows
    larger = resize_positions(rows, (4, 4), (8, 6), offset).reshape(8, 6)
    assert torch.allclose(larger, larger[:, :1].expand(-1, 6), atol=1e-4)
    assert (larger[1:, 0] > larger[:-1, 0]).all()
    constant = resize_positions(torch.ones(16, 3), (4, 4), (7, 5), offset)
    assert torch.allclose(constant, torch.ones(35, 3), atol=1e-5)
