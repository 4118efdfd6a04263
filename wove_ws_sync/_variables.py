"""The settings of an executor that is made without a URL: ``WOVE_WS_*`` in the environment.

Owns: the names of the variables, how their texts become values, and the blame for wrong ones.
Never: checks a value beyond its form, shows one that may be secret; :mod:`wove_ws_sync.options` checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .options import DeliveryOptions, LinkOptions

__all__ = ["NAMES", "PREFIX", "Found", "read", "value", "variable"]

_logger = logging.getLogger("wove_ws_sync.host")

#: In front of every variable that is a setting.
PREFIX = "WOVE_WS_"
#: Those of ``wove-ws-sync worker``.
_OTHERS = "WOVE_WS_WORKER_"
_SWITCH = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


def _number(kind: Callable[[str], Any], what: str) -> Callable[[str, str], Any]:
    def read_number(name: str, text: str) -> Any:
        if text.lower() == "none":
            return None  # no limit; where that is not allowed, the check says so
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"The environment variable {name} must be {what}, got {text[:80]!r}.") from None

    return read_number


def _switch(name: str, text: str) -> bool:
    try:
        return _SWITCH[text.lower()]
    except KeyError:
        raise ValueError(
            f"The environment variable {name} must be true or false, got {text[:80]!r}."
        ) from None


def _list(name: str, text: str) -> list[str]:
    if text.startswith("["):
        return _json(name, text, "a list in JSON, or with commas between")  # type: ignore[no-any-return]
    return [entry for part in text.split(",") if (entry := part.strip())]


def _text(name: str, text: str) -> str:
    return text


def _object(name: str, text: str) -> Any:
    return _json(name, text, "a JSON object")


def _json(name: str, text: str, what: str) -> Any:
    """Read JSON, of which nothing is shown: it may be a secret."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"The environment variable {name} must be {what} (not shown).") from None


def _security(name: str, text: str) -> Any:
    return _object(name, text) if text.startswith("{") else text


_float = _number(float, "a number of seconds, or none for no limit")
_int = _number(int, "a whole number")
_BY_DEFAULT: dict[type, Callable[[str, str], Any]] = {bool: _switch, int: _int, float: _float}
_BY_KEY: dict[str, Callable[[str, str], Any]] = {
    "url": _text,
    "security": _security,
    "headers": _object,
    "pinned_keys": _list,
    "context_vars": _list,
    "delivery_timeout": _float,
    "delivery_heartbeat_seconds": _float,
    "delivery_max_in_flight": _int,
}
#: Made of the URL, or of no use as one text for all runs.
_NONE = frozenset({"secure", "host", "port", "target", "delivery_idempotency_key"})


def variable(key: str) -> str:
    """Return the variable for a key of ``executor_config``, or a ``delivery_*`` setting."""
    return PREFIX + key.upper()


_READERS = {
    field.name: _BY_KEY.get(field.name) or _BY_DEFAULT.get(type(field.default), _text)
    for field in (*dataclasses.fields(LinkOptions), *dataclasses.fields(DeliveryOptions))
    if field.name not in _NONE
}
_ENDS = tuple(f"_{key.upper()}" for key in _READERS)
#: Every variable, by its key.
NAMES = {key: variable(key) for key in _READERS}


def value(key: str, name: str, text: str) -> Any:
    """Return what the *text* of the variable *name* says for *key*; one without a form is text.

    Raises ValueError, which names the variable, for a text of the wrong form.
    """
    return _READERS.get(key, _text)(name, text)


class Found:
    """The settings that the environment has."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    @contextlib.contextmanager
    def blamed(self, overridden: Mapping[str, Any]) -> Iterator[None]:
        """Add to errors about a setting which variable it is from, unless it was *overridden*."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError) as exc:
            if type(exc) not in (ValueError, TypeError, RuntimeError):
                raise
            text, there = str(exc), {*self.settings, "url"} - set(overridden)
            keys = [key for key in sorted(there) if re.search(rf"\b{key}\b", text)]
            if not keys:
                raise
            said = " and ".join(f"{key} {'is from' if key in self.settings else 'may be set by'} "
                f"the environment variable {NAMES[key]}" for key in keys)  # fmt: skip
            raise type(exc)(f"{text} ({said}.)") from exc


def read(environ: Mapping[str, str]) -> Found:
    """Return the settings that *environ* has; an empty variable counts as one that is not set.

    Raises ValueError, which names the variable, for a text of the wrong form.
    """
    settings = {
        key: _READERS[key](name, text)
        for key, name in NAMES.items()
        if (text := environ.get(name, "").strip())
    }
    _warn_of_misspelt(environ, str(settings.get("security")).removeprefix("env:"))
    return Found(settings)


def _warn_of_misspelt(environ: Mapping[str, str], secret: str) -> None:
    known = set(NAMES.values())
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name.startswith(_OTHERS) or name in known or name == secret:
            continue
        if name.endswith(_ENDS):
            continue  # WOVE_WS_DEFAULT_URL is that of an alias of Django's settings
        if near := difflib.get_close_matches(name, known, 1, 0.85):
            _logger.warning("The environment variable %s is no setting; did you mean %s?", name, near[0])
