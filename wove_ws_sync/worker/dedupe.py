"""Runs that stand for the same work by their idempotency key, as pure state.

Owns: which runs share one execution, which results are kept to be given out again, for
how long and how many bytes of them. Never: a clock (``now`` is an argument), a timer, a
job; never looks into a result. Keys are of an owner each, who is part of ``Key``.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from .events import renamed
from .runs import Run

__all__ = ["MAX_BYTES", "Dedupe", "Key", "Shared"]

#: What all kept results take at most; a larger one is not kept.
MAX_BYTES = 64 * 1024 * 1024
#: What a kept result takes besides its event and its key, about.
_OVERHEAD = 512

#: Whose key it is (the id of what it was authenticated with), the key itself, and what distinguishes
#: results that not every host can read.
Key = tuple[str, ...]


class Shared:
    """One execution and the runs that get its outcome, the one that began it first.

    ``job`` executes it under that one's ids, also when that one was cancelled; ``began_at``
    is when its task began, None until then.
    """

    __slots__ = ("began_at", "job", "key", "run_id", "runs", "task_id")

    def __init__(self, key: Key, run: Run) -> None:
        self.key = key
        self.run_id = run.run_id
        self.task_id = run.task_id
        self.job: Any = None
        self.began_at: float | None = None
        self.runs: dict[Run, None] = {}

    def __repr__(self) -> str:
        return f"<Shared {self.run_id!r} runs={len(self.runs)}>"

    def add(self, run: Run) -> None:
        """Have *run* get the outcome as well."""
        self.runs[run] = None
        run.shared, run.job = self, self.job

    def leave(self, run: Run) -> None:
        """Have *run* get nothing more."""
        self.runs.pop(run, None)
        run.shared = run.job = None

    def event_for(self, run: Run, event: bytes) -> bytes:
        """Return *event* of the execution as one of *run*."""
        return renamed(event, (self.run_id, self.task_id), (run.run_id, run.task_id))


class _Result(NamedTuple):
    event: bytes
    of: tuple[str, str]
    since: float
    size: int

    def __repr__(self) -> str:
        return f"_Result(of={self.of!r}, since={self.since!r}, size={self.size!r})"


class Dedupe:
    """The executions that are under way, and results that are kept for *window* seconds, by key."""

    def __init__(self, window: float, *, max_bytes: int = MAX_BYTES) -> None:
        self._window = window
        self._max_bytes = max_bytes
        self._shared: dict[Key, Shared] = {}
        self._results: collections.OrderedDict[Key, _Result] = collections.OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._shared) + len(self._results)

    def begin(self, key: Key, run: Run) -> Shared:
        """Return a new execution for *run*, which others may join; it has no job yet."""
        shared = self._shared[key] = Shared(key, run)
        return shared

    def find(self, key: Key) -> Shared | None:
        """Return the execution under this key that may be joined, None if there is none."""
        return self._shared.get(key)

    def replay(self, key: Key, run: Run, now: float) -> bytes | None:
        """Return the kept result as an event of *run*, None if none is kept."""
        self.expire(now)
        kept = self._results.get(key)
        return None if kept is None else renamed(kept.event, kept.of, (run.run_id, run.task_id))

    def close(self, shared: Shared) -> None:
        """Have nobody join *shared* any more: whoever comes with its key begins anew."""
        if self._shared.get(shared.key) is shared:
            del self._shared[shared.key]

    def ended(self, shared: Shared, result: bytes | None, now: float) -> None:
        """Note the end of an execution; keep *result*, its event, if it is one and anybody waited for it.

        Something closed may end so, too; what has begun, or ended, since then counts more.
        """
        self.close(shared)
        self.expire(now)
        is_newest = shared.key not in self._shared and shared.key not in self._results
        if result is None or not is_newest or self._window <= 0:
            return
        size = len(result) + len(shared.key[1]) + _OVERHEAD
        if size > self._max_bytes:
            return
        self._results[shared.key] = _Result(result, (shared.run_id, shared.task_id), now, size)
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._drop_first()

    def next_at(self) -> float | None:
        """Return the moment at which the next kept result expires, None if there is none."""
        return next(iter(self._results.values())).since + self._window if self._results else None

    def expire(self, now: float) -> None:
        """Drop what was kept long enough."""
        while self._results and next(iter(self._results.values())).since + self._window <= now:
            self._drop_first()

    def _drop_first(self) -> None:
        self.bytes -= self._results.popitem(last=False)[1].size
