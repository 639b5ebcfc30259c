"""Triton kernel of :func:`vargen.kernels.nearest.nearest_code`.

Checked under Triton's interpreter, never run on a GPU: opt-in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vargen.kernels.nearest import check_nearest
from vargen.kernels.triton_dot import dot_operand


@triton.jit
def _nearest_code(
    key_ptr, z_ptr, codes_ptr, z_norms_ptr, code_norms_ptr, N, K, D, K_SPLIT,
    OPERAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    z_norms = tl.load(z_norms_ptr + rows, rows < N, 0.0)
    first = tl.program_id(1) * K_SPLIT
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_code = tl.full((BLOCK_N,), 0, tl.int32) + first
    for start in range(first, min(first + K_SPLIT, K), BLOCK_K):
        codes = start + tl.arange(0, BLOCK_K)
        dot = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for d in range(0, D, BLOCK_D):
            channels = d + tl.arange(0, BLOCK_D)
            z = tl.load(z_ptr + rows[:, None] * D + channels[None, :], (rows < N)[:, None] & (channels < D)[None, :], 0.0)
            e = tl.load(
                codes_ptr + codes.to(tl.int64)[None, :] * D + channels[:, None], (codes < K)[None, :] & (channels < D)[:, None], 0.0
            )
            dot = tl.dot(z.to(OPERAND), e.to(OPERAND), dot, input_precision="ieee")
        code_norms = tl.load(code_norms_ptr + codes, codes < K, 0.0)
        distance = (z_norms[:, None] + code_norms[None, :]) - 2.0 * dot
        distance = tl.where(distance == distance, distance, -float("inf"))
        distance = tl.where((codes < K)[None, :], distance, float("inf"))
        least, code = tl.min(distance, axis=1, return_indices=True)
        closer = least < best
        best = tl.where(closer, least, best)
        best_code = tl.where(closer, start + code, best_code)
    # distance and index in one integer, so that parts of the codebook meet in an atomic minimum whose order does not matter:
    # float bits, made monotone, above the index; the least key is the first nearest code
    bits = best.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (bits.to(tl.int64) << 32) | best_code.to(tl.int64)
    tl.atomic_min(key_ptr + rows, key, mask=rows < N)


def _programs(device: torch.device) -> int:
    """Number of programs that fill a device."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """See :func:`vargen.kernels.nearest.nearest_code`; distances live in registers only.

    Two half-precision arguments of one dtype are multiplied as such (exact products, float32 sums), others in float32.
    """
    check_nearest(z, codebook)
    if z.dtype != codebook.dtype or z.dtype not in (torch.float16, torch.bfloat16):
        z, codebook = z.float(), codebook.float()
    z, codebook = z.contiguous(), codebook.contiguous()
    n, d = z.shape
    k = len(codebook)
    keys = torch.full((n,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=z.device)
    if n:
        block_n, block_k, block_d = 64, 64, min(max(triton.next_power_of_2(d), 16), 32)
        row_blocks = triton.cdiv(n, block_n)
        # the rows of a few images are too few programs: then the codebook is split as well
        split = block_k * triton.cdiv(triton.cdiv(k, block_k), max(_programs(z.device) // row_blocks, 1))
        _nearest_code[(row_blocks, triton.cdiv(k, split))](
            keys, z, codebook, z.float().square().sum(-1), codebook.float().square().sum(-1), n, k, d, split,
            OPERAND=dot_operand(z.dtype), BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d,
        )  # fmt: skip
    return keys & 0xFFFFFFFF
