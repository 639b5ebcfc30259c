"""Adversarial losses and regularisers at values that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vargen.losses.adversarial import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    adaptive_weight,
    lecam,
    r1_penalty,
    smoothed_discriminator,
)
from vargen.noise import Noise

ZERO = torch.zeros(2, 1)


@pytest.mark.parametrize("name, at_zero", [("hinge", 1.0), ("vanilla", math.log(2)), ("non-saturating", 2 * math.log(2))])
def test_discriminator_losses_at_zero_and_when_right(name, at_zero):
    loss = DISCRIMINATOR_LOSSES[name]
    assert float(loss(ZERO, ZERO)) == pytest.approx(at_zero, abs=1e-6)
    assert loss(ZERO + 9, ZERO - 9) < 1e-3
    assert loss(ZERO - 9, ZERO + 9) > 8


@pytest.mark.parametrize("name, at_zero", [("hinge", 0.0), ("non-saturating", math.log(2))])
def test_generator_losses_fall_with_the_logits(name, at_zero):
    loss = GENERATOR_LOSSES[name]
    assert float(loss(ZERO)) == pytest.approx(at_zero, abs=1e-6)
    assert loss(ZERO + 1) < loss(ZERO) < loss(ZERO - 1)


def test_swapped_losses_are_linear_in_the_logits():
    """Cross entropy of the constant logit 1 (0) with the target t is log(1 + e) - t (log 2)."""
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([4.0, 0.5])
    expected = 0.5 * (math.log(1 + math.e) - real.mean() + math.log(2))
    torch.testing.assert_close(DISCRIMINATOR_LOSSES["swapped"](real, fake), expected)
    torch.testing.assert_close(GENERATOR_LOSSES["swapped"](fake), math.log(1 + math.e) - fake.mean())


def test_smoothed_targets_stay_in_their_ranges():
    class Extreme(Noise):
        def normal(self, name, shape=(), at=(), dtype=torch.float32):
            return torch.full((2, *shape), -9.0 if name == "smooth_real" else 0.1)

    loss = smoothed_discriminator(ZERO + 1, ZERO - 1, Extreme(0, 2))
    expected = F.binary_cross_entropy_with_logits(ZERO + 1, ZERO + 0.7) + F.binary_cross_entropy_with_logits(ZERO - 1, ZERO + 0.015)
    torch.testing.assert_close(loss, expected)


def test_lecam_limits():
    """Zero when D(x) <= average of fakes and D(x_hat) >= average of reals, the square of the difference outside."""
    averages = torch.tensor(1.0), torch.tensor(0.5)
    assert lecam(torch.tensor([0.5]), torch.tensor([1.0]), *averages) == 0
    torch.testing.assert_close(lecam(torch.tensor([2.5]), torch.tensor([0.0]), *averages), torch.tensor(4.0 + 1.0))


def test_r1_of_a_linear_discriminator_is_its_squared_norm():
    weight = torch.arange(12.0).reshape(3, 2, 2).requires_grad_()
    pixels = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    penalty = r1_penalty(pixels, (pixels * weight).sum((1, 2, 3)))
    torch.testing.assert_close(penalty, weight.detach().square().sum())
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_adaptive_weight_balances_gradients():
    layer = torch.ones(4, requires_grad=True)
    weight = adaptive_weight((3 * layer).sum(), (0.5 * layer).sum(), layer)
    assert float(weight) == pytest.approx(6 / (1 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight((3 * layer).sum(), (0.0 * layer).sum(), layer) == 1e4
