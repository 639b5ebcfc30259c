import pytest
import torch

from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.tokenizers.nbp import PRESETS, DepthToSpace, NBPTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return NBPTokenizer(sample_size=(5, 16, 16), widths=(4, 8, 16), norm_groups=2).eval()


def test_released_size():
    with torch.device("meta"):
        model = NBPTokenizer(**PRESETS["magvit2"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 370.37
    assert model.space.token_shape == (5, 16, 16)
    assert model.space.codebook_size == 64000


@torch.no_grad()
def test_tokens_of_early_frames_do_not_depend_on_later_ones(tokenizer):
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    changed = video.clone()
    changed[:, :, 5:] = torch.rand(1, 3, 4, 16, 16)
    whole, other, image = tokenizer.encode(video), tokenizer.encode(changed), tokenizer.encode(video[:, :, :1])
    assert whole.shape == (1, 3, 2, 2)
    assert torch.equal(whole[:, :2], other[:, :2])
    assert torch.equal(whole[:, :1], image)
    assert tokenizer.decode(whole).shape == video.shape


def test_depth_to_space_is_block_major_and_drops_the_first_frame():
    x = torch.arange(8.0).reshape(1, 8, 1, 1, 1)
    assert DepthToSpace((2, 2, 2))(x).flatten().tolist() == [4, 5, 6, 7]
    assert DepthToSpace((1, 2, 2))(torch.arange(4.0).reshape(1, 4, 1, 1, 1)).flatten().tolist() == [0, 1, 2, 3]


def test_training_pass_reaches_the_encoder(tokenizer):
    output = tokenizer(torch.rand(1, 3, 5, 16, 16))
    output.reconstruction.square().mean().backward()
    assert tokenizer.encoder[0].weight.grad.abs().sum() > 0
    assert tokenizer.last_layer.grad is not None
    tokenizer.zero_grad()


def test_wrong_input_is_refused(tokenizer):
    for pixels, message in (
        (torch.zeros(1, 3, 4, 16, 16), r"1 \+ 4m frames"),
        (torch.zeros(1, 3, 5, 12, 16), "multiples of 8"),
        (torch.zeros(1, 3, 16, 16), r"\(B, 3, T, H, W\)"),
        (torch.full((1, 3, 5, 16, 16), float("nan")), "NaN"),
    ):
        with pytest.raises(VargenError, match=message):
            tokenizer.encode(pixels)
    with pytest.raises(SpaceError, match="expected 0..63999"):
        tokenizer.decode(torch.full((1, 2, 2, 2), 64000))
    with pytest.raises(VargenError, match="frames, rows, columns"):
        tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="three multiples"):
        NBPTokenizer(widths=(4, 8, 15), norm_groups=2)
