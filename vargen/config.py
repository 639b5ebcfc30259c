"""Recipes and overrides: OmegaConf trees checked against a schema, unknown keys refused with the nearest known one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vargen.errors import ConfigError, nearest

RECIPES = Path(__file__).parent / "configs"


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path to a YAML file, or the name of one that ships, e.g. ``digits/tokenizer``.

    Raises:
        ConfigError: there is no such file.
    """
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = [str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml")]
    raise ConfigError(f"recipe '{name}' is neither a file nor a recipe that ships{nearest(name, known)}")


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), schema: Mapping[str, Any] | None = None
) -> DictConfig:
    """A recipe with ``key=value`` overrides applied; keys must be known to ``schema``, or to the recipe where none is given.

    A schema is a nested mapping of defaults. A value of None accepts anything, and an empty mapping accepts any mapping; an
    override that gives such a mapping as a whole, ``dataset={name: cache, path: X}``, replaces the recipe's.

    Raises:
        ConfigError: missing or malformed file, malformed override, or unknown key.
    """
    try:
        tree = OmegaConf.create(dict(source)) if isinstance(source, Mapping) else OmegaConf.load(recipe_path(str(source)))
        if not isinstance(tree, DictConfig):
            raise ConfigError(f"recipe '{source}': expected a mapping at the top level")
        known = tree if schema is None else OmegaConf.create(dict(schema))
        assert isinstance(known, DictConfig)
        if schema is not None:
            _refuse_unknown(tree, known, "")
        changes = OmegaConf.from_dotlist([_check_override(o) for o in overrides])
        _refuse_unknown(changes, known, "")
        for key in (text.split("=", 1)[0] for text in overrides if text.split("=", 1)[1].lstrip().startswith("{")):
            free = OmegaConf.select(known, key)
            if isinstance(free, DictConfig) and not len(free):
                OmegaConf.update(tree, key, {}, merge=False)
        merged = OmegaConf.merge(known, tree, changes)
        OmegaConf.resolve(merged)
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe '{source}': {str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"recipe '{source}' is not valid YAML: {' '.join(str(error).split())}") from error
        raise
    assert isinstance(merged, DictConfig)
    return merged


def check_keys(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raises ConfigError for the first key of ``given`` that is not in ``known``."""
    for key in given:
        if key not in known:
            raise ConfigError(f"{what} has no '{key}'{nearest(str(key), known)}")


def _check_override(text: str) -> str:
    if "=" not in text or text.startswith("="):
        raise ConfigError(f"override '{text}': expected key=value")
    return text


def _refuse_unknown(tree: DictConfig, known: DictConfig, prefix: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown key '{prefix}{key!s}'{nearest(str(key), [str(k) for k in known])}")
        child, expected = tree._get_node(key), known._get_node(key)
        if isinstance(child, DictConfig) and isinstance(expected, DictConfig) and len(expected):
            _refuse_unknown(child, expected, f"{prefix}{key!s}.")
