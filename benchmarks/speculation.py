"""Speculative decoding of a next-token pipeline: tokens per target pass, time against plain decoding, distance, in one run.

    vargen train digits/drafter
    python benchmarks/speculation.py digits --drafter outputs/train/digits-drafter/final

Rows: plain decoding, lossless trees, LANTERN over k and its additive bound, LANTERN++ over k and its ratio. Every row draws the
same number of images with the same seed, one at a time, as speculation does.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch

from vargen import EagleDrafter
from vargen.checkpoint import atomic_write
from vargen.data.base import build_dataset
from vargen.decoding.lantern import Lantern
from vargen.decoding.neighbors import neighbor_table
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import load_feature_net
from vargen.noise import Noise
from vargen.sample.load import load_pipeline

STATIC = "naive_extend_57"


def settings(table: torch.Tensor, drafter: Any) -> dict[str, Lantern | None]:
    """The rows of the table, by name."""
    rows: dict[str, Lantern | None] = {
        "plain": None,
        "lossless, dynamic tree": Lantern(drafter),
        "lossless, static tree": Lantern(drafter, tree=STATIC),
    }
    for k in (10, 100):
        for delta in (0.1, 0.4):
            rows[f"LANTERN k={k} delta={delta}"] = Lantern(drafter, table, k, delta=delta)
    for k, ratio in ((10, 5.0), (5, 10.0), (5, 20.0)):
        rows[f"LANTERN++ k={k} lambda={ratio:g}"] = Lantern(drafter, table, k, ratio=ratio, tree=STATIC)
    return rows


def measure(pipe: Any, decoding: Lantern | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Draws ``--samples`` images one by one."""
    pixels, per_pass = [], []
    options = {} if decoding is None else {"decoding": decoding}
    pipe(class_labels=[0], generator=0, **options)
    started = time.perf_counter()
    for i in range(arguments.samples):
        label = i % pipe.model.num_classes
        pixels.append(pipe(class_labels=[label], generator=Noise(1, [i]), output_type="pt", **options).images)
        per_pass.append(1.0 if decoding is None else decoding.statistics.tokens_per_round)
    seconds = time.perf_counter() - started
    images = torch.cat(pixels).clamp(-1, 1)
    reference = build_dataset(arguments.model, size=images.shape[-1], split="test")
    labels = torch.arange(arguments.samples) % pipe.model.num_classes
    report = evaluate_images(images, reference, load_feature_net(arguments.model), labels=labels)
    return {
        "tokens_per_target_pass": sum(per_pass) / len(per_pass),
        "ms_per_image": 1000 * seconds / arguments.samples,
        "frechet_distance": report["frechet_distance"],
        "floor": report["frechet_floor_same_sizes"],
        "conditional_accuracy": report["conditional_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits"])
    parser.add_argument("--drafter", required=True, help="directory of a trained drafter")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--output", default="benchmarks/results/speculation-digits.json")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    drafter = EagleDrafter.from_pretrained(arguments.drafter).to(pipe.model.device).eval()
    table = neighbor_table(pipe.visual_tokenizer, 101)
    results: dict[str, dict[str, Any]] = {}
    print("| decoding | tokens per target pass | ms per image | time against plain | Fréchet distance | accuracy |")
    print("|---|---|---|---|---|---|")
    for name, decoding in settings(table, drafter).items():
        results[name] = row = measure(pipe, decoding, arguments)
        row["time_ratio"] = row["ms_per_image"] / results["plain"]["ms_per_image"]
        cells = [f"{row['tokens_per_target_pass']:.2f}", f"{row['ms_per_image']:.0f}", f"{row['time_ratio']:.2f}"]
        cells += [f"{row['frechet_distance']:.2f}", f"{100 * row['conditional_accuracy']:.1f} %"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(), "device": "cpu"}
    record = {"model": arguments.model, "samples": arguments.samples, "environment": environment, "results": results}
    atomic_write(arguments.output, lambda path: path.write_text(json.dumps(record, indent=2) + "\n") and None)


if __name__ == "__main__":
    main()
