import json

import pytest
import torch
from safetensors.torch import save_file

from vargen.condition import TextFeatures
from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.official.larp_tokenizer import load
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.larp_prior import PRIORS, LatentPrior, top_accuracy

SMALL = {
    "sample_size": 8,
    "frames": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "num_tokens": 5,
    "encoder_dim": 24,
    "encoder_depth": 1,
    "encoder_heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "codebook_size": 32,
    "code_dim": 6,
    "prior": {"depth": 1, "heads": 2, "dim": 8},
}


def make(**options):
    torch.manual_seed(0)
    model = LARPTokenizer(**{**SMALL, **options}).eval()
    # the output layer starts at zero
    torch.nn.init.normal_(model.to_patch.weight, std=0.1)
    return model


@pytest.fixture
def clip():
    return torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(7)) * 2 - 1


def test_released_size():
    with torch.device("meta"):
        model = LARPTokenizer.from_preset("larp-l-long")
    assert model.num_parameters_ == 193_880_224
    assert sum(p.numel() for p in model.prior_model.parameters()) == 21_700_240
    tables = (model.encoder_positions, model.patch_positions, model.latent_positions)
    assert sum(t.numel() for t in tables) == 2_359_296
    assert model.space.token_shape == (1024,)


def test_a_fresh_model_paints_black(clip):
    torch.manual_seed(0)
    model = LARPTokenizer(**SMALL).eval()
    assert torch.equal(model.decode(model.encode(clip)), torch.full_like(clip, -1.0))


@pytest.mark.parametrize("tokens", [2, 5, 30])
def test_any_number_of_tokens(clip, tokens):
    model = make(num_tokens=tokens)
    ids = model.encode(clip)
    assert ids.shape == (2, tokens)
    assert model.decode(ids).shape == clip.shape


def test_shorter_clips(clip):
    model = make()
    ids = model.encode(clip[:, :, :2])
    assert ids.shape == (2, 5)
    assert model.decode(ids, frames=2).shape == (2, 3, 2, 8, 8)


def test_encoding_is_repeatable_and_sampled_only_with_noise(clip):
    model = make(temperature=1.0)
    assert torch.equal(model.encode(clip), model.encode(clip))
    seeds = [model.encode(clip, noise=Noise(seed, 2)) for seed in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_training_pass(clip):
    model = make(quantizer_weight=0.5, prior_weight=0.25)
    out = model(clip, noise=Noise(0, 2), progress=0.5)
    assert set(out.losses) == {"codebook", "commitment", "prior"}
    assert out.losses["codebook"].item() == pytest.approx(4 * out.losses["commitment"].item(), rel=1e-5)
    assert out.reconstruction.shape == clip.shape
    sum(out.losses.values()).backward()
    # the prior's loss reaches the encoder through the latents that it reads
    assert model.embed.proj.weight.grad.abs().sum() > 0
    assert model.prior_model.head.weight.grad.abs().sum() > 0
    assert "prior" not in make(prior=None)(clip, noise=Noise(0, 2)).losses


def test_training_reduces_the_loss(clip):
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    errors = []
    for step in range(25):
        out = model(clip, noise=Noise(0, 2).at(step), progress=step / 25)
        error = (out.reconstruction - clip).abs().mean()
        optimizer.zero_grad()
        (error + sum(out.losses.values())).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.8 * errors[0]


def test_scheduled_sampling_rises_linearly():
    prior = LatentPrior(4, 8, 1, 2, 8, max_ratio=0.5, ramp=0.3)
    assert [prior.ratio(p) for p in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([0.0, 0.25, 0.5, 0.5])
    assert LatentPrior(4, 8, 1, 2, 8, ramp=0.0).ratio(0.0) == 0.5


def test_prior_looks_back_only():
    torch.manual_seed(0)
    prior = LatentPrior(4, 8, 1, 2, 8).eval()
    latents = torch.randn(2, 6, 4)
    changed = latents.clone()
    changed[:, 3] += 1
    before, after = prior(latents), prior(changed)
    assert before.shape == (2, 5, 4)
    # entry i predicts position i + 1 from positions up to i
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert not torch.allclose(before[:, 3], after[:, 3])
    assert torch.allclose(before.norm(dim=-1), torch.ones(2, 5), atol=1e-5)


def test_replaced_positions_hold_codes_and_the_first_never_changes():
    torch.manual_seed(0)
    prior = LatentPrior(4, 8, 1, 2, 8, max_ratio=1.0, ramp=0.0).eval()
    codebook = torch.nn.functional.normalize(torch.randn(16, 4), dim=-1)
    latents = torch.nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    out = prior.loss(latents, torch.randint(0, 16, (2, 6)), codebook, 1.0, Noise(0, 2))
    assert out.logits.shape == (2, 2, 5, 16)
    assert torch.equal(out.last_input[:, 0], latents[:, 0])
    assert ((out.last_input[:, 1:] @ codebook.T).amax(-1) > 1 - 1e-5).all()
    assert torch.equal(prior.loss(latents, torch.zeros(2, 6).long(), codebook, 1.0, Noise(0, 2)).last_input, out.last_input)


def test_top_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert top_accuracy(logits, torch.tensor([0, 0]), 1) == 0.5
    assert top_accuracy(logits, torch.tensor([1, 0]), 2) == 0.5


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 3, 4, 8, 12), "frames of"),
        ((2, 3, 6, 8, 8), "6 frames"),
        ((2, 3, 3, 8, 8), "3 frames"),
        ((2, 3, 8, 8), r"\(B, 3, T, H, W\)"),
        ((2, 1, 4, 8, 8), r"\(B, 3, T, H, W\)"),
    ],
)
def test_wrong_sizes_are_named(shape, message):
    with pytest.raises(VargenError, match=message):
        make().encode(torch.zeros(shape))


def test_wrong_tokens_and_pixels_are_named(clip):
    model = make()
    with pytest.raises(SpaceError, match="6 tokens"):
        model.decode(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(SpaceError, match="expected"):
        model.decode(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(SpaceError, match=r"0\.\.31"):
        model.decode(torch.full((1, 5), 32))
    with pytest.raises(VargenError, match="5 frames"):
        model.decode(torch.zeros(1, 5, dtype=torch.long), frames=5)
    with pytest.raises(VargenError, match="takes no text"):
        model.encode(clip, text=TextFeatures(torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)))
    clip[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(VargenError, match="NaN"):
        model.encode(clip)


def test_configuration_errors():
    with pytest.raises(ConfigError, match="prior 'XL'"):
        make(prior="XL")
    with pytest.raises(ConfigError, match="at least 2"):
        make(num_tokens=1)
    with pytest.raises(ConfigError, match="rounds 0"):
        make(prior={**SMALL["prior"], "rounds": 0})
    assert set(PRIORS) == {"L", "B", "M", "S", "XS", "XXS"}


def test_saving_round_trip(tmp_path, clip):
    model = make()
    model.save_pretrained(tmp_path)
    again = LARPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(clip), model.encode(clip))
    assert torch.equal(again.encoder_positions, model.encoder_positions)


OFFICIAL = {
    "input_size": 8,
    "frame_num": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "bottleneck_token_num": 5,
    "latent_pe_scale_factor": 10000,
    "encoder_hidden_size": 24,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "bottleneck": {
        "args": {
            "bottleneck_dim": 6,
            "regularizer": {
                "args": {"codebook_size": 32, "stochastic_temperature": 0.03, "commitment_loss_weight": 0.25},
            },
        }
    },
}


def official_state(model):
    """The tokenizer's weights, without prior, under the published names."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            ("attn.out", "attn.proj"),
            ("mlp.up", "mlp.fc1"),
            ("mlp.down", "mlp.fc2"),
            ("embed.proj", "x_embedder.proj"),
            ("queries", "encoder_latent_query_embed"),
            ("patch_type", "decoder_patch_query_token_type_embed"),
            ("to_code", "bottleneck.in_linear"),
            ("quantizer.codebook", "bottleneck.regularizer.embedding.weight"),
            ("from_code", "bottleneck.out_linear"),
            ("norm_out", "final_layer.norm_final"),
            ("to_patch", "final_layer.linear"),
        ):
            key = key.replace(ours, theirs)
        state[key] = value.view(1, 1, -1) if key.endswith("type_embed") else value.clone()
    return state


def test_official_folder_and_training_checkpoint(tmp_path, clip):
    model = make(prior=None)
    state = official_state(model)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    loaded = load(tmp_path)
    assert torch.equal(loaded.decode(loaded.encode(clip)), model.decode(model.encode(clip)))
    assert loaded.prior_model is None
    torch.save({"model": {"name": "larp", "args": OFFICIAL, "sd": state}, "epoch": 3}, tmp_path / "epoch-last.pth")
    assert torch.equal(load(tmp_path / "epoch-last.pth").encode(clip), model.encode(clip))


def test_official_files_that_do_not_fit(tmp_path):
    state = official_state(make(prior=None))
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(file)
    with pytest.raises(CheckpointError, match="learned_encoder_patch_pe=True"):
        load(file, config={**OFFICIAL, "learned_encoder_patch_pe": True})
    with pytest.raises(CheckpointError, match="lacks"):
        load(file, config={"input_size": 8})
    save_file({**state, "encoder_patch_pe": torch.zeros(1, 8, 24)}, file)
    with pytest.raises(CheckpointError, match="sine-cosine"):
        load(file, config=OFFICIAL)
    save_file({k: v for k, v in state.items() if "in_linear" not in k}, file)
    with pytest.raises(CheckpointError, match="missing keys"):
        load(file, config=OFFICIAL)
