"""From a recipe's name to a finished run."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vargen.config import load_config
from vargen.errors import ConfigError, nearest
from vargen.train.loop import Trainer

# kind of a recipe -> module, which has the recipe's SCHEMA, and task
KINDS = {
    "drafter": ("vargen.train.drafter", "DrafterTask"),
    "generator": ("vargen.train.generator", "GeneratorTask"),
    "tokenizer": ("vargen.train.tokenizer", "TokenizerTask"),
}


def train(
    recipe: str | Mapping[str, Any],
    overrides: Sequence[str] = (),
    output_dir: str | os.PathLike[str] | None = None,
    resume: str | None = None,
) -> Path | None:
    """Trains what a recipe describes.

    Args:
        recipe: name of one that ships, such as ``digits/tokenizer``, path of a YAML file, or a mapping.
        overrides: ``key=value`` each, such as ``training.batch_size=32``.
        output_dir: run directory, by default the recipe's ``output_dir``.
        resume: ``latest``, ``auto``, or a checkpoint's path or name; None for a new run.

    Returns:
        The directory of the finished model, or None if the run was stopped by a signal (after it saved a checkpoint).

    Raises:
        ConfigError: unknown recipe, key or value.
        VargenError: see :meth:`vargen.train.loop.Trainer.fit`.
    """
    kind = str(load_config(recipe).get("kind"))
    if kind not in KINDS:
        raise ConfigError(f"recipe kind '{kind}'{nearest(kind, KINDS)}")
    module, task = KINDS[kind]
    loaded = importlib.import_module(module)
    config = load_config(recipe, overrides, loaded.SCHEMA)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"the recipe leaves {', '.join(missing)} to you: add {' '.join(f'{key}=...' for key in missing)}")
    target = output_dir or config.output_dir
    if target is None:
        raise ConfigError("no output directory: give --output, or set output_dir in the recipe")
    OmegaConf.set_readonly(config, True)
    command = shlex.join(["vargen", "train", recipe if isinstance(recipe, str) else "RECIPE", *overrides])
    trainer = Trainer(getattr(loaded, task)(config, command), config, target)
    return trainer.final if trainer.fit(resume) else None
