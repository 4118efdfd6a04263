"""How a check says what is wrong: the key by its name in the settings, the remedy as the hint.

Owns: the form of the messages. Never: decides what is wrong.
"""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error, Warning

from . import conf

__all__ = ["error", "place", "warning"]


def place(alias: conf.Alias, key: str) -> str:
    """Return where the value of *key* stands, or could."""
    name = conf.key_name(alias.name, key)
    if key in alias.variables:
        return f"the environment variable {alias.variables[key]}, which sets {name}"
    return f"{name} (or set the environment variable {conf.variable(alias.name, key)})"


def error(alias: conf.Alias, key: str, number: str, text: str, remedy: str) -> CheckMessage:
    return _message(Error, alias, key, number, text, remedy)


def warning(alias: conf.Alias, key: str, number: str, text: str, remedy: str) -> CheckMessage:
    return _message(Warning, alias, key, number, text, remedy)


def _message(kind: Any, alias: conf.Alias, key: str, number: str, text: str, remedy: str) -> CheckMessage:
    name = conf.key_name(alias.name, key)
    source = (
        f" It is set by the environment variable {alias.variables[key]}." if key in alias.variables else ""
    )
    message: CheckMessage = kind(f"{name} {text}", hint=f"{remedy}{source}", obj=name, id=f"wove_ws.{number}")
    return message
