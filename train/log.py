"""What a training run tells: a progress bar, log lines, ``metrics.jsonl``, TensorBoard and pictures on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vargen.checkpoint import atomic_write
from vargen.errors import ConfigError

METRICS = "metrics.jsonl"
REPORTS = ("none", "tensorboard")


class RunLog:
    """The log of one run; silent on all processes but the first.

    Args:
        directory: the run directory. ``metrics.jsonl`` in it gets a line per :meth:`values`, and loses those after ``start``; its
            ``seconds`` count the training time of all parts of an interrupted run.
        start, total: step that the run continues from (0 for a new one), and its last step.
        enabled: this process writes.
        report_to: ``none`` or ``tensorboard`` (event files under ``directory/tensorboard``).
    """

    def __init__(self, directory: Path, start: int, total: int, enabled: bool = True, report_to: str = "none") -> None:
        if report_to not in REPORTS:
            raise ConfigError(f"report_to '{report_to}': expected one of {', '.join(REPORTS)}")
        self.directory, self.enabled = directory, enabled
        self.bar = tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, disable=not enabled)
        self.metrics = directory / METRICS
        self.writer: Any = None
        self.seconds, self.last_time, self.last_step = 0.0, time.perf_counter(), start
        if enabled:
            directory.mkdir(parents=True, exist_ok=True)
            self._drop_after(start)
            self.seconds = max((float(line.get("seconds", 0)) for line in read_metrics(directory)), default=0.0)
            if report_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def _drop_after(self, step: int) -> None:
        if self.metrics.is_file():
            kept = [line for line in read_metrics(self.directory) if line["step"] <= step]
            atomic_write(self.metrics, lambda path: _write_lines(path, kept))

    def advance(self) -> None:
        self.bar.update()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.enabled:
            self.bar.write(text)

    def values(self, step: int, values: Mapping[str, float], samples_per_step: int) -> None:
        """Logs scalars of ``step`` together with the speed since the last call."""
        now = time.perf_counter()
        speed = (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.seconds += now - self.last_time
        self.last_time, self.last_step = now, step
        if not self.enabled:
            return
        record = {**values, "steps_per_second": speed, "samples_per_second": speed * samples_per_step}
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {record['samples_per_second']:.1f} samples/s")
        self.say(f"(step={step:07d}) " + ", ".join(f"{name} {_short(value)}" for name, value in record.items()))
        self._record(step, {**record, "seconds": self.seconds})

    def extra(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars that are not measured at every log line, such as those of a validation."""
        if self.enabled and values:
            self.say(f"(step={step:07d}) " + ", ".join(f"{name} {_short(value)}" for name, value in values.items()))
            self._record(step, values)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        with open(self.metrics, "a") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, panels: Sequence[Tensor]) -> None:
        """Writes ``pictures/<step>.png``: panels of images ``(N, 3, H, W)`` in [-1, 1] side by side."""
        if self.enabled and panels:
            picture = side_by_side(panels)
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            atomic_write(self.directory / "pictures" / f"{step:08d}.png", lambda path: image.save(path))
            if self.writer is not None:
                self.writer.add_image("pictures", picture, step)

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()


class Meter:
    """Running means of scalars on the device, and the first step at which one of them was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, values: dict[str, Tensor], step: int, required: bool = True) -> None:
        """Adds scalars of ``step``; with ``required`` they must be finite."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + value
            self.counts[name] = self.counts.get(name, 0) + 1
            if required:
                self.bad = torch.where((self.bad == 0) & ~torch.isfinite(value), step, self.bad)

    def first_bad(self, accelerator: Accelerator) -> int:
        """The step of the first value that was not finite on any process, 0 if there was none."""
        found = self.bad.double()
        if accelerator.num_processes > 1:
            gathered = accelerator.gather(found.reshape(1))
            found = gathered[gathered > 0].min() if (gathered > 0).any() else found * 0
        return int(found)

    def mean(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps since the last call and over processes."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        if accelerator.num_processes > 1:
            means = accelerator.reduce(means, reduction="mean")
        self.sums, self.counts = {}, {}
        return {name: float(value) for name, value in means.items()}


def side_by_side(panels: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Panels of images ``(N, 3, H, W)`` in [-1, 1] as one picture, uint8 ``(3, H', W')``; each panel is a near-square grid."""
    grids = [_grid(panel.detach().float().cpu(), gap) for panel in panels]
    height = max(grid.shape[1] for grid in grids)
    padded = [F.pad(grid, (0, 4 * gap, 0, height - grid.shape[1]), value=1.0) for grid in grids]
    joined = torch.cat(padded, dim=2)[:, :, : -4 * gap]
    return (joined.nan_to_num(nan=-1.0).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def _grid(images: Tensor, gap: int) -> Tensor:
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    missing = rows * columns - len(images)
    images = F.pad(torch.cat([images, images.new_ones(missing, *images.shape[1:])]), (0, gap, 0, gap), value=1.0)
    return torch.cat([torch.cat(list(row), dim=2) for row in images.split(columns)], dim=1)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; one that a kill cut short is left out."""
    file = directory / METRICS
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _short(value: float) -> str:
    return f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:.4g}"
