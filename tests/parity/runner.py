"""The parity runner: component registry, comparison and report.

A component is a function marked ``@component(system, name)`` in a module of ``tests/parity/systems``. It takes the :class:`Case`
(whose outputs it sees as meta tensors: names, shapes, dtypes) and returns every output recomputed, by name.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.parity import systems
from tests.parity.case import Case, capture, checkpoint_file
from tests.parity.recorded import Draw, RecordedNoise
from vargen.errors import CheckpointError, nearest

__all__ = ["Case", "Draw", "RecordedNoise", "capture", "checkpoint_file", "component", "main", "run_case"]

Component = Callable[[Case], Mapping[str, Tensor]]
COMPONENTS: dict[tuple[str, str], Component] = {}
BROKEN_MODULES: dict[str, Exception] = {}


def component(system: str, name: str) -> Callable[[Component], Component]:
    """Registers the function that recomputes cases of a system's component."""

    def register(function: Component) -> Component:
        known = COMPONENTS.setdefault((system, name), function)
        if known is not function:
            raise ValueError(f"component '{system} {name}' is registered twice")
        return function

    return register


def load_components() -> dict[tuple[str, str], Component]:
    """All components; a module of ``systems`` that cannot be imported is noted and costs only its own components."""
    for module in pkgutil.iter_modules(systems.__path__):
        if module.name in BROKEN_MODULES:
            continue
        try:
            importlib.import_module(f"{systems.__name__}.{module.name}")
        except Exception as error:
            traceback.print_exc()
            BROKEN_MODULES[module.name] = error
    return COMPONENTS


@dataclass(frozen=True)
class Result:
    """One line of the report: the largest absolute error of an output, and why it fails (None if it passes)."""

    system: str
    component: str
    tensor: str
    error: float
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        line = f"{self.system} {self.component} {self.tensor} {self.error:.3e} "
        return line + ("PASS" if self.passed else f"FAIL ({self.reason})")


def run_case(path: str | Path) -> list[Result]:
    """Recomputes one case; every failure, exceptions included, becomes a result."""
    try:
        case = Case.read(path)
    except CheckpointError as error:
        return [Result("?", "?", Path(path).name, float("nan"), str(error))]

    def fail(name: str, reason: str) -> Result:
        return Result(case.system, case.component, name, float("nan"), reason)

    if not case.outputs:
        return [fail(Path(path).name, "the case records no outputs")]
    function = load_components().get((case.system, case.component))
    if function is None:
        known = [name for system, name in COMPONENTS if system == case.system]
        broken = f" (cannot import {', '.join(sorted(BROKEN_MODULES))})" if BROKEN_MODULES else ""
        return [fail(name, f"unknown component{nearest(case.component, known)}{broken}") for name in case.outputs]
    try:
        recomputed = dict(function(case.without_answers()))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return [fail(name, reason) for name in case.outputs]
    return [compare(case, name, recomputed[name]) if name in recomputed else fail(name, "not recomputed") for name in case.outputs]


def compare(case: Case, name: str, ours: Tensor) -> Result:
    """Passes when |ours - reference| <= atol + rtol |reference| everywhere; integers and booleans must be equal.

    Where the reference is infinite or NaN ours must be the same infinity or NaN.
    """
    reference = case.outputs[name]

    def result(error: float, reason: str | None) -> Result:
        return Result(case.system, case.component, name, error, reason)

    if not isinstance(ours, Tensor):
        return result(float("nan"), f"a {type(ours).__name__}, expected a tensor")
    if ours.is_meta:
        return result(float("nan"), "a meta tensor, expected values")
    ours = ours.detach().cpu()
    if _kind(ours) != _kind(reference):
        return result(float("nan"), f"dtype {ours.dtype}, expected {_kind(reference)} like {reference.dtype}")
    if ours.shape != reference.shape:
        return result(float("nan"), f"shape {tuple(ours.shape)}, expected {tuple(reference.shape)}")
    if not reference.is_floating_point():
        wrong = ours.long() != reference.long()
        error = (ours.long() - reference.long()).abs().max().item() if wrong.any() else 0.0
        return result(float(error), f"{int(wrong.sum())} of {wrong.numel()} values differ" if wrong.any() else None)
    atol, rtol = case.tolerance(name)
    ours, reference = ours.double(), reference.double()
    same = (ours == reference) | (ours.isnan() & reference.isnan())
    difference = torch.where(same, 0.0, (ours - reference).abs())
    # a comparison with NaN is false, so NaN or infinity of ours alone counts as wrong
    wrong = ~same & ~(reference.isfinite() & (difference <= atol + rtol * reference.abs()))
    error = difference.max().item() if difference.numel() else 0.0
    return result(error, f"{int(wrong.sum())} of {wrong.numel()} beyond atol {atol:g} rtol {rtol:g}" if wrong.any() else None)


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "boolean"
    if tensor.is_complex():
        return "complex"
    return "floating" if tensor.is_floating_point() else "integer"


def main(paths: Sequence[str]) -> int:
    """Runs the cases in turn and prints the report; returns the exit status."""
    if not paths:
        print("usage: python -m tests.parity CASE.safetensors ...")
        return 2
    passed = failed = 0
    for path in paths:
        for result in run_case(path):
            print(result, flush=True)
            passed, failed = passed + result.passed, failed + (not result.passed)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)
