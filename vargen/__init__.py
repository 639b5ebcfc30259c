"""vargen: visual autoregressive generation, where tokenizers, orders, heads, backbones and decoders compose.

Public names load lazily, so that importing the package (and ``vargen --help``) does not import torch.
"""

from __future__ import annotations

from typing import Any

from vargen.registry import PUBLIC, load_public

__version__ = "0.1.0"
__all__ = ["__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        value = load_public(name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'vargen' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
