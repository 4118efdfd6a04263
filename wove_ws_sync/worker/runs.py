"""The live runs of one owner (a host, mostly), as pure state, and when each owes a heartbeat.

Owns: which event still is due for a run (exactly one terminal event, no heartbeat after
it) and what a cancel answers. Never: a thread, a socket, a clock; ``now`` is an argument.

What a cancel answers (``Stopped`` is what the engine could do about it):

=============== ============================== ==========================================
Stopped         best_effort                    require_ack
=============== ============================== ==========================================
WITHDRAWN       ``task_cancelled`` at once     ``task_cancelled`` at once
STOPPING        the end of the coroutine decides: ``task_cancelled``, or its result if
                it swallowed the cancellation
UNSTOPPABLE     ``task_cancelled`` at once,    nothing yet; the result or error of the
                the later result is dropped    task wins when it has ended
=============== ============================== ==========================================
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections.abc import Iterator
from typing import Any

from .commands import RunTask

__all__ = ["BeatSchedule", "Run", "RunState", "RunTable", "Stopped"]


class RunState(enum.Enum):
    """Where a run is; ENDED is final."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


class Stopped(enum.Enum):
    """What an engine could do about a task that is to be cancelled."""

    WITHDRAWN = "withdrawn"  # it was still queued and never runs
    STOPPING = "stopping"  # it is a coroutine: it was cancelled and will end by itself
    UNSTOPPABLE = "unstoppable"  # it is inside a synchronous call


class Run:
    """One accepted run. ``job`` is what executes it; ``owner`` is the host that gets its events.

    ``shared`` is the execution whose outcome it gets with others, None if it has its own.
    ``origin`` names the host that let go of it, if one did; ``acknowledged`` says that its
    terminal event has arrived; ``began_at`` is when its task began, None until then,
    ``progress`` is the newest event of that kind, and ``record`` is of the Statistics until it ends.
    """

    __slots__ = (
        "acknowledged",
        "beat_interval",
        "beat_queued",
        "beat_serial",
        "began_at",
        "cancel_mode",
        "job",
        "origin",
        "orphan_policy",
        "owner",
        "progress",
        "record",
        "run_id",
        "shared",
        "state",
        "task_id",
    )

    def __init__(self, command: RunTask, owner: Any) -> None:
        self.run_id = command.run_id
        self.task_id = command.task_id
        self.beat_interval = command.beat_interval
        self.cancel_mode = command.cancel_mode
        self.orphan_policy = command.orphan_policy
        self.owner = owner
        self.origin: tuple[str, str] | None = None
        self.beat_serial = -1  # of its one valid place in a BeatSchedule
        self.job: Any = None
        self.shared: Any = None
        self.record: Any = None
        self.began_at: float | None = None
        self.progress: bytes | None = None
        self.state = RunState.QUEUED
        self.acknowledged = False
        self.beat_queued = False  # a heartbeat waits to be sent; another would say nothing new

    def __repr__(self) -> str:
        return f"<Run {self.run_id!r} {self.state.value}>"


class RunTable:
    """The live runs of one owner, by run_id."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def get(self, run_id: str) -> Run | None:
        """Return the live run, None if it is unknown or has ended."""
        return self._runs.get(run_id)

    def accept(self, command: RunTask, owner: Any = None) -> Run | None:
        """Enter a run; return None if its run_id is live already and must not run twice."""
        if command.run_id in self._runs:
            return None
        run = self._runs[command.run_id] = Run(command, owner)
        return run

    def adopt(self, run: Run, owner: Any) -> None:
        """Take over a live run from another owner."""
        run.owner = owner
        run.beat_queued = False  # that was the queue of the other one's connection
        self._runs[run.run_id] = run

    def remove(self, run: Run) -> None:
        """Give a live run away; it goes on."""
        del self._runs[run.run_id]

    def started(self, run: Run) -> bool:
        """Note that the task began; return whether ``task_started`` is due."""
        if run.state is not RunState.QUEUED:
            return False
        run.state = RunState.RUNNING
        return True

    def ended(self, run: Run) -> bool:
        """Note that the task ended; return whether its terminal event is due, which it is once."""
        if run.state is RunState.ENDED:
            return False
        run.state = RunState.ENDED
        self._runs.pop(run.run_id, None)
        return True

    def cancelled(self, run: Run, stopped: Stopped, mode: str | None) -> bool:
        """Note a cancel and what the engine made of it; return whether ``task_cancelled`` is due now."""
        if stopped is Stopped.STOPPING:
            return False
        if stopped is Stopped.UNSTOPPABLE and (mode or run.cancel_mode) == "require_ack":
            return False
        return self.ended(run)

    def clear(self) -> list[Run]:
        """End every run without an event, as nobody is there to read one; return them."""
        runs = list(self._runs.values())
        for run in runs:
            run.state = RunState.ENDED
        self._runs.clear()
        return runs


class BeatSchedule:
    """When which run owes its next heartbeat, for any number of connections."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Run]] = []
        self._serial = itertools.count()
        self._live_at_sweep = 512

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, run: Run, now: float) -> None:
        """Have *run* beat from *now* on, if its host asked for that; its place so far is given up."""
        if run.beat_interval is None:
            return
        run.beat_serial = next(self._serial)
        heapq.heappush(self._heap, (now + run.beat_interval, run.beat_serial, run))
        if len(self._heap) > 2 * self._live_at_sweep:
            self._sweep()

    def remove(self, run: Run) -> None:
        """Have *run* beat no more, until it is added again."""
        run.beat_serial = -1

    def next_at(self) -> float | None:
        """Return the moment of the next beat, None if there is none."""
        while self._heap and not _is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Run]:
        """Yield every live run whose beat is due and schedule its next one."""
        while self._heap and self._heap[0][0] <= now:
            moment, serial, run = self._heap[0]
            if not _is_valid(self._heap[0]) or run.beat_interval is None:  # the latter for the checker
                heapq.heappop(self._heap)
                continue
            # After a stall of this process one beat is enough; missed ones are not made up for.
            following = max(moment + run.beat_interval, now + run.beat_interval / 2)
            heapq.heapreplace(self._heap, (following, serial, run))
            yield run

    def _sweep(self) -> None:
        """Drop what has ended, or short runs with rare beats would pile up."""
        self._heap = [entry for entry in self._heap if _is_valid(entry)]
        heapq.heapify(self._heap)
        self._live_at_sweep = max(512, len(self._heap))


def _is_valid(entry: tuple[float, int, Run]) -> bool:
    _, serial, run = entry
    return run.state is not RunState.ENDED and run.beat_serial == serial and run.beat_interval is not None
