"""A parity case: what a published system computed for given weights, inputs and random draws."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vargen.errors import CheckpointError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One case file.

    Attributes:
        path: the file.
        system, component: what was run.
        config: its configuration in the system's own terms.
        state, inputs, outputs: the tensors under ``state/``, ``in/`` and ``out/``, as stored.
        metadata: the whole record (``call``, ``notes``, ``tolerance`` and whatever else a case carries).
    """

    path: Path
    system: str
    component: str
    config: dict[str, Any]
    state: State
    inputs: State
    outputs: State
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Case:
        """Raises CheckpointError for a file that is missing, truncated, or not a case."""
        file = Path(path)
        if not file.is_file():
            raise CheckpointError(f"'{file}' does not exist or is not a file")
        try:
            with safe_open(file, framework="pt") as handle:
                record = json.loads((handle.metadata() or {})["case"])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            parts = {part: {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")} for part in
                     ("state", "in", "out")}  # fmt: skip
            case = cls(file, record["system"], record["component"], record.get("config", {}), *parts.values(), record)
            case.tolerance("")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{file}' is not a readable parity case ({type(error).__name__}: {error})") from error
        return case

    def tolerance(self, output: str) -> tuple[float, float]:
        """``(atol, rtol)`` of an output; ``tolerance.per_output`` overrides the case's own."""
        given = self.metadata["tolerance"]
        given = {**given, **given.get("per_output", {}).get(output, {})}
        return float(given["atol"]), float(given["rtol"])

    def state32(self, prefix: str = "") -> State:
        """The state under ``prefix`` (which is cut off), with float16 and bfloat16 tensors as float32."""
        return {
            k.removeprefix(prefix): v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
            for k, v in self.state.items()
            if k.startswith(prefix)
        }

    def without_answers(self) -> Case:
        """The case as a component may see it: outputs keep names, shapes and dtypes but are meta tensors."""
        return replace(self, outputs={k: v.to("meta") for k, v in self.outputs.items()})


@contextmanager
def checkpoint_file(state: Mapping[str, Tensor], wrapper: str | None = None) -> Iterator[Path]:
    """A temporary checkpoint of ``state`` for a loader that takes a path.

    Without ``wrapper`` a safetensors file; with one, a torch file that holds ``{wrapper: state}`` as published files do.
    """
    with tempfile.TemporaryDirectory() as folder:
        if wrapper is None:
            path = Path(folder) / "checkpoint.safetensors"
            save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
        else:
            path = Path(folder) / "checkpoint.pt"
            torch.save({wrapper: dict(state)}, path)
        yield path


@contextmanager
def capture(module: nn.Module, names: Iterable[str] | Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A dictionary filled with the outputs of submodules while the block runs; the last call of each wins.

    Args:
        names: submodule paths, or a mapping ``label -> submodule path`` whose labels become the keys.
    """
    labels = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    taken: dict[str, Any] = {}

    def hook(label: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken[label] = output

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(label)) for label, name in labels.items()]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
