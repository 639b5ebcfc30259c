"""VQ-8 and VQ-16: sizes, round trips, training, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vargen import VQTokenizer
from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.tokenizers.vq import PRESETS

TINY = {
    "sample_size": 16,
    "encoder_widths": [8, 16],
    "decoder_widths": [8, 16],
    "encoder_blocks": 1,
    "decoder_blocks": 1,
    "latent_channels": 8,
    "codebook_size": 32,
    "codebook_dim": 4,
    "usage_window": 256,
    "norm_groups": 4,
}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return VQTokenizer(**TINY)


def pixels(batch=2, height=16, width=16):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize(
    "name, stride, encoder, decoder, total",
    [("VQ-16", 16, 29_298_176, 42_449_795, 71_883_403), ("VQ-8", 8, 28_559_232, 41_415_171, 70_109_835)],
)
def test_presets_have_the_published_sizes(name, stride, encoder, decoder, total):
    with torch.device("meta"):
        model = VQTokenizer.from_preset(name)
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert (model.stride, count(model.encoder), count(model.decoder), count(model)) == (stride, encoder, decoder, total)
    assert model.space.shape == (256 // stride, 256 // stride)
    assert model.space.codebook_size == 16384
    assert set(PRESETS) == {"VQ-16", "VQ-8"}


def test_encodes_and_decodes_any_size_that_the_stride_divides(tokenizer):
    tokenizer.eval()
    assert tokenizer.space.token_shape == (8, 8)
    for height, width in ((16, 16), (8, 24), (2, 2)):
        tokens = tokenizer.encode(pixels(2, height, width))
        assert tokens.shape == (2, height // 2, width // 2)
        assert tokens.dtype == torch.int64
        pixels_again = tokenizer.decode(tokens)
        assert pixels_again.shape == (2, 3, height, width)
        assert torch.equal(tokenizer.decode(tokens.to(torch.uint8)), pixels_again)
    assert VQTokenizer(**{**TINY, "sample_size": [16, 32]}).space.shape == (8, 16)


def test_forward_agrees_with_encode_and_decode(tokenizer):
    tokenizer.eval()
    out = tokenizer(pixels())
    assert torch.equal(out.tokens, tokenizer.encode(pixels()))
    torch.testing.assert_close(out.reconstruction, tokenizer.decode(out.tokens), rtol=1e-4, atol=1e-5)
    assert set(out.losses) == {"codebook", "commitment"}
    assert {"codebook_usage", "dead_codes", "codebook_perplexity", "latents"} == set(out.features)


def test_codes_are_unit_vectors(tokenizer):
    tokens = torch.arange(32).reshape(1, 4, 8)
    torch.testing.assert_close(tokenizer.quantizer.lookup(tokens).norm(dim=-1), torch.ones(1, 4, 8))


def test_training_lowers_the_error(tokenizer):
    x = F.interpolate(pixels(4, 4, 4), scale_factor=4.0)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    errors = []
    for _ in range(25):
        out = tokenizer.train()(x)
        errors.append(F.mse_loss(out.reconstruction, x))
        loss = errors[-1] + sum(out.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in tokenizer.parameters())
    assert errors[-1] < 0.6 * errors[0]
    assert tokenizer.last_layer is tokenizer.decoder.conv_out.weight


def test_saves_and_loads(tokenizer, tmp_path):
    tokenizer.train()(pixels())
    tokenizer.eval().save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(pixels()), tokenizer.encode(pixels()))
    assert torch.equal(again.quantizer.recent, tokenizer.quantizer.recent)
    assert again.config_dict() == tokenizer.config_dict()


def test_wrong_input_is_refused_in_one_line(tokenizer):
    bad = pixels()
    bad[0, 0, 0, 0] = float("nan")
    text = TextFeatures(torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))
    for call, match in (
        (lambda: tokenizer.encode(pixels(2, 15, 16)), "pixels of 15x16.*multiples of the stride 2"),
        (lambda: tokenizer(pixels()[:, :1]), r"expected \(B, 3, H, W\)"),
        (lambda: tokenizer.encode(pixels()[:, :, None]), r"expected \(B, 3, H, W\)"),
        (lambda: tokenizer.encode(bad), "NaN"),
        (lambda: tokenizer.encode(pixels(), text), "takes no text"),
        (lambda: tokenizer.decode(torch.zeros(2, 4, 4, dtype=torch.int64), text), "takes no text"),
    ):
        with pytest.raises(VargenError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tokens, match",
    [
        (torch.full((1, 2, 2), 32), "expected 0..31"),
        (torch.full((1, 2, 2), -1), "expected 0..31"),
        (torch.zeros(1, 2, 2), "expected integer ids"),
        (torch.zeros(1, 4, dtype=torch.int64), r"expected \(batch, height, width\)"),
        (torch.zeros(1, 0, 4, dtype=torch.int64), "positive sizes"),
    ],
)
def test_wrong_codes_are_refused(tokenizer, tokens, match):
    with pytest.raises(SpaceError, match=match):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"sample_size": 15}, "sample_size 15: expected a multiple of the stride 2"),
        ({"decoder_widths": [8, 8, 8]}, "2 encoder levels and 3 decoder levels"),
        ({"encoder_widths": [6, 8]}, "width 6: expected a multiple of the 4 groups"),
    ],
)
def test_wrong_configurations(arguments, match):
    with pytest.raises(ConfigError, match=match):
        VQTokenizer(**{**TINY, **arguments})


def test_unknown_preset():
    with pytest.raises(ConfigError, match="did you mean 'VQ-16'"):
        VQTokenizer.from_preset("VQ-61")
