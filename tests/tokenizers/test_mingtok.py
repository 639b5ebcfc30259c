import pytest
import torch
from safetensors.torch import save_file

from vargen.errors import CheckpointError, ConfigError, SpaceError, VargenError
from vargen.noise import Noise
from vargen.official.mingtok import load
from vargen.tokenizers.mingtok import PRESETS, MingTok, pixel_loss

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "latent_channels": 16,
    "encoder_dim": 64,
    "encoder_depth": 1,
    "semantic_dim": 64,
    "semantic_depth": 2,
    "pixel_patch_size": 4,
    "pixel_dim": 64,
    "pixel_depth": 1,
    "latent_mean": 0.5,
    "latent_std": 2.0,
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MingTok(**{**SMALL, **options}).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


def count(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_released_size():
    with torch.device("meta"):
        model = MingTok.from_preset("mingtok-vision")
    assert count(model) == pytest.approx(697.72, abs=0.01)
    assert count(model.encoder) == pytest.approx(87.65, abs=0.01)
    assert count(model.semantic_decoder) == pytest.approx(302.77, abs=0.01)
    assert count(model.pixel_decoder.expand) == pytest.approx(4.20, abs=0.01)
    assert count(model.pixel_decoder) == pytest.approx(303.10 + 4.20, abs=0.01)
    assert model.space.token_shape == (16, 16, 32)


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 32)])
def test_any_size_that_the_patch_divides(size):
    model = make()
    tokens = model.encode(torch.zeros(1, 3, *size))
    assert tokens.shape == (1, size[0] // 8, size[1] // 8, 16)
    assert model.decode(tokens).shape == (1, 3, *size)
    assert model.semantic_features(tokens).shape == (1, size[0] // 8, size[1] // 8, 64)


def test_decode_is_the_second_half_of_encode(pixels):
    model = make()
    features = model.semantic_decoder(model.encode_with_class(pixels))[:, :-1]
    assert torch.allclose(model.semantic_features(model.encode(pixels)).flatten(1, 2), features, atol=1e-5)


def test_semantic_features_are_causal_in_raster_order(pixels):
    model = make()
    tokens = model.encode(pixels)
    changed = tokens.clone()
    changed[:, 1, 0] += 1
    before, after = model.semantic_features(tokens), model.semantic_features(changed)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_masked_patches_are_hidden_and_left_out_of_the_loss(pixels):
    model = make(mask_ratio=0.5, pixel_weight=2.0).train()
    noise = Noise(3, 2)
    hidden = noise.permutation("mask", 4) < 2
    blank = pixels.clone()
    for row, patch in hidden.nonzero().tolist():
        top, left = 8 * (patch // 2), 8 * (patch % 2)
        blank[row, :, top : top + 8, left : left + 8] = 1.0
    seen, unseen = model(pixels, noise=noise), model(blank, noise=noise)
    assert torch.equal(seen.tokens, unseen.tokens)
    assert torch.equal(seen.losses["pixel"], unseen.losses["pixel"])
    assert not torch.equal(model.eval()(pixels, noise=noise).tokens, seen.tokens)


def test_training_pass_reaches_every_weight(pixels):
    model = make(mask_ratio=0.25, latent_teacher_channels=5, semantic_teacher_channels=6).train()
    out = model(pixels)
    assert out.features["latent_teacher"].shape == (2, 2, 2, 5)
    assert out.features["semantic_teacher"].shape == (2, 2, 2, 6)
    assert out.reconstruction.shape == pixels.shape
    (out.losses["pixel"] + sum(f.square().mean() for f in out.features.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_pixel_losses_agree_with_their_definitions():
    prediction, target = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    excluded = torch.tensor([[True, False, False], [True, True, False]])
    kept = [(prediction[b, n], target[b, n]) for b, n in (~excluded).nonzero().tolist()]
    expected = torch.stack([(p - t).abs().mean() for p, t in kept]).mean()
    assert torch.allclose(pixel_loss("l1", prediction, target, excluded), expected)
    shifted = pixel_loss("l2_standardized", (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True), 3 * target + 1)
    assert shifted < 1e-5
    stretched = pixel_loss(
        "l1_rescaled", prediction, (prediction - prediction.min()) / (prediction.max() - prediction.min()) * 2 - 1
    )
    assert stretched < 1e-6
    with pytest.raises(ConfigError, match="did you mean 'l1_tanh'"):
        pixel_loss("l1_tan", prediction, target)


def test_refusals(pixels):
    model = make()
    with pytest.raises(VargenError, match="multiples of the patch size 8x8"):
        model.encode(torch.zeros(1, 3, 16, 20))
    with pytest.raises(VargenError, match="NaN"):
        model(pixels * float("nan"))
    with pytest.raises(VargenError, match="expected \\(B, h, w, 16\\)"):
        model.decode(torch.zeros(2, 4, 16))
    with pytest.raises(SpaceError, match="expected"):
        model.decode(torch.zeros(2, 2, 2, 8))
    with pytest.raises(ConfigError, match="multiple of 64"):
        make(pixel_dim=48)
    with pytest.raises(ConfigError, match="mask_ratio"):
        make(mask_ratio=1.0)


def official_state(model):
    """The state of ``model`` under the published names."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            ("pixel_decoder.expand", "sem_to_pix"),
            ("encoder.cls_token", "low_level_encoder.cls_token"),
            ("encoder.positions", "low_level_encoder.pos_embed"),
            ("trunk.blocks.", "blocks.0."),
            ("trunk.final_norm", "norm"),
            ("attn.out", "attn.proj"),
        ):
            key = key.replace(ours, theirs)
        key = f"low_level_{key}" if key.startswith("encoder.") else key
        if ".mlp.gate." in key:
            up = model.state_dict()[_ours(key).replace(".gate.", ".up.")]
            key, value = key.replace("gate", "w12"), torch.cat([value, up])
        elif ".mlp." in key and not key.startswith("pixel"):
            if ".up." in key:
                continue
            key = key.replace("down", "w3")
        elif ".mlp." in key:
            key = key.replace("up", "fc1").replace("down", "fc2")
        elif key.endswith("pos_embed"):
            value = value[None]
        elif key.endswith("cls_token"):
            value = value[None, None]
        state[key] = value.clone()
    return state


def _ours(key):
    return key.replace("low_level_encoder", "encoder").replace("blocks.0.", "trunk.blocks.")


@pytest.mark.parametrize("prefix", ["", "vision."])
def test_official_file_alone_and_inside_a_joint_checkpoint(tmp_path, pixels, prefix):
    model = make(latent_mean=PRESETS["mingtok-vision"]["latent_mean"], latent_std=PRESETS["mingtok-vision"]["latent_std"])
    state = {prefix + key: value for key, value in official_state(model).items()}
    extra = {"model.lm_head.weight" if prefix else "target_backbone.norm.weight": torch.ones(3)}
    save_file({**state, **extra}, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors").encode(pixels), model.encode(pixels))
    save_file({**state, prefix + "surprise": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="unknown keys: surprise"):
        load(tmp_path / "m.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of this system"):
        load(tmp_path / "m.safetensors")


def test_round_trip_through_a_directory(tmp_path, pixels):
    model = make()
    model.save_pretrained(tmp_path)
    assert torch.equal(MingTok.from_pretrained(tmp_path).eval().encode(pixels), model.encode(pixels))
