"""The ``security`` value of the type "oauth2".

Owns: its keys, their checks and messages. Never: reads an environment variable or a file, shows a
value that may be a secret; whether a ``token_url`` without TLS is acceptable is decided in
:mod:`wove_ws_sync.security`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from . import _address, _checks

__all__ = ["LABEL", "SECRET_KEYS", "checked"]

LABEL = "executor_config.security"
#: Exactly one of these is given.
SECRET_KEYS = ("client_secret", "client_secret_env", "client_secret_file")

_AUTH_METHODS = ("client_secret_basic", "client_secret_post")
_SCOPE = re.compile(r"[!#-\[\]-~]+(?: [!#-\[\]-~]+)*")  # RFC 6749, 3.3


def _text(label: str, value: Any, remedy: str) -> str:
    """Return plain text that can be sent; the value is in no message."""
    if not isinstance(value, str):
        raise TypeError(f"{label} must be text; {remedy}.")
    text = str.__str__(value)  # a str that shows asterisks must not be sent as such
    try:
        empty = not text.encode()
    except UnicodeEncodeError:
        empty = True
    if empty:
        raise ValueError(f"{label} must be text that is not empty, and valid Unicode; {remedy}.")
    return text


def _scope(label: str, value: Any, remedy: str) -> str:
    text = _text(label, value, remedy)
    if not _SCOPE.fullmatch(text):
        raise ValueError(f"{label} must be names with one space between them; {remedy}.")
    return text


def _auth_method(label: str, value: Any, remedy: str) -> str:
    if not isinstance(value, str) or value not in _AUTH_METHODS:
        wanted = " or ".join(map(repr, _AUTH_METHODS))
        raise ValueError(f"{label} must be {wanted}, got {_checks.show(value)}; {remedy}.")
    return str.__str__(value)


def _token_url(label: str, value: Any, remedy: str) -> str:
    return _address.web_address(label, value).url


_CHECKS: dict[str, _checks.Check] = {
    "token_url": _token_url,
    "client_id": _text,
    "client_secret": _text,
    "client_secret_env": _text,
    "client_secret_file": _checks.path,
    "scope": _checks.or_none(_scope),
    "audience": _checks.or_none(_text),
    "auth_method": _auth_method,
    "leeway": _checks.or_none(_checks.seconds(zero=True)),
    "timeout": _checks.or_none(_checks.seconds()),
    "ca_file": _checks.or_none(_checks.path),
}
_DEFAULTS: dict[str, Any] = {
    "scope": None,
    "audience": None,
    "auth_method": "client_secret_basic",
    "leeway": None,
    "timeout": None,
    "ca_file": None,
}


def checked(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return *value* with its defaults, each value in its one form.

    Raises TypeError or ValueError that names the key and the remedy.
    """
    known = {"type", *_CHECKS}
    for key in value:
        if key not in known:
            raise ValueError(f"{LABEL} has no key {_checks.show(key)}. {_checks.unknown(key, known)}")
    for key in ("token_url", "client_id"):
        if value.get(key) is None:
            raise ValueError(
                f"{LABEL} of the type 'oauth2' needs {key!r}, as the authorization server has it."
            )
    given = [key for key in SECRET_KEYS if value.get(key) is not None]
    if len(given) != 1:
        state = f"has {' and '.join(map(repr, given))}" if given else "has no client secret"
        raise ValueError(
            f"{LABEL} of the type 'oauth2' {state}; give one of {', '.join(map(repr, SECRET_KEYS))}, "
            "best 'client_secret_env'."
        )
    settings = dict(_DEFAULTS)
    for key, check in _CHECKS.items():
        if value.get(key) is not None:
            settings[key] = check(f"{LABEL}.{key}", value[key], "see docs/howto/use-tokens")
    return {"type": "oauth2", **settings}
