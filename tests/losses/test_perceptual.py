"""Distances in the features of any teacher."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import nn

from vargen.losses.perceptual import LPIPS, FeatureDistance, make_perceptual


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels):
        features = self.conv(pixels)
        return [features, self.dropout(features).mean((2, 3))]


def pictures(count=3):
    return torch.rand(2, count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_teacher_is_frozen_and_kept_in_evaluation_mode():
    distance = FeatureDistance(Teacher()).train()
    x, y = pictures()
    y.requires_grad_()
    first = distance(x, y)
    assert torch.equal(first, distance(x, y))
    assert first.shape == (3,)
    assert ((first > 0) & (first <= 4)).all()
    assert torch.equal(distance(x, x), torch.zeros(3))
    first.sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(p.grad is None for p in distance.parameters())


def test_sources(tmp_path):
    assert make_perceptual(None) is None
    distance = make_perceptual(Teacher())
    assert isinstance(distance, FeatureDistance)
    assert make_perceptual(distance) is distance
    lpips = LPIPS("vgg", (2, 2, 2, 2, 2))
    save_file(lpips.state_dict(), tmp_path / "lpips.safetensors")
    loaded = make_perceptual(tmp_path / "lpips.safetensors")
    x = pictures()[0].repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.equal(loaded(x, -x), lpips.eval()(x, -x))
