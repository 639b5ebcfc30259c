import pytest
import torch

from vargen.errors import SpaceError
from vargen.space import TokenSpace


def test_shapes():
    image = TokenSpace(((16, 16),), codebook_size=8)
    assert image.token_shape == (16, 16)
    assert image.num_tokens == 256
    assert image.discrete
    pyramid = TokenSpace([[2, 2], [4, 4]], channels=3)
    assert pyramid.token_shape == (20, 3)
    assert pyramid.level_sizes == (4, 16)
    assert TokenSpace(**pyramid.to_dict()) == pyramid


def test_normalisation_is_inverted():
    space = TokenSpace(((2, 2),), channels=1, mean=1.5, std=4.0)
    x = torch.randn(3, 2, 2, 1)
    torch.testing.assert_close(space.denormalize(space.normalize(x)), x)


def test_tokens_outside_the_space_are_refused():
    space = TokenSpace(((2, 2),), codebook_size=8)
    assert space.check(torch.zeros(1, 2, 2, dtype=torch.int64)).shape == (1, 2, 2)
    for tokens, message in (
        (torch.zeros(1, 2, 3, dtype=torch.int64), "expected \\(batch, 2, 2\\)"),
        (torch.zeros(1, 2, 2), "expected integer ids below 8"),
        (torch.full((1, 2, 2), 8), "expected 0..7"),
        (torch.full((1, 2, 2), -1), "expected 0..7"),
    ):
        with pytest.raises(SpaceError, match=message):
            space.check(tokens)
    with pytest.raises(SpaceError, match="NaN"):
        TokenSpace(((1,),), channels=1).check(torch.full((1, 1, 1), float("nan")))


def test_spaces_that_cannot_be_or_do_not_match():
    with pytest.raises(SpaceError, match="exactly one"):
        TokenSpace(((2,),))
    with pytest.raises(SpaceError, match="exactly one"):
        TokenSpace(((2,),), codebook_size=2, channels=2)
    with pytest.raises(SpaceError, match="positive"):
        TokenSpace(((0, 2),), channels=2)
    with pytest.raises(SpaceError, match="codebook_size is 8 on one side and 9"):
        TokenSpace(((2,),), codebook_size=8).require(TokenSpace(((2,),), codebook_size=9))
