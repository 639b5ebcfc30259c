"""LARP's tokenizer on held-out clips, and whether an autoregressive prior profits from the order that it has learned.

    python benchmarks/larp.py outputs/train/shapes-larp --others outputs/train/shapes-larp-noprior

The round trip is compared with predicting the mean training clip. Then, for every run, fresh priors of one size and budget are
trained on the ids of the frozen tokenizer in three orders: the learned one, one that is drawn once per seed, and another one for
every clip; what is compared is their loss on held-out clips. Two kinds of prior: a next-token decoder as it generates videos (all
tokens count), and the latent prior that the tokenizer is trained with (its first token is given). The latent prior that was trained
along is judged in the same orders. Results go to a JSON file, reconstructions and the loss curve to pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from vargen.backbones.larp import LARPGenerator
from vargen.checkpoint import atomic_write
from vargen.condition import Condition
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.loader import batch_indices, ordered_batches
from vargen.metrics.frames import ssim
from vargen.nn.quantize import codebook_statistics
from vargen.noise import Noise
from vargen.sample.load import load_tokenizer
from vargen.sample.picture import film, save_image, side_by_side, to_images
from vargen.tokenizers.larp import LARPTokenizer
from vargen.tokenizers.larp_prior import LatentPrior
from vargen.train.build import plain
from vargen.train.card import loss_curve
from vargen.train.log import read_metrics

BATCH = 32
SHOWN = 5
FILM_WIDTH = 288
PRIOR_BATCH, LEARNING_RATE, WARMUP = 64, 2e-3, 20
DECODER: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4, "mlp_hidden": 192}
LATENT: dict[str, Any] = {"dim": 64, "depth": 2, "heads": 4}


@dataclass(frozen=True)
class Run:
    """A trained tokenizer and what is known of its training."""

    name: str
    folder: Path
    tokenizer: LARPTokenizer
    recipe: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Run:
        tokenizer = load_tokenizer(str(folder / "final"), "cpu")
        assert isinstance(tokenizer, LARPTokenizer)
        return cls(folder.name, folder, tokenizer, plain(OmegaConf.load(max(folder.glob("checkpoint-*/recipe.yaml")))))

    def dataset(self, split: str, length: int) -> VisualDataset:
        return build_dataset({**self.recipe["dataset"], "split": split, "length": length})

    def budget(self) -> dict[str, Any]:
        timed = [line for line in read_metrics(self.folder) if "seconds" in line]
        return {
            "steps": int(timed[-1]["step"]),
            "batch_size": int(self.recipe["training"]["batch_size"]),
            "minutes": float(timed[-1]["seconds"]) / 60,
            "seed": int(self.recipe["seed"]),
            "parameters": sum(p.numel() for p in self.tokenizer.parameters()),
        }


@dataclass(frozen=True)
class Codes:
    """Ids ``(n, N)`` and motion classes ``(n,)`` of clips."""

    ids: Tensor
    labels: Tensor

    def reordered(self, order: Tensor) -> Codes:
        """The ids of every clip in ``order`` ``(N,)``, or each in its own ``(n, N)``."""
        return Codes(self.ids.gather(1, order.expand_as(self.ids)), self.labels)


@torch.inference_mode()
def encode(tokenizer: LARPTokenizer, dataset: VisualDataset) -> Codes:
    batches = [(tokenizer.encode(b["pixels"]), b["class_labels"]) for b in ordered_batches(dataset, BATCH)]
    return Codes(torch.cat([ids for ids, _ in batches]), torch.cat([labels for _, labels in batches]))


def mean_error(values: Tensor) -> list[float]:
    """Mean and its standard error."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


@torch.inference_mode()
def fidelity(run: Run, held_out: VisualDataset, mean_clip: Tensor) -> dict[str, Any]:
    """The round trip of held-out clips beside predicting the mean training clip, and the use of codes."""
    scores: dict[str, list[Tensor]] = {"psnr": [], "psnr_of_mean_clip": [], "ssim": [], "motion_of_originals": [], "motion": []}
    ids = []
    for batch in ordered_batches(held_out, BATCH):
        pixels = batch["pixels"]
        ids.append(run.tokenizer.encode(pixels))
        painted = run.tokenizer.decode(ids[-1]).clamp(-1, 1)
        for name, guess in (("psnr", painted), ("psnr_of_mean_clip", mean_clip.expand_as(pixels))):
            scores[name].append(10 * torch.log10(4 / (guess - pixels).square().flatten(1).mean(1)))
        scores["ssim"].append(ssim(painted.transpose(1, 2), pixels.transpose(1, 2)).reshape(len(pixels), -1).mean(1))
        for name, clips in (("motion_of_originals", pixels), ("motion", painted)):
            scores[name].append(held_out.judge(clips, batch["class_labels"])["motion"].double())
    space = run.tokenizer.space
    codes = codebook_statistics(torch.cat(ids), space.codebook_size)
    return {
        **{name: mean_error(torch.cat(values)) for name, values in scores.items()},
        "codes": {**{k: float(v) for k, v in codes.items()}, "ids_counted": torch.cat(ids).numel()},
    }


class DecoderPrior(nn.Module):
    """LARP's generator at a small size: by class, every token from those before it."""

    def __init__(self, tokenizer: LARPTokenizer, classes: int) -> None:
        super().__init__()
        space = tokenizer.space
        dropout = {"condition_dropout": 0.0, "token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
        size = {"length": space.num_tokens, "codebook_size": space.codebook_size, "num_classes": classes}
        self.model = LARPGenerator(**size, **DECODER, **dropout)

    def forward(self, codes: Codes) -> Tensor:
        """Nats of every token ``(B, N)``."""
        keep = torch.zeros(len(codes.ids), dtype=torch.bool)
        logits = self.model.assemble(self.model.sequence(codes.ids, Condition(class_labels=codes.labels), keep))
        return F.cross_entropy(logits.transpose(1, 2), codes.ids, reduction="none")


class LatentCodesPrior(nn.Module):
    """The prior of the tokenizer's own training, on frozen codes."""

    codes: Tensor

    def __init__(self, tokenizer: LARPTokenizer, classes: int) -> None:
        super().__init__()
        self.register_buffer("codes", tokenizer.quantizer.codes.detach().clone())
        trained = tokenizer.config.prior if isinstance(tokenizer.config.prior, dict) else {}
        temperature = trained.get("temperature", 1.0)
        self.model = LatentPrior(
            tokenizer.config.code_dim, tokenizer.space.num_tokens, **LATENT, dropout=0.0, temperature=temperature
        )

    @classmethod
    def trained_along(cls, tokenizer: LARPTokenizer) -> LatentCodesPrior:
        prior = cls(tokenizer, 0)
        assert tokenizer.prior_model is not None
        prior.model = tokenizer.prior_model
        return prior

    def forward(self, codes: Codes) -> Tensor:
        """Nats of every token but the first ``(B, N - 1)``."""
        logits = self.model(self.codes[codes.ids]) @ self.codes.T / self.model.temperature
        return F.cross_entropy(logits.transpose(1, 2), codes.ids[:, 1:], reduction="none")


KINDS: dict[str, Callable[[LARPTokenizer, int], nn.Module]] = {"decoder": DecoderPrior, "latent": LatentCodesPrior}


def held_out_loss(kind: str, run: Run, known: Codes, tests: Codes, steps: int, seed: int) -> Tensor:
    """Nats per token ``(n,)`` of held-out clips under a prior of ``kind`` that was trained for ``steps``.

    Initial weights and batches depend on the seed alone, so that orders are compared like with like.
    """
    torch.manual_seed(seed)
    prior = KINDS[kind](run.tokenizer, int(known.labels.max()) + 1)
    optimizer = torch.optim.AdamW(prior.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
    )
    for step in range(steps):
        rows, _ = batch_indices(seed, step, PRIOR_BATCH, len(known.ids))
        loss = prior(Codes(known.ids[rows], known.labels[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return judged(prior, tests)


@torch.inference_mode()
def judged(prior: nn.Module, tests: Codes) -> Tensor:
    """Nats per token ``(n,)`` of held-out clips."""
    chunks = zip(tests.ids.split(128), tests.labels.split(128))
    return torch.cat([prior.eval()(Codes(ids, labels)).mean(1) for ids, labels in chunks])


def reorderings(known: Codes, tests: Codes, seed: int) -> dict[str, tuple[Codes, Codes]]:
    """Training and held-out clips in every order."""
    count = known.ids.shape[1]
    once = Noise(seed).permutation("order", count)[0]
    each = (
        Noise(seed, len(known.ids) + len(tests.ids)).permutation("order of a clip", count).split((len(known.ids), len(tests.ids)))
    )
    return {
        "learned": (known, tests),
        "random": (known.reordered(once), tests.reordered(once)),
        "random_for_every_clip": (known.reordered(each[0]), tests.reordered(each[1])),
    }


def orders(run: Run, known: Codes, tests: Codes, kinds: list[str], steps: int, seeds: list[int]) -> dict[str, Any]:
    """Held-out loss of every kind of prior in the learned order and in random ones."""

    def fresh(kind: str) -> Callable[[Codes, Codes, int], Tensor]:
        return lambda known, tests, seed: held_out_loss(kind, run, known, tests, steps, seed)

    losses: dict[str, Callable[[Codes, Codes, int], Tensor]] = {kind: fresh(kind) for kind in kinds}
    if run.tokenizer.prior_model is not None:
        along = LatentCodesPrior.trained_along(run.tokenizer)
        losses["trained_along"] = lambda known, tests, seed: judged(along, tests)
    report: dict[str, Any] = {}
    for kind, loss in losses.items():
        started = time.process_time()
        values: dict[str, list[Tensor]] = {}
        for seed in seeds:
            for name, pair in reorderings(known, tests, seed).items():
                values.setdefault(name, []).append(loss(*pair, seed))
        report[kind] = {name: _over_seeds([float(v.mean()) for v in each]) for name, each in values.items()}
        for name in list(values)[1:]:
            differences = [mean_error(other - own) for other, own in zip(values[name], values["learned"])]
            gains = _over_seeds([gain for gain, _ in differences])
            report[kind][f"{name}_minus_learned"] = {**gains, "error_over_clips": [error for _, error in differences]}
        report[kind]["processor_seconds"] = time.process_time() - started
    return report


def _over_seeds(values: list[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "seeds": values}


@torch.inference_mode()
def picture(runs: list[Run], held_out: VisualDataset) -> Image.Image:
    """Held-out clips and their round trips, all frames beside each other."""
    pixels = torch.stack([held_out[index]["pixels"] for index in range(SHOWN)])
    columns = [pixels, *(run.tokenizer.decode(run.tokenizer.encode(pixels)).clamp(-1, 1) for run in runs)]
    rows = [[film(to_images(clips[i].transpose(0, 1))) for clips in columns] for i in range(SHOWN)]
    captions = [held_out[index]["caption"] for index in range(SHOWN)]
    return side_by_side(rows, ["original", *(run.name for run in runs)], captions, FILM_WIDTH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory that `vargen train` made; its loss curve and pictures are drawn")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="runs to judge beside it, e.g. one without a prior")
    parser.add_argument("--samples", type=int, default=256, help="held-out clips")
    parser.add_argument("--clips", type=int, default=2048, help="training clips whose ids the priors learn from")
    parser.add_argument("--steps", type=int, default=250, help="of every prior")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of priors")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/larp.json"))
    parser.add_argument("--pictures", type=Path, default=Path("docs/tokenizers"))
    arguments = parser.parse_args()
    runs = [Run.read(folder) for folder in (arguments.run, *arguments.others)]
    training, held_out = runs[0].dataset("train", arguments.clips), runs[0].dataset("test", arguments.samples)
    mean_clip = torch.cat([b["pixels"] for b in ordered_batches(training, BATCH, 1024)]).mean(0)
    results = []
    for run in runs:
        known, tests = encode(run.tokenizer, training), encode(run.tokenizer, held_out)
        results.append(
            {
                "run": run.name,
                "budget": run.budget(),
                "model": run.recipe["model"],
                "prior_weight": run.tokenizer.config.prior_weight if run.tokenizer.config.prior else None,
                **fidelity(run, held_out, mean_clip),
                "order": orders(run, known, tests, arguments.kinds, arguments.steps, arguments.seeds),
            }
        )
    report = {
        "data": {**runs[0].recipe["dataset"], "held_out_clips": arguments.samples},
        "errors": "pairs are a mean over clips and its standard error",
        "priors": {
            "steps": arguments.steps,
            "batch_size": PRIOR_BATCH,
            "clips": arguments.clips,
            "seeds": arguments.seeds,
            "decoder": DECODER,
            "latent": LATENT,
            "loss": "nats per token on held-out clips; the latent prior's first token is given",
        },
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
        "results": results,
    }
    text = json.dumps(report, indent=2) + "\n"
    atomic_write(arguments.output, lambda path: path.write_text(text))
    save_image(picture(runs[:1], held_out), arguments.pictures / "larp.png")
    curve = loss_curve(read_metrics(runs[0].folder))
    if curve is not None:
        save_image(curve, arguments.pictures / "larp-loss.png")


if __name__ == "__main__":
    main()
