"""What an image costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vargen.condition import Condition
from vargen.errors import VargenError
from vargen.heads.mlp import Denoiser
from vargen.model import Generator
from vargen.nn.attention import attention_backend
from vargen.nn.bert import BertLayer
from vargen.nn.block import TransformerBlock
from vargen.noise import Noise


@dataclass(frozen=True)
class GenerationCost:
    """What generating one sample takes.

    Attributes:
        flops: floating-point operations of matrix products, attention included; a multiply-add counts 2.
        backbone: evaluations of the transformer; rows for guidance ride in the same one.
        head: evaluations of diffusion or flow heads, whatever the number of tokens in each; 0 for softmax heads, and where the
            transformer itself is the velocity (xAR).
    """

    flops: int
    backbone: int
    head: int


@torch.no_grad()
def generation_cost(model: Generator, condition: Condition | None = None, **options: Any) -> GenerationCost:
    """Counts while ``model.generate`` runs once with these ``options`` (``guidance``, ``steps``...).

    The default condition is class 0 where the model takes classes.

    Raises:
        VargenError: a model without transformer blocks.
    """
    if condition is None:
        takes_class = "class" in model.conditioning
        condition = Condition(class_labels=torch.zeros(1, dtype=torch.int64) if takes_class else None)
    calls = {"backbone": 0, "head": 0}

    def count(what: str) -> Any:
        def hook(*_: Any) -> None:
            calls[what] += 1

        return hook

    heads = [module for module in model.modules() if isinstance(module, Denoiser)]
    handles = [head.input.register_forward_hook(count("head")) for head in heads]
    handles.append(_first_block(model, heads).register_forward_hook(count("backbone")))
    try:
        # fused attention kernels are not counted, plain matrix products are
        with attention_backend("eager"), FlopCounterMode(display=False) as counter:
            model.generate(condition, batch_size=1, noise=Noise(0, 1), **options)
    finally:
        for handle in handles:
            handle.remove()
    return GenerationCost(counter.get_total_flops(), **calls)


def generation_flops(model: Generator, condition: Condition | None = None, **options: Any) -> int:
    """The FLOPs of :func:`generation_cost`."""
    return generation_cost(model, condition, **options).flops


def _first_block(model: Generator, heads: list[Denoiser]) -> nn.Module:
    """The transformer block that every evaluation of the backbone passes first."""
    inside = {module for head in heads for module in head.modules()}
    for module in model.modules():
        if isinstance(module, TransformerBlock | BertLayer) and module not in inside:
            return module
    raise VargenError(f"{type(model).__name__} has no transformer blocks whose evaluations could be counted")
