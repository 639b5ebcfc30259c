"""The decoding engine against two plain loops, one process, one model: without a cache, and with one.

    python benchmarks/engine.py --preset B --grid 16 16 --batch-size 1

The first loop runs the whole sequence again for every token; the second is the straightforward cached loop: one forward, one
softmax, one multinomial draw per token. Beside the times stands the bound that reading all weights once per token sets, from the
bandwidth that a plain copy reaches here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vargen import Condition, LlamaGen, Noise
from vargen.checkpoint import atomic_write


@torch.no_grad()
def without_cache(model: LlamaGen, condition: Condition) -> Tensor:
    batch = condition.batch_size or 1
    tokens = torch.zeros(batch, model.layout.order.num_cells, dtype=torch.int64, device=model.device)
    keep = torch.zeros(batch, dtype=torch.bool, device=model.device)
    for cell in range(tokens.shape[1]):
        (hidden,) = model.sequence(tokens, condition, keep, torch.arange(model.layout.prefix + cell))
        tokens[:, cell] = torch.multinomial(model.logits(hidden[:, -1]).softmax(-1), 1).squeeze(1)
    return tokens


@torch.no_grad()
def with_cache(model: LlamaGen, condition: Condition) -> Tensor:
    batch = condition.batch_size or 1
    state = model.start(condition, batch)
    tokens = torch.zeros(batch, model.layout.order.num_cells, dtype=torch.int64, device=model.device)
    slots, ids = torch.arange(model.layout.prefix), tokens[:, : model.layout.prefix]
    for cell in range(tokens.shape[1]):
        (hidden,) = model.forward(state, ids, slots)
        tokens[:, cell] = torch.multinomial(model.logits(hidden[:, -1]).softmax(-1), 1).squeeze(1)
        slots, ids = slots[-1:] + 1, tokens[:, cell : cell + 1]
    return tokens


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.empty(2**27, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - started)
    return 2 * source.numel() / min(times)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of some runs after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="B")
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/engine-cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaGen.from_preset(arguments.preset, grid=arguments.grid).eval()
    labels = torch.arange(arguments.batch_size) % model.num_classes
    condition = Condition(class_labels=labels)
    runs = {
        "engine": lambda: model.generate(condition, noise=Noise(0, arguments.batch_size)),
        "cached loop": lambda: with_cache(model, condition),
        "loop without cache": lambda: without_cache(model, condition),
    }
    times = {name: seconds(run, arguments.repeats if name != "loop without cache" else 1) for name, run in runs.items()}
    tokens = model.space.num_tokens
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = tokens * weights / copy_bandwidth()
    for name, value in times.items():
        print(f"{name:20s} {value:8.2f} s  {1000 * value / tokens:7.1f} ms per token  {value / times['engine']:5.2f} x the engine")
    print(f"{'weight bandwidth':20s} {bound:8.2f} s  {1000 * bound / tokens:7.1f} ms per token")
    record = {
        "preset": arguments.preset,
        "grid": arguments.grid,
        "batch_size": arguments.batch_size,
        "seconds": times,
        "bandwidth_bound_seconds": bound,
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
    }
    atomic_write(arguments.output, lambda path: path.write_text(json.dumps(record, indent=2) + "\n") and None)


if __name__ == "__main__":
    main()
