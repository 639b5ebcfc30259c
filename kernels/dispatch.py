"""Which implementation of an operation runs: its plain-torch reference, or its Triton kernel of the same signature.

The reference runs unless the kernel was measured faster than ``torch.compile`` of the reference on this class of device
(``Op.faster_on``), or the user asks for kernels: ``VARGEN_KERNELS=triton`` in the environment, or ``with kernels("triton")``.
``reference`` in the same places turns the measured ones off too. A kernel whose ``faster_on`` is empty has never been shown to pay
on a GPU; it is checked against its reference under Triton's interpreter and stays opt-in. Triton is imported at the first dispatch
to a kernel. Kernels have no backward: a call that must be differentiated takes the reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vargen.errors import VargenError, nearest
from vargen.kernels.diffusion_step import adaln_linear, adaln_mlp_block, ddpm_update
from vargen.kernels.nearest import nearest_code
from vargen.kernels.sample import guided_sample

MODES = ("auto", "reference", "triton")
_override: str | None = None


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        reference: its plain-torch function; the kernel's launcher has the same name in ``triton_ops`` and the same signature.
        faster_on: classes of device, such as ``sm_90``, where ``benchmarks/kernel_times.py`` measured the kernel faster than
            ``torch.compile`` of the reference; empty means never measured, thus opt-in.
    """

    reference: Callable[..., Tensor]
    faster_on: frozenset[str] = frozenset()


OPS: dict[str, Op] = {
    "nearest_code": Op(nearest_code),
    "guided_sample": Op(guided_sample),
    "adaln_linear": Op(adaln_linear),
    "adaln_mlp_block": Op(adaln_mlp_block),
    "ddpm_update": Op(ddpm_update),
}


def kernel(name: str) -> Callable[..., Tensor]:
    """The operation ``name`` as a function with its reference's signature; each call picks the implementation by its arguments.

    Raises:
        VargenError: no such operation.
    """
    if name not in OPS:
        raise VargenError(f"unknown kernel '{name}'{nearest(name, OPS)}")
    return partial(_dispatch, name)


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    """Sets the choice of implementations within the block, over the environment variable: auto, reference or triton."""
    global _override
    previous, _override = _override, _checked(mode)
    try:
        yield
    finally:
        _override = previous


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise VargenError(f"kernels '{mode}' (VARGEN_KERNELS): expected one of {', '.join(MODES)}")
    return mode


def _dispatch(name: str, *args: Any, **kwargs: Any) -> Tensor:
    reference = OPS[name].reference
    mode = _override or _checked(os.environ.get("VARGEN_KERNELS", "auto"))
    if mode == "reference" or (mode == "auto" and not OPS[name].faster_on):
        return reference(*args, **kwargs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiated or choice(name, device_class(tensors[0].device), mode) == "reference":
        return reference(*args, **kwargs)
    return triton_function(name)(*args, **kwargs)


def choice(name: str, device: str, mode: str = "auto") -> str:
    """``reference`` or ``triton``: what runs operation ``name`` on a class of device, see :func:`device_class`."""
    if mode == "triton":
        return "triton" if device.startswith("sm_") or device == "interpreter" else "reference"
    return "triton" if mode == "auto" and device in OPS[name].faster_on else "reference"


def device_class(device: torch.device) -> str:
    """Compute capability of a GPU as ``sm_90``; ``interpreter`` for the CPU under ``TRITON_INTERPRET=1``; else the type."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else device.type


def triton_function(name: str) -> Callable[..., Tensor]:
    """The kernel of an operation, whatever the mode; imports Triton.

    Raises:
        VargenError: Triton is not installed.
    """
    try:
        # a statement, since torch.compile traces through it, as it does not through importlib
        from vargen.kernels import triton_ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise VargenError("Triton kernels need triton: pip install triton, or leave VARGEN_KERNELS unset") from error
    return getattr(triton_ops, name)
