"""Multistage flow: stages of growing resolution that each carry a partly denoised map a little further (E-CAR, arXiv 2412.14170).

The paper's own formulas were not at hand; these are a consistent set in its spirit. Time runs from noise at 0 to data at 1. Stage k
goes from a start s_k to an end e_k, with one noise map of its own resolution::

    x_0 = s_k upsample(X_{k-1}) + (1 - s_k) noise        (noise alone in the first stage, s_1 = 0)
    x_1 = e_k X_k + (1 - e_k) noise                      (X itself in the last stage, e_K = 1)

on a straight path. Maps are ``(B, h, w, C)``; coarser ones are averages of 2x2 blocks.
"""

from __future__ import annotations

import math

from einops import reduce, repeat
from torch import Tensor

from vargen.errors import ConfigError


def pool(x: Tensor, factor: int = 2) -> Tensor:
    """Averages of ``factor`` x ``factor`` blocks."""
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=factor, q=factor)


def upsample(x: Tensor, factor: int = 2) -> Tensor:
    """Every position repeated as a block; ``pool(upsample(x))`` is x."""
    return repeat(x, "b h w c -> b (h p) (w q) c", p=factor, q=factor)


def pyramid(x: Tensor, stages: int) -> list[Tensor]:
    """The maps X_1 ... X_K of a latent, coarse first."""
    return [pool(x, 2 ** (stages - 1 - k)) if k < stages - 1 else x for k in range(stages)]


def following_start(end: float) -> float:
    """Start of the stage after one that ends at ``end``: ``e / (2 - e)``, the most that whitened noise allows."""
    return end / (2 - end)


def schedule(ends: list[float]) -> list[tuple[float, float]]:
    """(start, end) of every stage.

    Raises:
        ConfigError: ends that do not grow within (0, 1], or do not end in 1.
    """
    if not ends or any(not a < b for a, b in zip([0.0, *ends], ends)) or ends[-1] != 1.0:
        raise ConfigError(f"ends of stages {ends}: expected growing numbers above 0 of which the last is 1")
    return list(zip([0.0, *(following_start(e) for e in ends[:-1])], ends))


def endpoints(coarse: Tensor | None, fine: Tensor, start: float, end: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Ends x_0 and x_1 of a stage's path; ``coarse`` is the map one stage below, None in the first stage."""
    x0 = noise if coarse is None else start * upsample(coarse) + (1 - start) * noise
    return x0, end * fine + (1 - end) * noise


def jump(x: Tensor, end: float, draws: Tensor) -> Tensor:
    """The start of the next stage from the end ``x`` of one: upsampled, rescaled, and its noise made white again.

    Upsampling makes the noise equal within every 2x2 block. Noise of variance 1 and correlation -1/3 in a block, which sums to zero
    there, is added so that ``mean = s upsample(X)`` and ``covariance = (1 - s)^2 I``.

    Args:
        draws: standard normal ``(B, 2h, 2w, C)``; zeros give the biased jump without renoising.
    """
    start = following_start(end)
    balanced = (draws - upsample(pool(draws))) * math.sqrt(4 / 3)
    return start / end * upsample(x) + math.sqrt(3) * (1 - start) / 2 * balanced
