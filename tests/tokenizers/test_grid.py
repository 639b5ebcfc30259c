"""1D tokens laid on a grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.sample.load import load_tokenizer
from vargen.tokenizers.grid import GridTokenizer
from vargen.tokenizers.titok import TiTok

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 6,
    "channels": 4,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "encoder_heads": 2,
}
TINY |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


@pytest.mark.parametrize("codes", [32, None])
def test_a_grid_holds_the_tokens_of_its_base(tmp_path: Path, codes: int | None):
    torch.manual_seed(0)
    base = TiTok(**TINY, codebook_size=codes).eval()
    grid = GridTokenizer.of(base, (2, 3))
    pixels, noise = torch.rand(2, 3, 16, 16), Noise(0, 2)
    tokens = grid.encode(pixels, noise=noise)
    assert tuple(tokens.shape[1:]) == grid.space.token_shape
    assert grid.space.shape == (2, 3)
    assert torch.equal(tokens.flatten(1, 2), base.encode(pixels, noise=noise))
    assert torch.equal(grid.decode(tokens), base.decode(tokens.flatten(1, 2)))
    if codes is None:
        assert torch.equal(grid.tokens_of(grid.moments(pixels), noise), tokens)
    grid.save_pretrained(tmp_path)
    assert torch.equal(load_tokenizer(str(tmp_path)).encode(pixels, noise=noise), tokens)


def test_mistakes():
    base = TiTok(**TINY, codebook_size=32)
    with pytest.raises(SpaceError, match="a 1D tokenizer of 8 tokens"):
        GridTokenizer.of(base, (2, 4))
    with pytest.raises(ConfigError, match="class name of a tokenizer"):
        GridTokenizer({"class": "MAR"}, (2, 3))
    with pytest.raises(VargenError, match="nothing of its own"):
        GridTokenizer.of(base, (2, 3))(torch.rand(1, 3, 16, 16))
