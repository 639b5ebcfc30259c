"""Triton kernels of :mod:`vargen.kernels.diffusion_step`. Checked under Triton's interpreter, never run on a GPU: opt-in.

A residual block is two launches, since the second product needs every column of the first: norm, modulation, product and SiLU in
one, product, gate and residual in the other. With the few rows of a decoding step, time goes into reading the weights, so a launch
spreads their rows over many small programs, each of which normalises the (cached) hidden states again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vargen.errors import VargenError
from vargen.kernels.diffusion_step import DDPM_COEFFICIENTS
from vargen.kernels.triton_dot import dot_operand


@triton.jit
def _adaln_linear(
    out_ptr, h_ptr, shift_ptr, scale_ptr, ln_weight_ptr, ln_bias_ptr, weight_ptr, bias_ptr, N, C, M,
    h_stride, shift_stride, scale_stride, eps,
    SILU: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (rows < N)[:, None]

    mean = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)[None, :]
        h = tl.load(h_ptr + rows[:, None] * h_stride + channels, row & (channels < C), 0.0).to(tl.float32)
        mean += tl.sum(h, 1, keep_dims=True)
    mean /= C
    variance = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)[None, :]
        h = tl.load(h_ptr + rows[:, None] * h_stride + channels, row & (channels < C), 0.0).to(tl.float32)
        variance += tl.sum(tl.where(channels < C, (h - mean) * (h - mean), 0.0), 1, keep_dims=True)
    rstd = tl.rsqrt(variance / C + eps)

    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        channel = (channels < C)[None, :]
        h = tl.load(h_ptr + rows[:, None] * h_stride + channels[None, :], row & channel, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + rows[:, None] * shift_stride + channels[None, :], row & channel, 0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows[:, None] * scale_stride + channels[None, :], row & channel, 0.0).to(tl.float32)
        u = (h - mean) * rstd
        if ln_weight_ptr is not None:
            u *= tl.load(ln_weight_ptr + channels, channels < C, 0.0).to(tl.float32)[None, :]
        if ln_bias_ptr is not None:
            u += tl.load(ln_bias_ptr + channels, channels < C, 0.0).to(tl.float32)[None, :]
        u = tl.where(channel, u * (1.0 + scale) + shift, 0.0)
        w = tl.load(weight_ptr + columns[None, :] * C + channels[:, None], (columns < M)[None, :] & (channels < C)[:, None], 0.0)
        product = tl.dot(u.to(w.dtype).to(OPERAND), w.to(OPERAND), product, input_precision=PRECISION)
    product += tl.load(bias_ptr + columns, columns < M, 0.0).to(tl.float32)[None, :]
    if SILU:
        product *= tl.sigmoid(product)
    tl.store(out_ptr + rows[:, None] * M + columns[None, :], product, row & (columns < M)[None, :])


@triton.jit
def _gated_linear(
    out_ptr, h_ptr, gate_ptr, u_ptr, weight_ptr, bias_ptr, N, C, M, h_stride, gate_stride,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, C, BLOCK_C):
        channels = start + tl.arange(0, BLOCK_C)
        u = tl.load(u_ptr + rows[:, None] * C + channels[None, :], (rows < N)[:, None] & (channels < C)[None, :], 0.0)
        w = tl.load(weight_ptr + columns[None, :] * C + channels[:, None], (columns < M)[None, :] & (channels < C)[:, None], 0.0)
        product = tl.dot(u.to(w.dtype).to(OPERAND), w.to(OPERAND), product, input_precision=PRECISION)
    product += tl.load(bias_ptr + columns, columns < M, 0.0).to(tl.float32)[None, :]
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    h = tl.load(h_ptr + rows[:, None] * h_stride + columns[None, :], inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + columns[None, :], inside, 0.0).to(tl.float32)
    tl.store(out_ptr + rows[:, None] * M + columns[None, :], h + gate * product, inside)


@triton.jit
def _ddpm_update(
    out_ptr, x_ptr, eps_ptr, v_ptr, noise_ptr, coefficients_ptr, null_eps_ptr, N, C,
    x_stride, eps_stride, v_stride, noise_stride, null_eps_stride, guidance_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = flat // C
    channel = flat % C
    inside = row < N
    x = tl.load(x_ptr + row * x_stride + channel, inside, 0.0).to(tl.float32)
    eps = tl.load(eps_ptr + row * eps_stride + channel, inside, 0.0).to(tl.float32)
    v = tl.load(v_ptr + row * v_stride + channel, inside, 0.0).to(tl.float32)
    noise = tl.load(noise_ptr + row * noise_stride + channel, inside, 0.0).to(tl.float32)
    if null_eps_ptr is not None:
        null_eps = tl.load(null_eps_ptr + row * null_eps_stride + channel, inside, 0.0).to(tl.float32)
        eps = null_eps + guidance_scale * (eps - null_eps)
    x0 = tl.load(coefficients_ptr) * x - tl.load(coefficients_ptr + 1) * eps
    mean = tl.load(coefficients_ptr + 2) * x0 + tl.load(coefficients_ptr + 3) * x
    fraction = (v + 1.0) / 2.0
    log_variance = fraction * tl.load(coefficients_ptr + 5) + (1.0 - fraction) * tl.load(coefficients_ptr + 4)
    tl.store(out_ptr + flat, mean + tl.load(coefficients_ptr + 6) * tl.exp(0.5 * log_variance) * noise, inside)


def _rows(t: Tensor, like: Tensor) -> Tensor:
    """``t`` broadcast to ``like`` as rows ``(N, C)`` whose channels are adjacent; a slice of wider rows is not copied."""
    rows = t.expand_as(like).reshape(-1, like.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _check_linear(name: str, channels: int, weight: Tensor, bias: Tensor, *norm: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != channels or bias.shape != weight.shape[:1]:
        raise VargenError(f"{name}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, expected (M, {channels}) and (M,)")
    for part in norm:
        if part is not None and part.shape != (channels,):
            raise VargenError(f"{name}: norm parameter {tuple(part.shape)}, expected ({channels},)")


def _tiles(n: int, m: int, weight: Tensor) -> tuple[tuple[int, int], dict]:
    """Grid and constants of a product of ``n`` rows with a weight of ``m`` rows."""
    block_n = min(max(triton.next_power_of_2(n), 16), 64)
    block_m, block_c = (64, 128 // weight.element_size()) if n > 64 else (16, 128)
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    constants = {
        "OPERAND": dot_operand(weight.dtype),
        "PRECISION": precision,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
    }
    return (triton.cdiv(n, block_n), triton.cdiv(m, block_m)), constants


def _launch_adaln_linear(
    rows: tuple[Tensor, Tensor, Tensor],
    norm: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
) -> Tensor:
    h, shift, scale = rows
    (n, c), m = h.shape, len(weight)
    out = torch.empty(n, m, dtype=weight.dtype, device=h.device)
    if n:
        grid, constants = _tiles(n, m, weight)
        _adaln_linear[grid](
            out, h, shift, scale, *norm, weight.contiguous(), bias, n, c, m,
            h.stride(0), shift.stride(0), scale.stride(0), eps, SILU=silu, **constants,
        )  # fmt: skip
    return out


@torch.no_grad()
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
    """See :func:`vargen.kernels.diffusion_step.adaln_linear`; in float32 up to the product, which is in the weight's dtype."""
    _check_linear("adaln_linear", h.shape[-1], weight, bias, ln_weight, ln_bias)
    rows = (_rows(h, h), _rows(shift, h), _rows(scale, h))
    return _launch_adaln_linear(rows, (ln_weight, ln_bias), weight, bias, eps, silu=False).reshape(*h.shape[:-1], len(weight))


@torch.no_grad()
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
    """See :func:`vargen.kernels.diffusion_step.adaln_mlp_block`; in float32 but for the products, in the weights' dtype."""
    _check_linear("adaln_mlp_block", h.shape[-1], w1, b1, ln_weight, ln_bias)
    _check_linear("adaln_mlp_block", len(w1), w2, b2)
    if len(w2) != h.shape[-1]:
        raise VargenError(f"adaln_mlp_block: second weight {tuple(w2.shape)}, expected ({h.shape[-1]}, {len(w1)})")
    h_rows, shift, scale, gate = (_rows(t, h) for t in (h, shift, scale, gate))
    u = _launch_adaln_linear((h_rows, shift, scale), (ln_weight, ln_bias), w1, b1, eps, silu=True)
    n, c = h_rows.shape
    out = torch.empty(n, c, dtype=h.dtype, device=h.device)
    if n:
        grid, constants = _tiles(n, c, w2)
        _gated_linear[grid](
            out, h_rows, gate, u, w2.contiguous(), b2, n, len(w1), c, h_rows.stride(0), gate.stride(0), **constants
        )  # fmt: skip
    return out.reshape(h.shape)


@torch.no_grad()
def ddpm_update(
    x: Tensor,
    eps: Tensor,
    v: Tensor,
    noise: Tensor,
    coefficients: Tensor,
    null_eps: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """See :func:`vargen.kernels.diffusion_step.ddpm_update`."""
    if coefficients.shape != (len(DDPM_COEFFICIENTS),):
        raise VargenError(f"ddpm_update: coefficients {tuple(coefficients.shape)}, expected ({len(DDPM_COEFFICIENTS)},)")
    x_rows, eps, v, noise = (_rows(t, x) for t in (x, eps, v, noise))
    null_eps = None if null_eps is None else _rows(null_eps, x)
    n, c = x_rows.shape
    out = torch.empty(n, c, dtype=x.dtype, device=x.device)
    if n:
        block = min(triton.next_power_of_2(n * c), 512)
        _ddpm_update[(triton.cdiv(n * c, block),)](
            out, x_rows, eps, v, noise, coefficients.float().contiguous(), null_eps, n, c,
            x_rows.stride(0), eps.stride(0), v.stride(0), noise.stride(0), 0 if null_eps is None else null_eps.stride(0),
            float(guidance_scale), BLOCK=block,
        )  # fmt: skip
    return out.reshape(x.shape)
