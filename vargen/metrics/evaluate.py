"""One report for a set of generated images: distance to real ones with its floor, precision and recall, conditional accuracy."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vargen.data.base import VisualDataset
from vargen.data.loader import ordered_batches
from vargen.errors import DataError
from vargen.metrics.features import FeatureExtractor, extract
from vargen.metrics.frechet import frechet_from_features
from vargen.metrics.manifold import manifold_scores
from vargen.metrics.samples import SampleSet, read_samples, round_to_8_bits
from vargen.noise import Noise

logger = logging.getLogger(__name__)

Report = dict[str, Any]
NEIGHBORS = 3
FLOOR_DRAWS = 5


def evaluate_images(
    samples: str | os.PathLike[str] | Tensor | Iterable[Tensor],
    reference: VisualDataset,
    extractor: FeatureExtractor,
    labels: Tensor | Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    more_real: VisualDataset | None = None,
    seed: int = 0,
) -> Report:
    """How generated images compare with real ones.

    Args:
        samples: a sampling job's folder, any folder, an ``.npz`` batch, pixels ``(N, 3, (T,) H, W)`` in [-1, 1] or batches of them.
        reference: the real images or videos, best ones that the model was not trained on.
        extractor: the feature network.
        labels: class labels that the samples were asked for, where the source does not hold them.
        prompts: or their prompts.
        limit: evaluate only the first samples.
        more_real: further real images, such as the training split, that only the floors are drawn from.
        seed: chooses the parts of the real images whose distances are the floors.

    Returns:
        A JSON-able report. ``frechet_distance`` to the reference; ``frechet_floor``, the distance between two halves of all real
        images, and ``frechet_floor_same_sizes``, between parts as large as the samples and the reference (or in that proportion),
        since the distance of small sets is biased upwards; ``precision`` and ``recall``; where labels are known,
        ``conditional_accuracy`` by the network's class logits with its binomial ``conditional_accuracy_stderr``; where the
        reference has rules, ``ground_truth``: the share of samples that show each asked-for property by them.

    Raises:
        DataError: unreadable samples, or labels that do not fit them.
    """
    video = len(reference.sample_shape) == 3
    generated = read_samples(samples, limit, video)
    _attach(generated, labels, prompts)
    fake = extract(extractor, generated.batches(batch_size), device)
    real = extract(extractor, _real_batches(reference, batch_size), device)
    scores = manifold_scores(real.features.double(), fake.features.double(), NEIGHBORS)
    pool, pool_labels = real.features, reference.labels
    if more_real is not None:
        pool = torch.cat([pool, extract(extractor, _real_batches(more_real, batch_size), device).features])
        pool_labels = torch.cat([pool_labels, more_real.labels])
    halves = (len(pool) // 2, len(pool) - len(pool) // 2)
    parts = _fitting(len(generated), len(real.features), len(pool))
    report: Report = {
        "frechet_distance": frechet_from_features(real.features, fake.features),
        "frechet_floor": _floor(pool, pool_labels, *halves, seed),
        "frechet_floor_same_sizes": _floor(pool, pool_labels, *parts, seed),
        "precision": scores.precision,
        "recall": scores.recall,
    }
    class_logits = fake.logits.get("class")
    if generated.class_labels is not None and class_logits is not None and class_logits.shape[1] != reference.num_classes:
        logger.warning(
            "no conditional accuracy: %s tells %d classes, the reference has %d",
            extractor.name, class_logits.shape[1], reference.num_classes,
        )  # fmt: skip
    elif generated.class_labels is not None and class_logits is not None:
        right = class_logits.argmax(1) == generated.class_labels
        report["conditional_accuracy"], report["conditional_accuracy_stderr"] = _share(right)
        report["class_accuracy"] = {
            reference.classes[c]: float(right[generated.class_labels == c].float().mean())
            for c in generated.class_labels.unique().tolist()
        }
    verdicts = _judge(generated, reference, batch_size)
    if verdicts:
        report["ground_truth"] = {name: dict(zip(("share", "stderr"), _share(right))) for name, right in verdicts.items()}
    report["settings"] = {
        "samples": generated.source,
        "kind": "videos" if video else "images",
        "num_samples": len(generated),
        "num_reference": len(reference),
        "reference": {"data": type(reference).__name__, "split": getattr(reference, "split", None)},
        "extractor": extractor.name,
        "feature_dim": fake.features.shape[1],
        "covariance": "unbiased",
        "neighbors": NEIGHBORS,
        "floor_sizes": {"halves": list(halves), "same_sizes": list(parts)},
        "seed": seed,
    }
    return report


def _attach(samples: SampleSet, labels: Tensor | Sequence[int] | None, prompts: Sequence[str] | None) -> None:
    """Conditions given by the caller, checked against the number of samples."""
    for given, what in ((labels, "labels"), (prompts, "prompts")):
        if given is not None and len(given) < len(samples):
            raise DataError(f"{len(given)} {what} for {len(samples)} samples: expected one each")
    if labels is not None:
        samples.class_labels = torch.as_tensor(labels)[: len(samples)]
    if prompts is not None:
        samples.prompts = list(prompts)[: len(samples)]


def _real_batches(reference: VisualDataset, batch_size: int) -> Iterator[Tensor]:
    if len(reference) < 2 * (NEIGHBORS + 1):
        raise DataError(f"reference of {len(reference)} images: expected at least {2 * (NEIGHBORS + 1)}")
    for batch in ordered_batches(reference, batch_size):
        yield round_to_8_bits(batch["pixels"])


def _fitting(first: int, second: int, available: int) -> tuple[int, int]:
    """Two set sizes, shrunk in proportion until both fit into the available images, at least two each."""
    scale = min(1.0, available / (first + second))
    return max(int(first * scale), 2), max(int(second * scale), 2)


def _floor(features: Tensor, labels: Tensor, first: int, second: int, seed: int) -> float:
    """Mean distance of disjoint random parts, ``first`` and ``second`` samples large, with all classes in proportion."""
    distances = []
    for draw in range(FLOOR_DRAWS):
        place = Noise(seed).uniform("evaluate/floor", (len(labels),), at=(draw,), dtype=torch.float64)[0]
        for label in labels.unique():
            members = (labels == label).nonzero().flatten()
            # evenly spaced over the order in each class, so that every stretch of the order holds all classes in proportion
            ranks = place[members].argsort().argsort()
            place[members] = (ranks + place[members[0]]) / len(members)
        order = place.argsort()
        distances.append(frechet_from_features(features[order[:first]], features[order[first : first + second]]))
    return sum(distances) / FLOOR_DRAWS


def _share(right: Tensor) -> tuple[float, float]:
    """Share of True and its binomial standard error."""
    p = float(right.double().mean())
    return p, math.sqrt(p * (1 - p) / len(right))


def _judge(samples: SampleSet, reference: VisualDataset, batch_size: int) -> dict[str, Tensor]:
    if samples.class_labels is None and samples.prompts is None:
        return {}
    verdicts: dict[str, list[Tensor]] = {}
    for number, pixels in enumerate(samples.batches(batch_size)):
        rows = slice(number * batch_size, number * batch_size + len(pixels))
        labels = None if samples.class_labels is None else samples.class_labels[rows]
        prompts = None if samples.prompts is None else samples.prompts[rows]
        for name, right in reference.judge(pixels, labels, prompts).items():
            verdicts.setdefault(name, []).append(right)
    return {name: torch.cat(parts) for name, parts in verdicts.items()}


def format_report(report: Report) -> str:
    """The report as a few lines for a terminal."""
    settings = report["settings"]
    lines = [
        f"{settings['num_samples']} samples against {settings['num_reference']} real {settings['kind']}, "
        f"features of {settings['extractor']}",
        f"Fréchet distance      {report['frechet_distance']:.3f}   (two halves of the real set: {report['frechet_floor']:.3f}; "
        f"real sets of these sizes: {report['frechet_floor_same_sizes']:.3f})",
        f"precision, recall     {report['precision']:.3f}, {report['recall']:.3f}",
    ]
    if "conditional_accuracy" in report:
        accuracy, error = report["conditional_accuracy"], report["conditional_accuracy_stderr"]
        lines.append(f"conditional accuracy  {100 * accuracy:.1f} % ± {100 * error:.1f}")
    for name, truth in report.get("ground_truth", {}).items():
        lines.append(f"shows the {name:<11} {100 * truth['share']:.1f} % ± {100 * truth['stderr']:.1f}")
    return "\n".join(lines)
