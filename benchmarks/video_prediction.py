"""Frame prediction of moving shapes: continued clips against the true ones, beside copies of the last given frame.

    python benchmarks/video_prediction.py outputs/train/video-prediction/final

For every number of given frames, over held-out clips: the share of clips whose motion, read from the pixels by the rule, is the
true one, and the PSNR of the frames that were not given (of their mean squared error over all clips, as a still clip has none): of
the model, of the last given frame repeated, and of the true clip through the tokenizer, which no model of its tokens surpasses.
"""

from __future__ import annotations

import sys
from pathlib import Path

# `kernels` is also a package of Hugging Face, for which its other packages would take a file of this folder
if str(Path(__file__).parent) in sys.path:
    sys.path.remove(str(Path(__file__).parent))

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.data.base import build_dataset
from vargen.data.shapes_reader import check_motions
from vargen.noise import Noise
from vargen.pipeline import VisualARPipeline, to_output
from vargen.sample.load import resolve
from vargen.sample.picture import film, save_image, side_by_side

AT_ONCE = 40
WAYS = ("model", "last frame", "tokenizer")


@torch.no_grad()
def predict(pipe: VisualARPipeline, pixels: Tensor, labels: Tensor, given: int, seed: int) -> dict[str, Tensor]:
    """Clips that begin with the first ``given`` frames, by every one of ``WAYS``."""
    model, painted = [], []
    for rows in torch.arange(len(pixels)).split(AT_ONCE):
        condition: dict[str, Any] = {"class_labels": labels[rows]} if "class" in pipe.model.conditioning else {}
        out = pipe(video=pixels[rows, :, :given], generator=Noise(seed, rows), output_type="pt", **condition)
        model.append(out.images.clamp(-1, 1))
        painted.append(pipe.visual_tokenizer.decode(pipe.visual_tokenizer.encode(pixels[rows])).clamp(-1, 1))
    still = pixels[:, :, given - 1 : given].expand(-1, -1, pixels.shape[2] - given, -1, -1)
    return dict(zip(WAYS, (torch.cat(model), torch.cat([pixels[:, :, :given], still], dim=2), torch.cat(painted))))


def scores(clips: Tensor, pixels: Tensor, labels: Tensor, given: int) -> dict[str, float]:
    error = (clips - pixels)[:, :, given:].square().flatten(1).mean(1)
    psnr = 10 * math.log10(4 / float(error.mean()))
    right = check_motions(clips, labels)["motion"].double()
    return {
        "psnr": psnr,
        "psnr_stderr": 10 / math.log(10) * float(error.std() / error.mean()) / math.sqrt(len(error)),
        "rule_accuracy": float(right.mean()),
        "rule_accuracy_stderr": float((right.mean() * (1 - right.mean()) / len(right)) ** 0.5),
    }


def sheet(pipe: VisualARPipeline, pixels: Tensor, clips: Tensor, given: int, path: Path) -> None:
    """True and continued clips beside each other, the first eight; given frames are part of both."""
    films = [[film(video) for video in to_output(part[:8], "pil")] for part in (pixels, clips)]
    rows = [list(pair) for pair in zip(*films)]
    save_image(side_by_side(rows, ["true clip", f"continued from {given} frames"], [""] * len(rows), 320), path)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    head = [f"{way}: {what}" for way in WAYS for what in ("motion", "PSNR")]
    lines = ["| given | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for given, ways in results.items():
        cells = [
            text
            for way in WAYS
            for text in (f"{100 * ways[way]['rule_accuracy']:.1f} %", f"{ways[way]['psnr']:.2f} ± {ways[way]['psnr_stderr']:.2f}")
        ]
        lines.append(f"| {given} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a bundled name or the directory of a pipeline")
    parser.add_argument("--given", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="benchmarks/results/video-prediction.json")
    parser.add_argument("--picture", type=Path, help="a sheet of the first clips, from the middle one of the numbers given")
    arguments = parser.parse_args()
    pipe = VisualARPipeline.from_pretrained(resolve(arguments.model))
    frames, _, size = pipe.visual_tokenizer.sample_shape
    data = build_dataset("shapes-video", size=size, frames=frames, split="test", length=arguments.samples)
    pixels = torch.stack([data[i]["pixels"] for i in range(arguments.samples)])
    results = {}
    for given in arguments.given:
        clips = predict(pipe, pixels, data.labels, given, arguments.seed)
        results[str(given)] = {way: scores(clips[way], pixels, data.labels, given) for way in WAYS}
        if arguments.picture and given == arguments.given[len(arguments.given) // 2]:
            sheet(pipe, pixels, clips["model"], given, arguments.picture)
    # a path of this machine says nothing elsewhere
    record = {"model": Path(arguments.model).name, "samples": arguments.samples, "seed": arguments.seed, "results": results}
    atomic_write(arguments.output, lambda path: path.write_text(json.dumps(record, indent=2) + "\n") and None)
    print(table(results))


if __name__ == "__main__":
    main()
