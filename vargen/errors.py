"""Errors that a user can act on: each is one line that names the value, what was expected, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VargenError(ValueError):
    """Base of every error that is the caller's to mend; the command line prints it as one line and exits with 2."""


class ConfigError(VargenError):
    """A configuration key or value is unknown or out of range."""


class CheckpointError(VargenError):
    """A checkpoint is missing, truncated, pickled with code, or does not fit the model."""


class DataError(VargenError):
    """A data set, image, video or label cannot be used."""


class SpaceError(VargenError):
    """Two parts do not share a token space, or tokens do not lie in the space."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A suffix such as ``; did you mean 'width'?`` for error messages, or the list of known names when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names) or 'none'}"
