"""Adversarial losses and their regularisers. ``real`` and ``fake`` are logits of any shape; all losses are means over them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.noise import Noise


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * non_saturating_discriminator(real, fake)


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Goodfellow et al. 2014 (arXiv 1406.2661), equation 1; 2 ln 2 where all logits are zero."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def swapped_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """LlamaGen's ``non-saturating``: cross entropies whose logits are constant ones and zeros and whose targets are D's outputs.

    It is linear in D; no released model was trained with it.
    """
    return 0.5 * (
        F.binary_cross_entropy_with_logits(torch.ones_like(real), real)
        + F.binary_cross_entropy_with_logits(torch.zeros_like(fake), fake)
    )


def smoothed_discriminator(real: Tensor, fake: Tensor, noise: Noise) -> Tensor:
    """LARP's: cross entropy with noisy targets max(1 - 0.15|n|, 0.7) and min(0.15|n|, 0.3), n a standard normal per logit."""
    target_real = (1 - 0.15 * noise.normal("smooth_real", real.shape[1:]).abs()).clamp_min(0.7)
    target_fake = (0.15 * noise.normal("smooth_fake", fake.shape[1:]).abs()).clamp_max(0.3)
    return F.binary_cross_entropy_with_logits(real, target_real.to(real)) + F.binary_cross_entropy_with_logits(
        fake, target_fake.to(fake)
    )


def hinge_generator(fake: Tensor) -> Tensor:
    return -fake.mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-log sigmoid of the logits; ln 2 where they are zero."""
    return F.softplus(-fake).mean()


def swapped_generator(fake: Tensor) -> Tensor:
    """The generator's side of :func:`swapped_discriminator`."""
    return F.binary_cross_entropy_with_logits(torch.ones_like(fake), fake)


# the smoothed loss draws noise and is called by name
DISCRIMINATOR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "hinge": hinge_discriminator,
    "vanilla": vanilla_discriminator,
    "non-saturating": non_saturating_discriminator,
    "swapped": swapped_discriminator,
    "smoothed": smoothed_discriminator,
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": hinge_generator,
    "non-saturating": non_saturating_generator,
    "swapped": swapped_generator,
}


def lecam(real: Tensor, fake: Tensor, average_real: Tensor, average_fake: Tensor) -> Tensor:
    """LeCam regulariser (Tseng et al. 2021, arXiv 2104.03310, equation 8, with the usual cut at zero).

    Pushes logits towards the moving averages of the other side: zero where D(x) is at most ``average_fake`` and D(x_hat) at least
    ``average_real``.
    """
    return F.relu(real - average_fake).square().mean() + F.relu(average_real - fake).square().mean()


def r1_penalty(real_pixels: Tensor, real: Tensor) -> Tensor:
    """Mean squared gradient norm of D at real pictures (Mescheder et al. 2018, arXiv 1801.04406, equation 9, without gamma / 2)."""
    (gradient,) = torch.autograd.grad(real.sum(), real_pixels, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4) -> Tensor:
    """Ratio of the gradient norms of two losses at the last layer (Esser et al. 2021, arXiv 2012.09841, equation 7), a constant.

    ``|grad reconstruction| / (|grad adversarial| + 1e-4)``, cut to [0, most].
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, most).detach()
