"""Model cards: how a model was made and how it did, written from the run's own records."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from vargen.train.task import Facts

LOSS_ROWS = 9


def write_card(folder: Path, title: str, command: str, facts: Facts) -> None:
    """``README.md`` of a model directory: command, training time, scores, the loss over the run, the whole recipe."""
    text = f"""---
library_name: vargen
license: apache-2.0
---
# {title}

Made by `{command}`: {facts.step:,} steps, {facts.samples:,} samples, {_duration(facts)} on {_machine()}.

{_table(["score", "value"], [[name, f"{value:.4g}"] for name, value in facts.scores.items()])}

{_table(*_history(facts.metrics))}

Recipe:

```yaml
{facts.recipe.rstrip()}
```
"""
    (folder / "README.md").write_text(text)


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
