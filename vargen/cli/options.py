"""Options that several commands share, and the parsing of their small languages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vargen.errors import ConfigError, DataError, VargenError

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default the GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def parse_shard(text: str) -> tuple[int, int]:
    """``k/n`` to ``(k, n)``, 0 <= k < n."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise VargenError(f"shard '{text}': expected k/n with 0 <= k < n, such as 0/4")
    return int(k), int(n)


def parse_integers(text: str, what: str) -> tuple[int, ...]:
    """Positive integers separated by commas or ``x``: ``1,4,16`` or ``8x8``."""
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise VargenError(f"{what} '{text}': expected positive integers such as 8,8")
    return tuple(int(part) for part in parts)


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as a dictionary; values are read as YAML.

    Raises:
        ConfigError: a text without key or ``=``.
    """
    from omegaconf import OmegaConf

    for text in texts:
        if "=" not in text or text.startswith("="):
            raise ConfigError(f"setting '{text}': expected key=value")
    settings = OmegaConf.to_container(OmegaConf.from_dotlist(list(texts)))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; blank lines are left out.

    Raises:
        DataError: the file is missing, not UTF-8 text, or holds no prompt.
    """
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt file '{path}' cannot be read: {error}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"prompt file '{path}' holds no prompt: expected one per line")
    return prompts
