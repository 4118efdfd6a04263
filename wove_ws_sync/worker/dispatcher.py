"""What each command does, and what each report of a job means.

Owns: the hosts, the timer of their absences, what draining means; the ``Messenger`` tells
hosts of their runs. Never: executes user code (the engine's threads do), never reads or
writes a socket.

Everything here happens on the event loop that serves connections. Threads reach it
through the ``Outbox`` only.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from ..frames import encode
from .alarm import Alarm, Settlement
from .commands import (
    AttachTask,
    CancelTask,
    Command,
    DetachTask,
    EventAck,
    Ignored,
    MalformedRun,
    Resume,
    RunTask,
    Shutdown,
    Withdrawn,
)
from .connection import HostConnection
from .engines import Engine
from .events import (
    cancelled_event,
    error_event,
    plain_error,
    queue_full_event,
    service_error,
)
from .executions import Executions
from .host import Host
from .hosts import HostTable
from .kept import Kept
from .messenger import Messenger
from .registry import Registry
from .runs import Run, RunState, Stopped
from .shelf import Shelf
from .statistics import Statistics

__all__ = ["Dispatcher"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: Commands of an extension count as unknown where that is not used.
_NEEDS: dict[Any, str] = {
    Resume: "resume",
    DetachTask: "resume",
    AttachTask: "resume",
    "attach_task": "resume",  # a malformed one
    EventAck: "ack",
}
#: What the last errors of a drain may take to be written, in seconds.
_FLUSH_TIMEOUT = 1.0


class Dispatcher:
    """Obey hosts. One for a service; *counters* are the service's."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        counters: Counter[str],
        *,
        max_kept_bytes: int,
        max_queue: int,
        dedupe_window: float,
        registry: Registry | None = None,
        otel: str = "",
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._counters = counters
        self._executions = Executions(loop, engine, self._happened, dedupe_window=dedupe_window, otel=otel)
        self._table = HostTable(counters, max_kept_bytes=max_kept_bytes)
        self._max_queue = max_queue
        self._messenger = Messenger(loop, counters, max_kept_bytes=max_kept_bytes)
        self._away_alarm = Alarm(loop, self._table.next_at, self._end_absences)
        self._connections: set[HostConnection] = set()
        self.statistics = Statistics(loop.time())
        self._drain_until: float | None = None  # set once it begins; it never ends
        self._settlement = Settlement(loop)  # what a drain waits for
        self._closed = False
        self._commands: dict[type, Callable[[Host, Any], None]] = {
            RunTask: self._run_task,
            CancelTask: self._cancel_task,
            Shutdown: self._shutdown,
            MalformedRun: self._malformed,
            Ignored: self._ignored,
            Resume: self._resume,
            EventAck: self._event_ack,
            DetachTask: self._detach_task,
            AttachTask: self._attach_task,
            Withdrawn: self._withdrawn,
        }

    async def serve(self, connection: HostConnection, key: str) -> None:
        """Serve the host that *connection* belongs to; it was authenticated with *key*."""
        if self._closed:
            await connection.close(1001)
            return
        host, before, stopped = self._table.enter(key, connection.greeting, connection, self._loop.time())
        connection.host, connection.key, connection.since = host, key, self._loop.time()
        self._connections.add(connection)
        if before is not None:
            self._counters["takeover"] += 1
            before.retire()
        self._stop_jobs(stopped)
        if self._drain_until is not None:
            self._announce_drain(connection)
        try:
            await connection.serve(self._obey, self._gone)
        finally:
            self._connections.discard(connection)
            self.statistics.left(connection.received_bytes, connection.sent_bytes)

    def _gone(self, connection: HostConnection) -> None:
        """Note that *connection* brings and takes nothing more. Calling it again is harmless."""
        host: Host = connection.host
        if host.connection is connection:
            self._stop_jobs(self._table.leave(host, self._loop.time()))
            self._away_alarm.arm()
        self._settlement.check()

    def _obey(self, connection: HostConnection, command: Command) -> None:
        if self._closed:
            return
        needed = _NEEDS.get(command.kind if isinstance(command, MalformedRun) else type(command))
        if needed is None or needed in connection.greeting.features:
            self._commands[type(command)](connection.host, command)
        else:
            self._counters["ignored_type"] += 1

    # Commands of Wove

    def _run_task(self, host: Host, command: RunTask) -> None:
        if self._is_known(host, command.run_id):
            self._counters["duplicate_run"] += 1
            return
        if self.refusal:
            self._refuse(host, command)
            return
        admitted = command if self._registry is None else self._registry.admit(command, self._counters)
        if isinstance(admitted, bytes):
            host.connection.send(admitted)
            return
        run = host.runs.accept(command, host)
        assert run is not None
        self.statistics.accepted(run, self._loop.time())
        self._messenger.expect_beats(run)
        owner, limit = host.connection.key, host.connection.greeting.limit
        if not self._executions.begin(run, admitted, owner, limit):
            self._counters["deduplicated_run"] += 1

    def _refuse(self, host: Host, command: RunTask) -> None:
        if self._drain_until is not None:
            self._counters["refused_run"] += 1
            host.connection.send(_stopping(command, started=False))
        else:
            self._counters["queue_full"] += 1
            limit = self._max_queue
            host.connection.send(queue_full_event(command.run_id, command.task_id, limit, "--max-queue"))

    def _is_known(self, host: Host, run_id: str) -> bool:
        """Tell whether the run was here before, which must not happen twice; its end is told again."""
        host.unconfirmed.discard(run_id)
        found = host.find(run_id, self._loop.time())
        if isinstance(found, Kept):
            self._messenger.ended(found.run, found.event)
        elif found is not None:
            self._messenger.expect_beats(found)
        return found is not None

    def _cancel_task(self, host: Host, command: CancelTask) -> None:
        run = host.runs.get(command.run_id)
        if run is None:
            self._counters["unknown_run"] += 1
        else:
            self._cancel(run, command.cancel_mode)

    def _cancel(self, run: Run, mode: str | None) -> None:
        stopped = self._executions.stop(run)
        if not run.owner.runs.cancelled(run, stopped, mode):
            return
        self._executions.give_up(run, again=stopped is Stopped.UNSTOPPABLE)  # now that nobody waits for it
        self._end(run, cancelled_event(run.run_id, run.task_id))

    def _withdrawn(self, host: Host, command: Withdrawn) -> None:
        if self._is_known(host, command.run_id):
            self._cancel_task(host, CancelTask(command.run_id, command.cancel_mode))
        else:
            self._counters["withdrawn_run"] += 1
            host.connection.send(cancelled_event(command.run_id, command.task_id))

    def _shutdown(self, host: Host, command: Shutdown) -> None:
        host.leaving = True
        for run in host.runs:
            self._cancel(run, None)

    def _malformed(self, host: Host, command: MalformedRun) -> None:
        self._counters["malformed_run"] += 1
        if not host.has(command.run_id):  # or the error would end the run that has this id
            error = plain_error("MalformedFrame", command.message, "payload")
            host.connection.send(error_event(command.run_id, command.task_id, error, plain=True))

    def _ignored(self, host: Host, command: Ignored) -> None:
        self._counters[f"ignored_{command.reason}"] += 1

    # Commands of the extensions

    def _resume(self, host: Host, command: Resume) -> None:
        state, ended, stopped = host.resume(command, self._loop.time())
        host.connection.send_first(encode(state))
        for run_id in state["alive"]:
            run = host.runs.get(run_id)
            if run is not None:
                self._messenger.catch_up(run, answer=False)
        for kept in ended:
            self._messenger.ended(kept.run, kept.event)
        self._stop_jobs(stopped)
        self._something_let_go()

    def _event_ack(self, host: Host, command: EventAck) -> None:
        if unknown := host.acknowledge(command.run_ids):
            self._counters["unknown_ack"] += unknown
        self._settlement.check()

    def _detach_task(self, host: Host, command: DetachTask) -> None:
        displaced = host.let_go(command.run_id, self._loop.time())
        if displaced is None:
            self._counters["unknown_run"] += 1
        else:
            self._stop_jobs(displaced)
            self._something_let_go()
            self._settlement.check()

    def _something_let_go(self) -> None:
        """See to what may be on a shelf now: it takes room, and will expire."""
        self._table.make_room()
        self._away_alarm.arm()

    def _attach_task(self, host: Host, command: AttachTask) -> None:
        found = host.attach(command, self._loop.time())
        if found is None:
            self._counters["unknown_run"] += 1
            message = "There is no such run to attach to: it was never let go, was fetched, or has expired."
            host.connection.send(
                service_error(command.run_id, command.task_id, "UnknownRun", message, retryable=False)
            )
        elif isinstance(found, Kept):
            self._messenger.ended(found.run, found.event)
        else:
            self._messenger.catch_up(found, answer=True)

    # Events

    def _happened(self, run: Run, kind: str, event: bytes) -> None:
        """Take what a job reports of *run*: see ``jobs.Report``."""
        owner = run.owner
        if kind == "started":
            if owner.runs.started(run):
                self.statistics.started(run, self._loop.time())
                self._messenger.started(run, event)
        elif kind == "ended":
            if owner.runs.ended(run):
                self._end(run, event)
            else:
                self._counters["late_result"] += 1
            run.job = None  # the two know each other, which only the collector would undo
        elif run.state is RunState.RUNNING:
            if kind == "progress":
                said, now = json.loads(event), self._loop.time()
                self.statistics.progressed(run, said["done"], said["total"], said["message"], now)
            self._messenger.said(run, kind, event)

    def _end(self, run: Run, event: bytes) -> None:
        """Keep the terminal event of a run that has just ended, and tell its host."""
        now = self._loop.time()
        self.statistics.ended(run, event, now)
        run.owner.keep(run, event, now)
        if run.owner.connection is None:
            self._table.make_room()
        if isinstance(run.owner, Shelf):
            self._away_alarm.arm()  # it will expire
        self._messenger.ended(run, event)
        if run.owner.connection is not None:
            run.owner.connection.has_room()
        self._settlement.check()

    def _end_absences(self, now: float) -> None:
        self._stop_jobs(self._table.due(now))
        self._settlement.check()

    def _stop_jobs(self, runs: Iterable[Run]) -> None:
        """Stop what executes runs that have ended for everybody else."""
        for run in runs:
            self.statistics.ended(run, None, self._loop.time())
            self._executions.give_up(run, again=True)

    # What is shown

    @property
    def refusal(self) -> str:
        """Return why no new run would be taken now, "" if one would."""
        if self._drain_until is not None:
            return "draining"
        return "queue full" if self.statistics.queued >= self._max_queue else ""

    def connections(self) -> list[HostConnection]:
        """Return the connections of hosts that are here, the oldest first."""
        return sorted(self._connections, key=lambda connection: connection.since)

    def kept_bytes(self) -> int:
        """Return what the ends of runs take that have not arrived."""
        return self._table.kept_bytes()

    # The end

    async def drain(self, timeout: float) -> int:
        """Take no new runs and wait for those that there are; return how many had to be given up."""
        self._drain_until = self._loop.time() + timeout
        for connection in self._connections:
            self._announce_drain(connection)
        await self._settlement.wait_for(self._is_settled, timeout)
        left = self._table.live_runs()
        for run in left:
            stopped = self._executions.stop_for_all(run)
            self._executions.give_up(run, again=False)
            run.owner.runs.ended(run)
            self._end(run, _stopping(run, started=stopped is not Stopped.WITHDRAWN))
        if left and not self._closed:
            await self._settlement.wait_for(self._is_written, _FLUSH_TIMEOUT)
        return len(left)

    def counts(self) -> tuple[int, int]:
        """Return how many runs are alive and how many hosts are connected."""
        return len(self._table.live_runs()), len(self._table.present())

    def _announce_drain(self, connection: HostConnection) -> None:
        """Tell the host, if it knows of draining, and have its connection say when it is idle."""
        connection.on_idle = self._settlement.check
        connection.write_through()
        connection.read_on()
        if "drain" in connection.greeting.features:
            assert self._drain_until is not None
            left = max(0.0, self._drain_until - self._loop.time())
            connection.send(encode({"type": "draining", "timeout": round(left, 3)}))

    def _is_written(self) -> bool:
        return all(host.connection.is_idle for host in self._table.present())

    def _is_settled(self) -> bool:
        """Tell whether nobody waits for anything more: no run, no event on its way."""
        acknowledged = all(not host.kept for host in self._table.present())
        return acknowledged and not self._table.is_any_alive() and self._is_written()

    async def close(self) -> None:
        """Close every connection with 1001, obey nothing more."""
        self._closed = True
        self._settlement.close()
        self._messenger.close()
        self._away_alarm.stop()
        self._executions.close()
        for connection in (connections := list(self._connections)):
            connection.on_idle = None
        if connections:
            await asyncio.wait([asyncio.create_task(each.close(1001)) for each in connections])


def _stopping(run: Run | RunTask, *, started: bool) -> bytes:
    message = "The worker service is stopping; " + (
        "the task had begun and was given up." if started else "the task was not begun."
    )
    return service_error(run.run_id, run.task_id, "WorkerStopping", message, retryable=True, started=started)
