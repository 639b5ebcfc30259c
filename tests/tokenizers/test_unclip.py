import pytest
import torch

from vargen.errors import CheckpointError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.tokenizers.seed.tokenizer import SeedTokenizer
from vargen.tokenizers.seed.unclip import UnCLIPDecoder, guided, noised_embedding
from vargen.tokenizers.seed.unclip_training import UnCLIP, load_decoder

SMALL = {
    "sample_size": 16,
    "embedding_dim": 8,
    "vision_dim": 16,
    "vision_depth": 1,
    "vision_heads": 2,
    "words": ["blue", "red"],
    "vae_widths": [8, 8],
    "unet_widths": [16, 16],
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UnCLIP(**SMALL).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


class Chain:
    alphas_cumprod = torch.tensor([0.99, 0.5])


class Statistics:
    mean, std = torch.full((1, 4), 2.0), torch.full((1, 4), 3.0)


def test_noise_level_mixes_on_the_normalised_scale():
    embedding, noise = torch.randn(2, 4), torch.randn(2, 4)
    condition = noised_embedding(embedding, noise, 1, Statistics, Chain)
    expected = 2 + (embedding - 2) * 0.5**0.5 + 3 * noise * 0.5**0.5
    assert torch.allclose(condition[:, :4], expected, atol=1e-5)
    assert torch.allclose(condition[:, 4:6], torch.tensor([1.0, 0.01]).cos(), atol=1e-5)
    with pytest.raises(VargenError, match="noise_level 2"):
        noised_embedding(embedding, noise, 2, Statistics, Chain)


def test_guided_rows():
    u, c = torch.zeros(1, 2), torch.ones(1, 2)
    assert torch.equal(guided(torch.cat([u, c]), 10.0), torch.full((1, 2), 10.0))


def test_saved_pipeline_draws_the_same(tmp_path, model, pixels):
    model.pipeline().save_pretrained(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "model")
    tokens = model.encode(pixels)
    assert tokens.shape == (2, 1, 8)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0}
    painted = model.decode(tokens, noise=Noise(0, 2), **options)
    assert painted.shape == pixels.shape
    for folder in ("pipeline", "model"):
        decoder = load_decoder(tmp_path / folder)
        assert torch.allclose(decoder(tokens[:, 0], Noise(0, 2), **options), painted, atol=1e-5)
    seed = SeedTokenizer(
        image_size=16, patch_size=8, vision_dim=16, vision_depth=1, vision_heads=2, vision_mlp=16, num_queries=4, dim=16, depth=1,
        heads=2, mlp_hidden=16, codebook_size=8, code_dim=4, decoder_depth=1, decoder_heads=2, embedding_dim=8,
        unclip=str(tmp_path / "pipeline"),
    ).eval()  # fmt: skip
    assert seed.paints
    assert seed.decode(seed.encode(pixels), noise=Noise(0, 2), **options).shape == pixels.shape


def test_images_depend_on_their_own_noise_only(model, pixels):
    decoder = UnCLIPDecoder(model.pipeline())
    embeddings = model.encode(pixels)[:, 0]
    both = decoder(embeddings, Noise(3, 2), num_inference_steps=1)
    second = decoder(embeddings[1:], Noise(3, [1]), num_inference_steps=1)
    assert torch.allclose(both[1:], second, atol=1e-5)
    unguided = decoder(embeddings, Noise(3, 2), num_inference_steps=1, guidance_scale=1.0)
    assert not torch.allclose(both, unguided)
    negative = decoder(embeddings, Noise(3, 2), num_inference_steps=1, negative=-embeddings)
    assert not torch.allclose(both, negative)


def test_latents_are_not_clipped_on_their_way(model):
    scheduler = model.pipeline().scheduler
    scheduler.set_timesteps(10)
    latents, noise, t = torch.full((1, 4, 8, 8), 3.0), torch.randn(1, 4, 8, 8), scheduler.timesteps[5]
    survival = scheduler.alphas_cumprod[t]
    noisy = survival.sqrt() * latents + (1 - survival).sqrt() * noise
    velocity = survival.sqrt() * noise - (1 - survival).sqrt() * latents
    assert torch.allclose(scheduler.step(velocity, t, noisy).pred_original_sample, latents, atol=1e-4)


def test_training_pass_of_three_parts(model, pixels):
    model.train()
    text = model.text_encoder.encode(["red", "blue"])
    out = model(pixels, text, Noise(0, 2))
    model.eval()
    assert set(out.losses) == {"contrastive", "kl", "denoising"}
    denoising = torch.autograd.grad(out.losses["denoising"], list(model.parameters()), allow_unused=True, retain_graph=True)
    reached = {n.split(".")[0] for (n, _), g in zip(model.named_parameters(), denoising) if g is not None}
    assert reached == {"unet", "prompt_encoder"}
    contrastive = torch.autograd.grad(out.losses["contrastive"], list(model.parameters()), allow_unused=True)
    reached = {n.split(".")[0] for (n, _), g in zip(model.named_parameters(), contrastive) if g is not None}
    assert reached == {"image_encoder", "caption_tower", "log_scale"}
    assert set(model.scores(pixels, text)) == {"vae_psnr", "image_to_text"}


def test_errors(tmp_path, model, pixels):
    with pytest.raises(CheckpointError, match="not an unCLIP pipeline"):
        UnCLIPDecoder.from_pretrained(tmp_path)
    with pytest.raises(VargenError, match=r"\(B, 8\)"):
        UnCLIPDecoder(model.pipeline())(torch.zeros(1, 9))
    with pytest.raises(VargenError, match="num_inference_steps 0"):
        UnCLIPDecoder(model.pipeline())(torch.zeros(1, 8), num_inference_steps=0)
    with pytest.raises(VargenError, match="multiples of 2"):
        UnCLIPDecoder(model.pipeline())(torch.zeros(1, 8), height=15)
    with pytest.raises(SpaceError):
        model.decode(torch.zeros(1, 8))
    with pytest.raises(VargenError, match="resize first"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(VargenError, match="learns from captions"):
        model(pixels)
