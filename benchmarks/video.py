"""Next-token, NAR and NBP on the same video tokens side by side: accuracy by a rule, distance, passes, milliseconds per clip.

    python benchmarks/video.py --steps 600 --seeds 0 1

Every system starts from the recipe `video/shapes`, of which only the model is exchanged. A run, that is a system and a seed, is
trained and judged once and kept in the work folder; speed is measured at the end, of all runs in turn, so that a change of the
machine's load meets all of them. Nothing is ranked.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `kernels` is also a package of Hugging Face, for which its other packages would take a file of this folder
if str(Path(__file__).parent) in sys.path:
    sys.path.remove(str(Path(__file__).parent))

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.config import load_config
from vargen.data.base import build_dataset
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import load_feature_net
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline
from vargen.tokenizers.frames import FrameTokenizer
from vargen.train.run import train

RECIPE = "video/shapes"
# models of about equal size for 6 x 6 x 6 ids; NBP's blocks are a row, or a whole frame
_LLAMA = {"dim": 96, "heads": 4, "mlp_hidden": 256, "token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
_NBP = {"dim": 96, "heads": 4, "depth": 4, "condition_vocabulary": 8, "max_positions": 256}
_NBP |= {"token_dropout": 0.0, "residual_dropout": 0.0}
SYSTEMS: dict[str, dict[str, Any]] = {
    "next-token": {"system": "llamagen", "config": {**_LLAMA, "depth": 4}},
    "nar": {"system": "nar", "config": {**_LLAMA, "depth": 2, "positions": "rotary"}},
    "nbp-rows": {"system": "nbp", "config": {**_NBP, "block_size": 6}},
    "nbp-frames": {"system": "nbp", "config": {**_NBP, "block_size": 36}},
}
BATCHES = (1, 8)  # clips per call, where speed is measured
DRAWN_AT_ONCE = 50


def recipe_of(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The training recipe of a run."""
    recipe: Any = OmegaConf.to_container(load_config(RECIPE), resolve=True)
    recipe["model"], recipe["seed"] = SYSTEMS[name], seed
    recipe["dataset"]["length"] = arguments.clips
    recipe["sampling"] = {"temperature": 0.8}  # plain sampling, whatever the recipe has found best for NBP
    recipe["export"] = {"dtype": "float32"}
    changes = {"max_train_steps": arguments.steps, "batch_size": arguments.batch_size, "checkpointing_steps": 200}
    recipe["training"] = {**recipe["training"], **changes, "preview_steps": 0, "validation_steps": 0}
    return recipe


def run_one(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """Trains, draws and judges one system with one seed, as far as that has not been done."""
    folder = Path(arguments.work) / f"{name}-{seed}"
    if not (folder / "final" / "model_index.json").is_file():
        started = time.process_time()
        train(recipe_of(name, seed, arguments), output_dir=folder, resume="auto")
        write_json(folder / "training.json", {"core_minutes": (time.process_time() - started) / 60})
    judged = read_json(folder / "judged.json")
    if judged is not None and judged["samples"] == arguments.samples:
        return
    pipe = VisualARPipeline.from_pretrained(folder / "final")
    labels = torch.arange(arguments.samples) % pipe.model.num_classes
    parts = [
        pipe(class_labels=labels[rows], generator=Noise(seed, rows), output_type="pt").images
        for rows in torch.arange(arguments.samples).split(DRAWN_AT_ONCE)
    ]
    passes: list[int] = []
    pipe(class_labels=[0], generator=0, on_step=lambda info: passes.append(info.index))
    parameters = sum(p.numel() for p in pipe.model.parameters())
    result = {"parameters": parameters, "passes": len(passes), **judge(torch.cat(parts), labels, pipe)}
    write_json(folder / "judged.json", {"samples": arguments.samples, **result})
    print(name, seed, json.dumps(result), flush=True)


def judge(pixels: Tensor, labels: Tensor, pipe: VisualARPipeline) -> dict[str, float]:
    """Distance to the test split and its floor, and the share of clips that move as asked, by the rule and by the network."""
    frames, _, size = pipe.visual_tokenizer.sample_shape
    reference = build_dataset("shapes-video", size=size, frames=frames, split="test", length=512)
    report = evaluate_images(pixels.clamp(-1, 1), reference, load_feature_net("shapes-video"), labels=labels)
    return {
        "frechet_distance": report["frechet_distance"],
        "floor": report["frechet_floor_same_sizes"],
        "rule_accuracy": report["ground_truth"]["motion"]["share"],
        "conditional_accuracy": report["conditional_accuracy"],
    }


@torch.no_grad()
def ceilings(folder: Path, samples: int) -> dict[str, dict[str, float]]:
    """The same judgement of real clips, and of what the tokenizer alone makes of them."""
    pipe = VisualARPipeline.from_pretrained(folder)
    frames, _, size = pipe.visual_tokenizer.sample_shape
    data = build_dataset("shapes-video", size=size, frames=frames, split="train", seed=1, length=samples)
    pixels = torch.stack([data[i]["pixels"] for i in range(samples)])
    tokenizer: FrameTokenizer = pipe.visual_tokenizer
    painted = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in pixels.split(DRAWN_AT_ONCE)]).clamp(-1, 1)
    psnr = float((10 * torch.log10(4 / (painted - pixels).square().flatten(1).mean(1))).mean())
    return {"real": judge(pixels, data.labels, pipe), "reconstructed": {**judge(painted, data.labels, pipe), "psnr": psnr}}


def measure_speed(runs: list[tuple[str, int]], arguments: argparse.Namespace) -> None:
    """Milliseconds of one core per clip, tokens alone and with pixels, of all runs in turn; the median of some rounds is kept."""
    torch.set_num_threads(1)
    folders = [Path(arguments.work) / f"{name}-{seed}" for name, seed in runs]
    pipes = [VisualARPipeline.from_pretrained(folder / "final") for folder in folders]
    times: list[dict[str, list[float]]] = [{} for _ in runs]
    for _ in range(arguments.rounds):
        for pipe, taken in zip(pipes, times):
            for batch in BATCHES:
                labels = [i % pipe.model.num_classes for i in range(batch)]
                started = time.process_time()
                tokens = pipe(class_labels=labels, generator=0, output_type="pt").tokens
                whole = time.process_time()
                pipe.visual_tokenizer.decode(tokens)
                painting = time.process_time() - whole
                taken.setdefault(f"ms_per_clip_batch_{batch}", []).append((whole - started) * 1000 / batch)
                taken.setdefault(f"ms_of_painting_batch_{batch}", []).append(painting * 1000 / batch)
    for folder, taken in zip(folders, times):
        write_json(folder / "speed.json", {name: statistics.median(values) for name, values in taken.items()})


def collect(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All finished runs in the work folder, in the order of SYSTEMS."""
    results = []
    for name in SYSTEMS:
        for folder in sorted(Path(arguments.work).glob(f"{name}-[0-9]*")):
            judged, speed, training = (read_json(folder / f"{part}.json") for part in ("judged", "speed", "training"))
            if judged is not None:
                seed = int(folder.name.rsplit("-", 1)[1])
                results.append({"system": name, "seed": seed, **judged, **(training or {}), **(speed or {})})
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per system; plus or minus is the standard deviation over seeds."""
    lines = [
        "| system | parameters | passes | motion as asked, rule | Fréchet distance | ms per clip, batch 1 | batch 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["system"] for r in results):
        rows = [r for r in results if r["system"] == name]

        def spread(key: str, scale: float = 1.0, digits: int = 2, rows: list[dict[str, Any]] = rows) -> str:
            values = [scale * r[key] for r in rows if key in r]
            if not values:
                return "-"
            error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{error}"

        times = [spread(f"ms_per_clip_batch_{batch}", digits=1) for batch in BATCHES]
        accuracy = f"{spread('rule_accuracy', 100, 1)} %"
        cells = [name, f"{rows[0]['parameters'] / 1e6:.2f} M", rows[0]["passes"], accuracy, spread("frechet_distance"), *times]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n") and None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clips", type=int, default=4096, help="training clips")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed")
    parser.add_argument("--no-timing", action="store_true", help="leave the measurement of speed to a later call")
    parser.add_argument("--work", default="outputs/video-comparison", help="where runs are kept")
    parser.add_argument("--output", type=Path, default="benchmarks/results/video.json")
    arguments = parser.parse_args()
    runs = [(name, seed) for seed in arguments.seeds for name in arguments.systems]
    for name, seed in runs:
        run_one(name, seed, arguments)
    if arguments.no_timing:
        return
    measure_speed(runs, arguments)
    budget = {key: getattr(arguments, key) for key in ("steps", "batch_size", "clips", "samples", "rounds")}
    environment = {"torch": torch.__version__, "threads": 1, "machine": platform.machine(), "device": "cpu"}
    first = Path(arguments.work) / f"{runs[0][0]}-{runs[0][1]}" / "final"
    record = {"recipe": RECIPE, "budget": budget, "environment": environment, "ceilings": ceilings(first, arguments.samples)}
    results = collect(arguments)
    write_json(arguments.output, {**record, "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
