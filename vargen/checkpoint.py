"""Reading foreign checkpoints safely and writing our own atomically.

Nothing is ever unpickled freely: safetensors, or ``torch.load(weights_only=True)`` with ``argparse.Namespace`` as the one class
beyond tensors and plain containers, since published training files carry it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vargen.errors import CheckpointError, VargenError

State = dict[str, Tensor]


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a ``.safetensors`` file or of a torch ``.pt/.pth/.bin/.ckpt`` file, on the CPU.

    Raises:
        CheckpointError: missing, empty, truncated, or pickled with classes outside the allow-list.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"checkpoint '{file}' does not exist or is not a file")
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"'{file}' is not a complete safetensors file ({error}); fetch it again") from error
    except pickle.UnpicklingError as error:
        reason = next((w for w in re.findall(r"GLOBAL (\S+)", str(error))), "an object that is not a tensor")
        raise CheckpointError(
            f"'{file}' is refused: it would have to unpickle {reason}; convert it to safetensors where you trust it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"'{file}' is not a readable checkpoint ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' holds a {type(content).__name__}: expected a dictionary of tensors")
    return content


def unwrap(content: Mapping[str, Any], wrappers: Sequence[str]) -> State:
    """The state dict inside ``content``: under the first of ``wrappers`` that is there, else ``content`` itself.

    A wrapper may be a dotted path such as ``model.sd``. Non-tensor entries are refused.
    """
    for wrapper in wrappers:
        inner: Any = content
        for part in wrapper.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    odd = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if odd or not state:
        raise CheckpointError(
            f"no state dict found: expected tensors at the top level or under {', '.join(wrappers) or 'nothing'}, "
            f"got {', '.join(odd[:5]) or 'an empty dictionary'}"
        )
    return state


def rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> State:
    """Keys rewritten by the first rule ``(regular expression, replacement)`` that matches the whole key; others are kept."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: State = {}
    for key, value in state.items():
        for pattern, replacement in compiled:
            match = pattern.fullmatch(key)
            if match:
                key = match.expand(replacement)
                break
        renamed[key] = value
    return renamed


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], ignore: Sequence[str] = (), source: str = "checkpoint") -> None:
    """Loads ``state`` into ``model``; every key must fit.

    Args:
        ignore: regular expressions of keys of ``state`` that may be left unused.

    Raises:
        CheckpointError: lists missing keys, unknown keys, or shapes that differ.
    """
    own = model.state_dict()
    unused = [re.compile(pattern) for pattern in ignore]
    unknown = [k for k in state if k not in own and not any(p.fullmatch(k) for p in unused)]
    missing = [k for k in own if k not in state]
    shapes = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape
    ]
    for what, keys in (("missing keys", missing), ("unknown keys", unknown), ("shapes that differ", shapes)):
        if keys:
            raise CheckpointError(f"{source}: {what}: {', '.join(keys[:8])}{f' and {len(keys) - 8} more' if len(keys) > 8 else ''}")
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=True)


def check_model_directory(folder: Path) -> None:
    """Raises CheckpointError unless ``folder`` holds a readable ``config.json`` and complete safetensors weights."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"'{folder}' is not a model directory: it has no config.json")
    try:
        json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{config}' is not valid JSON ({error})") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
        hint = f"; {', '.join(pickled)} is refused: convert it with `vargen convert`" if pickled else ""
        raise CheckpointError(f"'{folder}' holds no .safetensors weights{hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{file}' is not a complete safetensors file ({error}); fetch it again") from error


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Calls ``write(temporary)`` and renames the result to ``path``: readers see the old file or the whole new one.

    Raises:
        VargenError: the file cannot be written (permission, full disk); the old one is untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise VargenError(f"cannot write '{target}': {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary directory beside ``path`` that replaces it when the block ends without an error."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise VargenError(f"cannot write '{target}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
