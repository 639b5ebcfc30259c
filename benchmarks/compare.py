"""Generators side by side: one data set, one family of tokenizers, one budget; distance, accuracy, cost and speed.

    python benchmarks/compare.py digits --discrete VQ_TOKENIZER --continuous KL_TOKENIZER --seeds 0 1

Every system starts from the data set's own generator recipe, of which only the model and the settings of sampling are exchanged
(`compare_systems.py`). A run, that is a system and a seed, is trained, drawn and judged once and kept in the work folder; speed is
measured at the end, of all runs in turn, so that a change of the machine's load meets all of them. Nothing is ranked.
"""

from __future__ import annotations

import sys
from pathlib import Path

from compare_systems import SYSTEMS

# `kernels` is also a package of Hugging Face, for which its other packages would take a file of this folder
if str(Path(__file__).parent) in sys.path:
    sys.path.remove(str(Path(__file__).parent))

import argparse
import json
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.config import load_config
from vargen.data.base import build_dataset
from vargen.decoding.flops import generation_cost
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import load_feature_net
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline, split_settings
from vargen.sample.load import load_tokenizer
from vargen.sample.picture import to_images
from vargen.train.run import train

BATCHES = (1, 8)  # images per call, where speed is measured
DRAWN_AT_ONCE = 250
PICTURES = 20


def recipe_of(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The training recipe of a run."""
    recipe: Any = OmegaConf.to_container(load_config(f"{arguments.dataset}/generator"), resolve=True)
    chosen = SYSTEMS[name]
    recipe["model"] = {"system": chosen["system"], "config": chosen["config"]}
    recipe["sampling"] = {**recipe.get("sampling", {}), **chosen["sampling"]}
    recipe["seed"], recipe["tokenizer"] = seed, str(getattr(arguments, chosen["tokens"]))
    recipe["tokens"]["views"] = arguments.views
    recipe["validation"] = {"samples": 128, "pictures": 1}
    recipe["export"] = {"dtype": "float32"}
    recipe["optimizer"]["learning_rate"] = arguments.learning_rate
    changes = {"batch_size": arguments.batch_size, "max_train_steps": arguments.steps, "checkpointing_steps": 200}
    recipe["training"] = {**recipe["training"], **changes, "preview_steps": 0, "validation_steps": 0}
    return recipe


def run_one(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Trains, draws and judges one system with one seed, as far as that has not been done."""
    folder, recipe = Path(arguments.work) / f"{name}-{seed}", recipe_of(name, seed, arguments)
    if not (folder / "final" / "model_index.json").is_file():
        started = time.process_time()
        train(recipe, output_dir=folder, resume="auto")
        write_json(folder / "training.json", {"core_minutes": (time.process_time() - started) / 60})
    settings = {**recipe["sampling"].pop("options", {}), **recipe["sampling"]}
    asked = {"settings": settings, "samples": arguments.samples}
    judged = read_json(folder / "judged.json")
    if judged is not None and judged["asked"] == asked:
        return
    pipe = VisualARPipeline.from_pretrained(folder / "final")
    labels = torch.arange(arguments.samples) % pipe.model.num_classes
    parts = []
    for rows in torch.arange(arguments.samples).split(DRAWN_AT_ONCE):
        parts.append(pipe(class_labels=labels[rows], generator=Noise(seed, rows), output_type="pt", **settings).images)
    pixels = torch.cat(parts).clamp(-1, 1)
    report = judge(pixels, labels, arguments)
    guidance, sampling, options = split_settings(settings)
    cost = generation_cost(pipe.model, guidance=guidance, sampling=sampling, **options)
    result = {
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        **report,
        "backbone_evaluations": cost.backbone,
        "head_evaluations": cost.head,
        "flops": cost.flops,
    }
    np.save(folder / "pictures.npy", ((pixels[:PICTURES] + 1) * 127.5).round().byte().numpy())
    write_json(folder / "judged.json", {"asked": asked, "result": result})
    print(name, seed, json.dumps(result), flush=True)


def judge(pixels: Tensor, labels: Tensor, arguments: argparse.Namespace) -> dict[str, float]:
    """Distance to the test split, its floor, and conditional accuracy."""
    reference = build_dataset(arguments.dataset, size=pixels.shape[-1], split="test")
    report = evaluate_images(pixels, reference, load_feature_net(arguments.dataset), labels=labels)
    kept = {
        "frechet_distance": "frechet_distance",
        "floor": "frechet_floor_same_sizes",
        "conditional_accuracy": "conditional_accuracy",
    }
    return {name: report[key] for name, key in kept.items()}


@torch.no_grad()
def reconstructions(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What the tokenizers alone do to as many training images: no generator of their tokens can be expected to come closer."""
    results = {}
    for kind in ("discrete", "continuous"):
        tokenizer = load_tokenizer(str(getattr(arguments, kind)), device="cpu")
        data = build_dataset(arguments.dataset, size=tokenizer.sample_shape[0], split="train")
        items = [data[i] for i in range(min(arguments.samples, len(data)))]
        pixels = torch.stack([item["pixels"] for item in items])
        painted = tokenizer.decode(tokenizer.encode(pixels, noise=Noise(0, len(pixels)))).clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (painted - pixels).square().flatten(1).mean(1)).mean()
        results[kind] = {**judge(painted, torch.tensor([item["class_label"] for item in items]), arguments), "psnr": float(psnr)}
    return results


def measure_speed(runs: list[tuple[str, int]], arguments: argparse.Namespace) -> None:
    """Milliseconds of one core per image, tokens and pixels, of all finished runs in turn; each folder gets its median round."""
    torch.set_num_threads(1)
    folders = [Path(arguments.work) / f"{name}-{seed}" for name, seed in runs]
    folders = [folder for folder in folders if (folder / "judged.json").is_file()]
    pipes = [VisualARPipeline.from_pretrained(folder / "final") for folder in folders]
    settings = [read_json(folder / "judged.json")["asked"]["settings"] for folder in folders]  # type: ignore[index]
    times: list[dict[int, list[float]]] = [{batch: [] for batch in BATCHES} for _ in folders]
    for _ in range(arguments.rounds):
        for pipe, options, taken in zip(pipes, settings, times):
            for batch in BATCHES:
                started = time.process_time()
                pipe(class_labels=[i % pipe.model.num_classes for i in range(batch)], generator=0, output_type="pt", **options)
                taken[batch].append((time.process_time() - started) * 1000 / batch)
    for folder, taken in zip(folders, times):
        medians = {f"ms_per_image_batch_{batch}": statistics.median(values) for batch, values in taken.items()}
        write_json(folder / "speed.json", {"rounds": arguments.rounds, **medians})


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All finished runs in the work folder, in the order of SYSTEMS."""
    results = []
    for name in SYSTEMS:
        for folder in sorted(Path(arguments.work).glob(f"{name}-[0-9]*")):
            judged, speed, training = (read_json(folder / f"{part}.json") for part in ("judged", "speed", "training"))
            if judged is not None:
                seed = {"system": name, "seed": int(folder.name.rsplit("-", 1)[1]), "settings": judged["asked"]["settings"]}
                results.append({**seed, **judged["result"], **(training or {}), **(speed or {})})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per system; plus or minus is the standard deviation over seeds."""
    lines = [
        "| system | parameters | Fréchet distance | conditional accuracy | backbone, head evaluations | MFLOPs per image "
        "| ms per image, batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["system"] for r in results):
        rows = [r for r in results if r["system"] == name]

        def spread(key: str, scale: float = 1.0, digits: int = 2, rows: list[dict[str, Any]] = rows) -> str:
            values = [scale * r[key] for r in rows if key in r]
            if not values:
                return "-"
            error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{error}"

        first = rows[0]
        cells = [
            name,
            f"{first['parameters'] / 1e6:.2f} M",
            spread("frechet_distance"),
            f"{spread('conditional_accuracy', 100, 1)} %",
            f"{first['backbone_evaluations']}, {first['head_evaluations'] or '-'}",
            f"{first['flops'] / 1e6:,.0f}",
            *(spread(f"ms_per_image_batch_{batch}", digits=1) for batch in BATCHES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(arguments: argparse.Namespace, target: Path) -> None:
    """One row of samples per system, of its first seed: classes in turn."""
    rows = [Path(arguments.work) / f"{name}-{arguments.seeds[0]}" / "pictures.npy" for name in SYSTEMS]
    pixels = [torch.from_numpy(np.load(row)).float() / 127.5 - 1 for row in rows if row.is_file()]
    if pixels:
        frame = [torch.nn.functional.pad(p, (1, 1, 1, 1), value=0.4) for p in pixels]
        sheet = torch.cat([torch.cat(list(p), dim=-1) for p in frame], dim=-2)
        small = to_images(sheet[None])[0].quantize(64)
        atomic_write(target, lambda path: small.save(path, format="PNG", optimize=True))


def read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n") and None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["digits"])
    parser.add_argument("--discrete", required=True, help="a trained tokenizer of discrete tokens")
    parser.add_argument("--continuous", required=True, help="one of continuous tokens, on the same grid")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--views", type=int, default=1, help="augmented views of every training image")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed")
    parser.add_argument("--no-timing", action="store_true", help="leave the measurement of speed to a later call")
    parser.add_argument("--time-only", action="store_true", help="measure only the speed of finished runs anew")
    parser.add_argument("--work", default="outputs/compare", help="where runs are kept")
    parser.add_argument("--output", type=Path, default="benchmarks/results/compare-digits.json")
    parser.add_argument("--picture", type=Path, default="docs/images/compare-digits.png")
    arguments = parser.parse_args()
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.systems]
    for name, seed in [] if arguments.time_only else runs:
        run_one(name, seed, arguments)
    if arguments.no_timing:
        return
    measure_speed(runs, arguments)
    budget = {key: getattr(arguments, key) for key in ("steps", "batch_size", "learning_rate", "views", "samples")}
    environment = {"torch": torch.__version__, "threads": 1, "machine": platform.machine(), "device": "cpu"}
    results = collect(arguments)
    record = {"dataset": arguments.dataset, "budget": budget, "environment": environment, "results": results}
    write_json(arguments.output, {**record, "tokenizers": reconstructions(arguments)})
    picture(arguments, arguments.picture)
    print(table(results))


if __name__ == "__main__":
    main()
