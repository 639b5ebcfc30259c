"""What the bench prints and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vargen.bench.device import slug
from vargen.checkpoint import atomic_write


def write(record: Mapping[str, Any], output: Path, device: torch.device) -> Path:
    """Writes a record as JSON to a file, or into a folder (given as such, or by its trailing slash) as ``<device>.json``."""
    file = output / f"{slug(device)}.json" if output.is_dir() else output
    atomic_write(file, lambda path: path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n") and None)
    return file


def heading(record: Mapping[str, Any]) -> str:
    """A line on device, versions and ceilings."""
    device, versions, limits = record["device"], record["versions"], record["ceilings"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return (
        f"{device['name']}{threads}; torch {versions['torch']}; {record['settings']['dtype']}; ceilings measured here: "
        f"{limits['bytes_per_second'] / 1e9:.0f} GB/s copied, {limits['flops_per_second'] / 1e12:.2f} TFLOP/s multiplied"
    )


def generation_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown, a line per row; what was left out says why."""
    lines = [
        "| system | way | batch | passes | ms per image | images/s | × next-token | peak memory | GB/s (of ceiling) | "
        "GFLOP/s (of ceiling) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = [row["system"], row["way"] + ("*" if "modelled" in row else ""), row["batch_size"]]
        reason = row.get("error") or row.get("left_out")
        if reason:
            cells = ["", reason, *[""] * 5]
        else:
            cells = [
                row.get("passes", ""),
                _number(row["milliseconds_per_image"]),
                _number(row["images_per_second"]),
                f"{row['times_as_fast_as_next_token']:.2f}" if "times_as_fast_as_next_token" in row else "",
                f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
                _of_ceiling(row, "bytes_per_second", 1e9),
                _of_ceiling(row, "flops_per_second", 1e9),
            ]
        lines.append("| " + " | ".join(str(cell) for cell in (*head, *cells)) + " |")
    return "\n".join(lines)


def training_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown, a line per row."""
    lines = [
        "| what | mode | batch | ms per step | images/s | tokens/s | peak memory | model FLOP utilisation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = [row["system"], row["mode"], row["batch_size"]]
        reason = row.get("error") or row.get("left_out")
        if reason:
            cells = [reason, *[""] * 4]
        else:
            cells = [
                _number(row["milliseconds_per_step"]),
                _number(row["images_per_second"]),
                _number(row["tokens_per_second"]),
                f"{row['peak_memory_bytes'] / 2**20:.0f} MiB",
                f"{100 * row['model_flop_utilisation']:.1f} %",
            ]
        lines.append("| " + " | ".join(str(cell) for cell in (*head, *cells)) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _of_ceiling(row: Mapping[str, Any], key: str, unit: float) -> str:
    return f"{_number(row[key] / unit)} ({100 * row[f'share_of_{key}']:.0f} %)" if key in row else ""
