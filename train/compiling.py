"""torch.compile where a compiler is there and pays, eager execution with a notice where not."""

from __future__ import annotations

import logging

import torch
from torch import nn

from vargen.errors import ConfigError

logger = logging.getLogger(__name__)

MODES = ("auto", "true", "false")


def compile_network(network: nn.Module, mode: str | bool, device: torch.device) -> bool:
    """Compiles the forward passes of ``network``'s repeated blocks in place; parameter names do not change.

    Blocks rather than the whole: one compilation serves all of them, and the code between (embedding, losses, addressed noise) has
    nothing to gain.

    Args:
        mode: ``true``, ``false``, or ``auto``: on CUDA only. Never decided by a measurement, which could turn out differently when
            a run is resumed and change its rounding.

    Returns:
        Whether anything is compiled.
    """
    mode = str(mode).lower()
    if mode not in MODES:
        raise ConfigError(f"compile '{mode}': expected one of {', '.join(MODES)}")
    if mode == "false" or (mode == "auto" and device.type != "cuda"):
        return False
    blocks = repeated_blocks(network)
    reason = compiler_failure(device) if blocks else "the network has no repeated blocks"
    if reason:
        logger.warning("torch.compile is not used: %s; training runs eagerly", reason)
        return False
    # a block that cannot be compiled after all runs eagerly, with torch's own warning
    torch._dynamo.config.suppress_errors = True
    for block in blocks:
        block.compile()
    return True


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The members of the outermost module lists whose members are of one class."""
    found: list[nn.Module] = []
    for child in network.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        if len(members) > 1 and len({type(m) for m in members}) == 1:
            found.extend(members)
        else:
            found.extend(repeated_blocks(child))
    return found


def compiler_failure(device: torch.device) -> str | None:
    """Why a small function with a gradient cannot be compiled here, or None if it can."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda t: (t.sin() * 2).sum())(x).backward()
    except Exception as error:  # a missing compiler, Triton or header surfaces as any of many exceptions
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None
