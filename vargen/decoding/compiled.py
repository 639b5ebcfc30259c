"""Compiled blocks and captured passes of the decoding engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from vargen.decoding.plan import Shape
from vargen.errors import VargenError
from vargen.nn.cache import CacheWindow


def _block(block: Any, x: Tensor, keys: Tensor, values: Tensor, places: Tensor, stop: int, arguments: dict[str, Any]) -> Tensor:
    return block(x, cache=CacheWindow([keys], [values], places, stop), layer=0, **arguments)


class CompiledBlocks:
    """Calls blocks through torch.compile. Blocks of equal sizes share what was compiled, however deep the model is."""

    @cached_property
    def compiled(self) -> Callable[..., Tensor]:
        # torch counts what it compiled up to a limit by code object: each engine has its own, or the first ones would use it up
        own = FunctionType(_block.__code__.replace(), globals(), _block.__name__)
        return torch.compile(own, dynamic=False)

    def __call__(self, block: Any, x: Tensor, **arguments: Any) -> Tensor:
        # the tensors of this layer go in by themselves: a layer's number would have each one compiled anew
        cache, layer = arguments.pop("cache"), arguments.pop("layer")
        return self.compiled(block, x, cache.keys[layer], cache.values[layer], cache.places, cache.stop, arguments)


@contextmanager
def compiler(device: torch.device) -> Iterator[None]:
    """Within the block torch.compile may compile as many shapes as the engine has.

    Raises:
        VargenError: what it needs on this device is not there.
    """
    if device.type == "cpu":
        names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
        if not any(map(shutil.which, names)):
            raise VargenError(
                f"Engine(compile=True) on a CPU needs a C++ compiler, {' or '.join(names)}: install one, or leave compile out"
            )
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        yield


class GraphedPasses:
    """Every shape of pass is captured when it is met first, and replayed from then on with other numbers.

    Args:
        step: a pass over buffers that stay where they are. To run it twice with the same numbers must be as good as once.

    Raises:
        VargenError: not a CUDA device.
    """

    def __init__(self, step: Callable[[Shape, Tensor], None], device: torch.device) -> None:
        if device.type != "cuda":
            raise VargenError(f"Engine(graphs=True) needs a CUDA device, the model is on '{device}': leave graphs out")
        self.step, self.device = step, device
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, shape: Shape, row: Tensor) -> None:
        if shape not in self.captured:
            self.captured[shape] = self._capture(shape, row)
        graph, numbers = self.captured[shape]
        numbers.copy_(row)
        graph.replay()

    def _capture(self, shape: Shape, row: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        numbers = row.clone()
        # what compiles, allocates workspaces or tunes itself does so before the capture, on a side stream as capturing demands
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(shape, numbers)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            self.step(shape, numbers)
        return graph, numbers
