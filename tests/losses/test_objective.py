"""The tokenizer objective: its sums, its schedule, its state, and the guard."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vargen.errors import ConfigError, VargenError
from vargen.losses.discriminators import Discriminator
from vargen.losses.objective import ReconstructionGuard, TokenizerObjective
from vargen.losses.perceptual import PerceptualDistance
from vargen.model import TokenizerOutput
from vargen.noise import Noise


class Sign(PerceptualDistance):
    """Counts pictures, so that clips show as frames."""

    def forward(self, x, y):
        return torch.full((len(x),), float(len(x)))


class Linear(Discriminator):
    def __init__(self, video=False):
        super().__init__()
        self.video = video
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels):
        return self.scale * pixels.flatten(1).mean(1, keepdim=True)


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def output(reconstruction, **losses):
    return TokenizerOutput(torch.zeros(2, 1), reconstruction, losses)


def test_total_is_the_weighted_sum(pixels):
    objective = TokenizerObjective(
        "l1", 2.0, perceptual=Sign(), perceptual_weight=0.5, discriminator=Linear(), adversarial_weight=0.25, discriminator_start=5
    )
    reconstruction = (pixels / 2).requires_grad_()
    commitment = torch.tensor(0.125, requires_grad=True)
    before = objective.generator_losses(pixels, output(reconstruction, commitment=commitment), 4)
    base = 2 * (pixels - reconstruction).abs().mean() + 0.5 * 2 + 0.125
    torch.testing.assert_close(before["loss"], base)
    assert "adversarial" not in before
    after = objective.generator_losses(pixels, output(reconstruction, commitment=commitment), 5)
    torch.testing.assert_close(after["loss"], base + 0.25 * -2 * reconstruction.mean())
    assert {"reconstruction", "perceptual", "commitment", "adversarial", "guard_scale", "guard_ratio"} <= set(after)
    assert [k for k, v in after.items() if v.requires_grad] == ["loss"]
    after["loss"].backward()
    assert commitment.grad == 1


def test_generator_losses_leave_no_gradient_in_the_discriminator(pixels):
    objective = TokenizerObjective(discriminator="patchgan", discriminator_options={"width": 4, "num_layers": 1})
    reconstruction = pixels.clone().requires_grad_()
    objective.generator_losses(pixels, output(reconstruction), 0)["loss"].backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in objective.discriminator_parameters())
    objective.discriminator_losses(pixels, reconstruction, 0)["loss"].backward()
    assert all(p.grad is not None for p in objective.discriminator_parameters())


def test_discriminator_learns_on_its_own_steps(pixels):
    objective = TokenizerObjective(discriminator=Linear(), discriminator_start=3, discriminator_every=2, discriminator_weight=0.5)
    learns = [objective.discriminator_losses(pixels, pixels / 2, step) is not None for step in range(7)]
    assert learns == [False, False, False, False, True, False, True]
    losses = objective.discriminator_losses(pixels, pixels / 2, 4)
    real, fake = (2 * x.flatten(1).mean(1) for x in (pixels, pixels / 2))
    torch.testing.assert_close(losses["loss"], 0.25 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()))
    torch.testing.assert_close(losses["logits_real"], real.mean())
    assert TokenizerObjective().discriminator_losses(pixels, pixels, 9) is None
    assert TokenizerObjective().discriminator_parameters() == []


def test_clips_are_judged_whole_or_by_frame():
    clips = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = TokenizerObjective(perceptual=Sign(), discriminator=Linear())
    losses = objective.generator_losses(clips, output(clips / 2), 0)
    torch.testing.assert_close(losses["reconstruction"], (clips / 2).square().mean())
    assert losses["perceptual"] == 8
    shapes = []
    for video in (False, True):
        net = Linear(video)
        net.register_forward_hook(lambda _m, inputs, _o: shapes.append(inputs[0].shape))
        TokenizerObjective(discriminator=net).generator_losses(clips, output(clips / 2), 0)
    assert shapes == [(8, 3, 8, 8), (2, 3, 4, 8, 8)]


def test_adaptive_weight_multiplies_the_adversarial_term(pixels):
    objective = TokenizerObjective(discriminator=Linear(), adversarial_weight=1.0, use_adaptive_weight=True)
    layer = torch.tensor(0.5, requires_grad=True)
    losses = objective.generator_losses(pixels, output(layer * pixels), 0, layer)
    of_reconstruction = torch.autograd.grad(F.mse_loss(layer * pixels, pixels), layer)[0].abs()
    of_adversarial = (2 * pixels.mean()).abs()
    torch.testing.assert_close(losses["adaptive_weight"], of_reconstruction / (of_adversarial + 1e-4))
    expected = losses["reconstruction"] + losses["adaptive_weight"] * losses["adversarial"]
    torch.testing.assert_close(losses["loss"].detach(), expected)
    with pytest.raises(VargenError, match="last layer"):
        objective.generator_losses(pixels, output(layer * pixels), 0)


@pytest.mark.parametrize("of_means", [False, True])
def test_lecam_uses_the_averages_of_before(pixels, of_means):
    objective = TokenizerObjective(discriminator=Linear(), lecam_weight=0.1, lecam_decay=0.9, lecam_of_means=of_means)
    objective.lecam_real.fill_(0.3)
    losses = objective.discriminator_losses(pixels, -pixels, 0)
    real, fake = (2 * x.flatten(1).mean(1) for x in (pixels, -pixels))
    terms = (real.mean(), fake.mean()) if of_means else (real, fake)
    expected = F.relu(terms[0] - 0).square().mean() + F.relu(0.3 - terms[1]).square().mean()
    torch.testing.assert_close(losses["lecam"], expected)
    torch.testing.assert_close(losses["loss"].detach(), losses["discriminator"] + 0.1 * expected)
    torch.testing.assert_close(objective.lecam_real, 0.9 * 0.3 + 0.1 * real.mean())
    torch.testing.assert_close(objective.lecam_fake, 0.1 * fake.mean())
    losses["loss"].backward()
    objective.eval().discriminator_losses(pixels, -pixels, 0)
    torch.testing.assert_close(objective.lecam_fake, 0.1 * fake.mean())


def test_r1_is_added_on_its_steps(pixels):
    objective = TokenizerObjective(discriminator=Linear(), r1_weight=10.0, r1_every=4)
    assert "r1" not in objective.discriminator_losses(pixels, pixels, 2)
    losses = objective.discriminator_losses(pixels, pixels, 4)
    # D is 2 mean(x): every one of 192 elements has gradient 2 / 192
    torch.testing.assert_close(losses["r1"], torch.tensor(4 / 192))
    torch.testing.assert_close(losses["loss"].detach(), losses["discriminator"] + 5 * 4 * losses["r1"])
    losses["loss"].backward()
    assert torch.isfinite(objective.discriminator.scale.grad)
    assert not pixels.requires_grad


def test_smoothed_loss_is_a_function_of_its_noise(pixels):
    objective = TokenizerObjective(discriminator=Linear(), discriminator_loss="smoothed", generator_loss="non-saturating")
    losses = [objective.discriminator_losses(pixels, pixels, 0, Noise(seed, 2))["loss"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_tokenizers_without_pixels_have_their_own_losses_only(pixels):
    losses = TokenizerObjective().generator_losses(pixels, output(None, contrastive=torch.tensor(2.0)), 0)
    assert losses["loss"] == losses["contrastive"] == 2


def test_errors(pixels):
    with pytest.raises(VargenError, match="reconstruction of shape"):
        TokenizerObjective().generator_losses(pixels, output(pixels[..., :4]), 0)
    for arguments, match in (
        ({"reconstruction": "l3"}, "reconstruction 'l3'"),
        ({"generator_loss": "hing"}, "did you mean 'hinge'"),
        ({"discriminator_loss": "wgan"}, "discriminator_loss 'wgan'"),
        ({"discriminator_every": 0}, "positive step counts"),
        ({"discriminator": Linear(), "guard_ratio": 0.9}, "ratio above 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            TokenizerObjective(**arguments)


def feed(guard, errors, adversarial=True):
    for error in errors:
        guard.update(torch.tensor(error), adversarial)
    return float(guard.scale)


def test_guard_lowers_suspends_and_recovers():
    guard = ReconstructionGuard(limit=1.5, patience=10)
    assert feed(guard, [1.0] * 50, adversarial=False) == 1
    assert feed(guard, [1.3] * 50) == 1
    lowered = [feed(guard, [3.0] * 10) for _ in range(6)]
    assert 0.4 < lowered[0] <= 0.5
    assert lowered == sorted(lowered, reverse=True)
    assert lowered[-1] == 0
    recovering = [feed(guard, [1.0] * 10) for _ in range(12)]
    assert recovering == sorted(recovering)
    assert recovering[-1] == 1
    assert float(guard.best) == pytest.approx(1, abs=0.01)


def test_guard_follows_errors_that_fall():
    guard = ReconstructionGuard(limit=1.5, patience=10)
    assert feed(guard, [2.0 * 0.99**i for i in range(300)]) == 1
    assert float(guard.ratio) == pytest.approx(1)


def train(guard_ratio, steps):
    """A picture learned from pixels while a discriminator that wants another picture joins at step 120; the final error."""

    class Spoiler(Discriminator):
        def forward(self, pixels):
            return -20 * (pixels - 1).square().mean((1, 2, 3))

    target = torch.zeros(1, 3, 4, 4)
    picture = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    objective = TokenizerObjective(discriminator=Spoiler(), discriminator_start=120, guard_ratio=guard_ratio, guard_patience=20)
    optimizer = torch.optim.SGD([picture], 0.1)
    noise = torch.Generator().manual_seed(0)
    for step in range(steps):
        seen = target + 0.1 * torch.randn(target.shape, generator=noise)
        losses = objective.generator_losses(seen, output(picture), step)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    return float(F.mse_loss(picture.detach(), target)), losses


def test_guard_keeps_a_bad_discriminator_from_ruining_pictures(caplog):
    ruined, _ = train(None, 240)
    assert ruined > 0.5
    with caplog.at_level(logging.WARNING, "vargen.losses.objective"):
        kept, losses = train(1.5, 400)
    assert kept < ruined / 5
    assert losses["guard_scale"] < 0.5
    assert "times worse than they were, the adversarial weight is lowered to" in caplog.text


def test_state_carries_everything(pixels):
    def make():
        torch.manual_seed(1)
        return TokenizerObjective(
            discriminator="patchgan", discriminator_options={"width": 4, "num_layers": 1}, lecam_weight=0.1, discriminator_start=2
        )

    def advance(objective, steps):
        for step in steps:
            objective.generator_losses(pixels, output(pixels / (step + 2)), step)
            losses = objective.discriminator_losses(pixels, pixels / 2, step)
        return losses["loss"]

    whole, first, second = make(), make(), make()
    expected = advance(whole, range(9))
    advance(first, range(5))
    second.load_state_dict(first.state_dict())
    assert torch.equal(advance(second, range(5, 9)), expected)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())
    assert {"guard.scale", "guard.best", "lecam_real"} <= set(whole.state_dict())
