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

__all__ = ["Kept", "KeptEvents"]


class Kept(NamedTuple):
    """The terminal event of a run, and when it was put here."""

    run: Run
    event: bytes
    since: float


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
        self.incomplete = False  # something was dropped: an unknown run_id may have been here

    def __len__(self) -> int:
        return len(self._whole) + len(self._stubs)

    def __iter__(self) -> Iterator[str]:
        yield from self._stubs
        yield from self._whole

    def get(self, run_id: str) -> Kept | None:
        """Return what is kept for the run, None if nothing is."""
        return self._whole.get(run_id) or self._stubs.get(run_id)

    def pop(self, run_id: str) -> Kept | None:
        """Forget the run; return what was kept for it."""
        kept = self._whole.pop(run_id, None) or self._stubs.pop(run_id, None)
        if kept is not None:
            self._bytes -= len(kept.event)
        return kept

    def put(self, run: Run, event: bytes, now: float) -> None:
        """Keep *event*; older ones make room for it if need be."""
        self.pop(run.run_id)
        self._whole[run.run_id] = Kept(run, event, now)
        self._bytes += len(event)
        while self._is_over(len(event)):
            self._make_room()

    def first_since(self) -> float | None:
        """Return since when the oldest event is here, None if there is none."""
        return next(iter(self._whole.values())).since if self._whole else None

    def drop_before(self, moment: float) -> int:
        """Drop what is here since *moment* or longer; return how much that was."""
        count = 0
        while self._whole and next(iter(self._whole.values())).since <= moment:
            self._bytes -= len(self._whole.popitem(last=False)[1].event)
            count += 1
        return count

    def _is_over(self, newest: int) -> bool:
        too_many = self._max_count is not None and len(self) > self._max_count
        return too_many or self._bytes - newest > self._max_bytes

    def _make_room(self) -> None:
        """Replace or drop the oldest event."""
        if len(self._whole) == 1:  # only the newest is whole: its elders' stubs have to go
            self._bytes -= len(self._stubs.popitem(last=False)[1].event)
            self.incomplete = True
            return
        self._counters["dropped_result"] += 1
        run_id, kept = self._whole.popitem(last=False)
        self._bytes -= len(kept.event)
        stub = b"" if self._stub is None else self._stub(kept.run)
        if stub and len(stub) < len(kept.event):
            self._stubs[run_id] = kept._replace(event=stub)
            self._bytes += len(stub)
        else:
            self.incomplete = True
