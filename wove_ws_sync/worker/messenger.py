"""How a host hears of its runs: their beats, what their tasks say, their end.

Owns: the beats, and in which form an end is told. Never: decides what becomes of a run,
keeps an end: the host does.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from .alarm import Alarm
from .connection import HostConnection
from .events import life_event
from .host import Host, fitting, result_dropped
from .runs import BeatSchedule, Run, RunState

__all__ = ["Messenger"]

#: A terminal event up to this size waits to be written as it is: what stands for it is no smaller.
_TINY = 1024


class Messenger:
    """Tell hosts of runs, if they are there and want to hear of them. One for a service."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, counters: Counter[str], *, max_kept_bytes: int
    ) -> None:
        self._loop = loop
        self._counters = counters
        self._max_kept_bytes = max_kept_bytes
        self._beats = BeatSchedule()
        self._alarm = Alarm(loop, self._beats.next_at, self._beat)

    def expect_beats(self, run: Run) -> None:
        """Have *run* beat from now on, if its host asked for that."""
        if run.beat_interval is not None:
            self._beats.add(run, self._loop.time())
            self._alarm.arm()

    def _beat(self, now: float) -> None:
        for run in self._beats.due(now):
            if _is_heard(run):
                run.owner.connection.beat(run)
            else:
                self._beats.remove(run)  # until somebody asks for it

    def started(self, run: Run, event: bytes) -> None:
        """Tell that the task of *run* has begun."""
        if _is_heard(run):
            run.owner.connection.send(event)

    def catch_up(self, run: Run, *, answer: bool) -> None:
        """Tell a host that comes, or comes back, how far *run* is: it may have begun while nobody heard.

        *answer*: it waits for a word about it, also if there is nothing to tell.
        """
        self.expect_beats(run)
        connection: HostConnection = run.owner.connection
        started = run.state is RunState.RUNNING
        if started or answer:
            connection.send(life_event(run.run_id, run.task_id, started=started))
        connection.progress(run)

    def said(self, run: Run, kind: str, event: bytes) -> None:
        """Take what a task says while it runs; its newest progress is also for a host that comes later."""
        if kind == "progress":
            run.progress = event
        if _is_heard(run):
            connection: HostConnection = run.owner.connection
            if kind == "log":
                connection.log(event)
            else:
                (connection.progress if kind == "progress" else connection.beat)(run)

    def ended(self, run: Run, event: bytes) -> None:
        """Tell the end of *run*, in the form that its host can take."""
        if not _is_heard(run):
            return
        host: Host = run.owner
        connection, limit = host.connection, host.connection.greeting.limit
        if host.kept is None and connection.waiting_bytes > self._max_kept_bytes:
            dropped = result_dropped(run)
            if len(dropped) < len(event):
                self._counters["dropped_result"] += 1
                event = dropped
        if host.kept is None or len(event) <= _TINY:
            connection.send(fitting(run, event, limit))
        else:  # what is kept for the host is not kept in its queue as well
            connection.send_later(len(event), lambda: fitting(run, host.end_of(run), limit))

    def close(self) -> None:
        """Have nothing beat any more."""
        self._alarm.stop()


def _is_heard(run: Run) -> bool:
    """Tell whether a host is there and wants to hear of *run*."""
    return run.owner.connection is not None and run.run_id not in run.owner.unconfirmed
