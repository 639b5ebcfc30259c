"""The decoding engine against two plain loops, one process, one model: with a cache, and without.

    python benchmarks/engine.py --preset B --grid 16 16 --batch-size 1

The first loop is the straightforward cached one: one forward, one softmax, one multinomial draw per token. The second runs the
whole sequence again for every token. Engine and cached loop take turns, so that what else the machine does hits both alike; wall
time and the process's CPU time are compared by their least and their median over the turns. Beside them stands the bound that
reading all weights once per token sets, from the bandwidth that a plain copy reaches here.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vargen import Condition, LlamaGen, Noise
from vargen.checkpoint import atomic_write
from vargen.decoding.engine import Engine
from vargen.decoding.quantize import int8_weights


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


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="B")
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="runs of engine and cached loop, after one that is not counted")
    parser.add_argument("--compile", action="store_true", help="takes turns as well: the engine with compiled blocks")
    parser.add_argument("--int8", action="store_true", help="takes turns as well: the compiled engine with 8-bit weights (torchao)")
    parser.add_argument("--output", default="benchmarks/results/engine-cpu.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaGen.from_preset(arguments.preset, grid=arguments.grid).eval()
    # a head of zeros, as it starts, would leave the softmax flat
    torch.nn.init.normal_(model.output_heads[0].linear.weight, std=0.02)
    condition = Condition(class_labels=torch.arange(arguments.batch_size) % model.num_classes)
    noise = Noise(0, arguments.batch_size)
    runs = {
        "engine": lambda: model.generate(condition, noise=noise),
        "cached loop": lambda: with_cache(model, condition),
    }
    if arguments.compile:
        engine = Engine(compile=True)
        runs["compiled engine"] = lambda: model.generate(condition, noise=noise, decoding=engine)
    if arguments.int8:
        small, small_engine = int8_weights(copy.deepcopy(model)), Engine(compile=True)
        runs["compiled engine, int8"] = lambda: small.generate(condition, noise=noise, decoding=small_engine)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(-1, arguments.turns):
        for name, run in runs.items():
            pair = seconds(run)
            if turn >= 0:
                times[name].append(pair)
    times["loop without cache"] = [seconds(lambda: without_cache(model, condition))]

    tokens = model.space.num_tokens
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bound = tokens * weights / copy_bandwidth()
    record = {
        "preset": arguments.preset,
        "grid": arguments.grid,
        "batch_size": arguments.batch_size,
        "seconds": {},
        "bandwidth_bound_seconds": round(bound, 3),
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
    }
    print(f"{'seconds':20s} {'wall: least':>12s} {'median':>8s} {'CPU: least':>12s} {'median':>8s}")
    for name, pairs in times.items():
        row = {clock: [f(p[i] for p in pairs) for f in (min, statistics.median)] for i, clock in enumerate(("wall", "cpu"))}
        record["seconds"][name] = {clock: dict(zip(("least", "median"), (round(v, 3) for v in row[clock]))) for clock in row}
        print(f"{name:20s} {row['wall'][0]:12.2f} {row['wall'][1]:8.2f} {row['cpu'][0]:12.2f} {row['cpu'][1]:8.2f}")
    print(f"{'weight bandwidth':20s} {bound:12.2f}")
    atomic_write(arguments.output, lambda path: path.write_text(json.dumps(record, indent=2) + "\n") and None)


if __name__ == "__main__":
    main()
