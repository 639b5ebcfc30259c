"""KL-16 and pyramids over it: sizes, shapes, sampling, calibration, refusals."""

import pytest
import torch
from accelerate import init_empty_weights

import vargen.tokenizers.kl as kl
from vargen.errors import ConfigError, SpaceError, VargenError
from vargen.nn.gaussian import DiagonalGaussian
from vargen.noise import Noise
from vargen.tokenizers.kl import KLTokenizer
from vargen.tokenizers.pyramid import PyramidTokenizer


def build(**changes):
    torch.manual_seed(0)
    config = {"sample_size": 16, "widths": [8, 8, 16], "latent_channels": 2, "norm_groups": 4, "std": 2.0}
    return KLTokenizer(**{**config, **changes}).eval()


PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_released_size():
    with init_empty_weights():
        model = KLTokenizer(**kl.PRESETS["KL-16"])
    assert len(model.state_dict()) == 312
    for part, millions in ((model, 66.456), (model.encoder, 28.266), (model.decoder, 38.189)):
        assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert model.space.std == pytest.approx(1 / 0.2325)
    assert model.space.token_shape == (16, 16, 16)


def test_tokens_are_normalised_samples_of_the_posterior():
    model, noise = build(mean=0.5), Noise(1, 3)
    tokens = model.encode(PIXELS, noise=noise)
    posterior = DiagonalGaussian.from_moments(model.moments(PIXELS), dim=1)
    latents = posterior.sample(noise.normal("posterior", (2, 4, 4)))
    assert tokens.shape == (3, 4, 4, 2)
    assert torch.allclose(tokens, ((latents - 0.5) / 2).permute(0, 2, 3, 1), atol=1e-6)
    assert torch.equal(model.tokens_of(model.moments(PIXELS), noise), tokens)
    assert not torch.equal(model.encode(PIXELS), model.encode(PIXELS))
    assert torch.allclose(model.decode(tokens), model.reconstruct(latents), atol=1e-5)


def test_patches_hold_their_latents_channel_first():
    plain, patched = build(), build(patch=2)
    noise = Noise(1, 3)
    small, large = patched.encode(PIXELS, noise=noise), plain.encode(PIXELS, noise=noise)
    assert patched.space.token_shape == small.shape[1:] == (2, 2, 8)
    assert torch.equal(small[:, 1, 0], large[:, 2:, :2].permute(0, 3, 1, 2).flatten(1))
    assert torch.allclose(patched.decode(small), plain.decode(large), atol=1e-5)


def test_training_pass():
    model = build(kl_weight=1e-3).train()
    output = model(PIXELS, noise=Noise(0, 3))
    expected = 1e-3 * DiagonalGaussian.from_moments(model.moments(PIXELS), dim=1).kl().sum() / PIXELS.numel()
    assert float(output.losses["kl"]) == pytest.approx(float(expected), rel=1e-5)
    assert output.reconstruction.shape == PIXELS.shape
    (output.reconstruction.square().mean() + output.losses["kl"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.last_layer.grad.abs().sum() > 0


def test_calibration_normalises_tokens():
    model = build()
    pixels = [PIXELS, PIXELS.flip(3)]
    model.calibrate(model.encode(p, noise=Noise(seed, 3)) for p in pixels for seed in range(50))
    tokens = torch.stack([model.encode(p, noise=Noise(seed, 3)) for p in pixels for seed in range(50)])
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-4)
    assert float(tokens.std()) == pytest.approx(1, abs=1e-3)
    assert model.config_dict()["std"] == model.space.std != 2.0
    with pytest.raises(VargenError, match="calibration needs tokens"):
        model.calibrate([])


def test_other_sizes_and_round_trip(tmp_path):
    model = build()
    assert model.decode(model.encode(PIXELS[..., :12])).shape == (3, 3, 16, 12)
    model.save_pretrained(tmp_path)
    again = KLTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(PIXELS, noise=Noise(0, 3)), model.encode(PIXELS, noise=Noise(0, 3)))


def test_bad_input_is_refused():
    model = build()
    with pytest.raises(VargenError, match="16x14: expected both sides to be multiples of the 4"):
        model.encode(torch.zeros(1, 3, 16, 14))
    with pytest.raises(VargenError, match="NaN"):
        model.encode(torch.full((1, 3, 16, 16), float("nan")))
    with pytest.raises(SpaceError, match="NaN"):
        model.decode(torch.full((1, 4, 4, 2), float("nan")))
    with pytest.raises(SpaceError, match="expected"):
        model.decode(torch.zeros(1, 4, 4, 3))
    with pytest.raises(SpaceError, match="expected"):
        model.decode(torch.zeros(1, 16, 2))
    with pytest.raises(ConfigError, match="sample_size 18"):
        build(sample_size=18)


@pytest.mark.parametrize("source", ["latents", "pixels"])
def test_pyramid(source, tmp_path):
    base = build(mean=0.2)
    pyramid, noise = PyramidTokenizer.of(base, [(1, 1), (2, 2), (4, 4)], source), Noise(4, 3)
    tokens = pyramid.encode(PIXELS, noise=noise)
    assert pyramid.space.token_shape == tokens.shape[1:] == (21, 2)
    assert (pyramid.space.mean, pyramid.space.std) == (0.2, 2.0)
    finest = base.encode(PIXELS, noise=noise.at(2))
    assert torch.equal(tokens[:, 5:], finest.flatten(1, 2))
    assert torch.allclose(pyramid.decode(tokens), base.decode(finest), atol=1e-5)
    if source == "latents":
        assert torch.allclose(tokens[:, 0], finest.mean((1, 2)), atol=1e-6)
        assert torch.allclose(tokens[:, 2], finest[:, :2, 2:].mean((1, 2)), atol=1e-6)
    else:
        flat = torch.ones_like(PIXELS) * 0.3
        small = base.encode(flat[..., :8, :8], noise=noise.at(1))
        assert torch.allclose(pyramid.encode(flat, noise=noise)[:, 1:5], small.flatten(1, 2), atol=1e-4)
    pyramid.save_pretrained(tmp_path)
    again = PyramidTokenizer.from_pretrained(tmp_path)
    assert torch.allclose(again.encode(PIXELS, noise=noise), tokens, atol=1e-5)


def test_bad_pyramids_are_refused():
    base = build()
    with pytest.raises(ConfigError, match="grids that divide"):
        PyramidTokenizer.of(base, [(3, 3), (4, 4)])
    with pytest.raises(ConfigError, match="end in it"):
        PyramidTokenizer.of(base, [(2, 2)])
    with pytest.raises(ConfigError, match="source 'image'"):
        PyramidTokenizer.of(base, [(2, 2), (4, 4)], "image")
    with pytest.raises(ConfigError, match="class name of a tokenizer"):
        PyramidTokenizer({"class": "Guidance"}, [(4, 4)])
    pyramid = PyramidTokenizer.of(base, [(2, 2), (4, 4)])
    with pytest.raises(VargenError, match="train its base"):
        pyramid(PIXELS)
    with pytest.raises(VargenError, match="belong to its size"):
        pyramid.encode(torch.zeros(1, 3, 8, 8))
