"""Holders of what must not be seen: a text, and the headers of a handshake.

Owns: that neither shows its content in a ``repr`` (and so in no traceback with local variables),
travels in a pickle, nor takes longer to compare the more of it fits. Never: encrypts; whoever has the
object in hand can ask it for the content.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any, NoReturn

__all__ = ["Headers", "Secret"]

# The hash of an equal secret is equal in this process, and tells nobody else anything.
_SALT = os.urandom(16)


class Secret:
    """Hold one text; :meth:`reveal` returns it. Equal texts make equal, hashable objects. Frozen."""

    __slots__ = ("_text",)

    _text: str

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "_text", text)

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Secret is frozen; cannot set {name!r}")

    def __repr__(self) -> str:
        return "Secret(...)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(_encoded(self._text), _encoded(other._text))

    def __hash__(self) -> int:
        return hash(hashlib.blake2b(_encoded(self._text), key=_SALT, digest_size=16).digest())

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("A secret is not pickled.")


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Headers(dict[str, str]):
    """The headers of a request, of which ``repr`` shows the names only. It refuses to be pickled."""

    def __repr__(self) -> str:
        return f"Headers({sorted(self)!r})"

    def __or__(self, other: Any) -> Headers:  # type: ignore[override]
        return Headers({**self, **other})

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("Headers may hold secrets and are not pickled.")
