"""What executes which run: one job for a run, or one job for all that share an idempotency key.

Owns: the jobs, from their making to their end; who shares which; what is reported to
whom. Never: knows a host or a connection, never decides what a run is told.

Everything here happens on the event loop that serves connections.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable

from .alarm import Alarm
from .commands import RunTask
from .dedupe import Dedupe, Key, Shared
from .engines import Engine
from .events import error_event, is_result, life_event, plain_error
from .jobs import Job
from .outbox import Outbox
from .runs import Run, Stopped

__all__ = ["Executions"]


class Executions:
    """Have *engine* execute runs, and tell *happened* ("started", "log" or "ended", and the event)."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        happened: Callable[[Run, str, bytes], None],
        *,
        dedupe_window: float,
        otel: str = "",
    ) -> None:
        self._loop = loop
        self._otel = otel
        self._engine = engine
        self._happened = happened
        self._outbox = Outbox(loop, self._reported)
        self._dedupe = Dedupe(dedupe_window)
        self._alarm = Alarm(loop, self._dedupe.next_at, self._dedupe.expire)

    def close(self) -> None:
        """Be silent: no timer is left."""
        self._alarm.stop()

    def begin(self, run: Run, command: RunTask, owner: str, limit: int) -> bool:
        """Have *run* executed; False if it gets what another one with its key gets, or got.

        Keys are those of *owner*; *limit* is the largest message in bytes that its host accepts.
        """
        if self._otel:
            command = dataclasses.replace(command, otel=self._otel)
        source: Run | Shared = run
        if command.idempotency_key:
            key = (owner, command.idempotency_key, "json" if command.name else "pickle")
            if self._follow(run, key):
                return False
            source = self._dedupe.begin(key, run)
        job = source.job = Job(command, functools.partial(self._outbox.post, source), limit)
        if isinstance(source, Shared):
            source.add(run)
        self._outbox.look_soon()
        try:
            self._engine.submit(job)
        except RuntimeError as exc:  # no more threads, or the service is stopping
            job.abandoned = True
            error = plain_error(type(exc).__name__, f"The worker cannot take the run: {exc}.", "executor")
            event = error_event(
                run.run_id, run.task_id, {**error, "retryable": True}, plain=bool(command.name)
            )
            self._reported(source, "ended", event)
        return True

    def _follow(self, run: Run, key: Key) -> bool:
        result = self._dedupe.replay(key, run, self._loop.time())
        if result is not None:
            self._happened(run, "ended", result)
            return True
        shared = self._dedupe.find(key)
        if shared is None:
            return False
        shared.add(run)
        # A cancel that stopped nothing may have been asked for; this run must not end by it.
        shared.job.cancel_requested = False
        if shared.began_at is not None:
            self._happened(run, "started", life_event(run.run_id, run.task_id, started=True))
        return True

    def stop(self, run: Run) -> Stopped:
        """Stop what executes *run*, unless others wait for it, too."""
        shared = run.shared
        if shared is not None and len(shared.runs) > 1:
            return Stopped.WITHDRAWN
        stopped = self._engine.cancel(run.job)
        if shared is not None and stopped is not Stopped.UNSTOPPABLE:
            self._dedupe.close(shared)  # nobody else shall share its cancellation
        return stopped

    def stop_for_all(self, run: Run) -> Stopped:
        """Stop what executes *run*, whoever waits for it."""
        return self._engine.cancel(run.job)

    def give_up(self, run: Run, *, again: bool) -> None:
        """Have what executes *run*, which ends, report nothing of it; if *again*, stop it (once more)."""
        job, shared = run.job, run.shared
        run.job = None
        if shared is not None:
            shared.leave(run)
            if shared.runs:
                return
            self._dedupe.close(shared)
            shared.job = None
        job.abandoned = True
        if again:
            self._engine.cancel(job)

    def _reported(self, source: Run | Shared, kind: str, event: bytes) -> None:
        if isinstance(source, Run):
            self._happened(source, kind, event)
            return
        waiting = list(source.runs)
        for run in waiting:
            run.began_at = source.began_at
            if kind == "ended":
                source.leave(run)
            self._happened(run, kind, source.event_for(run, event))
        if kind == "ended":
            result = event if waiting and is_result(event) else None
            self._dedupe.ended(source, result, self._loop.time())
            self._alarm.arm()
            source.job = None  # the two know each other, which only the collector would undo
