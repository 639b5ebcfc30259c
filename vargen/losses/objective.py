"""The training objective of tokenizers with a pixel decoder: reconstruction, perceptual and adversarial terms, and a guard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vargen.errors import ConfigError, VargenError, nearest
from vargen.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, adaptive_weight, lecam, r1_penalty
from vargen.losses.discriminators import make_discriminator
from vargen.losses.distillation import TeacherTerm
from vargen.losses.perceptual import PerceptualSource, make_perceptual
from vargen.model import TokenizerOutput
from vargen.nn.sync import all_mean
from vargen.noise import Noise, as_noise

log = logging.getLogger(__name__)

RECONSTRUCTIONS = {"l2": F.mse_loss, "l1": F.l1_loss}


class ReconstructionGuard(nn.Module):
    """Lowers the adversarial weight while reconstructions get worse than they have been.

    A moving average of the reconstruction error is compared with the least value it had. Beyond ``limit`` times that value the
    weight's factor is halved, and divided further by the excess over ``limit``; below 1/64 it becomes zero and the adversarial term
    is suspended. Back under the square root of ``limit`` it doubles, up to 1. There are ``patience`` steps between two changes.

    Args:
        limit: ratio of errors that is tolerated.
        patience: least number of steps between two changes and before the first; the average reaches back as far.
    """

    scale: Tensor
    recent: Tensor
    best: Tensor
    steps: Tensor
    wait: Tensor

    def __init__(self, limit: float = 1.5, patience: int = 50) -> None:
        super().__init__()
        if limit <= 1 or patience < 1:
            raise ConfigError(
                f"guard with limit {limit} and patience {patience}: expected a ratio above 1 and a positive step count"
            )
        self.limit, self.patience = limit, patience
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("recent", torch.tensor(0.0))
        self.register_buffer("best", torch.tensor(float("inf")))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("wait", torch.tensor(patience))

    @property
    def ratio(self) -> Tensor:
        """Recent error over the least one; zero before there is any."""
        return self.recent / self.best

    @torch.no_grad()
    def update(self, error: Tensor, adversarial: bool) -> None:
        """One training step with this reconstruction error; ``adversarial`` if the discriminator takes part."""
        error = all_mean(error.detach().float())
        self.recent.copy_(torch.where(self.steps == 0, error, self.recent.lerp(error, 2 / (self.patience + 1))))
        self.steps += 1
        self.best.copy_(torch.where(self.steps >= self.patience, torch.minimum(self.best, self.recent), self.best))
        if not adversarial:
            return
        # tensors decide, so that no step waits for the device
        self.wait.sub_(1).clamp_(min=0)
        ready = self.wait == 0
        lower = ready & (self.ratio > self.limit)
        higher = ready & (self.ratio < self.limit**0.5) & (self.scale < 1)
        lowered = self.scale / 2 * (self.limit / self.ratio)
        lowered = torch.where(lowered < 1 / 64, 0.0, lowered)
        raised = (2 * self.scale).clamp(1 / 64, 1)
        self.scale.copy_(torch.where(lower, lowered, torch.where(higher, raised, self.scale)))
        self.wait.copy_(torch.where(lower | higher, self.patience, self.wait))


class TokenizerObjective(nn.Module):
    """What a tokenizer is trained on besides its own losses, with all the state that this has.

    Args:
        reconstruction: ``"l2"`` or ``"l1"``, mean over all elements of pixels ``(B, 3, H, W)`` or clips ``(B, 3, T, H, W)``.
        perceptual: LPIPS weight files or ``"cache"`` (see :func:`~vargen.nn.lpips.load_lpips`), a
            :class:`~vargen.nn.lpips.PerceptualDistance`, any network from pixels to a list of features, or None. Clips are compared
            frame by frame.
        discriminator: ``"patchgan"``, ``"stylegan"``, ``"transformer"`` (for clips), a module from pixels to logits, or None.
        discriminator_options: arguments of the named discriminator.
        generator_loss, discriminator_loss: names in :mod:`~vargen.losses.adversarial`.
        adversarial_weight, discriminator_weight: factors of the generator's and of the discriminator's adversarial loss.
        discriminator_start: step from which on both sides of the adversarial game run.
        discriminator_every: the discriminator learns at every so-manieth step.
        use_adaptive_weight: multiply the generator's adversarial loss by the ratio of gradient norms at the last layer.
        lecam_weight, lecam_decay, lecam_of_means: LeCam regulariser; compare mean logits rather than each.
        r1_weight, r1_every: ``r1_weight / 2`` times the squared gradient norm at real pixels, every so many steps, times as many.
        teachers: arguments of :class:`~vargen.losses.distillation.TeacherTerm` each, for features of the tokenizer's training pass.
        guard_ratio, guard_patience: limit and patience of the :class:`ReconstructionGuard`; a ratio of None switches it off.

    Losses come out as dictionaries of scalars with the total under ``"loss"``. The guard acts on, and averages are updated by,
    training-mode calls only.
    """

    lecam_real: Tensor
    lecam_fake: Tensor

    def __init__(
        self,
        reconstruction: str = "l2",
        reconstruction_weight: float = 1.0,
        perceptual: PerceptualSource | None = None,
        perceptual_weight: float = 1.0,
        discriminator: str | nn.Module | None = None,
        discriminator_options: Mapping[str, Any] | None = None,
        generator_loss: str = "hinge",
        discriminator_loss: str = "hinge",
        adversarial_weight: float = 0.5,
        discriminator_weight: float = 1.0,
        discriminator_start: int = 0,
        discriminator_every: int = 1,
        use_adaptive_weight: bool = False,
        lecam_weight: float = 0.0,
        lecam_decay: float = 0.999,
        lecam_of_means: bool = False,
        r1_weight: float = 0.0,
        r1_every: int = 1,
        teachers: Sequence[Mapping[str, Any]] = (),
        guard_ratio: float | None = 1.5,
        guard_patience: int = 50,
    ) -> None:
        super().__init__()
        for what, name, known in (
            ("reconstruction", reconstruction, RECONSTRUCTIONS),
            ("generator_loss", generator_loss, GENERATOR_LOSSES),
            ("discriminator_loss", discriminator_loss, DISCRIMINATOR_LOSSES),
        ):
            if name not in known:
                raise ConfigError(f"{what} '{name}'{nearest(name, known)}")
        if discriminator_every < 1 or r1_every < 1:
            raise ConfigError(f"discriminator_every {discriminator_every}, r1_every {r1_every}: expected positive step counts")
        self.reconstruction, self.reconstruction_weight = reconstruction, reconstruction_weight
        self.perceptual, self.perceptual_weight = make_perceptual(perceptual), perceptual_weight
        self.discriminator = make_discriminator(discriminator, **(discriminator_options or {}))
        self.teachers = nn.ModuleList(_teacher_term(term) for term in teachers)
        self.generator_loss, self.discriminator_loss = generator_loss, discriminator_loss
        self.adversarial_weight, self.discriminator_weight = adversarial_weight, discriminator_weight
        self.discriminator_start, self.discriminator_every = discriminator_start, discriminator_every
        self.use_adaptive_weight = use_adaptive_weight
        self.lecam_weight, self.lecam_decay, self.lecam_of_means = lecam_weight, lecam_decay, lecam_of_means
        self.r1_weight, self.r1_every = r1_weight, r1_every
        if self.discriminator is not None:
            self.register_buffer("lecam_real", torch.tensor(0.0))
            self.register_buffer("lecam_fake", torch.tensor(0.0))
        guarded = guard_ratio is not None and self.discriminator is not None
        self.guard = ReconstructionGuard(guard_ratio, guard_patience) if guarded and guard_ratio is not None else None
        self._announced = 1.0

    def discriminator_parameters(self) -> list[nn.Parameter]:
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    def generator_losses(
        self, pixels: Tensor, output: TokenizerOutput, step: int, last_layer: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of the tokenizer at ``step``: the weighted sum of all terms, and each term for the log.

        Args:
            pixels: what the tokenizer was given.
            output: what it made of them; its own losses are part of the total.
            last_layer: see :attr:`VisualTokenizer.last_layer`; needed for the adaptive weight.
        """
        terms = dict(output.losses)
        total = sum(output.losses.values(), torch.zeros((), device=pixels.device))
        for term in self.teachers:
            terms[term.features] = term(pixels, output)
            total = total + term.weight * terms[term.features]
        if output.reconstruction is not None:
            image_loss, image_terms = self._image_losses(pixels, output.reconstruction)
            total, terms = total + image_loss, terms | image_terms
            if self.discriminator is not None:
                adversarial, more = self._adversarial_loss(
                    image_loss, image_terms["reconstruction"], output.reconstruction, step, last_layer
                )
                total, terms = total + adversarial, terms | more
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}}

    def _image_losses(self, pixels: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if reconstruction.shape != pixels.shape:
            raise VargenError(f"reconstruction of shape {tuple(reconstruction.shape)} for pixels {tuple(pixels.shape)}")
        terms = {"reconstruction": RECONSTRUCTIONS[self.reconstruction](reconstruction.float(), pixels.float())}
        loss = self.reconstruction_weight * terms["reconstruction"]
        if self.perceptual is not None and self.perceptual_weight:
            terms["perceptual"] = self.perceptual(_frames(pixels), _frames(reconstruction)).mean()
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return loss, terms

    def _adversarial_loss(
        self, image_loss: Tensor, error: Tensor, reconstruction: Tensor, step: int, last_layer: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        started = step >= self.discriminator_start
        if self.guard is not None and self.training:
            self.guard.update(error, started)
            self._announce(step)
        if not started:
            return image_loss.new_zeros(()), {}
        loss = GENERATOR_LOSSES[self.generator_loss](self._frozen_logits(reconstruction))
        terms, weight = {"adversarial": loss}, torch.tensor(self.adversarial_weight, device=loss.device)
        if self.use_adaptive_weight:
            if last_layer is None:
                raise VargenError(
                    "the adaptive adversarial weight is measured at the decoder's last layer: this tokenizer names none"
                )
            terms["adaptive_weight"] = adaptive_weight(image_loss, loss, last_layer)
            weight = weight * terms["adaptive_weight"]
        if self.guard is not None:
            terms |= {"guard_scale": self.guard.scale.clone(), "guard_ratio": self.guard.ratio}
            weight = weight * terms["guard_scale"]
        return weight * loss, terms

    def _frozen_logits(self, reconstruction: Tensor) -> Tensor:
        """D's logits, recorded such that the backward pass reaches the reconstruction but leaves no gradient in D."""
        parameters = [p for p in self.discriminator_parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        logits = self._logits(reconstruction)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return logits

    def _logits(self, pixels: Tensor) -> Tensor:
        assert self.discriminator is not None
        return self.discriminator(pixels if getattr(self.discriminator, "video", False) else _frames(pixels)).float()

    def _announce(self, step: int) -> None:
        assert self.guard is not None
        if step % self.guard.patience:
            return
        scale = float(self.guard.scale)
        if scale < self._announced:
            log.warning(
                "step %d: reconstructions are %.2f times worse than they were, the adversarial weight is %s",
                step,
                float(self.guard.ratio),
                f"lowered to {scale:g} of its setting" if scale else "suspended",
            )
        self._announced = scale

    def discriminator_losses(
        self, pixels: Tensor, reconstruction: Tensor, step: int, noise: Noise | None = None
    ) -> dict[str, Tensor] | None:
        """Losses of the discriminator on real and reconstructed (detached) pixels; None at steps where it does not learn.

        Args:
            noise: draws ``smooth_real`` and ``smooth_fake`` of the smoothed loss, one sample per picture.
        """
        if self.discriminator is None or step < self.discriminator_start or step % self.discriminator_every:
            return None
        penalised = bool(self.r1_weight) and step % self.r1_every == 0
        pixels = pixels.detach().requires_grad_(penalised)
        real, fake = self._logits(pixels), self._logits(reconstruction.detach())
        draws = {"noise": as_noise(noise, real.shape[0], real.device)} if self.discriminator_loss == "smoothed" else {}
        terms = {"discriminator": DISCRIMINATOR_LOSSES[self.discriminator_loss](real, fake, **draws)}
        loss = self.discriminator_weight * terms["discriminator"]
        if self.lecam_weight:
            logits = (real.mean(), fake.mean()) if self.lecam_of_means else (real, fake)
            terms["lecam"] = lecam(*logits, self.lecam_real, self.lecam_fake)
            loss = loss + self.lecam_weight * terms["lecam"]
            if self.training:
                self._update_averages(real, fake)
        if penalised:
            terms["r1"] = r1_penalty(pixels, real)
            loss = loss + 0.5 * self.r1_weight * self.r1_every * terms["r1"]
        terms |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def _update_averages(self, real: Tensor, fake: Tensor) -> None:
        # out of place: this step's loss still needs the old averages
        self.lecam_real = self.lecam_real.lerp(all_mean(real.mean()), 1 - self.lecam_decay)
        self.lecam_fake = self.lecam_fake.lerp(all_mean(fake.mean()), 1 - self.lecam_decay)


def _teacher_term(arguments: Mapping[str, Any]) -> TeacherTerm:
    try:
        return TeacherTerm(**arguments)
    except TypeError as error:
        raise ConfigError(f"teachers: {error}") from error


def _frames(pixels: Tensor) -> Tensor:
    """Clips ``(B, 3, T, H, W)`` as single frames ``(B * T, 3, H, W)``; pictures as they are."""
    return rearrange(pixels, "b c t h w -> (b t) c h w") if pixels.dim() == 5 else pixels
