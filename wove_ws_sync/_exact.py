"""Values that JSON carries exactly: what arrives equals what was sent, and has the same type.

Owns: which values these are, their text, the words about one that is none. Never: converts
anything: a tuple is no list, a number is no key.
"""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["JSONText", "to_json"]

#: Deeper than this nothing nests: what refers to itself would go on for ever, and every parser has a limit.
_MAX_DEPTH = 100
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode
_REMEDIES = {
    "tuple": "make it a list",
    "set": "make it a list",
    "frozenset": "make it a list",
    "bytes": "send text, base64 for example",
    "bytearray": "send text, base64 for example",
    "datetime": "send its isoformat()",
    "date": "send its isoformat()",
    "Decimal": "send its str()",
    "UUID": "send its str()",
    "Path": "send its str()",
}
_WANTED = "send what is None, bool, int, float, str, list or dict"


class JSONText(bytes):
    """A value as JSON text, which ``frames.encode`` puts into a message as it is."""


def to_json(value: Any, name: str) -> JSONText:
    """Return *value*, which messages call *name*, as JSON text.

    Raises TypeError for a value of another type than None, bool, int, float, str, list and dict with
    keys that are str (of exactly these types), and ValueError for a float that is not finite, an int
    of more than 64 bits, and what nests deeper than 100 levels.
    """
    _check(value, (name,), _MAX_DEPTH)
    return JSONText(_encode(value).encode("ascii"))


def _check(value: Any, path: tuple[Any, ...], depth: int) -> None:
    """Raise for what is not carried. *path* is the parent's path and the key in there."""
    kind = type(value)
    if value is None or kind is str or kind is bool:
        return
    if kind is int:
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"{_at(path)} is an int of more than 64 bits; send it as text.")
    elif kind is float:
        if not math.isfinite(value):
            raise ValueError(f"{_at(path)} is {value}, for which JSON has no number; send None or text.")
    elif kind is list or kind is dict:
        if not depth:
            raise ValueError(f"{_at(path)[:200]} is nested too deep (or contains itself): send a flat list.")
        _check_items(value, path, depth - 1)
    else:
        raise TypeError(f"{_at(path)} is a {kind.__qualname__}, which JSON cannot carry; {_remedy(kind)}.")


def _check_items(value: Any, path: tuple[Any, ...], depth: int) -> None:
    for key, item in value.items() if type(value) is dict else enumerate(value):
        if type(value) is dict and type(key) is not str:
            what = f"a key of the type {type(key).__qualname__}"
            raise TypeError(f"{_at(path)} has {what}; JSON has keys of the type str only: convert it.")
        _check(item, (path, key), depth)


def _remedy(kind: type) -> str:
    for plain in (bool, int, float, str, list, dict):
        if issubclass(kind, plain):
            return f"convert it to a plain {plain.__name__}"
    known = (_REMEDIES[base.__name__] for base in kind.__mro__ if base.__name__ in _REMEDIES)
    return next(known, _WANTED)


def _at(path: tuple[Any, ...]) -> str:
    """Return where the value is, as in ``argument 'image'['sizes'][3]``."""
    keys: list[str] = []
    while len(path) == 2:
        path, key = path
        keys.append(f"[{key!r:.60}]")
    return f"{path[0]}{''.join(reversed(keys))}"
