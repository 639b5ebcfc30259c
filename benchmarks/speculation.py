"""Speculative decoding of a next-token pipeline: tokens per target pass, time against plain decoding, distance, in one run.

    vargen train digits/drafter
    python benchmarks/speculation.py digits --drafter outputs/train/digits-drafter/final

Any next-token pipeline will do, with the shipped set that judges its samples:

    python benchmarks/speculation.py outputs/train/shapes-flextok-ar/final --judge shapes --drafter DIR --output FILE

Rows: plain decoding; then the dynamic tree (EAGLE-2, LANTERN), a static tree (EAGLE, LANTERN++), a chain, and drafts without a
drafter (Jacobi), each lossless and relaxed over k neighbours with an additive bound δ or a ratio λ. All rows draw the same samples,
one at a time as speculation does, in turns of a few, so that a change of load meets all of them. Every seed is a run of its own;
what is drawn is kept under ``--work``, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vargen import EagleDrafter
from vargen.bench.device import describe
from vargen.checkpoint import atomic_write
from vargen.data.base import build_dataset
from vargen.decoding.acceptance import Acceptance, Relaxation
from vargen.decoding.jacobi import Jacobi
from vargen.decoding.lantern import Lantern
from vargen.decoding.neighbors import neighbor_table
from vargen.decoding.speculative import Speculation
from vargen.metrics.evaluate import evaluate_images
from vargen.metrics.features import FEATURE_NETS, load_feature_net
from vargen.noise import Noise
from vargen.sample.load import load_pipeline

PLAIN = "plain"
TURN = 10
# with fewer samples only passes and time are reported
JUDGED = 100
# tree -> how it is called, and (k, bound) of its relaxed rows; LANTERN's own k = 1000 is a sixteenth of its codebook, as 8 is here
TREES: dict[str | None, tuple[str, list[tuple[int, dict[str, float]]]]] = {
    None: ("dynamic tree", [(8, {"delta": 0.1}), (8, {"delta": 0.4})]),
    "naive_extend_57": (
        "static tree",
        [(10, {"ratio": 5.0}), (5, {"ratio": 10.0}), (5, {"ratio": 20.0}), (3, {"delta": 0.4})],
    ),
    "chain_5": ("chain of 5", [(10, {"ratio": 5.0}), (5, {"ratio": 10.0})]),
}
SYMBOLS = {"delta": "δ", "ratio": "λ"}


def decodings(drafter: EagleDrafter, table: Tensor) -> dict[str, Speculation | None]:
    """The rows of the table, by name."""
    rows: dict[str, Speculation | None] = {PLAIN: None}
    for tree, (name, relaxed) in TREES.items():
        rows[f"{name}, lossless"] = Lantern(drafter, tree=tree)
        for k, bound in relaxed:
            rows[f"{name}, {described(k, bound)}"] = Lantern(drafter, table, k, tree=tree, **bound)  # type: ignore[arg-type]
    rows["Jacobi, lossless"] = Speculation(Jacobi(8), Acceptance())
    rows[f"Jacobi, {described(10, {'ratio': 5.0})}"] = Speculation(Jacobi(8), Acceptance(Relaxation(table, 10, ratio=5.0)))
    return rows


def described(k: int, bound: dict[str, float]) -> str:
    ((name, value),) = bound.items()
    return f"k={k}, {SYMBOLS[name]}={value:g}"


def draw(pipe: Any, decoding: Speculation | None, seed: int, number: int) -> dict[str, Tensor]:
    """One sample: its tokens, processor seconds of this process, and passes."""
    options = {} if decoding is None else {"decoding": decoding}
    label = number % pipe.model.num_classes
    condition, _ = pipe.condition(class_labels=[label])
    guidance, sampling = settings(pipe)
    started = time.process_time()
    tokens = pipe.model.generate(condition, noise=Noise(seed, [number]), guidance=guidance, sampling=sampling, **options)
    seconds = time.process_time() - started
    total = pipe.model.space.num_tokens
    passes = [total, 0, 0] if decoding is None else [
        decoding.statistics.target_passes, decoding.statistics.draft_passes, decoding.statistics.rounds
    ]  # fmt: skip
    return {"tokens": tokens.int(), "seconds": torch.tensor([seconds]), "passes": torch.tensor([passes])}


def settings(pipe: Any) -> tuple[Any, Any]:
    from vargen import Guidance, Sampling

    given = pipe.config.defaults
    sampling = Sampling(given["temperature"], given["top_k"], given["top_p"])
    return Guidance(given["guidance_scale"], schedule=given["guidance_schedule"]), sampling


def draw_all(pipe: Any, rows: dict[str, Speculation | None], seed: int, samples: int, work: Path) -> dict[str, dict[str, Tensor]]:
    """``samples`` of every row, in turns; what an earlier run has kept is not drawn again."""
    kept: dict[str, dict[str, Tensor]] = {}
    files = {name: work / f"seed-{seed}" / f"{re.sub('[^a-z0-9.=δλ]+', '-', name.lower())}.safetensors" for name in rows}
    for name, file in files.items():
        if file.is_file():
            kept[name] = load_file(file)
    for name, decoding in rows.items():
        if len(kept.get(name, {"tokens": ()})["tokens"]) < samples:
            draw(pipe, decoding, seed, 0)
    for start in range(0, samples, TURN):
        for name, decoding in rows.items():
            done = kept.get(name)
            if done is not None and len(done["tokens"]) > start:
                continue
            new = [draw(pipe, decoding, seed, number) for number in range(start, min(start + TURN, samples))]
            parts = [*([done] if done else []), *new]
            kept[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            atomic_write(files[name], lambda path, name=name: save_file(kept[name], path))
        print(f"seed {seed}: {start + TURN} samples", flush=True)
    return kept


def counted(pipe: Any, drawn: dict[str, Tensor], samples: int) -> dict[str, float]:
    """Passes and time of a row's samples."""
    seconds, passes = drawn["seconds"][:samples], drawn["passes"][:samples].double()
    return {
        # the first token comes from the pass over the prefix, as it does in plain decoding
        "tokens_per_target_pass": float(pipe.model.space.num_tokens / passes[:, 0].mean()),
        "draft_passes_per_target_pass": float(passes[:, 1].sum() / passes[:, 0].sum()),
        "processor_milliseconds_per_image": 1000 * float(seconds.mean()),
    }


@torch.no_grad()
def judged(pipe: Any, name: str, drawn: dict[str, Tensor], samples: int) -> dict[str, float]:
    """Distance and accuracy of a row's samples."""
    images = torch.cat([pipe.visual_tokenizer.decode(part.long()) for part in drawn["tokens"][:samples].split(50)]).clamp(-1, 1)
    options = {"frames": images.shape[2], "length": 512} if images.dim() == 5 else {}
    reference = build_dataset(name, size=images.shape[-1], split="test", **options)
    labels = torch.arange(samples) % pipe.model.num_classes
    report = evaluate_images(images, reference, load_feature_net(name), labels=labels)
    return {
        "frechet_distance": report["frechet_distance"],
        "floor": report["frechet_floor_same_sizes"],
        "conditional_accuracy": report["conditional_accuracy"],
    }


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown; plus or minus is the standard deviation over seeds."""
    lines = ["| decoding | tokens per target pass | time against plain | Fréchet distance | accuracy |", "|---|---|---|---|---|"]
    for name, runs in results.items():

        def spread(key: str, digits: int, scale: float = 1.0, runs: list[dict[str, float]] = runs) -> str:
            values = [scale * run[key] for run in runs if key in run]
            error = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.{digits}f}{error}" if values else ""

        cells = [spread("tokens_per_target_pass", 2), spread("time_ratio", 2), spread("frechet_distance", 2)]
        accuracy = spread("conditional_accuracy", 1, 100)
        lines.append("| " + " | ".join([name, *cells, f"{accuracy} %" if accuracy else ""]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bundled name or directory of a pipeline that is conditioned on classes")
    parser.add_argument(
        "--judge", choices=FEATURE_NETS, help="data set and network of the distance; by default as the model's name"
    )
    parser.add_argument("--drafter", required=True, help="directory of a trained drafter")
    parser.add_argument("--samples", type=int, default=200, help="for every seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these (plain decoding always)")
    parser.add_argument("--work", type=Path, default=Path("outputs/speculation"))
    parser.add_argument("--output", default="benchmarks/results/speculation-digits.json")
    arguments = parser.parse_args()
    judge = arguments.judge or arguments.model
    if judge not in FEATURE_NETS and arguments.samples >= JUDGED:
        parser.error(f"--judge says what judges '{judge}': one of {', '.join(FEATURE_NETS)}; or draw fewer than {JUDGED} samples")
    pipe = load_pipeline(arguments.model)
    drafter = EagleDrafter.from_pretrained(arguments.drafter).to(pipe.model.device).eval()
    rows = decodings(drafter, neighbor_table(pipe.visual_tokenizer, 11))
    if arguments.rows:
        rows = {name: way for name, way in rows.items() if name == PLAIN or any(part in name for part in arguments.rows)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for seed in arguments.seeds:
        drawn = draw_all(pipe, rows, seed, arguments.samples, arguments.work)
        for name in rows:
            results[name].append(counted(pipe, drawn[name], arguments.samples))
            if arguments.samples >= JUDGED:
                results[name][-1] |= judged(pipe, judge, drawn[name], arguments.samples)
            plain = results[PLAIN][-1]["processor_milliseconds_per_image"]
            results[name][-1]["time_ratio"] = results[name][-1]["processor_milliseconds_per_image"] / plain
    environment = describe(pipe.model.device)
    budget = {"samples": arguments.samples, "seeds": arguments.seeds}
    record = {"model": arguments.model, **budget, "sampling": dict(pipe.config.defaults), **environment, "results": results}
    content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    atomic_write(arguments.output, lambda path: path.write_text(content) and None)
    print(table(results))


if __name__ == "__main__":
    main()
