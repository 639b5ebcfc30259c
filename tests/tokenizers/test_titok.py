from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity.case import Case
from vargen.condition import TextFeatures
from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.official.titok import load
from vargen.tokenizers.titok import PRESETS, TiTok
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN

CASES = Path(__file__).parents[1] / "parity" / "cases"
SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 5,
    "channels": 6,
    "encoder_dim": 32,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "codebook_size": 16,
}
KL = {"codebook_size": None}
TEXT = {"text_dim": 12, "text_length": 6}
FIRST_STAGE = {"proxy_codes": 20, "mixed_latents": True, "l2_normalize": True}
SECOND_STAGE = {**FIRST_STAGE, "pixel_widths": [8, 8, 16], "pixel_channels": 10, "pixel_blocks": 1, "pixel_groups": 4}
KINDS = {"vq": {}, "kl": KL, "text": TEXT, "text-kl": {**KL, **TEXT}, "two-stage": SECOND_STAGE}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return TiTok(**{**SMALL, **options}).eval()


def caption(model, seed=1, batch=2):
    if not model.takes_text:
        return None
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(torch.randn(batch, 4, 12, generator=generator), torch.ones(batch, 4, dtype=torch.bool))


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


@pytest.mark.parametrize("name", PRESETS)
def test_released_sizes(name):
    with torch.device("meta"):
        model = TiTok.from_preset(name)

    def millions(*parts):
        return sum(p.numel() for part in parts if part is not None for p in part.parameters()) / 1e6

    letters = name.split("-")[1].rstrip("0123456789")
    expected = {"s": (26, 27), "b": (86, 88), "l": (303, 307)}
    assert millions(model.encoder) == pytest.approx(expected[letters[0]][0], abs=0.6)
    decoder = millions(model.decoder, model.code_head, model.pixel_head)
    # the direct head is smaller than the 1024-way one, the text projection adds a little
    assert decoder == pytest.approx(expected[letters[-1]][1], abs=0.6 if model.code_head is not None else 4)
    assert model.space.num_tokens == int(name.split("-")[1].lstrip("slb"))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_training_pass(kind, pixels):
    model = make(**KINDS[kind])
    text = caption(model)
    tokens = model.encode(pixels, text)
    model.space.check(tokens)
    assert model.decode(tokens, text).shape == pixels.shape
    model.train()
    out = model(pixels, text)
    loss = (out.reconstruction - pixels).square().mean() + sum(out.losses.values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_pixels_inside_are_in_unit_range(pixels):
    model = make()
    latents = model.codes(model.encode(pixels))
    assert torch.allclose(model.decode(model.encode(pixels)), model.paint(latents) * 2 - 1)
    assert torch.equal(model.latents(pixels), model.encoder((pixels + 1) / 2))


def test_gaussian_latents_are_drawn_from_addressed_noise(pixels):
    model = make(**KL, latent_mean=1.0, latent_std=2.0, kl_weight=0.5)
    first = model.encode(pixels, noise=Noise(1, 2))
    assert torch.equal(first, model.encode(pixels, noise=Noise(1, 2)))
    assert not torch.equal(first, model.encode(pixels, noise=Noise(2, 2)))
    raw = make(**KL)
    assert torch.allclose(first * 2 + 1, raw.encode(pixels, noise=Noise(1, 2)), atol=1e-6)
    mean, logvar = model.latents(pixels).chunk(2, dim=-1)
    expected = 0.5 * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
    assert torch.allclose(model(pixels).losses["kl"], expected)


def test_text_reaches_only_the_decoder(pixels):
    model = make(**TEXT)
    tokens = model.encode(pixels, caption(model, 1))
    assert torch.equal(tokens, model.encode(pixels, caption(model, 2)))
    assert not torch.allclose(model.decode(tokens, caption(model, 1)), model.decode(tokens, caption(model, 2)))
    text = caption(model)
    hidden = TextFeatures(torch.cat([text.features, torch.ones(2, 2, 12)], 1), torch.tensor([[True] * 4 + [False] * 2] * 2))
    assert torch.allclose(model.decode(tokens, hidden), model.decode(tokens, text), atol=1e-5)


def test_mixed_latents_reshape_instead_of_transposing(pixels):
    plain = make()
    mixed = make(mixed_latents=True)
    mixed.load_state_dict(plain.state_dict())
    kept = {}
    plain.encoder.out.register_forward_pre_hook(lambda module, inputs: kept.update(x=inputs[0]))
    plain.latents(pixels)
    expected = plain.encoder.out(kept["x"].reshape(2, 32, 5).transpose(1, 2))
    assert torch.allclose(mixed.latents(pixels), expected, atol=1e-6)


def test_first_stage_predicts_codes_and_second_stage_takes_its_weights(pixels):
    first = make(**FIRST_STAGE).train()
    out = first(pixels)
    assert out.reconstruction is None
    assert out.features["code_logits"].shape == (2, 4, 4, 20)
    (out.features["code_logits"].logsumexp(-1).mean() + sum(out.losses.values())).backward()
    assert first.encoder.latent_tokens.grad.abs().sum() > 0
    with pytest.raises(VargenError, match="first stage"):
        first.decode(out.tokens)
    vqgan = MaskGITVQGAN(16, [8, 8, 16], num_blocks=1, latent_channels=10, codebook_size=20, norm_groups=4).eval()
    second = first.eval().with_pixel_decoder(vqgan).eval()
    assert torch.equal(second.encode(pixels), first.encode(pixels))
    with torch.no_grad():
        # all logits on one code: the softmax-weighted code is that code
        torch.nn.init.zeros_(second.code_head.down.weight)
        second.code_head.down.bias.copy_(1e4 * torch.eye(20)[3])
        ids = torch.full((2, 4, 4), 3)
        assert torch.allclose(second.decode(second.encode(pixels)), vqgan.decode(ids), atol=1e-5)
    with pytest.raises(ConfigError, match="no first stage"):
        second.with_pixel_decoder(vqgan)
    with pytest.raises(ConfigError, match="VQGAN of 12 codes for a first stage of 20"):
        first.with_pixel_decoder(MaskGITVQGAN(16, [8, 8, 16], codebook_size=12, latent_channels=10, norm_groups=4))
    out = second.train()(pixels)
    out.reconstruction.square().mean().backward()
    assert out.losses == {}
    assert all(p.grad is None for part in (second.encoder, second.quantizer) for p in part.parameters())
    assert all(p.grad is not None for part in (second.decoder, second.code_head, second.pixel_decoder) for p in part.parameters())


def test_soft_assignments_decode_like_ids_when_they_are_hard(pixels):
    model = make(l2_normalize=True)
    ids = model.encode(pixels)
    hard = torch.nn.functional.one_hot(ids, 16).float()
    assert torch.allclose(model.codes(hard), model.codes(ids), atol=1e-6)


def test_clustering_moves_unused_codes_to_latents(pixels):
    model = make(clustering_decay=0.99).train()
    before = model.quantizer.codebook.detach().clone()
    model(pixels)
    assert not torch.allclose(model.quantizer.codebook, before)
    assert model.quantizer.usage_average.sum() == pytest.approx(0.01)


def test_refusals(pixels):
    model, with_text = make(), make(**TEXT)
    with pytest.raises(VargenError, match="takes no text"):
        model.encode(pixels, caption(with_text))
    with pytest.raises(VargenError, match="needs captions"):
        with_text.decode(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(VargenError, match="size 16x24, expected 16x16"):
        model.encode(torch.zeros(2, 3, 16, 24))
    with pytest.raises(VargenError, match="NaN"):
        model(pixels * float("nan"))
    with pytest.raises(SpaceError, match="expected .batch, 5."):
        model.decode(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(SpaceError, match=r"expected 0..15"):
        model.decode(torch.full((2, 5), 16))
    with pytest.raises(ConfigError, match="give proxy_codes"):
        make(pixel_widths=[8, 8, 16])
    with pytest.raises(ConfigError, match="needs 3"):
        make(**{**SECOND_STAGE, "pixel_widths": [8, 16]})


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_a_directory(kind, tmp_path, pixels):
    model = make(**KINDS[kind])
    model.save_pretrained(tmp_path)
    again = TiTok.from_pretrained(tmp_path).eval()
    tokens = model.encode(pixels, caption(model), Noise(0, 2))
    assert torch.equal(again.encode(pixels, caption(model), Noise(0, 2)), tokens)
    assert torch.equal(again.decode(tokens, caption(model)), model.decode(tokens, caption(model)))


def test_official_file(tmp_path):
    state = Case.read(CASES / "titok-vq.safetensors").state32()
    file = tmp_path / "titok.safetensors"
    save_file(state, file)
    options = {"encoder_heads": 2, "decoder_heads": 2}
    model = load(file, **options)
    assert model.config.mixed_latents
    assert model.config.l2_normalize
    assert model.config.codebook_size == len(state["quantize.embedding.weight"])
    # training statistics of a released file that has none start anew
    assert load(file, **options, clustering_decay=0.99, usage_window=8).quantizer.recent.eq(-1).all()
    first_stage = {k: v for k, v in state.items() if not k.startswith("pixel_")}
    save_file(first_stage, file)
    assert load(file, **options).pixel_decoder is None
    save_file({**state, "surprise": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="unknown keys: surprise"):
        load(file, **options)
    state.pop("decoder.mask_token")
    save_file(state, file)
    with pytest.raises(CheckpointError, match="missing keys: decoder.mask_token"):
        load(file, **options)
