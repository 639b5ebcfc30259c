"""Generators side by side: one data set, one tokenizer, one budget; distance, accuracy, passes, time, with errors over seeds.

    python benchmarks/compare.py digits --tokenizer TOKENIZER --systems llamagen nar nbp --steps 1000 --seeds 0 1

Every system starts from the data set's own generator recipe, of which only the model is exchanged. Results go to a JSON file and
a Markdown table, both made anew by one run; nothing is ranked.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from vargen.checkpoint import atomic_write
from vargen.config import load_config
from vargen.data.base import build_dataset
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import load_feature_net
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.train.run import train

# models of about equal size for the 8 x 8 ids of the shipped sets
MODELS: dict[str, dict[str, Any]] = {
    "llamagen": {"system": "llamagen", "config": {"dim": 128, "depth": 5, "heads": 4, "mlp_hidden": 344}},
    "nar": {"system": "nar", "config": {"dim": 128, "depth": 4, "heads": 4, "mlp_hidden": 344}},
    "nbp": {
        "system": "nbp",
        "config": {"dim": 128, "depth": 5, "heads": 4, "block_size": 8, "condition_vocabulary": 10, "max_positions": 128},
    },
    "maskgit": {"system": "maskgit", "config": {"trunk": "uvit", "dim": 128, "depth": 4, "heads": 4, "mlp_hidden": 512}},
}
# NBP's models know no unconditional row; MaskGIT's temperature scales Gumbel noise
SETTINGS: dict[str, dict[str, Any]] = {
    "nbp": {"guidance_scale": 1.0},
    "maskgit": {"temperature": 2.0, "guidance_scale": 2.0},
}


def run_one(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, samples and judges one system with one seed."""
    recipe = OmegaConf.to_container(load_config(f"{arguments.dataset}/generator"), resolve=True)
    assert isinstance(recipe, dict)
    recipe["model"] = MODELS[name]
    recipe["sampling"] = {**recipe.get("sampling", {}), **SETTINGS.get(name, {})}
    recipe["seed"], recipe["tokenizer"] = seed, str(arguments.tokenizer)
    recipe["training"] = {**recipe["training"], "max_train_steps": arguments.steps, "preview_steps": 0, "validation_steps": 0}
    recipe["training"]["checkpointing_steps"] = arguments.steps
    folder = Path(arguments.work) / f"{name}-{seed}"
    started = time.perf_counter()
    if not (folder / "final" / "model_index.json").is_file():
        train(recipe, output_dir=folder, resume="auto")
    minutes = (time.perf_counter() - started) / 60
    pipe = VisualARPipeline.from_pretrained(folder / "final")
    labels = torch.arange(arguments.samples) % pipe.model.num_classes
    pixels = []
    for first in range(0, arguments.samples, 50):
        rows = torch.arange(first, min(first + 50, arguments.samples))
        pixels.append(pipe(class_labels=labels[rows], generator=Noise(seed, rows), output_type="pt").images)
    reference = build_dataset(arguments.dataset, size=pixels[0].shape[-1], split="test")
    report = evaluate_images(torch.cat(pixels).clamp(-1, 1), reference, load_feature_net(arguments.dataset), labels=labels)
    return {
        "system": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        "training_minutes": minutes,
        "frechet_distance": report["frechet_distance"],
        "floor": report["frechet_floor_same_sizes"],
        "conditional_accuracy": report["conditional_accuracy"],
        **speed(pipe),
    }


def speed(pipe: VisualARPipeline, repeats: int = 3) -> dict[str, Any]:
    """Passes of the generator, and milliseconds per image, tokens only, at batch 1 and 8: the median of some runs."""
    passes: list[int] = []
    pipe(class_labels=[0], generator=0, on_step=lambda info: passes.append(info.index))
    times = {}
    for batch in (1, 8):
        runs = []
        for _ in range(repeats):
            started = time.perf_counter()
            pipe(class_labels=[i % pipe.model.num_classes for i in range(batch)], generator=0, output_type="pt")
            runs.append((time.perf_counter() - started) * 1000 / batch)
        times[f"ms_per_image_batch_{batch}"] = statistics.median(runs)
    return {"passes": len(passes), **times}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per system; plus or minus is the standard deviation over seeds."""
    lines = [
        "| system | parameters | passes | Fréchet distance | conditional accuracy | ms per image, batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["system"] for r in results):
        rows = [r for r in results if r["system"] == name]

        def spread(key: str, scale: float = 1.0, digits: int = 2, rows: list[dict[str, Any]] = rows) -> str:
            values = [scale * r[key] for r in rows]
            error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{error}"

        accuracy = f"{spread('conditional_accuracy', 100, 1)} %"
        times = [spread(f"ms_per_image_batch_{batch}", digits=1) for batch in (1, 8)]
        cells = [name, f"{rows[0]['parameters'] / 1e6:.2f} M", rows[0]["passes"], spread("frechet_distance"), accuracy, *times]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["digits"])
    parser.add_argument("--tokenizer", required=True, help="a trained tokenizer of the data set")
    parser.add_argument("--systems", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--work", default="outputs/compare", help="where the runs are kept; finished ones are not trained again")
    parser.add_argument("--output", default="benchmarks/results/compare-digits.json")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        for name in arguments.systems:
            results.append(run_one(name, seed, arguments))
            print(json.dumps(results[-1]), flush=True)
    environment = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine(), "device": "cpu"}
    budget = {"steps": arguments.steps, "seeds": arguments.seeds, "samples": arguments.samples}
    record = {"dataset": arguments.dataset, "budget": budget, "environment": environment, "results": results}
    assert all(math.isfinite(r["frechet_distance"]) for r in results)
    atomic_write(arguments.output, lambda path: path.write_text(json.dumps(record, indent=2) + "\n") and None)
    print(table(results))


if __name__ == "__main__":
    main()
