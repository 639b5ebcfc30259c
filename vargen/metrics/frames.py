"""PSNR and SSIM of images and video frames, as the video literature's common_metrics defines them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vargen.errors import VargenError

WINDOW, SIGMA = 11, 1.5


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.dim() < 3 or a.shape[-3] != 3:
        raise VargenError(f"images {tuple(a.shape)} and {tuple(b.shape)}: expected the same shape (..., 3, H, W)")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every frame; 100 where the mean squared error on [0, 1] is below 1e-10.

    Args:
        a, b: ``(..., 3, H, W)`` in [-1, 1].

    Returns:
        float64 ``(...)``.
    """
    _check(a, b)
    error = ((a.double() - b.double()) / 2).square().mean((-3, -2, -1))
    return torch.where(error < 1e-10, 100.0, -10 * error.clamp_min(1e-10).log10())


def clip_psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB from the mean squared error over a whole clip (LARP), which differs from the mean over its frames.

    Args:
        a, b: ``(B, ...)`` in [-1, 1].

    Returns:
        float64 ``(B,)``.
    """
    if a.shape != b.shape:
        raise VargenError(f"clips {tuple(a.shape)} and {tuple(b.shape)}: expected the same shape")
    error = ((a.double() - b.double()) / 2).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Structural similarity of every frame (Wang et al., 2004): data range 1, mean over valid window places and channels.

    Args:
        a, b: ``(..., 3, H, W)`` in [-1, 1], sides of at least 11.
        dtype: of the computation.

    Returns:
        ``(...)``.
    """
    _check(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise VargenError(f"images of {tuple(a.shape[-2:])}: expected sides of at least {WINDOW}, the window of SSIM")
    x, y = ((t.to(dtype) + 1).div(2).reshape(-1, 1, *t.shape[-2:]) for t in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((-3, -2, -1)).view(a.shape[:-2]).mean(-1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian window over ``(N, 1, H, W)``, valid places only."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def frame_scores(a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean and population standard deviation of PSNR and SSIM over all frames of ``(..., 3, H, W)`` pairs in [-1, 1]."""
    scores = {}
    for name, values in (("psnr", psnr(a, b)), ("ssim", ssim(a, b))):
        scores[name], scores[f"{name}_std"] = float(values.mean()), float(values.std(correction=0))
    return scores
