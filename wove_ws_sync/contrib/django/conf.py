"""The setting ``WOVE_WS``: what it and the environment say about each alias.

Owns: the form of the setting, which variable stands for which key, and how a key of
``executor_config`` is called in a message here. Never: connects, reads a secret.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.connection import ConnectionDoesNotExist

from ... import _variables
from ..._checks import unknown
from ...options import DeliveryOptions, LinkOptions

__all__ = [
    "BACKENDS",
    "DEFAULT_ALIAS",
    "KEYS",
    "SETTING",
    "Alias",
    "aliases",
    "in_settings",
    "key_name",
    "read",
    "stray_variables",
    "variable",
]

SETTING = "WOVE_WS"
DEFAULT_ALIAS = "default"
BACKENDS = ("websocket", "immediate")

_DERIVED = {"secure", "host", "port", "target"}  # made of the URL
_LINK_KEYS = {field.name.upper() for field in dataclasses.fields(LinkOptions)} - {
    name.upper() for name in _DERIVED
}
_DELIVERY_KEYS = {field.name.upper() for field in dataclasses.fields(DeliveryOptions)}
_OWN_KEYS = {"BACKEND", "ENVIRONMENT", "VARIABLES"}
#: Every key of an alias.
KEYS = frozenset(_LINK_KEYS | _DELIVERY_KEYS | _OWN_KEYS)
# WOVE_WS_WORKER_... are the options of the command.
_TAKEN = "worker"


# May hold secrets.
_UNSHOWN = ("SECURITY", "HEADERS")


class _Unshown(dict[Any, Any]):
    """What is shown without its values: Django's error reports have every local variable."""

    def __repr__(self) -> str:
        return f"<{', '.join(map(str, self))}: not shown>"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Alias:
    """What is set for one alias. ``given`` are the keys that are set, ``variables`` those by a variable."""

    name: str
    backend: str = "websocket"
    environment: str | None = None
    executor_config: Mapping[str, Any]
    delivery: Mapping[str, Any]
    given: frozenset[str]
    variables: Mapping[str, str]

    def __repr__(self) -> str:
        return f"<Alias {self.name!r} {self.backend}: {', '.join(sorted(self.given))}>"


def aliases() -> list[str]:
    """Return the names of all aliases; "default" may exist by its variable alone."""
    names = [str(name) for name in _setting()]
    if DEFAULT_ALIAS not in names and _is_set(variable(DEFAULT_ALIAS, "URL")):
        names.append(DEFAULT_ALIAS)
    return names


def read(name: str) -> Alias:
    """Return what is set for the alias *name*.

    Raises ConnectionDoesNotExist if there is none of this name, ImproperlyConfigured for what is wrong
    in its form; what a value of ``executor_config`` must be is for those who use it to say.
    """
    if name not in aliases():
        known = ", ".join(map(repr, aliases())) or "none"
        raise ConnectionDoesNotExist(f"{SETTING} has no alias {name!r}; there are: {known}.")
    if name.lower() == _TAKEN:
        raise ImproperlyConfigured(
            f"{SETTING} must not have an alias {name!r}: its variables would be those of the worker command. "
            "Choose another name."
        )
    values = _setting().get(name, {})
    if not isinstance(values, dict):
        raise ImproperlyConfigured(
            f"{SETTING}[{name!r}] must be a dictionary, such as {{'URL': 'wss://...'}}."
        )
    for key in values:
        if key not in KEYS:
            raise ImproperlyConfigured(f"{SETTING}[{name!r}] has no key {str(key)[:60]!r}. {_hint(key)}")
    named = {key: variable(name, key) for key in KEYS - {"VARIABLES"} if _is_set(variable(name, key))}
    if not values.get("VARIABLES", True):
        named = {}
    values = {**values, **_from_variables(named)}
    values |= {key: _Unshown(values[key]) for key in _UNSHOWN if isinstance(values.get(key), dict)}
    backend = values.get("BACKEND", "websocket")
    if backend not in BACKENDS:
        raise ImproperlyConfigured(
            f"{key_name(name, 'BACKEND')} must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}."
        )
    environment = values.get("ENVIRONMENT") or None
    if environment is not None and not isinstance(environment, str):
        raise ImproperlyConfigured(f"{key_name(name, 'ENVIRONMENT')} must be the name of a Wove environment.")
    return Alias(
        name=name,
        backend=backend,
        environment=environment,
        executor_config={key.lower(): value for key, value in values.items() if key in _LINK_KEYS},
        delivery={
            key.lower(): value for key, value in values.items() if key in _DELIVERY_KEYS and value is not None
        },
        given=frozenset(values),
        variables=named,
    )


def variable(name: str, key: str) -> str:
    """Return the environment variable that stands for *key* of the alias *name*."""
    return f"{SETTING}_{re.sub(r'[^A-Za-z0-9]', '_', name).upper()}_{key}"


def stray_variables(name: str) -> list[str]:
    """Return the variables that look as if they were for the alias *name*, and set nothing."""
    start = variable(name, "")
    used = {variable(alias, key) for alias in aliases() for key in KEYS}
    longer = [variable(alias, "") for alias in [*aliases(), _TAKEN] if variable(alias, "") != start]
    return sorted(
        text
        for text in os.environ
        if text.startswith(start)
        and text not in used
        and not any(text.startswith(other) and len(other) > len(start) for other in longer)
    )


def key_name(name: str, key: str) -> str:
    """Return how *key* of the alias is called in a message."""
    return f"{SETTING}[{name!r}][{key!r}]"


def in_settings(name: str, text: str) -> str:
    """Return a message about ``executor_config`` with the keys of the setting in place of its own."""

    def renamed(match: re.Match[str]) -> str:
        inner = "".join(f"[{part!r}]" for part in match[2].split(".")[1:])
        return key_name(name, match[1].upper()) + inner

    text = re.sub(r"\bexecutor_config\.([a-z]\w*)((?:\.\w+)*)", renamed, text)
    text = re.sub(r"^context_vars\b", key_name(name, "CONTEXT_VARS"), text)
    text = re.sub(r"(?<![\w'])(delivery_[a-z_]+)\b", lambda match: key_name(name, match[1].upper()), text)
    return text.replace("executor_config", f"{SETTING}[{name!r}]")


def _setting() -> dict[Any, Any]:
    value = getattr(settings, SETTING, {})
    if not isinstance(value, dict):
        raise ImproperlyConfigured(
            f"{SETTING} must be a dictionary of aliases, such as {{'default': {{'URL': 'wss://...'}}}}."
        )
    return value


def _hint(key: Any) -> str:
    if isinstance(key, str) and key.upper() in KEYS:
        return f"Did you mean {key.upper()!r}?"
    return unknown(key.upper() if isinstance(key, str) else key, KEYS)


def _is_set(text: str) -> bool:
    """Tell whether a variable is set; an empty one is not."""
    return bool(os.environ.get(text, "").strip())


def _from_variables(named: Mapping[str, str]) -> dict[str, Any]:
    try:
        return {
            key: _variables.value(key.lower(), text, os.environ[text].strip()) for key, text in named.items()
        }
    except ValueError as exc:
        raise ImproperlyConfigured(str(exc)) from None
