import pytest
import torch
from safetensors.torch import save_file

from vargen.errors import CheckpointError, SpaceError, VargenError
from vargen.official.titok_vqgan import load
from vargen.tokenizers.titok_vqgan import MaskGITVQGAN, ResBlock

SMALL = {"image_size": 16, "widths": [8, 8, 16], "num_blocks": 2, "latent_channels": 6, "codebook_size": 12, "norm_groups": 4}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return MaskGITVQGAN(**{**SMALL, **options}).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1


def test_released_size():
    with torch.device("meta"):
        model = MaskGITVQGAN.from_preset("maskgit-vqgan-f16-256")
    assert model.space.token_shape == (16, 16)
    assert model.num_parameters_ == 54_515_587


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_any_size_that_the_stride_divides(size):
    model = make()
    tokens = model.encode(torch.zeros(1, 3, *size))
    assert tokens.shape == (1, size[0] // 4, size[1] // 4)
    assert model.decode(tokens).shape == (1, 3, *size)


def test_a_block_that_changes_the_width_does_not_carry_its_input():
    block = ResBlock(4, 8, 4)
    x = torch.randn(1, 4, 5, 5)
    torch.nn.init.zeros_(block.conv2.weight)
    assert block(x).abs().max() == 0
    same = ResBlock(8, 8, 4)
    torch.nn.init.zeros_(same.conv2.weight)
    y = torch.randn(1, 8, 5, 5)
    assert torch.equal(same(y), y)


def test_training_pass(pixels):
    model = make().train()
    out = model(pixels)
    ((out.reconstruction - pixels).square().mean() + sum(out.losses.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_refusals(pixels):
    model = make()
    with pytest.raises(VargenError, match="multiples of the patch size 4x4"):
        model.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(VargenError, match="NaN"):
        model.encode(pixels * float("nan"))
    with pytest.raises(SpaceError, match="height, width"):
        model.decode(torch.zeros(2, 16, dtype=torch.int64))
    with pytest.raises(SpaceError, match=r"0..11"):
        model.decode(torch.full((2, 4, 4), 12))


def official_state(model):
    deepest = len(model.config.widths) - 1
    state = {}
    for key, value in model.state_dict().items():
        parts = key.replace("shortcut", "nin_shortcut").split(".")
        if parts[:2] == ["encoder", "levels"]:
            parts = ["encoder", "down", parts[2], "block", *parts[3:]]
        elif parts[:2] == ["decoder", "levels"]:
            parts = ["decoder", "up", str(deepest - int(parts[2])), "block", *parts[3:]]
        elif parts[:2] == ["decoder", "ups"]:
            parts = ["decoder", "up", str(deepest - int(parts[2])), "upsample_conv", parts[4]]
        elif parts[0] == "quantizer":
            parts = ["quantize", "embedding", "weight"]
        state[".".join(parts)] = value.clone()
    return state


def test_official_file(tmp_path, pixels):
    model = make()
    state = official_state(model)
    file = tmp_path / "vqgan.safetensors"
    save_file(state, file)
    again = load(file, image_size=16, norm_groups=4)
    tokens = model.encode(pixels)
    assert torch.equal(again.encode(pixels), tokens)
    assert torch.equal(again.decode(tokens), model.decode(tokens))
    save_file({k: v for k, v in state.items() if "norm_out" not in k}, file)
    with pytest.raises(CheckpointError, match="missing keys"):
        load(file, image_size=16, norm_groups=4)


def test_round_trip_through_a_directory(tmp_path, pixels):
    model = make()
    model.save_pretrained(tmp_path)
    assert torch.equal(MaskGITVQGAN.from_pretrained(tmp_path).eval().encode(pixels), model.encode(pixels))
