"""Runs that their host has let go of, until some host of the same key takes them.

Owns: which of them are alive, the ends that are kept and for how long. Never: a clock, a
timer or a socket; nobody hears anything of a run that is here.
"""

from __future__ import annotations

from collections import Counter

from .kept import Account, Kept, KeptEvents
from .runs import Run, RunTable

__all__ = ["KEEP_SECONDS", "MAX_KEPT_BYTES", "Identity", "Shelf"]

#: A host's key id and what it calls itself.
Identity = tuple[str, str]

#: How long, in seconds, the terminal event of a run that was let go is kept.
KEEP_SECONDS = 15 * 60.0
#: How many such events there are at most under one key.
_MAX_KEPT = 1000
#: What they take at most.
MAX_KEPT_BYTES = 64 * 1024 * 1024


class Shelf:
    """What was let go under one key id. It owns the runs as a host does, and never has a connection."""

    connection = None
    unconfirmed: frozenset[str] = frozenset()

    def __init__(self, counters: Counter[str], account: Account) -> None:
        self.runs = RunTable()
        self.kept = KeptEvents(MAX_KEPT_BYTES, counters, max_count=_MAX_KEPT)
        self.kept.book(account)

    def put(self, run: Run, origin: Identity) -> list[Run]:
        """Take a live run from *origin*; return the runs whose place it takes, which are to be stopped."""
        displaced = self._clear_place(run.run_id)
        run.origin = origin
        self.runs.adopt(run, self)
        return displaced

    def put_end(self, kept: Kept, origin: Identity, now: float) -> list[Run]:
        """Take the kept end of a run in the same way."""
        displaced = self._clear_place(kept.run.run_id)
        kept.run.origin, kept.run.owner = origin, self
        self.keep(kept.run, kept.event, now)
        return displaced

    def _clear_place(self, run_id: str) -> list[Run]:
        self.kept.pop(run_id)
        displaced = self.runs.get(run_id)
        if displaced is None:
            return []
        self.runs.ended(displaced)
        return [displaced]

    def keep(self, run: Run, event: bytes, now: float) -> None:
        """Keep the terminal event of a run that has ended here."""
        self.kept.put(run, event, now)

    def take(self, run_id: str, origin: Identity | None = None) -> Run | Kept | None:
        """Give away a run, or its end, if it is here (and was put here by *origin*)."""
        run = self.runs.get(run_id)
        kept = None if run is not None else self.kept.get(run_id)
        found = run or (kept and kept.run)
        if found is None or (origin is not None and found.origin != origin):
            return None
        if run is not None:
            self.runs.remove(run)
        else:
            self.kept.pop(run_id)
        return run or kept

    def make_room(self) -> bool:
        """Drop the oldest event but the newest; return whether there was one."""
        return self.kept.shrink()

    def next_at(self) -> float | None:
        """Return the moment at which the next kept event expires, None if there is none."""
        first = self.kept.first_since()
        return None if first is None else first + KEEP_SECONDS

    def expire(self, now: float) -> int:
        """Drop what was kept long enough; return how much that was."""
        return self.kept.drop_before(now - KEEP_SECONDS)
