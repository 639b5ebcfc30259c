"""The record of a sampling job: ``job.json`` (what decides every image) and ``manifest.jsonl`` (a line for each finished image).

Several processes may write to one folder. An image is renamed into place first and recorded after, under a lock on the manifest, so
a job that is killed at any moment has lost at most unrecorded images, which a restart draws again, identical.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vargen.checkpoint import atomic_write
from vargen.errors import VargenError

JOB_FILE, MANIFEST_FILE = "job.json", "manifest.jsonl"


class Manifest:
    """The finished images of the job in ``folder``. Nothing is written before :meth:`start`.

    Args:
        folder: where the images go.
        job: JSON-able settings that decide every image.

    Attributes:
        records: image number -> its line.

    Raises:
        VargenError: the folder holds another job or other files, cannot be written, or its manifest is damaged.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        self.path = folder / MANIFEST_FILE
        self.job = json.loads(json.dumps(job))
        self.records: dict[int, dict[str, Any]] = {}
        self._read = 0
        _refuse_strangers(folder)
        _refuse_unwritable(folder)
        self._refuse_other_job()
        self.refresh()

    def start(self) -> None:
        """Makes the folder and records the job, unless that was done before."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        except OSError as error:
            raise VargenError(f"cannot write to '{self.folder}': {error.strerror or error}") from error
        with self._locked():
            self._refuse_other_job()
            if not (self.folder / JOB_FILE).exists():
                atomic_write(self.folder / JOB_FILE, self._write_job)

    def done(self, index: int) -> bool:
        """Image ``index`` is recorded and its file is there."""
        record = self.records.get(index)
        return record is not None and (self.folder / record["file"]).exists()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Records finished images; those that another process has recorded meanwhile are left out."""
        with self._locked() as handle:
            self._refresh(handle)
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records if record["index"] not in self.records]
            handle.write("".join(lines).encode())
            handle.flush()
            os.fsync(handle.fileno())
            self._refresh(handle)

    def refresh(self) -> None:
        """Takes in what other processes have recorded."""
        if self.path.exists():
            with self._locked() as handle:
                self._refresh(handle)

    def sweep(self) -> None:
        """Deletes the temporary files that killed writers of recorded images have left."""
        for path in self.folder.glob(".[0-9]*"):
            number = path.name[1:].split(".")[0]
            if number.isdecimal() and int(number) in self.records:
                # a video in the form of frames is a folder
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        with open(self.path, "rb+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle

    def _refuse_other_job(self) -> None:
        recorded = read_job(self.folder)
        if recorded is None:
            return
        for key in (*self.job, *recorded):
            before, now = recorded.get(key), self.job.get(key)
            if before != now:
                raise VargenError(
                    f"'{self.folder}' holds a job with {key} {_short(before)}, not {_short(now)}: "
                    "choose another --output, or delete that folder"
                )

    def _write_job(self, path: Path) -> None:
        path.write_text(json.dumps(self.job, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _refresh(self, handle: Any) -> None:
        """Reads lines not seen yet. Under the lock, a line without an end is the last word of a killed writer: it is cut."""
        handle.seek(self._read)
        *lines, torn = handle.read().split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
                self.records.setdefault(int(record["index"]), record)
            except (ValueError, KeyError, TypeError) as error:
                raise VargenError(
                    f"'{self.path}' has a damaged line at byte {self._read}: delete that line and run again"
                ) from error
            self._read += len(line) + 1
        if torn:
            handle.truncate(self._read)
        handle.seek(self._read)


def read_job(folder: Path) -> dict[str, Any] | None:
    """The settings recorded in a job's folder, or None where there is no job."""
    path = folder / JOB_FILE
    if not path.is_file():
        return None
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VargenError(f"'{path}' is not readable ({error}): delete '{folder}' or choose another --output") from error
    if not isinstance(job, dict):
        raise VargenError(f"'{path}' holds no job: delete '{folder}' or choose another --output")
    return job


def _refuse_strangers(folder: Path) -> None:
    if not folder.is_dir() or (folder / JOB_FILE).exists():
        return
    strangers = [p.name for p in folder.iterdir() if p.name != MANIFEST_FILE and not p.name.startswith(".")]
    if strangers:
        raise VargenError(f"'{folder}' holds '{min(strangers)}' and is no sampling job: choose a new folder with --output")


def _refuse_unwritable(folder: Path) -> None:
    """Finds before the first image is drawn that none could be written."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise VargenError(f"cannot write to '{folder}': '{place}' is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise VargenError(f"cannot write to '{folder}': no permission in '{place}'")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
