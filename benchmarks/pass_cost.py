"""What speculation can gain where passes are dear: times of a target's passes over trees, and of its drafter's, on this device.

    python benchmarks/pass_cost.py --preset B --speculation benchmarks/results/speculation-digits.json

The target is a LlamaGen with fresh weights and its drafter one of the same width: times do not depend on weights, what is accepted
does. Tokens per target pass are therefore taken from a run of ``benchmarks/speculation.py`` with trained models; the last columns
join the two and are modelled, not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vargen import Condition, EagleDrafter, LlamaGen
from vargen.bench.device import describe
from vargen.bench.device import seconds as wall_seconds
from vargen.checkpoint import atomic_write
from vargen.decoding.eagle import DynamicTree
from vargen.decoding.speculative import tree_mask
from vargen.decoding.tree import StaticTree, Tree, chain
from vargen.sample.load import pick_device, pick_dtype

# rows of benchmarks/speculation.py -> nodes of the tree that the target reads, and of those that the drafter expands, by depth
GROWTH: dict[str, tuple[int, list[int]]] = {
    "dynamic tree": (DynamicTree().size, [DynamicTree().top_k] * DynamicTree().depth),
    "static tree": (57 + 1, [len(nodes) for nodes in StaticTree.of("naive_extend_57").expanded[1:]]),
    "chain of 5": (6, [1] * 4),
    "Jacobi": (9, []),
}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a GPU's wall clock, or of one CPU thread's processor time, which other work on the machine disturbs less."""
    if device.type != "cpu":
        return wall_seconds(call, device)
    started = time.process_time()
    call()
    return time.process_time() - started


@torch.no_grad()
def target_pass(model: LlamaGen, tree: Tree, rows: int, repeats: int) -> float:
    """Seconds of a pass over ``tree`` with half of the cache filled."""
    condition = Condition(class_labels=torch.zeros(1, dtype=torch.int64, device=model.device))
    half, count = model.layout.num_inputs // 2, len(tree)
    state = model.start(condition, 1, rows, model.layout.num_inputs + count)
    model.forward(state, torch.zeros(rows, half, dtype=torch.int64, device=model.device), torch.arange(half))
    ids = torch.zeros(rows, count, dtype=torch.int64, device=model.device)
    slots = torch.tensor(tree.depths) + half

    def run() -> None:
        mask = tree_mask(tree, half, state.cache.visible) if count > 1 else None
        (hidden,) = model.forward(state, ids, slots, mask)
        model.logits(hidden)
        state.cache.truncate(half)

    run()
    return statistics.median(seconds(run, model.device) for _ in range(repeats))


@torch.no_grad()
def drafter_pass(model: LlamaGen, drafter: EagleDrafter, count: int, rows: int, repeats: int) -> float:
    """Seconds of a drafter's pass over ``count`` nodes, and of the logits behind them."""
    half = model.layout.num_inputs // 2
    cache = drafter.start(rows, half + count)
    width = model.config.dim
    hidden = torch.zeros(rows, half, width, device=model.device, dtype=model.dtype)
    drafter(hidden, torch.zeros(rows, half, dtype=torch.int64, device=model.device), torch.arange(half) - 1, None, cache)
    ids = torch.zeros(rows, count, dtype=torch.int64, device=model.device)

    def run() -> None:
        model.logits(drafter(hidden[:, :count], ids, torch.full((count,), half), None, cache))
        cache.truncate(half)

    run()
    return statistics.median(seconds(run, model.device) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="B")
    parser.add_argument("--speculation", type=Path, default=Path("benchmarks/results/speculation-digits.json"))
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=2, help="2 with guidance, else 1")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/pass-cost-cpu.json")
    arguments = parser.parse_args()
    device, dtype, rows, repeats = pick_device(arguments.device), pick_dtype(arguments.dtype), arguments.rows, arguments.repeats
    torch.manual_seed(0)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = torch.nn.Module.to(LlamaGen.from_preset(arguments.preset), device, dtype).eval()
    drafter = torch.nn.Module.to(EagleDrafter.for_target(model), device, dtype).eval()
    measured = json.loads(arguments.speculation.read_text(encoding="utf-8"))["results"]
    one = target_pass(model, chain(0), rows, repeats)
    shapes: dict[str, dict[str, float]] = {}
    for name, (nodes, expanded) in GROWTH.items():
        # what a pass costs depends on the number of nodes; how they hang together does not matter
        target = target_pass(model, chain(nodes - 1), rows, repeats)
        # before it grows a draft, a drafter reads the states of the tokens that were kept: about three
        draft = 0.0 if name == "Jacobi" else sum(drafter_pass(model, drafter, n, rows, repeats) for n in [3, *expanded])
        shapes[name] = {"nodes": nodes, "target_pass": target, "draft": draft}
    print(f"one token: {1000 * one:.0f} ms, the unit of the columns of passes and drafting\n")
    print("| decoding | tokens per target pass (digits) | target pass | drafting | modelled time against plain |")
    print("|---|---|---|---|---|")
    modelled: dict[str, float] = {}
    for name, runs in measured.items():
        shape: Any = shapes.get(name.split(",")[0])
        if shape is None:
            continue
        tokens = statistics.mean(run["tokens_per_target_pass"] for run in runs)
        modelled[name] = (shape["target_pass"] + shape["draft"]) / tokens / one
        cells = [f"{tokens:.2f}", f"{shape['target_pass'] / one:.2f}", f"{shape['draft'] / one:.2f}", f"{modelled[name]:.2f}"]
        print("| " + " | ".join([name, *cells]) + " |")
    record = {"preset": arguments.preset, "rows": rows, "dtype": arguments.dtype, "seconds_of_one_token": one, "shapes": shapes}
    record |= {"modelled_time_against_plain": modelled, **describe(device)}
    content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(arguments.output, lambda path: path.write_text(content) and None)


if __name__ == "__main__":
    main()
