"""The bench: every system in every way that applies, in one process, to one record and one table."""

from __future__ import annotations

import gc
import logging
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from vargen.bench.device import PeakMemory, ceilings, describe, seconds
from vargen.bench.systems import REFERENCE, SYSTEMS, Subject, arguments_of
from vargen.bench.ways import PLAIN, WAYS, Run
from vargen.decoding.counting import Cost, counting
from vargen.errors import ConfigError, nearest
from vargen.train.compiling import repeated_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        systems, ways: names; all by default.
        size: key of ``SIZES``.
        batch_sizes: images made together.
        guidance_scale: 1 for no second row.
        dtype: of weights, or, where they are trained, of autocast.
        repeats: timed calls after the first, of which the median counts.
        seconds: a row whose call took longer is not repeated, and not measured at larger batches.
        minutes: rows that do not begin in this time are left out.

    Raises:
        ConfigError: unknown names, or numbers that leave nothing to measure.
    """

    systems: tuple[str, ...] = SYSTEMS
    ways: tuple[str, ...] = tuple(WAYS)
    size: str = "base"
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    guidance_scale: float = 1.0
    dtype: str = "float32"
    repeats: int = 3
    seconds: float = 30.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in self.systems:
            arguments_of(name, self.size)
        for way in self.ways:
            if way not in WAYS:
                raise ConfigError(f"unknown way '{way}'{nearest(way, WAYS)}")
        if not self.systems or not self.ways or not self.batch_sizes or min(self.batch_sizes) < 1 or self.repeats < 1:
            raise ConfigError("nothing to measure: expected at least one system, way, repeat, and batch sizes of at least 1")
        if self.seconds <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise ConfigError(f"limits of {self.seconds} seconds and {self.minutes} minutes: expected positive numbers")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def deadline(self) -> float:
        """On the monotonic clock, from now."""
        return math.inf if self.minutes is None else time.monotonic() + 60 * self.minutes


def bench_generation(settings: Settings, device: torch.device, scale: float = 1.0) -> dict[str, Any]:
    """The whole record: device and versions, settings, ceilings, and a row for every system, way and batch size.

    Args:
        scale: of the operations that measure ceilings, see :func:`vargen.bench.device.ceilings`.
    """
    deadline, dtype = settings.deadline(), settings.torch_dtype
    limits = ceilings(device, dtype, scale=scale)
    rows: list[dict[str, Any]] = []
    # the plain next-token generator comes first, since the others are set in relation to it
    for name in dict.fromkeys([REFERENCE, *settings.systems]):
        ways = (PLAIN, *settings.ways) if name in settings.systems else (PLAIN,)
        subject = Subject.build(name, settings.size, device, dtype, settings.guidance_scale)
        runs = {way: run for way in dict.fromkeys(ways) if (run := WAYS[way](subject)) is not None}
        rows += _measure(subject, runs, settings, deadline)
        del subject, runs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    relate(rows, limits)
    return {**describe(device), "settings": asdict(settings), "ceilings": limits, "rows": rows}


def _measure(subject: Subject, runs: dict[str, Run], settings: Settings, deadline: float) -> list[dict[str, Any]]:
    """Rows of one system. Repeats go round the ways, so that a change of clock or load meets all of them."""
    device, rows = subject.model.device, []
    parameters = sum(p.numel() for p in subject.model.parameters())
    slow: set[str] = set()
    for batch in settings.batch_sizes:
        counted: dict[str, Any] | None = None
        current: dict[str, tuple[dict[str, Any], list[float]]] = {}
        for way, run in runs.items():
            row: dict[str, Any] = {"system": subject.name, "way": way, "batch_size": batch, "parameters": parameters}
            rows.append(row)
            reason = (
                "decodes samples one after the other"
                if run.one_by_one and batch > min(settings.batch_sizes)
                else f"slower than {settings.seconds:g} s at a smaller batch"
                if way in slow
                else "no time left"
                if time.monotonic() > deadline
                else None
            )
            if reason:
                row["left_out"] = reason
                continue
            logger.info("%s, %s, batch %d", subject.name, way, batch)
            try:
                first = _first(subject, run, batch, row)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            if way == PLAIN:
                counted = {key: row[key] for key in ("passes", "flops", "weight_bytes", "other_bytes")}
            elif not run.countable and counted:
                row |= {**counted, "weight_bytes": round(counted["weight_bytes"] * run.weight_size)}
            current[way] = (row, [])
            if first > settings.seconds:
                slow.add(way)
                current[way][1].append(first)
        for _ in range(settings.repeats):
            for way, (_, times) in current.items():
                if way not in slow:
                    times.append(seconds(partial(runs[way].call, batch), device))
        for way, (row, times) in current.items():
            _summarise(row, times, runs[way])
    return rows


def _first(subject: Subject, run: Run, batch: int, row: dict[str, Any]) -> float:
    """The calls that are not timed: one that warms up (compiles, allocates), one for memory and, once more, one for the cost."""
    device = subject.model.device
    if not run.countable:
        run.call(batch)
    with PeakMemory(device) as memory:
        first = seconds(partial(run.call, batch), device)
    weights = sum(p.numel() * p.element_size() for model in run.models for p in model.parameters())
    row["peak_memory_bytes"] = memory.bytes + (weights if device.type == "cuda" else 0)
    if run.countable:
        with torch.no_grad(), counting(*run.models) as cost, _Passes(subject) as passes:
            run.call(batch)
        row |= {"passes": passes.count, **_as_row(cost)}
    return first


def _as_row(cost: Cost) -> dict[str, int]:
    return {"flops": cost.flops, "weight_bytes": cost.weight_bytes, "other_bytes": cost.other_bytes}


class _Passes:
    """Counts passes of a subject's backbone, whatever drives it."""

    def __init__(self, subject: Subject) -> None:
        self.block, self.count = repeated_blocks(subject.model)[0], 0

    def __enter__(self) -> _Passes:
        self.hook = self.block.register_forward_hook(self._counted)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _counted(self, *_: object) -> None:
        self.count += 1


def _summarise(row: dict[str, Any], times: Sequence[float], run: Run) -> None:
    batch, middle = row["batch_size"], statistics.median(times)
    row |= {
        "milliseconds_per_image": 1000 * middle / batch,
        "images_per_second": batch / middle,
        "seconds_of_calls": list(times),
        **run.statistics(),
    }
    if run.modelled:
        row["modelled"] = run.modelled
    if "flops" in row:
        row["flops_per_second"] = row["flops"] / middle
        row["bytes_per_second"] = (row["weight_bytes"] + row["other_bytes"]) / middle


def relate(rows: Iterable[dict[str, Any]], limits: dict[str, float]) -> None:
    """Adds to measured rows what they reach of the ceilings, and their time in relation to plain next-token decoding."""
    rows = [row for row in rows if "milliseconds_per_image" in row]
    plain = {row["batch_size"]: row["milliseconds_per_image"] for row in rows if (row["system"], row["way"]) == (REFERENCE, PLAIN)}
    for row in rows:
        if row["batch_size"] in plain:
            row["times_as_fast_as_next_token"] = plain[row["batch_size"]] / row["milliseconds_per_image"]
        for key, limit in limits.items():
            if key in row:
                row[f"share_of_{key}"] = row[key] / limit
