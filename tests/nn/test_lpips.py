"""LPIPS: layouts of weight files, the formula, and errors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from vargen.errors import CheckpointError, ConfigError
from vargen.nn.lpips import LPIPS, TAPS, WIDTHS, load_lpips, unit_channels

SLICES = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}


@pytest.fixture
def narrow():
    torch.manual_seed(0)
    model = LPIPS("vgg", (2, 3, 4, 4, 5)).eval()
    for lin in model.lins:
        lin.weight.abs_()
    return model


def parts(model):
    """The trunk as torchvision names it, and the linear layers as the lpips package does."""
    state = model.state_dict()
    trunk = {k.replace("trunk.", "features."): v.clone() for k, v in state.items() if k.startswith("trunk.")}
    lins = {f"lin{i}.model.1.weight": state[f"lins.{i}.weight"].clone() for i in range(5)}
    return trunk, lins


def pictures(count=2, size=32):
    return torch.rand(2, count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_published_layouts_load_alike(narrow, tmp_path):
    trunk, lins = parts(narrow)
    torchvision = {**trunk, "classifier.0.weight": torch.zeros(2, 2), "classifier.0.bias": torch.zeros(2)}
    torch.save(torchvision, tmp_path / "vgg16-397923af.pth")
    torch.save(lins, tmp_path / "vgg.pth")
    sliced = {f"net.slice{SLICES[int(k.split('.')[1])]}.{k.removeprefix('features.')}": v for k, v in trunk.items()}
    whole = {**sliced, **lins, **{f"lins.{i}.model.1.weight": lins[f"lin{i}.model.1.weight"].clone() for i in range(5)}}
    save_file({**whole, "scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "all.safetensors")
    save_file(narrow.state_dict(), tmp_path / "own.safetensors")
    x, y = pictures()
    sources = (
        tmp_path,
        [tmp_path / "vgg.pth", tmp_path / "vgg16-397923af.pth"],
        str(tmp_path / "all.safetensors"),
        tmp_path / "own.safetensors",
    )
    for source in sources:
        assert torch.equal(load_lpips(source)(x, y), narrow(x, y))


def test_trunk_comes_from_the_cache(narrow, tmp_path, monkeypatch):
    trunk, lins = parts(narrow)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(lins, tmp_path / "vgg.pth")
    with pytest.raises(
        CheckpointError, match=r"LPIPS trunk.*add vgg16-397923af.pth, or train with the perceptual loss switched off"
    ):
        load_lpips(tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match="do not exist"):
        load_lpips("cache")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(trunk, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    x, y = pictures()
    assert torch.equal(load_lpips(tmp_path / "vgg.pth")(x, y), narrow(x, y))
    torch.save(lins, tmp_path / "hub" / "checkpoints" / "vgg.pth")
    assert torch.equal(load_lpips("cache")(x, y), narrow(x, y))


def test_absent_or_odd_weights(narrow, tmp_path):
    trunk, lins = parts(narrow)
    with pytest.raises(CheckpointError, match="do not exist"):
        load_lpips(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"holds neither vgg.pth"):
        load_lpips(tmp_path)
    save_file(trunk, tmp_path / "trunk.safetensors")
    with pytest.raises(CheckpointError, match="linear layers"):
        load_lpips(tmp_path / "trunk.safetensors")
    save_file({**trunk, **lins, "stray": torch.zeros(1)}, tmp_path / "stray.safetensors")
    with pytest.raises(CheckpointError, match="unknown keys: stray"):
        load_lpips(tmp_path / "stray.safetensors")
    save_file({**trunk, **lins, "lin2.model.1.weight": torch.zeros(3)}, tmp_path / "flat.safetensors")
    with pytest.raises(CheckpointError, match="five LPIPS linear layers"):
        load_lpips(tmp_path / "flat.safetensors")
    for call in (lambda: LPIPS("resnet"), lambda: load_lpips(tmp_path, "resnet")):
        with pytest.raises(ConfigError, match="expected one of vgg, alex"):
            call()


@pytest.mark.parametrize("trunk", ["vgg", "alex"])
def test_taps_are_activations_of_the_published_widths(trunk):
    with torch.device("meta"):
        model = LPIPS(trunk)
        features = model.features(torch.zeros(1, 3, 64, 80))
    assert tuple(f.shape[1] for f in features) == WIDTHS[trunk]
    assert all(isinstance(model.trunk[i], torch.nn.ReLU) for i in TAPS[trunk])
    assert not any(p.requires_grad for p in model.parameters())


def test_distance_is_the_written_formula(narrow):
    x, y = pictures()
    expected = 0
    for a, b, lin in zip(narrow.features(x), narrow.features(y), narrow.lins, strict=True):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        expected = expected + torch.einsum("bchw,c->bhw", (a - b) ** 2, lin.weight.flatten()).mean((1, 2))
    torch.testing.assert_close(narrow(x, y), expected)
    assert torch.equal(narrow(x, x), torch.zeros(2))


def test_dropout_acts_in_training_mode_only(narrow):
    x, y = pictures()
    assert torch.equal(narrow(x, y), narrow(x, y))
    narrow.train()
    assert not torch.equal(narrow(x, y), narrow(x, y))


def test_gradient_is_finite_where_features_vanish():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_channels(x).sum().backward()
    assert torch.isfinite(x.grad).all()
