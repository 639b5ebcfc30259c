"""The denoising step of an AdaLN-MLP diffusion head (MAR, arXiv 2406.11838, section 3.3): its blocks and the DDPM update.

A step of the head is: one matrix product ``SiLU(y) -> all shifts, scales and gates``, ``adaln_mlp_block`` for every residual
block, ``adaln_linear`` for the final layer, and ``ddpm_update``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# entries of the coefficient row that `ddpm_update` takes, in this order; see there
DDPM_COEFFICIENTS = (
    "x0_from_x",
    "x0_from_eps",
    "mean_from_x0",
    "mean_from_x",
    "log_variance_min",
    "log_variance_max",
    "noise_scale",
)


def adaln_linear(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """``Linear(LayerNorm(h) * (1 + scale) + shift)``.

    Args:
        h: ``(..., C)``.
        shift, scale: broadcast to the shape of ``h``.
        ln_weight, ln_bias: ``(C,)``, or None for a norm without affine part.
        weight, bias: ``(M, C)`` and ``(M,)``.

    Returns:
        ``(..., M)``.
    """
    u = F.layer_norm(h, h.shape[-1:], ln_weight, ln_bias, eps) * (1 + scale) + shift
    return F.linear(u, weight, bias)


def adaln_mlp_block(
    h: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """``h + gate * Linear(SiLU(Linear(LayerNorm(h) * (1 + scale) + shift)))``.

    Args:
        h: ``(..., C)``.
        shift, scale, gate: broadcast to the shape of ``h``.
        ln_weight, ln_bias: ``(C,)``, or None for a norm without affine part.
        w1, b1: ``(M, C)`` and ``(M,)``.
        w2, b2: ``(C, M)`` and ``(C,)``.

    Returns:
        ``(..., C)``.
    """
    u = F.silu(adaln_linear(h, shift, scale, ln_weight, ln_bias, w1, b1, eps))
    return h + gate * F.linear(u, w2, b2)


def ddpm_update(
    x: Tensor,
    eps: Tensor,
    v: Tensor,
    noise: Tensor,
    coefficients: Tensor,
    null_eps: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """One ancestral step with learned variance (Ho et al., 2020; Nichol and Dhariwal, 2021, eq. 15), in float32.

    With ``c`` the coefficients of the step, ``e = null_eps + guidance_scale * (eps - null_eps)`` and ``f = (v + 1) / 2``::

        x0   = c.x0_from_x * x - c.x0_from_eps * e
        mean = c.mean_from_x0 * x0 + c.mean_from_x * x
        x'   = mean + c.noise_scale * exp((f * c.log_variance_max + (1 - f) * c.log_variance_min) / 2) * noise

    Args:
        x: ``(..., C)`` noisy tokens.
        eps, null_eps: ``(..., C)`` predicted noise with and without the condition; ``null_eps`` None for no guidance.
        v: ``(..., C)`` predicted interpolation of the log variance, -1..1.
        noise: ``(..., C)`` standard normal draws.
        coefficients: float32 ``(7,)``, ordered as ``DDPM_COEFFICIENTS``: sqrt(1/abar), sqrt(1/abar - 1), the two factors of the
            posterior mean, the clipped posterior log variance, log beta, and the temperature (0 at the last step). A tensor, so
            that a captured graph can take it from a table on the device.

    Returns:
        ``(..., C)`` in the dtype of ``x``.
    """
    x0_from_x, x0_from_eps, mean_from_x0, mean_from_x, log_min, log_max, noise_scale = coefficients.float().unbind()
    noisy, e = x.float(), eps.float()
    if null_eps is not None:
        e = null_eps.float() + guidance_scale * (e - null_eps.float())
    x0 = x0_from_x * noisy - x0_from_eps * e
    mean = mean_from_x0 * x0 + mean_from_x * noisy
    fraction = (v.float() + 1) / 2
    std = torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min))
    return (mean + noise_scale * std * noise.float()).to(x.dtype)
