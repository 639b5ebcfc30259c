"""Checkpoints of a training run: whole or absent, checked when read, and free of pickles.

A run directory holds ``checkpoint-00001000/`` and the like. Each is written under a hidden temporary name and renamed when it is
complete, so that a kill at any moment leaves earlier ones intact; ``manifest.json`` inside lists size and CRC-32 of every file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vargen.checkpoint import atomic_directory
from vargen.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.(checkpoint-\d+|final)\..*")
_TENSOR = "__tensor__"


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
        directory: the run directory; made at the first save.
        keep: number of newest checkpoints that are kept, or None for all.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise ConfigError(f"checkpoints_total_limit {keep}: expected at least 1, or null to keep all")
        self.directory, self.keep = Path(directory), keep

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        found = [(_NAME.fullmatch(p.name), p) for p in self.directory.iterdir()]
        return sorted(int(match[1]) for match, path in found if match and path.is_dir())

    def path(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step:08d}"

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Lets ``write`` fill a directory, makes it the checkpoint of ``step``, and removes those beyond ``keep``.

        Raises:
            VargenError: the disk is full or not writable; nothing of the attempt remains.
        """
        with atomic_directory(self.path(step)) as folder:
            write(folder)
            seal(folder)
        for old in self.steps()[: -self.keep] if self.keep else []:
            self._remove(old)
        return self.path(step)

    def forget_after(self, step: int) -> list[int]:
        """Removes the checkpoints of later steps, which a run that goes on from ``step`` will write anew; returns their steps."""
        later = [s for s in self.steps() if s > step]
        for s in later:
            self._remove(s)
        return later

    def _remove(self, step: int) -> None:
        # first out of the way, then away: a kill in between must not leave half a checkpoint under a valid name
        doomed = self.path(step).with_name(f".{self.path(step).name}.removed")
        os.replace(self.path(step), doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def clean(self) -> None:
        """Removes what killed saves left behind."""
        for path in self.directory.glob(".*") if self.directory.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def resolve(self, which: str | os.PathLike[str]) -> Path:
        """The checkpoint to resume from, checked: ``latest``, a path, or the name of one in this directory.

        Raises:
            CheckpointError: there is none, or it is damaged; the newest older one that is whole is named.
        """
        if str(which) == "latest":
            path = self.latest()
            if path is None:
                raise CheckpointError(f"'{self.directory}' holds no checkpoint to resume from; start without resuming")
        else:
            path = next((p for p in (Path(which), self.directory / which) if p.is_dir()), None)
            if path is None:
                raise CheckpointError(f"there is no checkpoint '{which}'; '{self.directory}' has steps {self.steps() or 'none'}")
        damage = find_damage(path)
        if damage:
            raise CheckpointError(f"checkpoint '{path}' is damaged: {damage}; {self._older_advice(path)}")
        return path

    def _older_advice(self, path: Path) -> str:
        match = _NAME.fullmatch(path.name)
        newest = int(match[1]) if match else 0
        for step in reversed([s for s in self.steps() if s < newest]):
            if find_damage(self.path(step)) is None:
                return f"the newest older one that is whole is '{self.path(step)}': resume from it"
        return "there is no older one that is whole: start again without resuming"


def seal(folder: Path) -> None:
    """Writes the manifest of all files below ``folder`` and flushes them to the disk."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint directory, in a few words, or None if it is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} of {expected['bytes']} bytes"
            if _crc32(file) != expected["crc32"]:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is missing or unreadable ({' '.join(str(error).split())[:120]})"
    return None


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def write_tree(path: Path, tree: Any) -> None:
    """Nested dictionaries and lists of tensors and JSON values as one safetensors file; the structure goes into its header."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(node, Mapping):
            return {str(key): strip(value, f"{name}/{key}") for key, value in node.items()}
        if isinstance(node, (list, tuple)):
            return [strip(value, f"{name}/{index}") for index, value in enumerate(node)]
        return node

    structure = json.dumps(strip(tree, ""))
    save_file(tensors, path, metadata={"tree": structure})


def read_tree(path: Path) -> Any:
    """Inverse of :func:`write_tree`; tuples come back as lists, keys as strings.

    Raises:
        CheckpointError: missing, truncated, or not written by :func:`write_tree`.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            structure = json.loads(handle.metadata()["tree"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not a readable training state ({' '.join(str(error).split())[:120]})") from error

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return tensors[node[_TENSOR]] if _TENSOR in node else {key: fill(value) for key, value in node.items()}
        return [fill(value) for value in node] if isinstance(node, list) else node

    return fill(structure)


def write_model(folder: Path, model: Any, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """A model directory (``config.json`` and safetensors) of ``model`` with the weights ``state``, cast to ``dtype`` if given."""
    model.save_config(folder)
    weights = {k: v.detach().to("cpu", dtype if v.is_floating_point() else None).contiguous().clone() for k, v in state.items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
