"""What the bench prints and writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vargen.bench.device import slug, slugged
from vargen.checkpoint import atomic_write
from vargen.errors import DataError


def write(record: Mapping[str, Any], output: Path, device: torch.device) -> Path:
    """Writes a record as JSON to a file, or into a folder (given as such, or by its trailing slash) as ``<device>.json``."""
    file = output / f"{slug(device)}.json" if output.is_dir() else output
    content = json.dumps(record, indent=1, ensure_ascii=False) + "\n"

    def save(path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    atomic_write(file, save)
    return file


def collect(folder: Path, output: Path, failed: Sequence[str] = ()) -> Path:
    """Joins the records in ``folder`` into one file ``<device>.json`` in ``output``, each under the name of its file.

    Raises:
        DataError: there is none, or they are of different devices.
    """
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    names = {record["device"]["name"] for record in records.values()}
    if len(names) != 1:
        raise DataError(f"records of {len(names)} devices in '{folder}': expected those of one")
    first = next(iter(records.values()))
    common = {key: first[key] for key in ("device", "versions", "platform")}
    parts = {name: {k: v for k, v in record.items() if k not in common} for name, record in records.items()}
    kind = first["device"]["type"]
    file = output / f"{slugged(first['device']['name']) if kind == 'cuda' else kind}.json"
    write({**common, "failed": list(failed), **parts}, file, torch.device(kind))
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


if __name__ == "__main__":
    print(collect(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(1 if sys.argv[3:] else 0)
