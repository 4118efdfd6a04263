"""What waits to be written to one host, and in which order it leaves, as pure state.

Owns: the order, what shares a message, how much waits. Never: a socket; never waits
itself, never drops anything but log records.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["SMALL", "SendQueue"]

#: Events up to this size go before larger ones and may share a message.
SMALL = 64 * 1024
#: Log records that wait for a slow host; further ones are dropped.
_MAX_LOGS = 2000
#: Where this much waits, in bytes, log records are dropped as well.
_MAX_BYTES_FOR_LOGS = 8 * 1024 * 1024

#: What an event takes that is made in its turn.
_LATER_BYTES = 512


class _Log(bytes):
    """A log event in the queue."""


class _Later(NamedTuple):
    """An event that is made when its turn has come: it costs little memory until then."""

    make: Callable[[], bytes]


class SendQueue:
    """Small events before large ones, and none before what was queued earlier and is small.

    Small events share messages of at most *batch_bytes*, as a list; 0 forbids that. ``bytes``
    is how much memory waits, where what is made in its turn counts a flat amount.
    """

    def __init__(self, batch_bytes: int) -> None:
        self.bytes = 0
        self._batch_bytes = batch_bytes
        self._small: collections.deque[bytes | _Later] = collections.deque()
        self._large: collections.deque[tuple[int, bytes | _Later]] = collections.deque()
        # How many small events were queued and taken: a large one waits for those that were before it.
        self._put = 0
        self._taken = 0
        self._logs = 0

    def __bool__(self) -> bool:
        return bool(self._small or self._large)

    def put(self, event: bytes, *, first: bool = False) -> None:
        """Queue an event; if *first*, nothing that is queued later leaves before it, whatever its size."""
        self._append(event, len(event), first)

    def put_later(self, size: int, make: Callable[[], bytes]) -> None:
        """Queue what *make* returns in its turn, about *size* bytes; b"" is nothing to say."""
        self._append(_Later(make), size, False)

    def put_log(self, event: bytes) -> bool:
        """Queue a log event, unless too much waits already; return whether it was queued."""
        if self._logs >= _MAX_LOGS or self.bytes > _MAX_BYTES_FOR_LOGS:
            return False
        self._logs += 1
        self._append(_Log(event), len(event), True)
        return True

    def _append(self, item: bytes | _Later, size: int, first: bool) -> None:
        self.bytes += size if isinstance(item, bytes) else _LATER_BYTES
        if first or size <= SMALL:
            self._put += 1
            self._small.append(item)
        else:
            self._large.append((self._put, item))

    def clear(self) -> None:
        """Forget everything."""
        self._small.clear()
        self._large.clear()
        self._taken, self._logs, self.bytes = self._put, 0, 0

    def next_large(self) -> bytes:
        """Return the next large event; b"" if there is none whose turn it is."""
        if not self._large or self._large[0][0] > self._taken:
            return b""
        return self._made(self._large.popleft()[1])

    def next_small(self) -> bytes:
        """Return the next message of small events; b"" if there is nothing to say."""
        batch: list[bytes] = []
        size = 2
        while self._small:
            event = self._take_small()
            if not event:
                continue
            if not self._batch_bytes:
                return event
            size += len(event) + 1
            if batch and size > self._batch_bytes:
                self._put_back(event)
                break
            batch.append(event)
        if len(batch) <= 1:
            return batch[0] if batch else b""
        return b"[" + b",".join(batch) + b"]"

    def _take_small(self) -> bytes:
        item = self._small.popleft()
        self._taken += 1
        self._logs -= isinstance(item, _Log)
        return self._made(item)

    def _put_back(self, event: bytes) -> None:
        self._small.appendleft(event)
        self._taken -= 1
        self._logs += isinstance(event, _Log)
        self.bytes += len(event)

    def _made(self, item: bytes | _Later) -> bytes:
        if isinstance(item, bytes):
            self.bytes -= len(item)
            return item
        self.bytes -= _LATER_BYTES
        return item.make()
