"""Checks of one value that the user gave.

Owns: what is a duration, a count, a switch, a path, and the words of a refusal. Never: knows
which option it checks; the label for the message is an argument.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = [
    "Check",
    "callable_only",
    "context_vars",
    "flag",
    "map_sizes",
    "one_of",
    "or_none",
    "path",
    "refusal",
    "seconds",
    "show",
    "unknown",
    "whole",
]

_VARIABLE = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")

_NESTED = (Mapping, list, tuple, set, frozenset)

# (label for the message, value, remedy) -> the value to keep.
Check = Callable[[str, Any, str], Any]


def show(value: object) -> str:
    """Return a bounded ``repr`` that never raises, of what has no parts that may be secret."""
    parts = value if isinstance(value, list | tuple | set | frozenset) else ()
    if isinstance(value, Mapping) or any(isinstance(part, _NESTED) for part in parts):
        return f"<{type(value).__name__}>"  # a whole configuration in the wrong place, say
    try:
        text = repr(value)
    except Exception:  # a value's own __repr__ may do anything, and ints have a digit limit
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def refusal(label: str, wanted: str, value: object, remedy: str) -> str:
    """Return the message for a value that is not what is *wanted*."""
    return f"{label} must be {wanted}, got {show(value)}; {remedy}."


def unknown(name: object, known: Iterable[str]) -> str:
    """Return the hint for a name that is not among the *known*: the nearest, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."


def seconds(*, zero: bool = False) -> Check:
    """Return the check of a duration."""
    wanted = f"a number of seconds {'from' if zero else 'above'} 0 and up to {threading.TIMEOUT_MAX:.0f}"

    def check(label: str, value: Any, remedy: str) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(refusal(label, wanted, value, remedy))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not 0.0 <= number <= threading.TIMEOUT_MAX or (number == 0.0 and not zero):  # NaN fails the first
            raise ValueError(refusal(label, wanted, value, remedy))
        return number

    return check


def whole(least: int) -> Check:
    """Return the check of a count."""
    wanted = f"a whole number from {least} up"

    def check(label: str, value: Any, remedy: str) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(refusal(label, wanted, value, remedy))
        number = int(value)
        if not least <= number <= sys.maxsize:
            raise ValueError(refusal(label, wanted, value, remedy))
        return number

    return check


def flag(label: str, value: Any, remedy: str) -> bool:
    """Check a switch."""
    # Truthiness would turn the text "false" into permission for plain text connections.
    if not isinstance(value, bool):
        raise TypeError(refusal(label, "True or False", value, remedy))
    return value


def path(label: str, value: Any, remedy: str) -> str:
    """Check the path of a file, which is not looked at."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(refusal(label, "the path of a PEM file", value, remedy))
    if not text or "\0" in text:
        raise ValueError(refusal(label, "the path of a PEM file", value, remedy))
    return text


def context_vars(label: str, value: Any, remedy: str) -> tuple[str, ...]:
    """Return the names of context variables, each as ``module:attribute``."""
    wanted = 'a list of names such as "myapp.context:request_id", of a module that workers have too'
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(refusal(label, wanted, value, remedy))
    names = tuple(value)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(refusal(label, wanted, value, remedy))
        if not _VARIABLE.fullmatch(name) or name.startswith("__main__:"):
            raise ValueError(refusal(label, wanted, name, remedy))
    return names


def one_of(*known: str) -> Check:
    """Return the check of a setting with few values."""

    def check(label: str, value: Any, remedy: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise ValueError(refusal(label, f"one of {', '.join(map(repr, known))}", value, remedy))
        return known[known.index(value)]

    return check


def or_none(check: Check) -> Check:
    """Return *check* for a value that may be None."""
    return lambda label, value, remedy: None if value is None else check(label, value, remedy)


def callable_only(fn: object) -> None:
    """Raise TypeError for what is to be run and cannot be called."""
    if not callable(fn):
        raise TypeError(f"fn must be callable, not {type(fn).__name__}.")


def map_sizes(chunksize: int, buffersize: int | None) -> None:
    """Raise what ``map()`` raises for sizes that are none."""
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and (not isinstance(buffersize, int) or isinstance(buffersize, bool)):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
