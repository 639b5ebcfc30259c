"""Operand types of matrix products in Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_OPERANDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_operand(dtype: torch.dtype) -> tl.dtype:
    """The type that ``tl.dot`` multiplies values of ``dtype`` in; sums are float32 either way."""
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32  # the interpreter's dot takes bfloat16 bits for integers
    return _OPERANDS.get(dtype, tl.float32)
