"""What an image costs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vargen.condition import Condition
from vargen.model import Generator
from vargen.nn.attention import attention_backend
from vargen.noise import Noise


@torch.no_grad()
def generation_flops(model: Generator, condition: Condition | None = None, **options: Any) -> int:
    """Floating-point operations of matrix products, attention included, in generating one sample; a multiply-add counts 2.

    It runs ``model.generate`` once with these ``options`` (``guidance``, ``steps``...); the default condition is class 0 where the
    model takes classes.
    """
    if condition is None:
        takes_class = "class" in model.conditioning
        condition = Condition(class_labels=torch.zeros(1, dtype=torch.int64) if takes_class else None)
    # fused attention kernels are not counted, plain matrix products are
    with attention_backend("eager"), FlopCounterMode(display=False) as counter:
        model.generate(condition, batch_size=1, noise=Noise(0, 1), **options)
    return counter.get_total_flops()
