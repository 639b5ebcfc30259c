"""Quantisers: vector quantisation with its training losses and codebook care, and finite scalar quantisation.

Latents have their channels last, ``(B, ..., D)``; all arithmetic is float32 whatever the latents or autocast say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vargen.errors import ConfigError, VargenError
from vargen.kernels.dispatch import kernel
from vargen.nn.sync import all_sum, from_first
from vargen.noise import Noise, as_noise

# buffers of a quantiser that only its training reads, and the arguments that make them; encoding and decoding do without
TRAINING_STATE = frozenset(("recent", "idle_steps", "ema_counts", "ema_sums", "usage_average"))
TRAINING_ARGUMENTS = {"usage_window": 0, "revive_after": None, "ema_decay": None, "clustering_decay": None}


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantiser returns.

    Attributes:
        quantized: ``(B, ..., D)``, the value of the codes with a straight-through gradient into the latents.
        indices: int64 ``(B, ...)``.
        losses: weighted scalars: ``codebook``, ``commitment``, ``entropy``, those whose weight is not zero.
        statistics: scalars for the log: ``codebook_usage`` (share of codes in use), ``dead_codes``, ``codebook_perplexity``.
    """

    quantized: Tensor
    indices: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` in the forward pass, the gradient of ``gradient`` in the backward pass."""
    return gradient + (value - gradient).detach()


def usage_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs, float32 ``(K,)``; negative indices are not counted."""
    counts = torch.zeros(codebook_size + 1, device=indices.device)
    flat = indices.reshape(-1).clamp_min(-1) + 1
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))[1:]


@torch.no_grad()
def codebook_statistics(indices: Tensor, codebook_size: int, window: Tensor | None = None) -> dict[str, Tensor]:
    """The statistics of :class:`QuantizerOutput`; usage and dead codes are counted over ``window`` where one is given."""
    counts = usage_counts(indices, codebook_size)
    used = ((counts if window is None else usage_counts(window, codebook_size)) > 0).sum()
    return {
        "codebook_usage": used / codebook_size,
        "dead_codes": codebook_size - used,
        "codebook_perplexity": torch.special.entr(counts / counts.sum().clamp_min(1)).sum().exp(),
    }


class VectorQuantizer(nn.Module):
    """Nearest-code quantisation (van den Oord et al. 2017, arXiv 1711.00937) in the variants of this field.

    Args:
        codebook_size, dim: shape of the codebook.
        l2_normalize: latents and codes are compared, returned and penalised as unit vectors; the stored codebook is not normalised.
        codebook_weight: of ``mean((e - sg z)^2)``, which pulls codes to latents. Means run over all elements.
        commitment_weight: of ``mean((sg e - z)^2)``, which pulls latents to codes. (SEED and early VQ-GANs put 0.25 on the former.)
        entropy_weight: of the mean entropy of a latent's soft assignment minus the entropy of the mean assignment; the assignment
            is a softmax over ``-distance / entropy_temperature``.
        sampling_temperature: None takes the nearest code; a number draws the code from a softmax over cosines (or negative squared
            distances of a plain codebook) divided by it (LARP).
        ema_decay: codes follow moving averages of their latents instead of the gradient (van den Oord et al., appendix A.1).
        revive_after: a code that no latent chose in so many training steps moves to a random latent of the batch.
        clustering_decay: decay of the usage average by which rarely used codes move to their closest latents (CVQ-VAE, Zheng and
            Vedaldi 2023, arXiv 2307.15139). Revival and clustering happen before a training batch is quantised.
        usage_window: number of last chosen indices that ``codebook_usage`` is counted over; 0 counts the batch.
    """

    codebook: nn.Parameter
    recent: Tensor
    idle_steps: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    usage_average: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        *,
        l2_normalize: bool = False,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
        sampling_temperature: float | None = None,
        ema_decay: float | None = None,
        revive_after: int | None = None,
        clustering_decay: float | None = None,
        usage_window: int = 0,
    ) -> None:
        super().__init__()
        if codebook_size < 1 or dim < 1:
            raise ConfigError(f"codebook of {codebook_size} codes of {dim} channels: expected positive numbers")
        for name, decay in (("ema_decay", ema_decay), ("clustering_decay", clustering_decay)):
            if decay is not None and not 0 <= decay < 1:
                raise ConfigError(f"{name} {decay}: expected a number in [0, 1)")
        if revive_after is not None and revive_after < 1:
            raise ConfigError(f"revive_after {revive_after}: expected a positive number of steps")
        self.codebook_size, self.dim, self.l2_normalize = codebook_size, dim, l2_normalize
        self.codebook_weight, self.commitment_weight = codebook_weight, commitment_weight
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature
        self.sampling_temperature = sampling_temperature
        self.ema_decay, self.revive_after, self.clustering_decay = ema_decay, revive_after, clustering_decay

        codes = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        codes = F.normalize(codes, dim=-1) if l2_normalize else codes
        self.codebook = nn.Parameter(codes, requires_grad=ema_decay is None)
        if usage_window:
            self.register_buffer("recent", torch.full((usage_window,), -1))
        if ema_decay is not None:
            self.register_buffer("ema_counts", torch.ones(codebook_size))
            self.register_buffer("ema_sums", codes.clone())
        if revive_after is not None:
            self.register_buffer("idle_steps", torch.zeros(codebook_size, dtype=torch.int64))
        if clustering_decay is not None:
            self.register_buffer("usage_average", torch.zeros(codebook_size))

    @property
    def codes(self) -> Tensor:
        """The codes as they are compared and returned, float32 ``(K, D)``."""
        return self._project(self.codebook)

    def _project(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) if self.l2_normalize else x.float()

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of ``indices`` ``(...)``, in the codebook's dtype, ``(..., D)``."""
        # normalising the rows that are asked for, not the whole codebook
        return self._project(F.embedding(indices.long(), self.codebook)).to(self.codebook.dtype)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices ``(...)`` of the nearest codes of latents ``(..., D)``; among equal distances the first code."""
        with torch.autocast(z.device.type, enabled=False):
            return kernel("nearest_code")(self._project(z).reshape(-1, self.dim), self.codes).reshape(z.shape[:-1])

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances ``|z|^2 + |e|^2 - 2 z.e`` of latents ``(..., D)`` to all codes, float32 ``(..., K)``."""
        z, codes = self._project(z), self.codes
        return z.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * z @ codes.T

    def probabilities(self, z: Tensor) -> Tensor:
        """Distribution ``(..., K)`` that a sampling quantiser draws from; needs ``sampling_temperature``."""
        if self.sampling_temperature is None:
            raise VargenError("this quantiser takes the nearest code: it has no sampling_temperature")
        similarity = self._project(z) @ self.codes.T if self.l2_normalize else -self.distances(z)
        return F.softmax(similarity / self.sampling_temperature, dim=-1)

    def forward(self, z: Tensor, noise: Noise | None = None, sample: bool | None = None) -> QuantizerOutput:
        """Quantises latents ``(B, ..., D)``.

        Args:
            noise: draws ``quantizer`` of a sampling quantiser, and ``revive``, for one of B samples each.
            sample: draw codes rather than take the nearest; by default True where there is a ``sampling_temperature``.
        """
        if z.shape[-1] != self.dim:
            raise VargenError(f"latents of shape {tuple(z.shape)}: expected {self.dim} channels in the last axis")
        sample = self.sampling_temperature is not None if sample is None else sample
        if noise is None and (sample or (self.training and self.revive_after is not None)):
            noise = as_noise(None, z.shape[0], z.device)
        dtype = z.dtype
        with torch.autocast(z.device.type, enabled=False):
            raw = z.float()
            if self.training:
                self._refresh(raw.detach(), noise)
            z = self._project(raw)
            if sample:
                assert noise is not None
                indices = noise.categorical("quantizer", self.probabilities(z.detach()))
            else:
                indices = self.nearest(raw)
            quantized = self._project(F.embedding(indices, self.codebook))
            losses = self._losses(z, quantized)
            if self.training:
                self._track(z.detach(), indices)
            window = self.recent if self.training and "recent" in self._buffers else None
            statistics = codebook_statistics(indices, self.codebook_size, window)
            return QuantizerOutput(straight_through(quantized, z).to(dtype), indices, losses, statistics)

    def _losses(self, z: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        losses = {}
        if self.codebook_weight and self.ema_decay is None:
            losses["codebook"] = self.codebook_weight * F.mse_loss(quantized, z.detach())
        if self.commitment_weight:
            losses["commitment"] = self.commitment_weight * F.mse_loss(z, quantized.detach())
        if self.entropy_weight:
            losses["entropy"] = self.entropy_weight * self._entropy(z)
        return losses

    def _entropy(self, z: Tensor) -> Tensor:
        affinity = -self.distances(z.reshape(-1, self.dim)) / self.entropy_temperature
        probs, log_probs = F.softmax(affinity, dim=-1), F.log_softmax(affinity + 1e-5, dim=-1)
        mean = probs.mean(0)
        return -(probs * log_probs).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()

    @torch.no_grad()
    def _refresh(self, z: Tensor, noise: Noise | None) -> None:
        """Moves codes that the latents do not reach; before the search, so that autograd never sees a code change."""
        flat = z.reshape(-1, self.dim)
        if self.clustering_decay is not None:
            scale = self.codebook_size * 10 / (1 - self.clustering_decay)
            weight = torch.exp(-self.usage_average * scale - 1e-3)
            closest = kernel("nearest_code")(self.codes, self._project(flat))
            self._move_codes(weight[:, None], from_first(flat[closest]))
        if self.revive_after is not None:
            assert noise is not None
            rows = noise.select(slice(0, 1)).integers("revive", len(flat), (self.codebook_size,))[0]
            dead = self.idle_steps >= self.revive_after
            self._move_codes(dead[:, None].float(), from_first(flat[rows]))
            self.idle_steps.masked_fill_(dead, 0)

    def _move_codes(self, weight: Tensor, target: Tensor) -> None:
        self.codebook.lerp_(target.to(self.codebook.dtype), weight.to(self.codebook.dtype))
        if self.ema_decay is not None:
            self.ema_sums.lerp_(target, weight)
            self.ema_counts.lerp_(torch.ones_like(self.ema_counts), weight[:, 0])

    @torch.no_grad()
    def _track(self, z: Tensor, indices: Tensor) -> None:
        """Updates the averages and counters of a training step."""
        flat, chosen = z.reshape(-1, self.dim), indices.reshape(-1)
        if "recent" in self._buffers:
            self.recent.copy_(torch.cat([self.recent, chosen])[-len(self.recent) :])
        if self.ema_decay is None and self.revive_after is None and self.clustering_decay is None:
            return
        counts = all_sum(usage_counts(chosen, self.codebook_size))
        if self.revive_after is not None:
            self.idle_steps.add_(1).masked_fill_(counts > 0, 0)
        if self.clustering_decay is not None:
            self.usage_average.lerp_(counts / counts.sum(), 1 - self.clustering_decay)
        if self.ema_decay is not None:
            sums = all_sum(torch.zeros_like(self.ema_sums).index_add_(0, chosen, flat))
            self.ema_counts.lerp_(counts, 1 - self.ema_decay)
            self.ema_sums.lerp_(sums, 1 - self.ema_decay)
            # Laplace smoothing keeps the quotient finite for codes that are never chosen
            total = self.ema_counts.sum()
            smoothed = (self.ema_counts + 1e-5) / (total + 1e-5 * self.codebook_size) * total
            self.codebook.copy_(self.ema_sums / smoothed[:, None])

    def extra_repr(self) -> str:
        return f"{self.codebook_size}, {self.dim}, l2_normalize={self.l2_normalize}"


class FSQ(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2024, arXiv 2309.15505): every channel is squashed and rounded to its levels.

    ``bound(z) = tanh(z + shift) * half - offset`` with ``half = (L - 1)(1 + margin) / 2``, ``offset = 1/2`` for even L else 0, and
    ``shift = atanh(offset / half)``, or ``tan`` of it. FlexTok takes atanh and margin 1e-3; NBP's video tokenizer tan and -1e-3.
    Code values are ``round(bound(z)) / (L // 2)``; the index counts with the first channel fastest. There are no weights.

    Args:
        levels: number of levels of every channel.
        usage_window: see :class:`VectorQuantizer`.
    """

    counts: Tensor
    basis: Tensor
    recent: Tensor

    def __init__(
        self, levels: Sequence[int] = (8, 8, 8, 5, 5, 5), *, shift: str = "atanh", margin: float = 1e-3, usage_window: int = 0
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ConfigError(f"FSQ levels {list(levels)}: expected at least one, each of 2 or more")
        if shift not in ("atanh", "tan"):
            raise ConfigError(f"FSQ shift '{shift}': expected 'atanh' or 'tan'")
        self.levels, self.dim, self.codebook_size = tuple(levels), len(levels), math.prod(levels)
        self.shift, self.margin = shift, margin
        # integers, so that casting the model to a lower precision leaves the grid alone
        self.register_buffer("counts", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]], dtype=torch.int64).cumprod(0), persistent=False)
        if usage_window:
            self.register_buffer("recent", torch.full((usage_window,), -1))

    def bound(self, z: Tensor) -> Tensor:
        """Latents ``(..., D)`` squashed into the range of their levels, float32."""
        half = (self.counts - 1) * (1 + self.margin) / 2
        offset = torch.where(self.counts % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half) if self.shift == "atanh" else torch.tan(offset / half)
        return torch.tanh(z.float() + shift) * half - offset

    def lookup(self, indices: Tensor) -> Tensor:
        """Code values of ``indices`` ``(...)``, float32 ``(..., D)`` in [-1, 1]."""
        half = self.counts // 2
        return (indices.long().unsqueeze(-1) // self.basis % self.counts - half) / half

    def index(self, codes: Tensor) -> Tensor:
        """Indices ``(...)`` of code values ``(..., D)``."""
        half = self.counts // 2
        return (((codes.float() * half).round().long() + half) * self.basis).sum(-1)

    def forward(self, z: Tensor, continuous: Tensor | None = None) -> QuantizerOutput:
        """Quantises latents ``(B, ..., D)``.

        Args:
            continuous: bool ``(B,)``, samples whose values stay between the levels, so that a decoder learns from differences that
                do not change a code yet; their indices are rounded like all others.
        """
        if z.shape[-1] != self.dim:
            raise VargenError(f"latents of shape {tuple(z.shape)}: expected {self.dim} channels in the last axis")
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            rounded = straight_through(bounded.round(), bounded)
            indices = self.index(rounded.detach() / (self.counts // 2))
            if continuous is not None:
                rounded = torch.where(continuous.view(-1, *(1,) * (z.dim() - 1)), bounded, rounded)
            codes = rounded / (self.counts // 2)
        counted = self.training and "recent" in self._buffers
        if counted:
            self.recent.copy_(torch.cat([self.recent, indices.reshape(-1)])[-len(self.recent) :])
        statistics = codebook_statistics(indices, self.codebook_size, self.recent if counted else None)
        return QuantizerOutput(codes.to(z.dtype), indices, {}, statistics)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"
