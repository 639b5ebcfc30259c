"""TexTok; the numbered checks are those of the facts that the paper leaves to be tested."""

import math

import pytest
import torch

from vargen.condition import TextFeatures
from vargen.errors import SpaceError, VargenError
from vargen.losses.adversarial import lecam, non_saturating_discriminator, non_saturating_generator
from vargen.noise import Noise
from vargen.text import WordEncoder
from vargen.tokenizers.textok import PRESETS, TexTok

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 5,
    "channels": 3,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "text_dim": 12,
    "text_length": 6,
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return TexTok(**{**SMALL, **options}).eval()


def caption(seed, length=4, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(batch, length, 12, generator=generator), torch.ones(batch, length, dtype=torch.bool))


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_1_shapes(pixels, patch_size):
    model = make(patch_size=patch_size)
    tokens = model.encode(pixels, caption(1))
    assert tokens.shape == (2, 5, 3) == (2, *model.space.token_shape)
    assert model.decode(tokens, caption(1)).shape == pixels.shape
    assert model(pixels, caption(1)).reconstruction.shape == pixels.shape


def test_2_parameter_count():
    with torch.device("meta"):
        model = TexTok.from_preset("textok-256-256")
    assert abs(model.num_parameters_ - 176e6) < 1e6
    assert len(PRESETS) == 8


def test_3_a_side_without_text_does_not_depend_on_the_caption(pixels):
    decoder_only = make(encoder_text=False)
    tokens = decoder_only.encode(pixels, caption(1))
    assert torch.equal(tokens, decoder_only.encode(pixels, caption(2)))
    assert not torch.allclose(decoder_only.decode(tokens, caption(1)), decoder_only.decode(tokens, caption(2)))
    encoder_only = make(decoder_text=False)
    assert not torch.allclose(encoder_only.encode(pixels, caption(1)), encoder_only.encode(pixels, caption(2)))
    assert torch.equal(encoder_only.decode(tokens, caption(1)), encoder_only.decode(tokens, caption(2)))
    baseline = make(encoder_text=False, decoder_text=False)
    assert baseline.decode(baseline.encode(pixels)).shape == pixels.shape
    with pytest.raises(VargenError, match="takes no text"):
        baseline.encode(pixels, caption(1))
    with pytest.raises(VargenError, match="takes no text"):
        baseline.decode(tokens, caption(1))


def test_4_padding_changes_nothing(pixels):
    model, text = make(), caption(1)
    junk = torch.full((2, 2, 12), 9.0)
    padded = TextFeatures(torch.cat([text.features, junk], 1), torch.cat([text.mask, torch.zeros(2, 2, dtype=torch.bool)], 1))
    tokens = model.encode(pixels, text)
    assert torch.allclose(tokens, model.encode(pixels, padded), atol=1e-5)
    assert torch.allclose(model.decode(tokens, text), model.decode(tokens, padded), atol=1e-5)


def test_5_the_caption_is_used_on_both_sides(pixels):
    model = make()
    tokens = model.encode(pixels, caption(1))
    assert not torch.allclose(tokens, model.encode(pixels, caption(2)))
    assert not torch.allclose(model.decode(tokens, caption(1)), model.decode(tokens, caption(2)))


def test_6_only_latents_and_pixels_carry_loss_and_the_text_encoder_gets_no_gradient(pixels):
    model = make()
    words = WordEncoder(["red", "square"], dim=12, max_length=6).requires_grad_(False)
    outputs = {}

    def keep(name, output):
        output.retain_grad()
        outputs[name] = output

    model.encoder.register_forward_hook(lambda module, inputs, output: keep("encoder", output))
    model.decoder.register_forward_hook(lambda module, inputs, output: keep("decoder", output))
    out = model(pixels, words.encode(["red square", "square"]))
    (out.reconstruction - pixels).square().mean().backward()
    assert all(p.grad is None for p in words.parameters())
    encoder, decoder = (outputs[name].grad.abs().sum((0, 2)) for name in ("encoder", "decoder"))
    assert (encoder[16:21] > 0).all()
    assert encoder[:16].sum() == encoder[21:].sum() == 0
    assert (decoder[:16] > 0).all()
    assert decoder[16:].sum() == 0


def test_7_without_visible_text_it_is_the_baseline(pixels):
    model = make()
    for group in (model.encoder_text, model.decoder_text):
        torch.nn.init.zeros_(group.proj.weight)
        torch.nn.init.zeros_(group.proj.bias)
    baseline = make(encoder_text=False, decoder_text=False)
    baseline.load_state_dict({k: v for k, v in model.state_dict().items() if "_text." not in k})
    hidden = TextFeatures(caption(1).features, torch.zeros(2, 4, dtype=torch.bool))
    tokens = baseline.encode(pixels)
    assert torch.allclose(model.encode(pixels, hidden), tokens, atol=1e-5)
    assert torch.allclose(model.decode(tokens, hidden), baseline.decode(tokens), atol=1e-5)


def test_8_lecam_limits():
    real_average, fake_average = torch.tensor(0.5), torch.tensor(-0.25)
    assert lecam(torch.tensor([-0.25, -3.0]), torch.tensor([0.5, 2.0]), real_average, fake_average) == 0
    outside = lecam(torch.tensor([1.0]), torch.tensor([-1.0]), real_average, fake_average)
    assert outside == pytest.approx(1.25**2 + 1.5**2)


def test_9_adversarial_losses_of_an_undecided_discriminator():
    zero = torch.zeros(4, 1)
    assert non_saturating_generator(zero) == pytest.approx(math.log(2))
    assert non_saturating_discriminator(zero, zero) == pytest.approx(2 * math.log(2))


def test_variational_bottleneck_draws_addressed_noise_and_pays_divergence(pixels):
    model = make(variational=True, kl_weight=0.5)
    first, second = (model.encode(pixels, caption(1), Noise(seed, 2)) for seed in (1, 2))
    assert torch.equal(first, model.encode(pixels, caption(1), Noise(1, 2)))
    assert not torch.allclose(first, second)
    assert model(pixels, caption(1)).losses["kl"] > 0
    assert make()(pixels, caption(1)).losses == {}


def test_scores_tell_what_captions_are_worth(pixels):
    model, text = make(), caption(1)
    scores = model.scores(pixels, text)
    swapped = TextFeatures(text.features.flip(0), text.mask.flip(0))
    assert torch.equal(scores["psnr_other_caption"], model.scores(pixels, swapped)["psnr"])
    assert scores["psnr"].shape == (2,)
    baseline = make(encoder_text=False, decoder_text=False)
    assert set(baseline.scores(pixels)) == {"psnr"}


def test_tokens_are_normalized():
    model = make(latent_mean=2.0, latent_std=4.0)
    raw = make()
    pixels = torch.zeros(2, 3, 16, 16)
    assert torch.allclose(model.encode(pixels, caption(1)) * 4 + 2, raw.encode(pixels, caption(1)), atol=1e-5)


def test_refusals(pixels):
    model = make()
    tokens = model.encode(pixels, caption(1))
    with pytest.raises(VargenError, match="needs captions"):
        model.encode(pixels)
    with pytest.raises(VargenError, match="needs captions"):
        model.decode(tokens)
    with pytest.raises(VargenError, match="captions of 7 tokens of width 12, expected at most 6"):
        model.encode(pixels, caption(1, length=7))
    with pytest.raises(VargenError, match="3 captions for 2 samples"):
        model.encode(pixels, caption(1, batch=3))
    with pytest.raises(VargenError, match="size 16x24, expected 16x16"):
        model.encode(torch.zeros(2, 3, 16, 24), caption(1))
    with pytest.raises(VargenError, match="NaN"):
        model.encode(pixels * float("nan"), caption(1))
    with pytest.raises(SpaceError, match=r"expected \(batch, 5, 3\)"):
        model.decode(torch.cat([tokens, tokens], 1), caption(1))


def test_round_trip_through_a_directory(tmp_path, pixels):
    model = make()
    model.save_pretrained(tmp_path)
    again = TexTok.from_pretrained(tmp_path).eval()
    assert torch.equal(again.encode(pixels, caption(1)), model.encode(pixels, caption(1)))
