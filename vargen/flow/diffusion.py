"""Gaussian diffusion over continuous tokens: tables, respacing, losses with learned variance, DDPM and DDIM sampling.

Sources: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (cosine schedule, learned variance, respacing),
Salimans and Ho 2022 (v-prediction), Lin et al. 2024 (zero terminal SNR). Tables are float64, cast to float32 where used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from vargen.errors import ConfigError, nearest
from vargen.flow.sample import HeadSample
from vargen.kernels.dispatch import kernel

PREDICTIONS = ("eps", "v", "x0")
VARIANCES = ("learned", "large", "small")

ddpm_update = kernel("ddpm_update")

# (x, timestep on the original scale) -> prediction (..., C), followed by C variance values where the variance is learned
Predict = Callable[[Tensor, int], Tensor]
StepNoise = Callable[[int], Tensor]


def cosine_betas(steps: int = 1000, limit: float = 0.999) -> Tensor:
    """``1 - abar(i+1)/abar(i)``, ``abar(s) = cos^2((s/T + 0.008)/1.008 * pi/2)``, at most ``limit`` (Nichol, eq. 17)."""

    def survival(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - survival((i + 1) / steps) / survival(i / steps), limit) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, stop: float = 0.012, zero_terminal_snr: bool = False) -> Tensor:
    """Betas linear in their square root (latent diffusion), if asked rescaled so that the last step is pure noise (Lin et al.)."""
    betas = torch.linspace(start**0.5, stop**0.5, steps, dtype=torch.float64) ** 2
    if not zero_terminal_snr:
        return betas
    root = (1 - betas).cumprod(0).sqrt()
    survival = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([survival[:1], survival[1:] / survival[:-1]])


SCHEDULES: dict[str, Callable[[], Tensor]] = {
    "cosine": cosine_betas,
    "scaled-linear": scaled_linear_betas,
    "scaled-linear-zero-snr": lambda: scaled_linear_betas(zero_terminal_snr=True),
}


def named_betas(schedule: str) -> Tensor:
    """Betas of 1000 steps: ``cosine``, ``scaled-linear`` or ``scaled-linear-zero-snr``; raises ConfigError for another name."""
    if schedule not in SCHEDULES:
        raise ConfigError(f"diffusion schedule '{schedule}'{nearest(schedule, SCHEDULES)}")
    return SCHEDULES[schedule]()


def respaced_timesteps(steps: int, spacing: str) -> list[int]:
    """Timesteps of a chain of ``steps`` that sampling keeps, ascending.

    Args:
        spacing: ``""`` all; ``"n"`` n evenly spaced ones from the first to the last; ``"a,b,c"`` so many in each of equal sections;
            ``"ddimN"`` N multiples of a stride, from 0; ``"trailingN"`` N multiples of steps/N counted back from the last.

    Raises:
        ConfigError: the chain cannot be spaced like that.
    """
    match = re.fullmatch(r"(ddim|trailing)?(\d+(?:,\d+)*)?", spacing)
    counts = [int(n) for n in match[2].split(",")] if match and match[2] else []
    if match is None or (match[1] and len(counts) != 1) or any(not 1 <= n <= steps for n in counts):
        raise ConfigError(
            f"diffusion spacing '{spacing}': expected 'n', 'a,b,...', 'ddimN' or 'trailingN' with counts of 1..{steps}"
        )
    if not counts:
        return list(range(steps))
    if match[1] == "trailing":
        return sorted(round(steps - i * steps / counts[0]) - 1 for i in range(counts[0]))
    if match[1] == "ddim":
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == counts[0]:
                return list(range(0, steps, stride))
        raise ConfigError(f"diffusion spacing '{spacing}': no stride keeps {counts[0]} of {steps} timesteps; use '{counts[0]}'")
    kept: list[int] = []
    first = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ConfigError(f"diffusion spacing '{spacing}': section {section + 1} has {size} timesteps, {count} were asked for")
        step = 1.0 if count == 1 else (size - 1) / (count - 1)
        # adding up the stride, instead of multiplying, is what decides how halves are rounded in published samplers
        place = 0.0
        for _ in range(count):
            kept.append(first + round(place))
            place += step
        first += size
    return kept


class Diffusion:
    """A chain of noise levels and what the network predicts on it.

    Args:
        betas: float64 ``(S,)``.
        timesteps: the timestep of each level on the scale that the network was trained with; 0..S-1 by default.
        prediction: what the network's output is: the noise ``eps``, ``v = sqrt(abar) eps - sqrt(1 - abar) x0``, or ``x0``.
        variance: ``learned`` (the network also returns the interpolation between the two others), ``large`` (beta) or ``small``
            (that of the posterior).

    Attributes (float64 ``(S,)``):
        betas, alphas_cumprod, alphas_cumprod_prev, posterior_variance, posterior_log_variance_clipped (its first entry replaced by
        the second), posterior_mean_coef1 (of x0), posterior_mean_coef2 (of x_t), sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod.
    """

    def __init__(
        self, betas: Tensor, timesteps: list[int] | None = None, prediction: str = "eps", variance: str = "learned"
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ConfigError(f"diffusion prediction '{prediction}'{nearest(prediction, PREDICTIONS)}")
        if variance not in VARIANCES:
            raise ConfigError(f"diffusion variance '{variance}'{nearest(variance, VARIANCES)}")
        self.prediction, self.variance = prediction, variance
        self.betas = betas = betas.double()
        self.timesteps = list(range(len(betas))) if timesteps is None else timesteps
        self.alphas_cumprod = abar = (1 - betas).cumprod(0)
        self.alphas_cumprod_prev = previous = torch.cat([abar.new_ones(1), abar[:-1]])
        self.posterior_variance = betas * (1 - previous) / (1 - abar)
        self.posterior_log_variance_clipped = self._clipped(self.posterior_variance).log()
        self.posterior_mean_coef1 = betas * previous.sqrt() / (1 - abar)
        self.posterior_mean_coef2 = (1 - previous) * (1 - betas).sqrt() / (1 - abar)
        self.sqrt_recip_alphas_cumprod = (1 / abar).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / abar - 1).sqrt()
        zero, one = torch.zeros_like(abar), torch.ones_like(abar)
        signal, spread = abar.sqrt(), (1 - abar).sqrt()
        # x0 = a * x_t - b * output and eps = c * x_t + d * output, for the output that the network gives
        self._tables = {
            "signal": signal,
            "spread": spread,
            "x0_from_x": {"eps": self.sqrt_recip_alphas_cumprod, "v": signal, "x0": zero}[prediction],
            "x0_from_output": {"eps": self.sqrt_recipm1_alphas_cumprod, "v": spread, "x0": -one}[prediction],
            "eps_from_x": {"eps": zero, "v": spread, "x0": 1 / spread}[prediction],
            "eps_from_output": {"eps": one, "v": signal, "x0": -signal / spread}[prediction],
            "mean_from_x0": self.posterior_mean_coef1,
            "mean_from_x": self.posterior_mean_coef2,
            "log_min": self.posterior_log_variance_clipped,
            "log_max": betas.log(),
        }
        if variance == "small":
            self._tables["log_max"] = self.posterior_log_variance_clipped
        if variance == "large":
            self._tables["log_min"] = self._tables["log_max"] = torch.cat(
                [self._clipped(self.posterior_variance)[:1], betas[1:]]
            ).log()
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    @staticmethod
    def _clipped(variance: Tensor) -> Tensor:
        return torch.cat([variance[1:2], variance[1:]]) if len(variance) > 1 else variance.clamp(min=1e-20)

    def __len__(self) -> int:
        return len(self.timesteps)

    def respaced(self, spacing: str) -> Diffusion:
        """The chain over the kept timesteps, see :func:`respaced_timesteps`, with betas that give the same ``abar`` there."""
        kept = respaced_timesteps(len(self), spacing)
        abar = self.alphas_cumprod[kept]
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        return Diffusion(betas, [self.timesteps[i] for i in kept], self.prediction, self.variance)

    def _at(self, name: str, level: int | Tensor, like: Tensor) -> Tensor | float:
        """Entries of a table in the shape of ``level`` with axes appended until they broadcast to ``like``."""
        if isinstance(level, int):
            return float(self._tables[name][level])
        if level.device not in self._on_device:
            self._on_device[level.device] = {k: v.float().to(level.device) for k, v in self._tables.items()}
        entry = self._on_device[level.device][name][level]
        return entry.reshape(entry.shape + (1,) * (like.dim() - entry.dim()))

    def add_noise(self, x0: Tensor, noise: Tensor, level: int | Tensor) -> Tensor:
        """``x_t = sqrt(abar) x0 + sqrt(1 - abar) noise``; ``level`` indexes this chain, its shape is a prefix of x0's."""
        return self._at("signal", level, x0) * x0 + self._at("spread", level, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, level: int | Tensor) -> Tensor:
        """What the network should predict."""
        if self.prediction == "v":
            return self._at("signal", level, x0) * noise - self._at("spread", level, x0) * x0
        return noise if self.prediction == "eps" else x0

    def predicted_x0(self, output: Tensor, x: Tensor, level: int | Tensor) -> Tensor:
        """x0 that a prediction stands for, not clipped."""
        return self._at("x0_from_x", level, x) * x - self._at("x0_from_output", level, x) * output

    def predicted_noise(self, output: Tensor, x: Tensor, level: int | Tensor) -> Tensor:
        """Noise that a prediction stands for."""
        return self._at("eps_from_x", level, x) * x + self._at("eps_from_output", level, x) * output

    def posterior_mean(self, x0: Tensor, x: Tensor, level: int | Tensor) -> Tensor:
        """Mean of ``q(x_{t-1} | x_t, x0)``."""
        return self._at("mean_from_x0", level, x) * x0 + self._at("mean_from_x", level, x) * x

    def log_variance(self, values: Tensor | None, level: int | Tensor, like: Tensor) -> Tensor:
        """Log variance of a step: interpolated by the network's ``values`` (-1 the posterior's, 1 beta), or fixed."""
        low, high = self._at("log_min", level, like), self._at("log_max", level, like)
        if self.variance != "learned" or values is None:
            return torch.as_tensor(high, dtype=like.dtype, device=like.device).expand_as(like)
        fraction = (values + 1) / 2
        return fraction * high + (1 - fraction) * low

    def losses(self, output: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of the prediction and variational term of a learned variance, both averaged over channels.

        Args:
            output: the network's ``(..., C)``, or ``(..., 2C)`` for a learned variance.
            x0, noise: ``(..., C)``; level: int64, of a shape that broadcasts to ``(...)``.

        Returns:
            two tensors ``(...)``, the second in bits (0 for a fixed variance). Its gradient reaches only the variance values.
        """
        prediction, values = self.split(output)
        error = (self.target(x0, noise, level) - prediction).square().mean(-1)
        if values is None:
            return error, torch.zeros_like(error)
        return error, self.variational_bits(prediction.detach(), values, x0, noise, level)

    def variational_bits(self, prediction: Tensor, values: Tensor, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x0) || p) in bits, averaged over channels; at t = 0 minus the log likelihood of a bin around x0.

        The bin's half width 1/255 is a convention of 8-bit images (Ho et al., 2020, eq. 13) that tokens inherit. Returns ``(...)``.
        """
        x = self.add_noise(x0, noise, level)
        mean = self.posterior_mean(self.predicted_x0(prediction, x, level), x, level)
        log_variance = self.log_variance(values, level, x)
        true_mean, true_log_variance = self.posterior_mean(x0, x, level), self._at("log_min", level, x)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -binned_log_likelihood(x0, mean, 0.5 * log_variance)
        first = (level == 0).reshape(level.shape + (1,) * (x.dim() - level.dim()))
        return torch.where(first, nll, kl).mean(-1) / math.log(2)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as prediction and variance values (None for a fixed variance)."""
        if self.variance != "learned":
            return output, None
        prediction, values = output.chunk(2, dim=-1)
        return prediction, values

    def coefficients(self, temperature: float, device: torch.device) -> Tensor:
        """float32 ``(S, 7)``, a row per level in the order of :data:`vargen.kernels.diffusion_step.DDPM_COEFFICIENTS`."""
        names = ("x0_from_x", "x0_from_output", "mean_from_x0", "mean_from_x", "log_min", "log_max")
        scale = torch.full_like(self.betas, temperature)
        scale[0] = 0.0
        return torch.stack([*(self._tables[name] for name in names), scale], dim=1).float().to(device)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, exp(log_variance1)) || N(mean2, exp(log_variance2))) in nats, elementwise."""
    log_ratio = log_variance2 - log_variance1
    return 0.5 * (-1.0 + log_ratio + torch.exp(-log_ratio) + (mean1 - mean2).square() * torch.exp(-log_variance2))


def binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor, half_bin: float = 1 / 255) -> Tensor:
    """Log probability of the bin around x under a Gaussian; bins are open beyond -0.999 and 0.999. Nats, elementwise."""

    def cdf(u: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    upper = cdf((x - mean + half_bin) * torch.exp(-log_std))
    lower = cdf((x - mean - half_bin) * torch.exp(-log_std))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()


def ddpm(
    chain: Diffusion,
    predict: Predict,
    start: Tensor,
    step_noise: StepNoise,
    temperature: float = 1.0,
    known: tuple[Tensor, Tensor] | None = None,
) -> HeadSample:
    """Ancestral sampling, from the last level of ``chain`` to the first.

    Args:
        predict: network output ``(..., C)`` or ``(..., 2C)`` at noisy tokens and an original timestep, guidance included.
        start: initial noise ``(..., C)``, not scaled by the temperature.
        step_noise: level to standard normal draws ``(..., C)``; level 0 is never asked for.
        temperature: factor of the noise of every step.
        known: mask ``(..., 1)`` and tokens ``(..., C)`` that are given there: before every step they are put in, noised with their
            own part of ``start`` (Hi-MAR).
    """
    coefficients = chain.coefficients(temperature, start.device)
    x, log_std_sum, log_std = start, torch.zeros_like(start), torch.zeros_like(start)
    for level in reversed(range(len(chain))):
        if known is not None:
            x = torch.where(known[0], chain.add_noise(known[1], start, level), x)
        prediction, values = chain.split(predict(x, chain.timesteps[level]))
        noise = step_noise(level) if level else torch.zeros_like(x)
        x = ddpm_update(x, prediction, torch.zeros_like(x) if values is None else values, noise, coefficients[level])
        log_std = 0.5 * chain.log_variance(values, level, x)
        log_std_sum = log_std_sum + log_std if level else log_std_sum
    return HeadSample(x, x, log_std.exp() * temperature, log_std_sum)


def ddim(chain: Diffusion, predict: Predict, start: Tensor) -> HeadSample:
    """Deterministic sampling (Song et al., 2021, eq. 12 with sigma 0), from the last level of ``chain`` to the first."""
    x = start
    for level in reversed(range(len(chain))):
        output, _ = chain.split(predict(x, chain.timesteps[level]))
        x0, noise = chain.predicted_x0(output, x, level), chain.predicted_noise(output, x, level)
        x = chain.add_noise(x0, noise, level - 1) if level else x0
    return HeadSample.deterministic(x)
