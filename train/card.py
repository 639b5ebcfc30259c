"""Model cards: how a model was made and how it did, written from the run's own records."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vargen.train.log import side_by_side
from vargen.train.task import Facts

LOSS_ROWS = 9
CURVE, PICTURES = "loss.png", "pictures.png"
_SIZE, _MARGINS, _FONT_SIZE = (560, 240), (56, 12, 12, 26), 12


def write_card(folder: Path, title: str, command: str, facts: Facts, panels: Sequence[Tensor] = ()) -> None:
    """``README.md`` of a model directory: command, training time, scores, the loss over the run, pictures, the whole recipe.

    Args:
        panels: images ``(N, 3, H, W)`` in [-1, 1] each, shown beside each other, such as originals and reconstructions.
    """
    shown, gap = [], "\n\n"
    curve = loss_curve(facts.metrics)
    if curve is not None:
        curve.save(folder / CURVE)
        shown.append(f"![Training loss by step]({CURVE})")
    if panels:
        Image.fromarray(side_by_side(panels).permute(1, 2, 0).numpy()).save(folder / PICTURES)
        shown.append(f"![Pictures of the finished model]({PICTURES})")
    text = f"""---
library_name: vargen
license: apache-2.0
---
# {title}

Made by `{command}`: {facts.step:,} steps, {facts.samples:,} samples, {_duration(facts)} on {_machine()}.

{_table(["score", "value"], [[name, f"{value:.4g}"] for name, value in facts.scores.items()])}

{_table(*_history(facts.metrics))}

{gap.join(shown)}

Recipe:

```yaml
{facts.recipe.rstrip()}
```
"""
    (folder / "README.md").write_text(text)


def loss_curve(metrics: Sequence[dict[str, Any]]) -> Image.Image | None:
    """The logged training loss over steps drawn on a logarithmic scale if it stays positive; None for fewer than two."""
    points = [(float(line["step"]), float(line["loss"])) for line in metrics if "loss" in line]
    if len(points) < 2:
        return None
    logarithmic = min(value for _, value in points) > 0
    heights = [math.log10(value) if logarithmic else value for _, value in points]
    low, high = min(heights), max(heights)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    (width, height), (left, top, right, bottom) = _SIZE, _MARGINS
    last = points[-1][0]

    def place(step: float, value: float) -> tuple[float, float]:
        share = (value - low) / (high - low)
        return left + step / last * (width - left - right), height - bottom - share * (height - top - bottom)

    image = Image.new("RGB", _SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_FONT_SIZE)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        x, y = place(share * last, value)
        draw.line((left, y, width - right, y), fill=(225, 225, 230))
        draw.text((left - 6, y), f"{10**value if logarithmic else value:.2g}", fill="black", font=font, anchor="rm")
        draw.text((x, height - 6), f"{share * last:.0f}", fill="black", font=font, anchor="ms" if share < 1 else "rs")
    draw.line([place(step, value) for (step, _), value in zip(points, heights)], fill=(40, 90, 200), width=2)
    return image


def _duration(facts: Facts) -> str:
    seconds = max((float(line.get("seconds", 0)) for line in facts.metrics), default=0.0)
    return f"{seconds / 60:.1f} minutes" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} hours"


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def _history(metrics: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Evenly spaced rows of the losses that were logged."""
    logged = [line for line in metrics if "loss" in line]
    if not logged:
        return ["step", "loss"], []
    speed = {"steps_per_second", "samples_per_second", "seconds", "step"}
    names = [name for name in logged[-1] if name not in speed]
    count = min(LOSS_ROWS, len(logged))
    chosen = [logged[round(i * (len(logged) - 1) / max(count - 1, 1))] for i in range(count)]
    return ["step", *names], [[str(line["step"]), *(f"{line[n]:.4g}" if n in line else "" for n in names)] for line in chosen]


def _table(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
