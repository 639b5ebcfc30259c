"""Gradients under the names and in the layout of an official checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


def official_gradients(loss: Tensor, model: nn.Module, state: State, adapt: Callable[[State], State]) -> dict[str, Tensor]:
    """Gradient of ``loss`` for every tensor of an official ``state``, whatever ``adapt`` does to its names and layout.

    ``adapt`` is run on the numbers of all elements, which shows where each one goes. Elements that no parameter of ``model`` takes
    have gradient zero.
    """
    sizes = {name: math.prod(tensor.shape) for name, tensor in state.items()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist()))
    # exact in float64, and adapters may do arithmetic such as padding with zeros: number 0 is left to those
    numbers = {
        k: torch.arange(1 + starts[k], 1 + starts[k] + sizes[k], dtype=torch.float64).view(v.shape) for k, v in state.items()
    }
    places = adapt(numbers)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and name in places}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    flat = torch.zeros(1 + sum(sizes.values()), dtype=torch.float64)
    for name, gradient in zip(parameters, gradients):
        if gradient is not None:
            flat[places[name].long()] = gradient.double()
    return {k: flat[1 + starts[k] : 1 + starts[k] + sizes[k]].view(v.shape).float() for k, v in state.items()}
