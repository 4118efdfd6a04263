"""When which run has to be looked at.

Owns: the moments at which a deadline, a silence or a wait of a run may be over. Never: decides
what follows from that, reads a clock.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sized

from ._run import Run, RunState

__all__ = ["Alarms"]


class Alarms:
    """The moments of all runs; of those of one run, the one in ``run.alarm`` counts.

    *alive* is the collection of the runs that have not ended.
    """

    def __init__(self, alive: Sized) -> None:
        self._alive = alive
        self._heap: list[tuple[float, int, Run]] = []
        self._order = itertools.count()
        #: What ``delivery_heartbeat_seconds`` is multiplied with.
        self.heartbeat_factor = 1.0

    def next(self) -> float | None:
        """Return the earliest moment at which :meth:`due` may have a run."""
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Run | None:
        """Take out a run whose moment has come; None if there is none left."""
        while self._heap and self._heap[0][0] <= now:
            moment, _, run = heapq.heappop(self._heap)
            if not run.terminal and run.alarm == moment:
                run.alarm = None
                return run
        return None

    def silent_at(self, run: Run, now: float) -> float | None:
        """Return when *run* has been silent for too long; the clock starts when its last byte left."""
        interval = run.delivery.delivery_heartbeat_seconds
        if interval is None or run.receipt is None or run.in_limbo:
            return None
        if run.receipt.sent_at is None and not run.answered:  # it is not known to have left
            since = now
        else:
            since = max(run.life, run.receipt.sent_at or 0.0)
        return since + interval * self.heartbeat_factor

    def set(self, run: Run, now: float) -> None:
        """Have *run* looked at when something of it is due, unless it will be before that anyway."""
        if run.state is RunState.CANCELLING:
            alarm = run.ack_by
        else:
            alarm = run.deadline.at
            for moment in (self.silent_at(run, now), run.limbo_until):
                if moment is not None and (alarm is None or moment < alarm):
                    alarm = moment
        if alarm is None or (run.alarm is not None and run.alarm <= alarm):
            return
        run.alarm = alarm
        heapq.heappush(self._heap, (alarm, next(self._order), run))
        if len(self._heap) > 64 + 2 * len(self._alive):
            self._heap = [
                entry for entry in self._heap if not entry[2].terminal and entry[2].alarm == entry[0]
            ]
            heapq.heapify(self._heap)

    def rebuild(self, runs: Iterable[Run], now: float) -> None:
        """Set every alarm anew."""
        self._heap = []
        for run in runs:
            run.alarm = None
            self.set(run, now)
