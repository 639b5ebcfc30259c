"""Every Triton kernel against its reference and torch.compile of it: time and error at the sizes that decoding meets.

    python benchmarks/kernel_times.py --output benchmarks/results/kernels-gpu.json

A kernel pays where it is faster than torch.compile of its reference in every case; its ``faster_on`` in
``vargen/kernels/dispatch.py`` may then name the class of device that is printed at the end. Without a GPU the references are timed,
at small sizes, so that the script itself can be tried; kernels run natively only.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vargen.bench.device import describe, seconds
from vargen.checkpoint import atomic_write
from vargen.kernels.dispatch import OPS, device_class, kernels, triton_function
from vargen.sample.load import pick_device, pick_dtype

Case = tuple[str, tuple[Any, ...], dict[str, Any]]
# sides of the cases on a CPU are divided by this
SMALL = 16


def cases(device: torch.device, dtype: torch.dtype) -> dict[str, list[Case]]:
    """For each operation names of sizes, arguments and options."""
    small = SMALL if device.type == "cpu" else 1
    vocabulary, codes, width = 16384 // small, 16384 // small, 1024 // small

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def logits(batch: int, targets: int, **options: Any) -> Case:
        rows = [normal(batch, targets, vocabulary) for _ in range(2)]
        name = f"{batch} x {targets} x {vocabulary}" + "".join(f", {key} {value}" for key, value in options.items())
        return name, (*rows, 4.0, torch.rand(batch, targets, device=device)), options

    def block(rows: int) -> list[Any]:
        shift, scale, gate = normal(rows, 3 * width).chunk(3, -1)
        weights = [normal(width, width) / math.sqrt(width), normal(width), normal(width, width) / math.sqrt(width), normal(width)]
        return [normal(rows, width), shift, scale, gate, normal(width), normal(width), *weights]

    def linear(rows: int) -> tuple[Any, ...]:
        h, shift, scale, _, ln_weight, ln_bias, _, _, _, _ = block(rows)
        return h, shift, scale, ln_weight, ln_bias, normal(32, width) / math.sqrt(width), normal(32)

    def update(rows: int) -> tuple[Any, ...]:
        tensors = [normal(rows, 16, dtype=torch.float32) for _ in range(4)]
        coefficients = torch.tensor([1.1, 0.5, 0.6, 0.4, -6.0, -4.0, 1.0], device=device)
        return (*tensors, coefficients, normal(rows, 16, dtype=torch.float32), 3.0)

    counts = [n // small for n in (64 * 256, 256)]
    rows = [n // small or 1 for n in (1, 64, 1024, 16384)]
    return {
        "guided_sample": [
            logits(1, 1), logits(1, 1, top_k=vocabulary // 8), logits(64, 1), logits(64, 1, top_k=vocabulary // 8, top_p=0.9),
            logits(8, 16),
        ],
        "nearest_code": [
            (f"{n} in {codes} x {d}", (normal(n, d, dtype=torch.float32), normal(codes, d, dtype=torch.float32)), {})
            for n in counts
            for d in (8, 32)
        ],
        "adaln_mlp_block": [(f"{n} x {width}", tuple(block(n)), {}) for n in rows],
        "adaln_linear": [(f"{n} x {width}", linear(n), {}) for n in rows],
        "ddpm_update": [(f"{n} x 16", update(n), {}) for n in rows],
    }  # fmt: skip


def median(call: Callable[[], object], device: torch.device, repeats: int, calls: int = 10) -> float:
    """Seconds of one call among ``calls`` in a row, as in a decoding loop, which waits for none; after two that do not count."""

    def several() -> None:
        for _ in range(calls):
            call()

    call(), call()
    return statistics.median(seconds(several, device) / calls for _ in range(repeats))


def error(found: Tensor, expected: Tensor) -> float:
    """Of indices the share that differs, of numbers the largest difference relative to the largest value."""
    if not found.is_floating_point():
        return float((found != expected).double().mean())
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30))


def measure(name: str, case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    sizes, args, options = case
    reference = OPS[name].reference
    row: dict[str, Any] = {"operation": name, "case": sizes}
    with kernels("reference"), torch.no_grad():
        expected = reference(*args, **options)
        row["reference_seconds"] = median(partial(reference, *args, **options), device, repeats)
        try:
            torch._dynamo.reset()
            compiled = torch.compile(reference)
            row["compiled_seconds"] = median(partial(compiled, *args, **options), device, repeats)
        except Exception as failure:  # a missing compiler surfaces as any of many exceptions
            row["compiled_error"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
    if device.type == "cuda":
        with torch.no_grad():
            run = partial(triton_function(name), *args, **options)
            row["triton_error"] = error(run(), expected)
            row["triton_seconds"] = median(run, device, repeats)
    return row


def pays(rows: list[dict[str, Any]]) -> bool:
    """A kernel is faster than the better of its reference and the compiled one in every case."""
    return all(
        "triton_seconds" in row and row["triton_seconds"] < min(row["reference_seconds"], row.get("compiled_seconds", math.inf))
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; by default the GPU where there is one")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, dtype = pick_device(arguments.device), pick_dtype(arguments.dtype)
    torch.manual_seed(0)
    rows, faster = [], []
    columns = ("reference", "compiled", "triton")
    print("| operation | case | reference, µs | compiled, µs | Triton, µs | error |\n|---|---|---|---|---|---|")
    table = cases(device, dtype)
    for name in OPS:
        found = [measure(name, case, device, arguments.repeats) for case in table.get(name, [])]
        for row in found:
            times = [f"{1e6 * row[f'{c}_seconds']:.0f}" if f"{c}_seconds" in row else "" for c in columns]
            difference = f"{row['triton_error']:.1e}" if "triton_error" in row else ""
            print("| " + " | ".join([name, row["case"], *times, difference]) + " |", flush=True)
        rows += found
        if found and pays(found):
            faster.append(name)
    print(f"\nfaster than torch.compile in every case on {device_class(device)}: {', '.join(faster) or 'none'}")
    if arguments.output is not None:
        record = {
            **describe(device),
            "device_class": device_class(device),
            "dtype": arguments.dtype,
            "faster": faster,
            "rows": rows,
        }
        content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        atomic_write(arguments.output, lambda path: path.write_text(content) and None)


if __name__ == "__main__":
    main()
