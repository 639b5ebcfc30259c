"""Trains the small classifiers whose features the evaluation of the shipped sets uses.

``python -m vargen.train.features digits --out vargen/assets/features-digits`` makes the network that ships; see ``RECIPES``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from vargen.checkpoint import atomic_directory
from vargen.data.base import VisualDataset, build_dataset
from vargen.data.loader import batch_indices, ordered_batches
from vargen.data.shapes import BACKGROUNDS, COLORS, MOTIONS, POSITIONS, SHAPES, SIZES
from vargen.data.shapes_reader import attributes_from_caption, attributes_from_video_caption
from vargen.errors import ConfigError, VargenError, nearest
from vargen.metrics.features import FeatureNet, extract
from vargen.metrics.samples import from_uint8
from vargen.noise import Noise

# ``shift`` (share of the width), ``rotation`` (degrees) and ``zoom`` (of the log scale) bound the random affine maps; ``blur`` and
# ``grain`` make the network bear with what generators draw
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "data": {"name": "digits", "size": 32},
        "network": {"image_size": 32, "widths": [16, 32, 48, 64], "dim": 64},
        "augment": {"shift": 0.08, "rotation": 10.0, "zoom": 0.12, "blur": 0.3, "grain": 0.15},
        "steps": 900,
    },
    "shapes": {
        "data": {"name": "shapes", "size": 48, "length": 16384},
        "network": {"image_size": 48, "widths": [16, 32, 48, 64], "dim": 64},
        "augment": {"shift": 0.0, "rotation": 0.0, "zoom": 0.0, "blur": 0.3, "grain": 0.1},
        "steps": 2500,
    },
    "shapes-video": {
        "data": {"name": "shapes-video", "size": 24, "frames": 6, "length": 8192},
        "network": {"image_size": 24, "widths": [32, 48, 64, 64], "dim": 64, "frames": 6},
        "augment": {"shift": 0.0, "rotation": 0.0, "zoom": 0.0, "blur": 0.3, "grain": 0.1},
        "steps": 1500,
    },
}
TEST_LENGTH = 2048
THUMBNAIL, THUMBNAIL_WEIGHT = 8, 4.0


def train_features(
    dataset: str, out_dir: str | Path, steps: int | None = None, seed: int = 0, batch_size: int = 64, learning_rate: float = 2e-3
) -> dict[str, float]:
    """Trains a :class:`FeatureNet` on a shipped set and writes it, half precision, with its model card.

    Args:
        dataset: key of ``RECIPES``.
        out_dir: directory that the model replaces.
        steps: optimizer steps, the recipe's by default.
        seed: of initialisation, order and augmentation.

    Returns:
        Accuracy on the held-out split for every property, measured with the saved weights.
    """
    if dataset not in RECIPES:
        raise ConfigError(f"no feature recipe for '{dataset}'{nearest(dataset, RECIPES)}")
    recipe = RECIPES[dataset]
    steps = recipe["steps"] if steps is None else steps
    started = (time.perf_counter(), time.process_time())
    train = build_dataset(recipe["data"], split="train")
    properties = properties_of(dataset, train)
    torch.manual_seed(seed)
    model = FeatureNet(properties, name=f"features-{dataset}", **recipe["network"])
    pixels, targets = _tabulate(train, properties)
    # features must also give back a thumbnail: those of a classifier alone say little about pictures that are of no class
    thumbnail = nn.Linear(model.config["dim"], 3 * (model.frames or 1) * THUMBNAIL**2)
    parameters = [*model.parameters(), *thumbnail.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / max(steps, 1))))
    model.train()
    for step in trange(steps, desc=f"features-{dataset}", mininterval=5):
        rows, epochs = batch_indices(seed, step, batch_size, len(pixels))
        shown = augment(from_uint8(pixels[rows]).flatten(1, -3), Noise(seed, rows), epochs, **recipe["augment"])
        out = model(shown.reshape(pixels[rows].shape))
        loss = sum(F.cross_entropy(out.logits[key], targets[key][rows], label_smoothing=0.05) for key in properties)
        loss = loss + THUMBNAIL_WEIGHT * F.mse_loss(thumbnail(out.features), F.adaptive_avg_pool2d(shown, THUMBNAIL).flatten(1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    seconds = [round(now - then) for now, then in zip((time.perf_counter(), time.process_time()), started)]
    model.half().float()  # the numbers below are those of the weights as saved
    scores = accuracy(model.eval(), dataset)
    facts = {"steps": steps, "seed": seed, "batch_size": batch_size, "seconds": seconds, "accuracy": scores}
    _save(model, Path(out_dir), dataset, facts)
    return scores


def properties_of(name: str, dataset: VisualDataset) -> dict[str, list[str]]:
    """What the network of a set tells; the class of shapes is the shape."""
    if name == "shapes":
        return {
            "class": list(SHAPES),
            "color": list(COLORS),
            "background": list(BACKGROUNDS),
            "size": list(SIZES),
            "position": list(POSITIONS),
        }
    if name == "shapes-video":
        return {"class": list(MOTIONS), "color": list(COLORS), "background": list(BACKGROUNDS), "shape": list(SHAPES)}
    return {"class": list(dataset.classes)}


def _tabulate(dataset: VisualDataset, properties: Mapping[str, list[str]]) -> tuple[Tensor, dict[str, Tensor]]:
    """All pixels, uint8, and, for every property, the number of its value."""
    pixels, targets = [], {key: [] for key in properties}  # type: ignore[var-annotated]
    for batch in ordered_batches(dataset, 64):
        pixels.append(((batch["pixels"] + 1) * 127.5).round().byte())
        for row, label in enumerate(batch["class_labels"].tolist()):
            words = _words(batch["captions"][row], pixels[0].dim() == 5) if len(properties) > 1 else {}
            for key, values in properties.items():
                targets[key].append(label if key == "class" else values.index(words[key]))
    return torch.cat(pixels), {key: torch.tensor(numbers) for key, numbers in targets.items()}


def _words(caption: str, video: bool) -> dict[str, str]:
    return attributes_from_video_caption(caption) if video else asdict(attributes_from_caption(caption))


def augment(
    pixels: Tensor,
    noise: Noise,
    epochs: Tensor,
    *,
    shift: float,
    rotation: float,
    zoom: float,
    blur: float,
    grain: float,
) -> Tensor:
    """Random affine maps, then blur for a share ``blur`` of the images and pixel noise of deviation up to ``grain``."""
    u = 2 * noise.uniform("augment/map", (4,), at=(epochs,)) - 1
    if shift or rotation or zoom:
        angle, scale = torch.deg2rad(rotation * u[:, 0]), torch.exp(zoom * u[:, 1])
        cos, sin = scale * angle.cos(), scale * angle.sin()
        move = 2 * shift * u[:, 2:]
        rows = (torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1))
        grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    v = noise.uniform("augment/disturb", (2,), at=(epochs,))[..., None, None, None]
    soft = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    pixels = torch.where(v[:, 0] < blur, soft, pixels)
    return pixels + grain * v[:, 1] * noise.normal("augment/grain", tuple(pixels.shape[1:]), at=(epochs,))


@torch.no_grad()
def accuracy(model: FeatureNet, dataset: str) -> dict[str, float]:
    """Share of held-out images whose property the network tells right."""
    data = dict(RECIPES[dataset]["data"])
    if "length" in data:
        data["length"] = TEST_LENGTH
    test = build_dataset(data, split="test")
    properties = properties_of(dataset, test)
    pixels, targets = _tabulate(test, properties)
    logits = extract(model, map(from_uint8, pixels.split(256))).logits
    return {key: float((logits[key].argmax(1) == targets[key]).float().mean()) for key in properties}


def _save(model: FeatureNet, folder: Path, dataset: str, facts: Mapping[str, Any]) -> None:
    count = torch.get_num_threads()
    threads = f"{count} CPU thread{'s' if count > 1 else ''} ({platform.machine()})"
    rows = "\n".join(f"| {key} | {100 * share:.2f} % |" for key, share in facts["accuracy"].items())
    held_out = "359 held-out digits" if dataset == "digits" else f"{TEST_LENGTH} held-out {'clips' if model.frames else 'pictures'}"
    card = f"""---
library_name: vargen
license: apache-2.0
---
# Feature network of the {dataset} set

A small classifier ({model.num_parameters_:,} parameters, half precision on disk). Its {model.config["dim"]} features and its class
logits serve the offline evaluation: `vargen.metrics.features.load_feature_net("{dataset}")`.

| property | accuracy on {held_out} |
| --- | --- |
{rows}

Made by `python -m vargen.train.features {dataset} --steps {facts["steps"]} --seed {facts["seed"]} --out FOLDER`:
{facts["steps"]} steps of {facts["batch_size"]} {"clips" if model.frames else "images"}, {facts["seconds"][0]} s
({facts["seconds"][1]} s of processor time) on {threads}.
"""
    half = copy.deepcopy(model).half()
    with atomic_directory(folder) as temporary:
        half.save_pretrained(temporary)
        (temporary / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vargen.train.features", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=sorted(RECIPES))
    parser.add_argument("--out", required=True, help="directory of the model")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        scores = train_features(options.dataset, options.out, options.steps, options.seed)
    except VargenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
