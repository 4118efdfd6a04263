"""Terminal events that somebody may still ask for.

Owns: the bounds, in bytes and in number, and which of the events goes first. Never: a
clock or a timer; ``now`` is an argument.
"""

from __future__ import annotations

import collections
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .runs import Run

__all__ = ["Account", "Kept", "KeptEvents"]

#: What a kept event takes besides its own bytes, about.
OVERHEAD = 512


class Account:
    """How many bytes are kept in several places together."""

    def __init__(self) -> None:
        self.bytes = 0


class Kept(NamedTuple):
    """The terminal event of a run, and when it was put here."""

    run: Run
    event: bytes
    since: float

    def __repr__(self) -> str:
        return f"Kept({self.run!r}, {len(self.event)} bytes, since={self.since!r})"


class KeptEvents:
    """Terminal events by run_id, the oldest first.

    At most *max_bytes* of them and at most *max_count*, where the newest never counts: a
    single result larger than that is kept. What has to make room is replaced by what
    *stub* makes of its run, if there is a *stub* and that is smaller, and dropped otherwise;
    *counters* counts both as "dropped_result".
    """

    def __init__(
        self,
        max_bytes: int,
        counters: Counter[str],
        *,
        max_count: int | None = None,
        stub: Callable[[Run], bytes] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._counters = counters
        self._max_count = max_count
        self._stub = stub
        # An OrderedDict finds its first entry at once, also when many before it are gone.
        self._whole: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._stubs: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._bytes = 0
        self._account: Account | None = None
        self.incomplete = False  # something was dropped: an unknown run_id may have been here

    def __len__(self) -> int:
        return len(self._whole) + len(self._stubs)

    def __iter__(self) -> Iterator[str]:
        yield from self._stubs
        yield from self._whole

    @property
    def size(self) -> int:
        """Return how many bytes that takes."""
        return self._bytes

    def book(self, account: Account | None) -> None:
        """Have *account* count what is kept here, in place of the one that does so far."""
        if self._account is not None:
            self._account.bytes -= self._bytes
        if account is not None:
            account.bytes += self._bytes
        self._account = account

    def _count(self, kept: Kept, sign: int) -> None:
        size = sign * _cost(kept.event)
        self._bytes += size
        if self._account is not None:
            self._account.bytes += size

    def get(self, run_id: str) -> Kept | None:
        """Return what is kept for the run, None if nothing is."""
        return self._whole.get(run_id) or self._stubs.get(run_id)

    def pop(self, run_id: str) -> Kept | None:
        """Forget the run; return what was kept for it."""
        kept = self._whole.pop(run_id, None) or self._stubs.pop(run_id, None)
        if kept is not None:
            self._count(kept, -1)
        return kept

    def put(self, run: Run, event: bytes, now: float) -> None:
        """Keep *event*; older ones make room for it if need be."""
        self.pop(run.run_id)
        kept = self._whole[run.run_id] = Kept(run, event, now)
        self._count(kept, 1)
        while self._is_over(_cost(event)):
            if not self.shrink():  # only the newest is whole: its elders' stubs have to go
                self.drop_stub()

    def first_since(self) -> float | None:
        """Return since when the oldest event is here, None if there is none."""
        return next(iter(self._whole.values())).since if self._whole else None

    def drop_before(self, moment: float) -> int:
        """Drop what is here since *moment* or longer; return how much that was."""
        count = 0
        while self._whole and next(iter(self._whole.values())).since <= moment:
            self._count(self._whole.popitem(last=False)[1], -1)
            count += 1
        return count

    def _is_over(self, newest: int) -> bool:
        too_many = self._max_count is not None and len(self) > self._max_count
        return too_many or self._bytes - newest > self._max_bytes

    def shrink(self, spare: int = 1) -> bool:
        """Replace or drop the oldest event; False if only stubs and the newest *spare* are left."""
        if len(self._whole) <= spare:
            return False
        self._counters["dropped_result"] += 1
        run_id, kept = self._whole.popitem(last=False)
        self._count(kept, -1)
        stub = b"" if self._stub is None else self._stub(kept.run)
        if stub and len(stub) < len(kept.event):
            self._stubs[run_id] = kept._replace(event=stub)
            self._count(self._stubs[run_id], 1)
        else:
            self.incomplete = True
        return True

    def drop_stub(self) -> bool:
        """Drop the oldest stub; return whether there was one."""
        if not self._stubs:
            return False
        self._count(self._stubs.popitem(last=False)[1], -1)
        self.incomplete = True
        return True


def _cost(event: bytes) -> int:
    return len(event) + OVERHEAD
