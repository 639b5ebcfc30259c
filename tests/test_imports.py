"""The floors of the house: modules import downwards only, in no circle, and the systems are blind to each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("", "kernels", "sample", "tokenizers", "train")

# every module belongs to the floor of its longest listed prefix; a floor may import itself and what stands before it
FLOORS = (
    ("vargen.errors", "vargen.kernels"),
    tuple(
        "vargen." + n for n in ("checkpoint", "condition", "config", "guidance", "layout", "noise", "order", "registry", "space")
    ),
    ("vargen.model", "vargen.nn"),
    (
        "vargen.flow",
        "vargen.heads",
        "vargen.losses",
        "vargen.text",
        "vargen.clips",
        "vargen.data",
        "vargen.editing",
        "vargen.metrics",
    ),
    ("vargen.decoding",),
    ("vargen.tokenizers", "vargen.backbones"),
    ("vargen.official",),
    ("vargen.pipeline",),
    ("vargen.train", "vargen.sample"),
    ("vargen.bench",),
    ("vargen.cli",),
)
FLOOR_OF = {"vargen": 1} | {prefix: number for number, floor in enumerate(FLOORS) for prefix in floor}

# files of these packages hold one system each (a large one may span files of one first word, larp.py and larp_prior.py) and know of
# other systems only through the shared parts named here
SYSTEMS = {
    "vargen.backbones": {"causal", "llama"},
    "vargen.tokenizers": set(),
    "vargen.official": {"fuse", "llama", "shared"},
}


def modules() -> dict[str, ast.Module]:
    found = {}
    for folder in FOLDERS:
        base = ROOT / "vargen" / folder
        for path in base.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known: set[str], everywhere: bool = True) -> Iterator[str]:
    """Modules of ours that ``tree`` imports: everywhere, or only when it is imported itself."""
    for node in ast.walk(tree) if everywhere else _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vargen")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vargen":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run at import time: no function bodies, no ``if TYPE_CHECKING`` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _executed(node)


def floor(module: str) -> int:
    prefix = module
    while prefix not in FLOOR_OF:
        prefix = prefix.rpartition(".")[0]
    return FLOOR_OF[prefix]


MODULES = modules()
EDGES = [(name, target) for name, tree in MODULES.items() for target in sorted(set(imports(tree, set(MODULES)))) if target != name]


def test_modules_are_found() -> None:
    assert {"vargen.cli.main", "vargen.sample.job", "vargen.space"} <= set(MODULES)
    assert ("vargen.sample.job", "vargen.noise") in EDGES


def test_every_module_has_a_floor_of_its_own() -> None:
    top = {name for name in MODULES if name.count(".") == 1}
    assert top - set(FLOOR_OF) == set(), "give new top-level modules a floor in FLOORS"


def test_imports_go_downwards() -> None:
    upwards = [
        f"{name} (floor {floor(name)}) imports {target} ({floor(target)})" for name, target in EDGES if floor(target) > floor(name)
    ]
    assert upwards == []


def test_kernels_are_a_leaf() -> None:
    outside = [
        (name, target)
        for name, target in EDGES
        if name.startswith("vargen.kernels") and not target.startswith(("vargen.kernels", "vargen.errors"))
    ]
    assert outside == []


@pytest.mark.parametrize("package", SYSTEMS)
def test_systems_are_blind_to_each_other(package: str) -> None:
    siblings = []
    for name, target in EDGES:
        if name.startswith(package + ".") and target.startswith(package + "."):
            mine, theirs = (module.removeprefix(package + ".").split(".")[0] for module in (name, target))
            if theirs not in SYSTEMS[package] and mine.split("_")[0] != theirs.split("_")[0]:
                siblings.append((mine, theirs))
    assert siblings == []


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for name, tree in MODULES.items():
        graph[name] = {target for target in imports(tree, set(MODULES), everywhere=False) if target in MODULES and target != name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_imports_the_folders_by_their_bare_names() -> None:
    bare = []
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            targets = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            targets += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            bare += [(name, t) for t in targets if t.split(".")[0] in {"kernels", "sample", "train", "configs", "tokenizers"}]
    assert bare == []
