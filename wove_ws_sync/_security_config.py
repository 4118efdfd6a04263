"""The ``security`` value of an ``executor_config``.

Owns: :class:`SecurityConfig`, which keeps it from being changed, shown or pickled. Never: reads an
environment variable or a file, signs; :mod:`wove_ws_sync.security` does when a connection is made.
"""

from __future__ import annotations

import hmac
from typing import Any, NoReturn

from . import _oauth2_config
from ._checks import show, unknown

__all__ = ["SecurityConfig"]

_TYPES = ("signed", "bearer", "none", "ed25519")
_SECRETS = frozenset({"secret", "secret_env", "secret_file"})
_KEY_PAIR_REMEDY = (
    "key is the name by which workers know this host, private_key_file the PEM file of its private key, "
    "worker_key_file that of the public key of the worker service"
)
_KEY_PAIR = frozenset({"type", "key", "private_key_file", "worker_key_file"})


class SecurityConfig:
    """Hold the ``security`` value of an ``executor_config``: frozen, comparable, never shown.

    *value* is None, ``"none"``, ``"env:VARIABLE"``, a dictionary as
    ``wove.NetworkExecutorSecurity.from_config`` takes it, or one of the forms that this package
    adds: ``secret_file`` and ``keys`` in a signed one, and the types ``ed25519`` and ``oauth2``.
    Equal content makes equal objects. It refuses to be pickled. Raises Wove's TypeError or ValueError.
    Thread-safe.
    """

    __slots__ = ("_frozen", "mode")

    mode: str
    _frozen: str | tuple[tuple[str, Any], ...] | None

    def __init__(self, value: Any = None) -> None:
        mode, frozen = _freeze(value)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "_frozen", frozen)

    @property
    def value(self) -> Any:
        """Return the value as it was given, a copy; None for no security."""
        if not isinstance(self._frozen, tuple):
            return self._frozen
        value = dict(self._frozen)
        if "keys" in value:
            value["keys"] = [dict(entry) for entry in value["keys"]]
        return value

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SecurityConfig is frozen; cannot set {name!r}")

    def __repr__(self) -> str:
        if isinstance(self._frozen, tuple):
            value = self.value
            ids = [entry["key"] for entry in value.get("keys", ())]
            keys = f", keys={ids!r}" if ids else f", key={value.get('key', 'default')!r}"
            return f"SecurityConfig(type={self.mode!r}{keys if self.mode in ('signed', 'ed25519') else ''})"
        return f"SecurityConfig({self._frozen or 'none'!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecurityConfig):
            return NotImplemented
        mine, theirs = (repr(each._frozen).encode("utf-8", "surrogatepass") for each in (self, other))
        return hmac.compare_digest(mine, theirs)

    def __hash__(self) -> int:
        return hash(repr(self))  # made of what may be seen anyway

    def __copy__(self) -> SecurityConfig:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SecurityConfig:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("SecurityConfig holds a secret and is not pickled; pass 'env:VARIABLE' instead.")


def _freeze(value: Any) -> tuple[str, str | tuple[tuple[str, Any], ...] | None]:
    """Return the security mode and the value in an immutable form."""
    if value is None or (isinstance(value, str) and value == "none"):
        return "none", None
    if isinstance(value, str):
        if not value.startswith("env:"):
            raise ValueError("executor_config.security string must be 'none' or 'env:VARIABLE'.")
        return "signed", str.__str__(value)
    if not isinstance(value, dict):
        raise TypeError("executor_config.security must be a dictionary, 'env:VARIABLE', or 'none'.")
    mode = value.get("type", "signed")
    if mode == "oauth2":
        return "oauth2", tuple(sorted(_oauth2_config.checked(value).items()))
    if not isinstance(mode, str) or mode not in _TYPES:
        raise ValueError("executor_config.security.type must be one of: 'signed', 'bearer', 'none'.")
    if mode == "none":
        return "none", None
    plain = {key: item for key, item in value.items() if key != "keys"}
    frozen = _frozen_entry(plain, "executor_config.security")
    if "keys" in value:
        frozen["keys"] = _frozen_keys(value["keys"], mode, plain)
    if mode == "ed25519":
        _check_key_pair(plain)
    return mode, tuple(sorted(frozen.items()))


def _frozen_entry(entry: dict[Any, Any], label: str) -> dict[str, Any]:
    frozen: dict[str, Any] = {}
    for key, item in entry.items():
        if not isinstance(key, str) or not isinstance(item, str | bytes | int | float | None):
            raise TypeError(
                f"{label}[{show(key)}] must be text, bytes or a number; "
                "pass the secret itself or the name of its environment variable."
            )
        # A str that shows asterisks must neither be signed with them nor be equal to every other one.
        frozen[key] = str.__str__(item) if isinstance(item, str) else item
    if "key" in frozen:
        frozen["key"] = str(frozen["key"])
    return frozen


def _frozen_keys(entries: Any, mode: str, beside: dict[Any, Any]) -> tuple[tuple[tuple[str, Any], ...], ...]:
    label = "executor_config.security.keys"
    if mode != "signed" or not (_SECRETS | {"key"}).isdisjoint(beside):
        raise ValueError(f"{label} is for the type 'signed', and stands in place of key and secret there.")
    if not isinstance(entries, list | tuple) or not entries:
        raise TypeError(f"{label} must be a list of dictionaries, the key to sign with first.")
    frozen = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise TypeError(f"{label}[{position}] must be a dictionary.")
        for name in entry:
            if name != "key" and name not in _SECRETS:
                hint = unknown(name, _SECRETS | {"key"})
                raise ValueError(f"{label}[{position}] has no key {show(name)}. {hint}")
        if not entry.get("key") or len(_SECRETS.intersection(entry)) != 1:
            raise ValueError(
                f"{label}[{position}] must have a key, its name, and one of secret, secret_env, secret_file."
            )
        frozen.append(tuple(sorted(_frozen_entry(entry, f"{label}[{position}]").items())))
    return tuple(frozen)


def _check_key_pair(config: dict[str, Any]) -> None:
    label = "executor_config.security"
    for name in config:
        if name not in _KEY_PAIR:
            hint = unknown(name, _KEY_PAIR)
            raise ValueError(f"{label} has no key {show(name)} with type 'ed25519'. {hint}")
    for name in ("key", "private_key_file", "worker_key_file"):
        if not isinstance(config.get(name), str) or not config[name]:
            raise ValueError(f"{label}.{name} must be text with type 'ed25519': {_KEY_PAIR_REMEDY}.")
