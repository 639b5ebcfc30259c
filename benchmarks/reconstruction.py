"""What trained tokenizers are worth on held-out samples: fidelity, use of codes, and what each kind claims for itself.

    python benchmarks/reconstruction.py flextok outputs/train/shapes-flextok
    python benchmarks/reconstruction.py textok outputs/train/shapes-textok outputs/train/shapes-textok-2 ...
    python benchmarks/reconstruction.py vq shapes

Every run directory is judged on the test split of the data it was trained on. Of ordered tokens, every number of leading ones is
decoded from the same noise. Tokenizers that take captions are also given shuffled ones. Results go to a JSON file, reconstructions
and loss curves to pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from vargen.checkpoint import atomic_write
from vargen.condition import TextFeatures
from vargen.config import load_config
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.loader import ordered_batches
from vargen.data.shapes_reader import attributes_from_pixels
from vargen.metrics.features import load_feature_net
from vargen.metrics.frames import ssim
from vargen.model import VisualTokenizer
from vargen.nn.quantize import codebook_statistics
from vargen.noise import Noise
from vargen.sample.load import load_tokenizer
from vargen.sample.picture import save_image, side_by_side, to_images
from vargen.text import load_text_encoder
from vargen.tokenizers.flextok import FlexTok
from vargen.tokenizers.mingtok import MingTok
from vargen.train.build import plain
from vargen.train.card import loss_curve
from vargen.train.log import read_metrics
from vargen.train.tokenizer import SCHEMA

BATCH = 64
SHOWN = 6


class Judge:
    """A trained tokenizer and the held-out samples that it is judged on.

    Args:
        run: directory that ``vargen train`` made, or ``digits`` or ``shapes`` for the VQ tokenizers that ship.
        samples: held-out samples.
    """

    def __init__(self, run: Path, samples: int) -> None:
        self.run = run
        model = str(run / "final") if run.is_dir() else str(run)
        self.tokenizer = load_tokenizer(model, "cpu")
        recipe = max(run.glob("checkpoint-*/recipe.yaml"), default=None)
        self.recipe = plain(OmegaConf.load(recipe) if recipe else load_config(f"{run}/tokenizer", schema=SCHEMA))
        dataset = {k: v for k, v in self.recipe["dataset"].items() if v is not None}
        self.training = build_dataset(dataset)
        held_out = {k: v for k, v in dataset.items() if k not in ("augment", "length")}
        self.held_out = build_dataset({**held_out, "split": "test", **({"length": samples} if dataset["name"] == "shapes" else {})})
        batch = next(ordered_batches(self.held_out, samples, samples))
        self.pixels, self.labels = batch["pixels"], batch["class_labels"]
        self.network = load_feature_net(dataset["name"])
        self.text: TextFeatures | None = None
        if self.tokenizer.takes_text:
            self.text = load_text_encoder(run / "final" / "text_encoder").encode(batch["captions"])

    def first(self, count: int) -> Judge:
        """The same with the first samples only."""
        part = copy.copy(self)
        part.pixels, part.labels = self.pixels[:count], self.labels[:count]
        return part

    def text_of(self, rows: slice, shift: int = 0) -> TextFeatures | None:
        """Captions of ``rows``, or those of samples ``shift`` further on."""
        if self.text is None:
            return None
        return self.text.select((torch.arange(len(self.pixels))[rows] + shift) % len(self.text.mask))

    def rows(self) -> Iterator[slice]:
        for start in range(0, len(self.pixels), BATCH):
            yield slice(start, min(start + BATCH, len(self.pixels)))

    @torch.inference_mode()
    def encode(self, shift: int = 0) -> Tensor:
        noise = Noise(0, len(self.pixels))
        tokens = [self.tokenizer.encode(self.pixels[r], self.text_of(r, shift), noise.select(r)) for r in self.rows()]
        return torch.cat(tokens)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, shift: int = 0, seed: int = 1, **options: Any) -> Tensor:
        noise = Noise(seed, len(self.pixels))
        parts = [self.tokenizer.decode(tokens[r], self.text_of(r, shift), noise.select(r), **options) for r in self.rows()]
        return torch.cat(parts).clamp(-1, 1)

    def errors(self, painted: Tensor) -> Tensor:
        """Mean square error of each sample, pixels in [-1, 1]."""
        return (painted - self.pixels).square().flatten(1).mean(1)

    def recognised(self, painted: Tensor) -> dict[str, float]:
        """How plausible pictures are: what the classifier of the data set says, and what rules read from shapes."""
        told = self.network(painted).logits["class"].argmax(1)
        scores = {"class_accuracy": float((told == self.labels).float().mean())}
        if self.recipe["dataset"]["name"] == "shapes":
            seen = [attributes_from_pixels(image) for image in painted]
            overlaps = torch.tensor([0.0 if s is None else s.match for s in seen])
            scores["overlap_with_an_ideal_shape"] = float(overlaps.mean())
        return scores


def mean_error(values: Tensor) -> list[float]:
    """Mean and its standard error."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def psnr(errors: Tensor) -> Tensor:
    return 10 * torch.log10(4 / errors.clamp(min=1e-10))


def mean_image(dataset: VisualDataset, samples: int = 1024) -> Tensor:
    batches = [batch["pixels"] for batch in ordered_batches(dataset, BATCH, samples)]
    return torch.cat(batches).mean(0)


def bits(tokenizer: VisualTokenizer) -> float | None:
    """Bits of a sample's ids; None for continuous tokens."""
    size = tokenizer.space.codebook_size
    return None if size is None else tokenizer.space.num_tokens * float(torch.tensor(float(size)).log2())


def fidelity(judge: Judge) -> tuple[dict[str, Any], Tensor]:
    """The round trip of all tokens beside what predicting the mean training image would give, and every sample's PSNR."""
    options = {"guidance_scale": 1.0} if isinstance(judge.tokenizer, FlexTok) else {}
    tokens = judge.encode()
    painted = judge.decode(tokens, **options)
    errors, constant = judge.errors(painted), judge.errors(mean_image(judge.training))
    space = judge.tokenizer.space
    report = {
        "tokens": space.num_tokens,
        "numbers_per_token": space.channels,
        "codebook_size": space.codebook_size,
        "bits": bits(judge.tokenizer),
        "psnr": mean_error(psnr(errors)),
        "psnr_of_mean_image": mean_error(psnr(constant)),
        "mse": mean_error(errors),
        "mse_of_mean_image": mean_error(constant),
        "ssim": mean_error(ssim(painted, judge.pixels)),
        "originals": judge.recognised(judge.pixels),
        "reconstructions": judge.recognised(painted),
    }
    if space.codebook_size is not None:
        report["codes"] = {k: float(v) for k, v in codebook_statistics(tokens, space.codebook_size).items()}
        report["codes"]["ids_counted"] = tokens.numel()
    else:
        report["token_mean_and_deviation"] = [float(tokens.mean()), float(tokens.std())]
    return report, psnr(errors)


def prefixes(judge: Judge, counts: list[int]) -> dict[str, Any]:
    """Leading tokens of an ordered space, from the same noise; and the decoder's settings at all of them."""
    tokens, rows, before = judge.encode(), [], None
    for count in counts:
        painted = judge.decode(tokens[:, :count], guidance_scale=1.0)
        errors = judge.errors(painted)
        row = {"tokens": count, "mse": mean_error(errors), "psnr": mean_error(psnr(errors)), **judge.recognised(painted)}
        if before is not None:
            row["mse_below_the_row_before"] = mean_error(before - errors)
        rows.append(row)
        before = errors
    settings = []
    few = judge.first(BATCH)
    for count in (counts[0], counts[len(counts) // 2], counts[-1]):
        for options in (
            {"guidance_scale": 1.0, "num_inference_steps": 5},
            {"guidance_scale": 1.0, "num_inference_steps": 25},
            {"guidance_scale": 2.0, "normalized_guidance": False},
            {"guidance_scale": 2.0},
            {"guidance_scale": 7.5, "normalized_guidance": False},
            {"guidance_scale": 7.5},
        ):
            painted = few.decode(tokens[:BATCH, :count], **options)
            settings.append({"tokens": count, **options, "psnr": mean_error(psnr(few.errors(painted))), **few.recognised(painted)})
    return {"prefixes": rows, "settings": settings, "settings_samples": BATCH}


def captions(judge: Judge) -> dict[str, Any]:
    """The right caption against those of other samples, on both sides or at the decoder alone."""
    right = judge.errors(judge.decode(judge.encode()))
    report: dict[str, Any] = {"right": mean_error(psnr(right))}
    for name, encoder, decoder in (("shuffled", 1, 1), ("shuffled_at_the_decoder", 0, 1), ("shuffled_at_the_encoder", 1, 0)):
        errors = judge.errors(judge.decode(judge.encode(encoder), decoder))
        report[name] = mean_error(psnr(errors))
        report[f"right_above_{name}"] = mean_error(psnr(right) - psnr(errors))
    return report


def semantics(judge: Judge) -> dict[str, Any]:
    """How well a linear map tells the class from latents, from semantic features and from pixels (ridge regression)."""
    tokenizer = judge.tokenizer
    assert isinstance(tokenizer, MingTok)
    batches = list(ordered_batches(judge.training, BATCH, 2048))
    known = torch.cat([batch["pixels"] for batch in batches])
    labels = torch.cat([batch["class_labels"] for batch in batches])

    def views(pixels: Tensor) -> dict[str, Tensor]:
        latents = tokenizer.encode(pixels)
        return {"pixels": pixels, "latents": latents, "semantic_features": tokenizer.semantic_features(latents)}

    report = {}
    with torch.inference_mode():
        pairs = zip(views(known).items(), views(judge.pixels).values())
        for (name, inputs), tests in pairs:
            x, y = (v.flatten(1).double() for v in (inputs, tests))
            center, scale = x.mean(0), x.std() * x.shape[1] ** 0.5
            x, y = ((v - center) / scale for v in (x, y))
            targets = torch.nn.functional.one_hot(labels).double() - 1 / (int(labels.max()) + 1)
            weights = torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
            report[name] = float(((y @ weights).argmax(1) == judge.labels).float().mean())
    return report


def picture(judges: dict[str, Judge], counts: list[int]) -> Image.Image:
    """Originals beside the reconstructions of every run: of every number of ordered tokens, with right and with other captions."""
    rows: list[list[Image.Image]] = [[image] for image in to_images(next(iter(judges.values())).pixels[:SHOWN])]
    titles = ["original"]
    for name, judge in judges.items():
        few, space = judge.first(SHOWN), judge.tokenizer.space
        tokens = few.encode()
        if space.ordered:
            columns = {f"{n} tokens": few.decode(tokens[:, :n], guidance_scale=1.0) for n in counts}
        else:
            columns = {name if len(judges) > 1 else f"{space.num_tokens} tokens": few.decode(tokens)}
        if few.text is not None:
            columns["other caption"] = few.decode(few.encode(1), 1)
        for title, painted in columns.items():
            titles.append(title)
            for row, image in zip(rows, to_images(painted)):
                row.append(image)
    return side_by_side(rows, titles, [""] * len(rows), side=64)


def budget(judge: Judge) -> dict[str, Any]:
    timed = [line for line in read_metrics(judge.run) if "seconds" in line]
    training = judge.recipe["training"]
    return {
        "steps": int(timed[-1]["step"] if timed else training["max_train_steps"]),
        "batch_size": int(training["batch_size"]),
        "minutes": float(timed[-1]["seconds"]) / 60 if timed else None,
        "seed": int(judge.recipe["seed"]),
        "parameters": sum(p.numel() for p in judge.tokenizer.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result files")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; the first one's loss curve is drawn")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="prefixes of ordered tokens")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/tokenizers"))
    arguments = parser.parse_args()
    judges = {run.name: Judge(run, arguments.samples) for run in arguments.runs}
    results: list[dict[str, Any]] = []
    values: dict[str, Tensor] = {}
    for name, judge in judges.items():
        data = judge.recipe["dataset"]
        report, values[name] = fidelity(judge)
        result: dict[str, Any] = {"run": name, "budget": budget(judge), "model": judge.recipe["model"], **report}
        result["psnr_above"] = {other: mean_error(values[name] - values[other]) for other in values if other != name}
        if judge.tokenizer.space.ordered:
            result |= prefixes(judge, [n for n in arguments.tokens if n <= judge.tokenizer.space.num_tokens])
        if judge.tokenizer.takes_text:
            result["captions"] = captions(judge)
        if isinstance(judge.tokenizer, MingTok):
            result["class_accuracy_of_a_linear_map"] = semantics(judge)
        results.append(result)
    summary = {
        "data": {"name": data["name"], "size": data["size"], "split": "test", "samples": len(judge.pixels)},
        "errors": "pairs are a mean over samples and its standard error; pixels lie in [-1, 1]",
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
        "results": results,
    }
    text = json.dumps(summary, indent=2) + "\n"
    atomic_write(arguments.results / f"tokenizers-{arguments.name}.json", lambda path: path.write_text(text))
    save_image(picture(judges, arguments.tokens), arguments.pictures / f"{arguments.name}.png")
    curve = loss_curve(read_metrics(arguments.runs[0]))
    if curve is not None:
        save_image(curve, arguments.pictures / f"{arguments.name}-loss.png")


if __name__ == "__main__":
    main()
