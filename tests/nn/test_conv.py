"""The convolutional encoder and decoder: shapes, where attention stands, padding, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vargen.errors import ConfigError
from vargen.nn.conv import AttnBlock, Decoder, Downsample, Encoder, ResBlock, Upsample

SMALL = {"groups": 4}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_strides_and_shapes():
    encoder = Encoder((8, 8, 16), 5, num_blocks=1, **SMALL)
    decoder = Decoder((8, 8, 16), 5, num_blocks=2, **SMALL)
    z = encoder(torch.randn(2, 3, 16, 24))
    assert encoder.stride == decoder.stride == 4
    assert z.shape == (2, 5, 4, 6)
    assert decoder(z).shape == (2, 3, 16, 24)


def attention_counts(net):
    return [len(level.attentions) for level in net.levels]


def test_attention_stands_where_it_is_told_to():
    deepest = Encoder((8, 8, 8), 4, num_blocks=2, **SMALL)
    assert attention_counts(deepest) == [0, 0, 2]
    # decoder levels are counted as the encoder's but stand deepest first
    assert attention_counts(Decoder((8, 8, 8), 4, num_blocks=3, attention_levels=(-1, 0), **SMALL)) == [3, 0, 3]
    bare = Decoder((8, 8, 8), 4, attention_levels=(), mid_attention=False, **SMALL)
    assert not any(isinstance(m, AttnBlock) for m in bare.modules())
    assert sum(isinstance(m, AttnBlock) for m in Decoder((8, 8), 4, attention_levels=(), **SMALL).modules()) == 1


def test_widths_change_in_the_first_block_of_a_level():
    encoder = Encoder((8, 16), 4, stem_width=4, num_blocks=2, **SMALL)
    assert encoder.conv_in.out_channels == 4
    first, second = encoder.levels[1].blocks
    assert (first.conv1.in_channels, first.conv1.out_channels, second.conv1.in_channels) == (8, 16, 16)
    assert isinstance(second.shortcut, torch.nn.Identity)


def test_parameter_counts_of_the_published_autoencoders():
    """MAR's KL-16, and Chameleon's VQ-GAN as Orthus uses it."""
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    widths = (128, 128, 256, 256, 512)
    with torch.device("meta"):
        kl_encoder = Encoder(widths, 32)
        kl_decoder = Decoder(widths, 16, attention_levels=())
        chameleon = Encoder(widths, 256, attention_levels=()), Decoder(widths, 256, attention_levels=())
    assert [round(count(net) / 1e6, 3) for net in (kl_encoder, kl_decoder)] == [28.266, 38.189]
    assert [round(count(net) / 1e6, 1) for net in chameleon] == [27.2, 39.3]


def test_attention_is_the_written_formula():
    block, x = AttnBlock(8, **SMALL), torch.randn(2, 8, 3, 5)
    h = block.norm(x)
    q, k, v = (proj(h).flatten(2) for proj in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * 8**-0.5, dim=-1)
    expected = x + block.out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_downsample_pads_right_and_below_only():
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 0, 0] = 1
        down.conv.bias.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # the top left tap reads the pixel itself: without padding above and to the left nothing is shifted
    assert torch.equal(down(x), x[..., ::2, ::2])


def test_upsample_repeats():
    up, x = Upsample(2), torch.randn(1, 2, 3, 2)
    repeated = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1))


def test_residual_block_adds_its_input():
    block = ResBlock(4, 4, **SMALL)
    torch.nn.init.zeros_(block.conv2.weight), torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("levels", [(3,), (-4,)])
def test_attention_at_a_level_that_is_not_there(levels):
    with pytest.raises(ConfigError, match="attention levels"):
        Encoder((8, 8, 8), 4, attention_levels=levels, **SMALL)


def test_width_that_the_groups_do_not_divide():
    with pytest.raises(ConfigError, match="width 6: expected a multiple of the 4 groups"):
        Encoder((8, 6), 4, **SMALL)
