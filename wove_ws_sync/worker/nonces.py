"""The nonces of handshakes that were accepted: none is taken twice.

Owns: what a nonce store has to do, the store in memory, what ``--nonce-store`` means. Never: checks a
signature; a nonce comes here after its signature was found right. Guesses: a store that cannot
tell raises :class:`NonceStoreError`, and the handshake is refused.

===================== ============================= ========================================
store                 refuses a replay              module
===================== ============================= ========================================
``memory``            to the same process           this one
``file:PATH``         to any process of the machine :mod:`wove_ws_sync.worker.nonce_file`
                      that uses the file, restarted
                      ones included
``redis://...``       to any that uses that server  :mod:`wove_ws_sync.worker.nonce_redis`
===================== ============================= ========================================
"""

from __future__ import annotations

import hashlib
import threading
import urllib.parse
from typing import Protocol

from .not_ready import NotReady

__all__ = [
    "MAX_NONCE",
    "MemoryNonces",
    "NonceStore",
    "NonceStoreError",
    "check_nonce_store",
    "make_nonce_store",
    "mark_of",
]

#: A longer nonce is none of ours, in characters; those of Wove have 24.
MAX_NONCE = 128

_DEFAULT_LIMIT = 65_536
#: How much one check forgets at most, in nonces and in seconds without one. More than it adds.
_SWEEP = 64
_HINT = "it must be memory, file:PATH, redis://HOST:PORT/DB or redis:env:VARIABLE"


class NonceStoreError(NotReady):
    """A store cannot tell whether it has seen a nonce."""


class NonceStore(Protocol):
    """What an authenticator needs of a store. Every method may be called from any thread."""

    @property
    def blocks(self) -> bool:
        """Tell whether ``use`` waits for something, and so must not be called on an event loop."""

    def open(self) -> None:
        """Get ready, once and before ``use``. Raises NonceStoreError if it cannot."""

    def use(self, key: str, nonce: str, now: float, expires: float) -> bool:
        """Remember *nonce* of the key id *key* until *expires*; return False if it was known.

        Times are seconds since the epoch. A signature that has expired must have been refused
        before. Raises NonceStoreError if it cannot tell.
        """

    def close(self) -> None:
        """Let go of what ``open`` has taken. Idempotent."""


def mark_of(key: str, nonce: str) -> bytes:
    """Return the 16 bytes that stand for *nonce* of *key* in a store.

    Nonces of different keys never meet, so that no host uses up those of another.
    """
    name, text = (part.encode("utf-8", "surrogatepass") for part in (key, nonce))
    return hashlib.blake2b(b"%d:%b%b" % (len(name), name, text), digest_size=16).digest()


class MemoryNonces:
    """Remember nonces in this process, at most *limit* of each key.

    A key whose *limit* is reached has its handshakes refused until old ones expire: forgetting one
    would allow its replay. Other keys go on. A check takes the same time however many there are.
    """

    blocks = False

    def __init__(self, limit: int = _DEFAULT_LIMIT) -> None:
        if limit < 1:
            raise ValueError(f"limit must be above 0, not {limit}.")
        self._limit = limit
        self._lock = threading.Lock()  # guards the wheels
        self._wheels: dict[str, _Wheel] = {}

    def __repr__(self) -> str:
        return f"<MemoryNonces {len(self)} of at most {self._limit} for each of {len(self._wheels)} keys>"

    def __len__(self) -> int:
        with self._lock:
            return sum(len(wheel.marks) for wheel in self._wheels.values())

    def open(self) -> None:
        """Do nothing."""

    def use(self, key: str, nonce: str, now: float, expires: float) -> bool:
        """Remember *nonce*; return False if it was known. Raises NonceStoreError if there are too many."""
        mark = mark_of(key, nonce)
        with self._lock:
            wheel = self._wheels.setdefault(key, _Wheel(self._limit))
            return wheel.use(mark, now, int(expires))

    def close(self) -> None:
        """Do nothing: what is forgotten can be replayed."""


class _Wheel:
    """The marks of one key, in one bucket for each second in which some expire."""

    def __init__(self, limit: int) -> None:
        self.marks: set[bytes] = set()
        self._limit = limit
        self._buckets: dict[int, list[bytes]] = {}
        self._hand = 0  # no bucket is before it
        self._forgotten = -1  # the last second of which something was forgotten

    def use(self, mark: bytes, now: float, second: int) -> bool:
        self._sweep(int(now), _SWEEP)
        if mark in self.marks:
            return False
        if second <= self._forgotten:
            raise NonceStoreError("The clock went back: a replay could not be told from a new handshake.")
        if len(self.marks) >= self._limit:
            self._hand = min(self._buckets)  # there may be a long way to the first
            self._sweep(int(now), 1)
        if len(self.marks) >= self._limit:
            raise NonceStoreError("Too many handshakes within the clock skew.", retry_after=10.0)
        if not self._buckets or second < self._hand:
            self._hand = second
        self.marks.add(mark)
        self._buckets.setdefault(second, []).append(mark)
        return True

    def _sweep(self, now: int, steps: int) -> None:
        """Forget what expired before the second *now*, in at most so many steps."""
        while self._buckets and self._hand < now and steps > 0:
            steps -= 1
            bucket = self._buckets.get(self._hand)
            if bucket is None:
                self._hand += 1
                continue
            self._forgotten = max(self._forgotten, self._hand)
            self.marks.discard(bucket.pop())
            if not bucket:
                del self._buckets[self._hand]


def check_nonce_store(text: str) -> str:
    """Return *text* if it says which store to use. Raises ValueError, in which no password is shown."""
    kind, _, rest = text.partition(":")
    if text == "memory" or (kind == "file" and rest and "\0" not in rest):
        return text
    if text.startswith("redis:env:") and len(text) > len("redis:env:"):
        return text
    if kind not in ("redis", "rediss"):
        raise ValueError(f"{_HINT} (not shown)")
    try:
        parts = urllib.parse.urlsplit(text)
        has_place = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise ValueError(f"{_HINT} (not shown)") from None
    if "@" in text or parts.query or parts.fragment:
        raise ValueError(
            "a Redis URL with a password or options must come by redis:env:VARIABLE, the environment "
            "variable that holds it (not shown)"
        )
    if not text.startswith(f"{kind}://") or not has_place or not parts.path.strip("/").isdecimal():
        raise ValueError(f"{_HINT} (not shown)")
    return text


def make_nonce_store(text: str) -> NonceStore:
    """Return the store that ``--nonce-store`` names, not opened yet.

    Raises ValueError for what :func:`check_nonce_store` refuses, NonceStoreError if a package or an
    environment variable is missing.
    """
    check_nonce_store(text)
    if text == "memory":
        return MemoryNonces()
    if text.startswith("file:"):
        from .nonce_file import FileNonces

        return FileNonces(text.removeprefix("file:"))
    from .nonce_redis import RedisNonces

    return RedisNonces(text)
