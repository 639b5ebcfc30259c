"""FlexTok: an image as an ordered sequence of tokens, any prefix of which decodes to an image.

Bachmann et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", ICML 2025, arXiv 2502.13967. The decoder
is a rectified flow in the latents of a frozen VAE, with noise at t = 1 and data at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from vargen.condition import TextFeatures
from vargen.errors import ConfigError, SpaceError, VargenError, nearest
from vargen.flow.flow import draw_times, euler, shifted_times, straight_path, uniform_times
from vargen.guidance import normalized_difference
from vargen.model import TokenizerOutput, VisualTokenizer
from vargen.nn.gaussian import DiagonalGaussian
from vargen.nn.quantize import FSQ
from vargen.noise import Noise, as_noise
from vargen.space import TokenSpace
from vargen.tokenizers.flextok_nets import FlowDecoder, RegisterEncoder

RELEASED_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 256,
}
PRESETS: dict[str, dict[str, Any]] = {
    "d12-d12": {"encoder_dim": 768, "encoder_depth": 12, "decoder_dim": 768, "decoder_depth": 12, "vae": RELEASED_VAE},
    "d18-d18": {"encoder_dim": 1152, "encoder_depth": 18, "decoder_dim": 1152, "decoder_depth": 18, "vae": RELEASED_VAE},
    "d18-d28": {"encoder_dim": 1152, "encoder_depth": 18, "decoder_dim": 1792, "decoder_depth": 28, "vae": RELEASED_VAE},
    "flextok-tiny": {
        "sample_size": 32,
        "patch_size": 4,
        "num_registers": 16,
        "encoder_dim": 128,
        "encoder_depth": 3,
        "decoder_dim": 192,
        "decoder_depth": 4,
        "head_dim": 32,
    },
}
NESTED = ("uniform", "pow2", "uniform_pow2")
Scale = float | Callable[[float], float]


class FlexTok(VisualTokenizer):
    """Images to ``num_registers`` ids, coarse first; any number of leading ids decodes.

    Args:
        sample_size: largest image side; smaller ones crop the position tables.
        vae: arguments of diffusers' ``AutoencoderKL``, which stays frozen; None to work on pixels as they are.
        scaling_factor: of the VAE's latents; None for the VAE's own.
        patch_size: latent cells per patch and side.
        num_registers, levels: number of tokens, and levels of every channel of their codes.
        encoder_dim, encoder_depth, decoder_dim, decoder_depth, head_dim: of the two transformers.
        positions: ``sincos`` (released) or ``learned`` positions of the patches.
        max_timestep: times are multiplied by 1000 / max_timestep where they are embedded.
        learned_null: the empty condition is a learned vector, else zeros.
        nested: law of the number of registers kept in training: ``uniform`` over 1..N, ``pow2`` over powers of two, or
            ``uniform_pow2``, uniform and rounded up to one.
        condition_dropout: share of training samples without condition.
        times, mode_scale: law of training times, see :func:`training_times`.
        time_shift: times of training and decoding move towards noise, ``t`` to ``s t / (1 + (s - 1) t)`` (Esser et al., 2024,
            section 5.3.2). Flat pixels show through much noise: only times close to 1 ask the registers what is there.
        flow_weight: of the flow's loss.
        repa_layer, repa_dim, repa_hidden: the patches after this block pass a projector of that hidden width to ``repa_dim``
            channels, ``features["repa_teacher"]``, to be aligned with a teacher's (REPA, arXiv 2410.06940); None for no projector.
        usage_window: see :class:`vargen.nn.quantize.VectorQuantizer`.
        continuous_share: share of training samples whose codes are not rounded, see :meth:`vargen.nn.quantize.FSQ.forward`.
        register_std: deviation of the encoder's registers at the start. In short trainings registers that are as large as what they
            read from the patches soon tell different things; small ones all tell the same.
        code_gain: of the first weights that make codes. At 1 many codes start at their outermost levels, where the quantizer is
            flat and tells the encoder nothing.
        patch_gain: of the first embedding of noised patches. At 1 the noise is as large as the patches' positions, by which they
            find what registers tell of them.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        vae: Mapping[str, Any] | None = None,
        scaling_factor: float | None = None,
        patch_size: int = 2,
        num_registers: int = 256,
        levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        head_dim: int = 64,
        positions: str = "sincos",
        max_timestep: float = 1.0,
        learned_null: bool = True,
        nested: str = "uniform_pow2",
        condition_dropout: float = 0.2,
        times: str = "logit-normal",
        mode_scale: float = 1.29,
        time_shift: float = 1.0,
        flow_weight: float = 1.0,
        repa_layer: int = 1,
        repa_dim: int | None = None,
        repa_hidden: int = 2048,
        usage_window: int = 0,
        continuous_share: float = 0.0,
        register_std: float = 0.02,
        code_gain: float = 1.0,
        patch_gain: float = 1.0,
    ) -> None:
        super().__init__()
        if nested not in NESTED:
            raise ConfigError(f"nested dropout '{nested}'{nearest(nested, NESTED)}")
        if time_shift <= 0:
            raise ConfigError(f"time_shift {time_shift}: expected a positive number, 1 for none")
        if repa_dim is not None and not 0 <= repa_layer < decoder_depth:
            raise ConfigError(f"repa_layer {repa_layer}: expected 0..{decoder_depth - 1}")
        self.front = None if vae is None else AutoencoderKL(**vae).requires_grad_(False)
        self.latent_scale = self._latent_scale()
        channels = 3 if self.front is None else int(self.front.config.latent_channels)
        self.stride = 1 if self.front is None else 2 ** (len(self.front.config.block_out_channels) - 1)
        side = self.stride * patch_size
        if sample_size % side:
            raise ConfigError(f"sample_size {sample_size}: expected a multiple of {side}")
        grid = (sample_size // side, sample_size // side)
        shared: dict[str, Any] = {"head_dim": head_dim, "code_dim": len(levels), "positions": positions}
        self.encoder = RegisterEncoder(
            channels, patch_size, grid, num_registers, encoder_dim, encoder_depth, **shared, register_std=register_std
        )
        self.quantizer = FSQ(levels, usage_window=usage_window)
        self.decoder = FlowDecoder(
            channels,
            patch_size,
            grid,
            num_registers,
            decoder_dim,
            decoder_depth,
            **shared,
            max_timestep=max_timestep,
            learned_null=learned_null,
        )
        self.projector = None if repa_dim is None else _projector(decoder_dim, repa_hidden, repa_dim)
        self.encoder.apply(_init_weights)
        self.decoder.apply(_init_weights)
        for modulation in (*self.decoder.modulations, self.decoder.modulation_out):
            nn.init.zeros_(modulation.linear.weight)
        nn.init.zeros_(self.decoder.to_patch.weight)
        nn.init.xavier_uniform_(self.encoder.to_code.weight, gain=code_gain)
        nn.init.xavier_uniform_(self.decoder.patches.proj.weight, gain=patch_gain)
        nn.init.zeros_(self.encoder.to_code.bias)

    def _latent_scale(self) -> float:
        given = self.config.scaling_factor
        return given if given is not None else 1.0 if self.front is None else float(self.front.config.scaling_factor)

    @property
    def space(self) -> TokenSpace:
        return TokenSpace(levels=((self.config.num_registers,),), codebook_size=self.quantizer.codebook_size, ordered=True)

    @property
    def sample_shape(self) -> tuple[int, int]:
        return (self.config.sample_size, self.config.sample_size)

    def check_pixels(self, pixels: Tensor, text: TextFeatures | None = None) -> Tensor:
        self._check_size(super().check_pixels(pixels, text).shape[2:])
        return pixels

    def _check_size(self, size: Sequence[int]) -> tuple[int, int]:
        side, largest = self.stride * self.config.patch_size, self.config.sample_size
        if len(size) != 2 or any(n % side or not 0 < n <= largest for n in size):
            raise VargenError(f"FlexTok: pixels of {tuple(size)}, expected height and width in multiples of {side} up to {largest}")
        return size[0], size[1]

    def posterior(self, pixels: Tensor) -> DiagonalGaussian | None:
        """The VAE's posterior of the unscaled latents; None without a VAE."""
        if self.front is None:
            return None
        with torch.no_grad():
            return DiagonalGaussian.from_moments(self.front.encode(pixels).latent_dist.parameters, dim=1)

    def latents(self, pixels: Tensor, noise: Noise | None = None) -> Tensor:
        """Scaled latents ``(B, C, H / stride, W / stride)``: a sample of the posterior, or its mean without noise."""
        posterior = self.posterior(pixels)
        if posterior is None:
            return pixels * self.latent_scale
        mean = posterior.mean
        sample = mean if noise is None else posterior.sample(noise.normal("posterior", mean.shape[1:]).to(mean))
        return sample * self.latent_scale

    def paint(self, latents: Tensor) -> Tensor:
        """Scaled latents to pixels."""
        latents = latents / self.latent_scale
        return latents if self.front is None else self.front.decode(latents).sample

    def encode(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> Tensor:
        """Pixels to ids ``(B, num_registers)``: of a sample of the VAE's posterior, as published, or of its mean without noise."""
        return self.quantizer(self.encoder(self.latents(self.check_pixels(pixels, text), noise))).indices

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        text: TextFeatures | None = None,
        noise: Noise | None = None,
        *,
        keep: Tensor | None = None,
        num_inference_steps: int = 25,
        guidance_scale: Scale = 7.5,
        normalized_guidance: bool = True,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """The first ids ``(B, n)``, 1 <= n <= num_registers, to pixels.

        Args:
            noise: draws the latent that the flow starts from.
            keep: int64 ``(B,)``, number of ids that count in each sample; all of them by default.
            num_inference_steps: Euler steps from noise to image.
            guidance_scale: 1 for none; or a function of the time in [0, 1].
            normalized_guidance: adaptive projected guidance (:func:`~vargen.guidance.normalized_difference`), else the plain one.
            size: pixels ``(H, W)`` to decode to, as encoded; the full size by default.

        Raises:
            SpaceError: no id or more than there are registers, ids outside the codebook, or ``keep`` outside 1..n.
            VargenError: a size that was not encoded: beyond the largest, or no multiple of the patches.
        """
        tokens, keep = self._pad(tokens, keep)
        self.check_text(text, len(tokens))
        latents = self.sample(self.quantizer.lookup(tokens), keep, as_noise(noise, len(tokens), tokens.device), num_inference_steps,
                              guidance_scale, normalized_guidance, size)  # fmt: skip
        return self.paint(latents)

    def _pad(self, tokens: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        registers = self.config.num_registers
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= registers:
            raise SpaceError(f"tokens of shape {tuple(tokens.shape)}: FlexTok decodes (batch, n) with n in 1..{registers}")
        count = tokens.shape[1]
        if keep is None:
            keep = torch.full((len(tokens),), count, device=tokens.device)
        if keep.shape != (len(tokens),) or int(keep.min()) < 1 or int(keep.max()) > count:
            raise SpaceError(
                f"keep of shape {tuple(keep.shape)}: expected one number in 1..{count} for each of {len(tokens)} samples"
            )
        return self.space.check(nn.functional.pad(tokens, (0, registers - count))), keep.to(tokens.device)

    def sample(
        self,
        codes: Tensor,
        keep: Tensor,
        noise: Noise,
        num_inference_steps: int = 25,
        guidance_scale: Scale = 7.5,
        normalized_guidance: bool = True,
        size: Sequence[int] | None = None,
    ) -> Tensor:
        """Codes ``(B, num_registers, code_dim)`` to scaled latents; arguments as of :meth:`decode`."""
        height, width = self._check_size(size or self.sample_shape)
        shape = (self.decoder.patches.proj.in_features // self.config.patch_size**2, height // self.stride, width // self.stride)
        start = noise.normal("latent", shape)
        batch = len(codes)
        guided = callable(guidance_scale) or guidance_scale != 1
        registers = self.decoder.condition(codes, keep)
        if guided:
            nothing = torch.ones(batch, dtype=torch.bool, device=codes.device)
            registers = torch.cat([registers, self.decoder.condition(codes, keep, nothing)])
        average: Tensor | None = None

        def velocity(x: Tensor, t: float) -> Tensor:
            nonlocal average
            rows = 2 if guided else 1
            stacked = x.repeat(rows, 1, 1, 1).to(registers.dtype)
            v = self.decoder(stacked, torch.full((rows * batch,), t, device=x.device), registers)[0].float()
            if not guided:
                return v
            full, null = v.chunk(2)
            scale = guidance_scale(t) if callable(guidance_scale) else guidance_scale
            if not normalized_guidance:
                return null + scale * (full - null)
            direction, average = normalized_difference(full, null, average)
            return full + (scale - 1) * direction

        return euler(velocity, start, shifted_times(uniform_times(num_inference_steps), self.config.time_shift)).tokens

    @torch.no_grad()
    def scores(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> dict[str, Tensor]:
        """PSNR in dB of the round trip with all registers and with one; without guidance, which trades fidelity."""
        ids = self.encode(pixels, text)
        scores = {}
        for count in (1, ids.shape[1]):
            painted = self.decode(ids[:, :count], noise=noise, num_inference_steps=10, guidance_scale=1.0, size=pixels.shape[2:])
            error = (painted.clamp(-1, 1) - pixels).square().flatten(1).mean(1)
            scores[f"psnr_{count}"] = 10 * torch.log10(4 / error.clamp(min=1e-10))
        return scores

    def forward(self, pixels: Tensor, text: TextFeatures | None = None, noise: Noise | None = None) -> TokenizerOutput:
        """The training pass: the flow's loss at one time per image, with some registers and sometimes all of them left out."""
        self.check_pixels(pixels, text)
        batch = len(pixels)
        noise = as_noise(noise, batch, pixels.device)
        latents = self.latents(pixels, noise)
        share = self.config.continuous_share
        q = self.quantizer(self.encoder(latents), noise.bernoulli("continuous", share) if share and self.training else None)
        keep = kept_registers(noise, self.config.nested, self.config.num_registers)
        null = noise.bernoulli("null", self.config.condition_dropout)
        t = shifted(training_times(noise, self.config.times, self.config.mode_scale), self.config.time_shift)
        loss, tapped = self.flow_loss(latents, q.quantized, keep, null, t, noise.normal("flow", latents.shape[1:]))
        features = dict(q.statistics)
        if self.projector is not None:
            features["repa_teacher"] = self.projector(tapped)
        return TokenizerOutput(q.indices, None, {"flow": self.config.flow_weight * loss.mean()}, features)

    def flow_loss(
        self, latents: Tensor, codes: Tensor, keep: Tensor, null: Tensor, t: Tensor, normal: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Mean squared error of the velocity ``noise - latents``, ``(B,)``, and the patches after ``repa_layer``."""
        x, target = straight_path(latents, normal, t)
        registers = self.decoder.condition(codes, keep, null)
        velocity, tapped = self.decoder(x, t, registers, tap=self.config.repa_layer)
        return (velocity.float() - target).square().flatten(1).mean(1), tapped


def kept_registers(noise: Noise, law: str, count: int) -> Tensor:
    """Numbers of registers that nested dropout keeps, int64 ``(B,)`` in 1..count."""
    powers = torch.tensor([2**i for i in range(int(math.log2(count)) + 1)] + ([count] if count & (count - 1) else []))
    powers = powers.to(noise.device)
    if law == "pow2":
        return powers[noise.integers("keep", len(powers))]
    keep = 1 + noise.integers("keep", count)
    return keep if law == "uniform" else powers[torch.searchsorted(powers, keep)]


def training_times(noise: Noise, law: str, mode_scale: float = 1.29) -> Tensor:
    """Times of a batch, ``(B,)``: the laws of :func:`~vargen.flow.flow.draw_times`, or

    ``stratified``: logit-normal with one draw in each of B equal parts of the probability; ``mode``: uniform ``u`` warped to
    ``1 - u - s (cos(pi u / 2)^2 - 1 + u)`` (Esser et al., 2024, arXiv 2403.03206, section 3.1).
    """
    if law == "stratified":
        strata = torch.arange(noise.batch_size, device=noise.device)
        u = (strata + noise.uniform("time")) / noise.batch_size
        return torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)).sigmoid().float()
    if law == "mode":
        u = noise.uniform("time")
        return 1 - u - mode_scale * ((math.pi * u / 2).cos().square() - 1 + u)
    return draw_times(noise, "time", law)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times moved towards noise at 1: as :func:`~vargen.flow.flow.shifted_times` does with a list."""
    return shift * t / (1 + (shift - 1) * t)


def _projector(dim: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
