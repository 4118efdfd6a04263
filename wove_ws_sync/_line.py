"""Who may go out next.

Owns: the line of runs that may be sent, the slots of each session and limit, and the runs that
are delivered alone. Never: sends, decides when a run ends, keeps its deadlines.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterable, Sized

from ._run import Run, RunState

__all__ = ["Line"]

# From its third delivery on, a run that has only one left goes alone.
_MAX_SHARED = 2


@dataclasses.dataclass(slots=True)
class _Slots:
    taken: int = 0
    waiting: deque[Run] = dataclasses.field(default_factory=deque)


class Line:
    """The runs that wait to be sent. *alive* is the collection of all that have not ended."""

    def __init__(self, alive: Sized, max_requeues: int) -> None:
        self._alive = alive
        self._max_requeues = max_requeues
        self._ready: deque[Run] = deque()
        # Runs before their last delivery, each of which may be what kills workers: one at a time.
        self._suspects: deque[Run] = deque()
        self._suspect: Run | None = None
        self._slots: dict[tuple[Hashable, int], _Slots] = {}

    @property
    def has_ready(self) -> bool:
        """Tell whether :meth:`take` may have something to give."""
        return bool(self._ready) or (self._suspect is None and bool(self._suspects))

    def take(self) -> list[Run]:
        """Return the runs that may be sent now, each once, in order."""
        if not self._ready and not self._suspects:  # as after every run that was sent
            return []
        taken = [run for run in self._ready if not run.terminal]
        self._ready.clear()
        while self._suspect is None and self._suspects:
            run = self._suspects.popleft()
            if not run.terminal:
                self._suspect = run
                taken.append(run)
        return taken

    def enter(self, run: Run) -> None:
        """Put a new run in line, which waits for a slot first if its session has a limit."""
        self._sweep(self._ready)
        limit = run.delivery.delivery_max_in_flight
        if limit is None:
            self._ready.append(run)
            return
        slots = self._slots.setdefault((run.session, limit), _Slots())
        self._sweep(slots.waiting)
        slots.waiting.append(run)
        self._fill(slots, limit)

    def enter_again(self, run: Run) -> None:
        """Put a run in line once more; it keeps its slot."""
        if self._suspect is run:
            self._suspect = None
            self._suspects.appendleft(run)
        elif self._is_suspect(run):
            self._suspects.append(run)
        else:
            self._ready.append(run)

    def leave(self, run: Run) -> None:
        """Let others have the place of a run that has ended."""
        if self._suspect is run:
            self._suspect = None
        limit = run.delivery.delivery_max_in_flight
        if limit is None:
            return
        slots = self._slots[run.session, limit]
        if run.holds_slot:
            slots.taken -= 1
        self._fill(slots, limit)
        if not slots.taken and not slots.waiting:
            del self._slots[run.session, limit]

    def rebuild(self, runs: Iterable[Run]) -> None:
        """Set everything anew from what the *runs* that have not ended say of themselves."""
        self._ready.clear()
        self._suspects.clear()
        self._suspect, self._slots = None, {}
        for run in runs:
            limit = run.delivery.delivery_max_in_flight
            if limit is not None:
                slots = self._slots.setdefault((run.session, limit), _Slots())
                slots.taken += run.holds_slot
                if not run.holds_slot:
                    slots.waiting.append(run)
            if run.state is not RunState.QUEUED:
                self._suspect = run if self._is_suspect(run) else self._suspect
            elif limit is None or run.holds_slot:
                (self._suspects if self._is_suspect(run) else self._ready).append(run)
        for (_, limit), slots in self._slots.items():
            self._fill(slots, limit)

    def _is_suspect(self, run: Run) -> bool:
        """Tell whether the next delivery of *run*, or the present one, is one to be made alone."""
        return _MAX_SHARED < run.attempt > self._max_requeues

    def _sweep(self, line: deque[Run]) -> None:
        """Drop what has ended from a line that nobody takes from for long."""
        if len(line) > 64 + 2 * len(self._alive):
            waiting = [run for run in line if not run.terminal]
            line.clear()
            line.extend(waiting)

    def _fill(self, slots: _Slots, limit: int) -> None:
        while slots.waiting and slots.taken < limit:
            run = slots.waiting.popleft()
            if not run.terminal:
                slots.taken += 1
                run.holds_slot = True
                self._ready.append(run)
