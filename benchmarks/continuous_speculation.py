"""Continuous speculative decoding of one masked generator by a smaller one: acceptance, passes, time and distance, in one run.

    python benchmarks/continuous_speculation.py digits --target outputs/train/digits-mar-target/final \\
        --draft outputs/train/digits-mar-draft/final

Rows: target and draft alone, the target alone with as few passes as speculation takes, the published rule over its window and its
inner temperature, and the exact rule. All rows draw samples of the same seeds, but for the exact rule, which takes long and draws
those of the first seed only. It works on one sample after the other, the other rows on batches, and time is that of one processor
thread. What is drawn is kept under ``--work``, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vargen import Guidance
from vargen.bench.device import describe
from vargen.checkpoint import atomic_write
from vargen.data.base import build_dataset
from vargen.decoding.continuous import ContinuousSpeculation
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import load_feature_net
from vargen.noise import Noise
from vargen.sample.load import load_pipeline

PLAIN, EXACT = "target alone", "exact rule"
WINDOW = 4
# with fewer samples only passes and time are reported
JUDGED = 50


@dataclass
class Row:
    """One way to make the images: which pipeline, in how many steps, beside which row's time, with what driver, how many together.

    Where ``most`` is given there are no more samples than that, all of the first seed.
    """

    pipe: Any
    steps: int
    beside: str
    decoding: ContinuousSpeculation | None = None
    batch_size: int = 50
    most: int | None = None


def ways(target: Any, draft: Any, steps: int, exact_steps: int, exact_samples: int) -> dict[str, Row]:
    """The rows of the table, by name."""
    whole, beside_exact = f"{PLAIN}, {steps} steps", f"{PLAIN}, {exact_steps} steps, beside the exact rule"
    rows = {
        whole: Row(target, steps, whole),
        f"draft alone, {steps} steps": Row(draft, steps, whole),
        f"{PLAIN}, {steps // WINDOW} steps": Row(target, steps // WINDOW, whole),
    }
    for window, temperature in ((WINDOW, 1.0), (WINDOW, 42.0), (WINDOW, 1000.0), (8, 42.0)):
        way = ContinuousSpeculation(draft.model, num_draft=window, inner_temperature=temperature)
        rows[f"published rule, window {window}, T={temperature:g}"] = Row(target, steps, whole, way)
    exact = ContinuousSpeculation(draft.model, rule="exact", num_draft=1)
    # both with as many samples, since distances and their floor depend on the number
    rows[beside_exact] = Row(target, exact_steps, beside_exact, most=exact_samples)
    rows[f"{EXACT}, {exact_steps} steps"] = Row(target, exact_steps, beside_exact, exact, batch_size=5, most=exact_samples)
    return rows


@torch.no_grad()
def draw(row: Row, seed: int, numbers: Tensor) -> dict[str, Tensor]:
    """Tokens of some samples, processor seconds, and counts of the driver, all per sample."""
    model, defaults = row.pipe.model, dict(row.pipe.config.defaults)
    condition, size = row.pipe.condition(class_labels=numbers % model.num_classes)
    started = time.process_time()
    tokens = model.generate(
        condition,
        noise=Noise(seed, numbers),
        guidance=Guidance(defaults["guidance_scale"], schedule=defaults["guidance_schedule"]),
        steps=row.steps,
        **({} if row.decoding is None else {"decoding": row.decoding}),
    )
    seconds = (time.process_time() - started) / size
    counts = [row.steps, 0, 0, 0]
    if row.decoding is not None:
        seen = row.decoding.statistics
        # the exact rule counts the passes of all samples, the published one those of the batch
        each = size if row.decoding.rule == "exact" else 1
        counts = [seen.target_passes / each, seen.draft_passes / each, seen.tested / size, seen.accepted / size]
    return {"tokens": tokens, "seconds": torch.full((size,), seconds), "counts": torch.tensor([counts] * size)}


def draw_all(rows: dict[str, Row], seed: int, samples: int, work: Path) -> dict[str, dict[str, Tensor]]:
    """``samples`` of every row; what an earlier run has kept is not drawn again."""
    kept = {}
    for name, row in rows.items():
        file = work / f"seed-{seed}" / f"{re.sub('[^a-z0-9.=]+', '-', name.lower())}.safetensors"
        parts = [load_file(file)] if file.is_file() else []
        done = len(parts[0]["tokens"]) if parts else 0
        count = samples if row.most is None else min(samples, row.most)
        if done < count:
            draw(row, seed, torch.arange(1))
        for start in range(done, count, row.batch_size):
            parts.append(draw(row, seed, torch.arange(start, min(start + row.batch_size, count))))
            parts = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}]
            atomic_write(file, lambda path, part=parts[0]: save_file(part, path))
        kept[name] = {key: value[:count] for key, value in parts[0].items()}
        print(f"seed {seed}: {name}", flush=True)
    return kept


@torch.no_grad()
def judge(row: Row, name: str, drawn: dict[str, Tensor]) -> dict[str, float]:
    """Passes and time of a row's samples, and, where they are not too few, distance and accuracy."""
    target_passes, draft_passes, tested, accepted = drawn["counts"].double().mean(0).tolist()
    scores = {
        "samples": len(drawn["tokens"]),
        "target_passes": target_passes,
        "draft_passes": draft_passes,
        "tokens_per_target_pass": row.pipe.model.space.num_tokens / target_passes,
        **({"acceptance_rate": accepted / tested} if tested else {}),
        "processor_milliseconds_per_image": 1000 * float(drawn["seconds"].mean()),
    }
    if scores["samples"] < JUDGED:
        return scores
    images = torch.cat([row.pipe.visual_tokenizer.decode(part) for part in drawn["tokens"].split(50)]).clamp(-1, 1)
    labels = torch.arange(len(images)) % row.pipe.model.num_classes
    reference = build_dataset(name, size=images.shape[-1], split="test")
    report = evaluate_images(images, reference, load_feature_net(name), labels=labels)
    return {
        **scores,
        "frechet_distance": report["frechet_distance"],
        "floor": report["frechet_floor_same_sizes"],
        "conditional_accuracy": report["conditional_accuracy"],
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown; plus or minus is the standard deviation over seeds."""
    lines = [
        "| decoding | accepted | target passes | tokens per target pass | time against target | Fréchet distance | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():

        def spread(key: str, digits: int, scale: float = 1.0, runs: list[dict[str, float]] = runs) -> str:
            values = [scale * run[key] for run in runs if key in run]
            error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{error}" if values else ""

        accepted = spread("acceptance_rate", 1, 100)
        cells = [f"{accepted} %" if accepted else "", spread("target_passes", 1), spread("tokens_per_target_pass", 2)]
        accuracy = spread("conditional_accuracy", 1, 100)
        cells += [spread("time_ratio", 2), spread("frechet_distance", 2), f"{accuracy} %" if accuracy else ""]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["digits"])
    parser.add_argument("--target", required=True, help="pipeline of a masked generator with a diffusion head")
    parser.add_argument("--draft", required=True, help="pipeline of a smaller one, with the same tokenizer")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--exact-steps", type=int, default=16, help="steps of the exact rule, and of a row to compare it with")
    parser.add_argument(
        "--exact-samples", type=int, default=200, help="most samples of the exact rule, of the first seed only: it takes long"
    )
    parser.add_argument("--samples", type=int, default=200, help="for every seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=Path("outputs/continuous-speculation"))
    parser.add_argument("--output", default="benchmarks/results/continuous-speculation-digits.json")
    arguments = parser.parse_args()
    target, draft = load_pipeline(arguments.target), load_pipeline(arguments.draft)
    rows = ways(target, draft, arguments.steps, arguments.exact_steps, arguments.exact_samples)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for seed in arguments.seeds:
        drawn_now = {name: row for name, row in rows.items() if row.most is None or seed == arguments.seeds[0]}
        drawn = draw_all(drawn_now, seed, arguments.samples, arguments.work)
        for name, row in drawn_now.items():
            results[name].append(judge(row, arguments.dataset, drawn[name]))
            milliseconds = [results[key][-1]["processor_milliseconds_per_image"] for key in (name, row.beside)]
            results[name][-1]["time_ratio"] = milliseconds[0] / milliseconds[1]
    parameters = {"target": target.model.num_parameters_, "draft": draft.model.num_parameters_}
    budget = {"samples": arguments.samples, "seeds": arguments.seeds}
    sampling = {k: v for k, v in dict(target.config.defaults).items() if k != "steps"}
    record = {"dataset": arguments.dataset, **budget, "parameters": parameters, "sampling": sampling}
    record |= {**describe(target.model.device), "results": results}
    content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(arguments.output, lambda path: path.write_text(content) and None)
    print(table(results))


if __name__ == "__main__":
    main()
