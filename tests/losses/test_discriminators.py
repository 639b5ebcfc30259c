"""Discriminators: published shapes and sizes, and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vargen.errors import ConfigError, VargenError
from vargen.losses.discriminators import Blur, PatchGAN, StyleGANDiscriminator, make_discriminator


def test_patchgan_is_the_published_one():
    with torch.device("meta"):
        net = PatchGAN()
        logits = net(torch.zeros(2, 3, 256, 256))
    assert logits.shape == (2, 1, 30, 30)
    layers = {key.rsplit(".", 1)[0] for key in net.state_dict()}
    assert layers == {f"main.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)}
    assert [net.main[i].bias is not None for i in (0, 2, 5, 8, 11)] == [True, False, False, False, True]
    assert sum(p.numel() for p in net.parameters()) == 2_765_633


def test_patchgan_initialisation():
    torch.manual_seed(0)
    net = PatchGAN(16)
    assert abs(net.main[8].weight.std() - 0.02) < 1e-3
    assert abs(net.main[9].weight.mean() - 1) < 0.02


def test_patchgan_needs_room():
    net = PatchGAN(4, num_layers=3)
    assert net(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(VargenError, match="needs 24: give it fewer num_layers"):
        net(torch.zeros(1, 3, 16, 32))
    assert PatchGAN(4, num_layers=2)(torch.zeros(1, 3, 16, 32)).shape == (1, 1, 2, 6)


def test_stylegan_has_the_size_that_textok_names():
    """About 24M parameters at 256 pixels."""
    with torch.device("meta"):
        net = StyleGANDiscriminator()
        assert net(torch.zeros(4, 3, 256, 256)).shape == (4, 1)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 24


def test_stylegan_of_other_sizes():
    torch.manual_seed(0)
    net = StyleGANDiscriminator((16, 32), width=4, multipliers=(1, 2))
    x = torch.randn(6, 3, 16, 32)
    assert net(x).shape == (6, 1)
    with pytest.raises(VargenError, match=r"built for \(16, 32\)"):
        net(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="multiple of 4"):
        StyleGANDiscriminator(18, multipliers=(1, 1))
    alone = StyleGANDiscriminator((16, 32), width=4, multipliers=(1, 2), minibatch_std=False)
    torch.testing.assert_close(alone(x)[:1], alone(x[:1]))
    # with the batch statistic a sample's logit depends on its group
    assert not torch.allclose(net(x)[:1], net(x[:1]))


def test_blur_halves_and_keeps_the_mean():
    x = torch.full((1, 2, 8, 8), 3.0)
    out = Blur()(x)
    assert out.shape == (1, 2, 4, 4)
    torch.testing.assert_close(out[..., 1:-1, 1:-1], torch.full((1, 2, 2, 2), 3.0))


def test_made_by_name():
    assert make_discriminator(None) is None
    module = nn.Conv2d(3, 1, 1)
    assert make_discriminator(module) is module
    assert isinstance(make_discriminator("patchgan", width=8), PatchGAN)
    with pytest.raises(ConfigError, match="did you mean 'patchgan'"):
        make_discriminator("patchgun")
    with pytest.raises(ConfigError, match="discriminator 'patchgan'.*depth"):
        make_discriminator("patchgan", depth=3)
