"""The ``security`` value of an ``executor_config``.

Owns: :class:`SecurityConfig`, which keeps it from being changed, shown or pickled. Never:
reads an environment variable, signs; :mod:`wove_ws_sync.security` does when a connection is made.
"""

from __future__ import annotations

import hmac
from typing import Any, NoReturn

from ._checks import show

__all__ = ["SecurityConfig"]


class SecurityConfig:
    """Hold the ``security`` value of an ``executor_config``: frozen, comparable, never shown.

    *value* is None, ``"none"``, ``"env:VARIABLE"`` or a dictionary as
    ``wove.NetworkExecutorSecurity.from_config`` takes it. Equal content makes equal objects.
    It refuses to be pickled. Raises Wove's TypeError or ValueError. Thread-safe.
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
        """Return what ``wove.NetworkExecutorSecurity.from_config`` takes; None for no security."""
        return dict(self._frozen) if isinstance(self._frozen, tuple) else self._frozen

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SecurityConfig is frozen; cannot set {name!r}")

    def __repr__(self) -> str:
        if isinstance(self._frozen, tuple):
            key = f", key={dict(self._frozen).get('key', 'default')!r}" if self.mode == "signed" else ""
            return f"SecurityConfig(type={self.mode!r}{key})"
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
    if not isinstance(mode, str) or mode not in ("signed", "bearer", "none"):
        raise ValueError("executor_config.security.type must be one of: 'signed', 'bearer', 'none'.")
    if mode == "none":
        return "none", None
    frozen = {}
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, str | bytes | int | float | None):
            raise TypeError(
                f"executor_config.security[{show(key)}] must be text, bytes or a number; "
                "pass the secret itself or the name of its environment variable."
            )
        # A str that shows asterisks must neither be signed with them nor be equal to every other one.
        frozen[key] = str.__str__(item) if isinstance(item, str) else item
    if "key" in frozen:
        frozen["key"] = str(frozen["key"])
    return mode, tuple(sorted(frozen.items()))
