"""One host's connection to the worker service.

Owns: the host's runs, the order in which its events leave, and what each command does.
Never: executes user code (the engine's threads do), never looks at credentials.

Everything here happens on the event loop that serves connections. Threads reach it
through the ``Outbox`` only.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from ..frames import InvalidMessage, encode
from .commands import CancelTask, Command, Ignored, MalformedRun, RunTask, read
from .engines import Engine
from .jobs import Job, cancelled_event, error_event, plain_error
from .runs import Run, RunState, RunTable

__all__ = ["HostConnection", "Outbox"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: Events up to this size go before larger ones and may share a message.
_SMALL = 64 * 1024
#: A larger message leaves in pieces of this size, so that pings and pongs get in between.
_FRAGMENT = 1024 * 1024
#: How long ``task_started`` may wait for the end of a short task, in seconds.
_SOON = 0.002
#: Log records that wait for a slow host; further ones are dropped and counted.
_MAX_QUEUED_LOGS = 2000


class _Log(bytes):
    """A log event in the queue."""


class Outbox:
    """Bring events from any thread to the loop, with one wake-up for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: collections.deque[tuple[Run, str, bytes]] = collections.deque()
        self._awake = False
        self._looking = False

    def look_soon(self) -> None:
        """Have the loop look by itself in a moment: a short task then needs one wake-up, not two."""
        if not self._looking:
            self._looking = True
            self._loop.call_later(_SOON, self._look)

    def _look(self) -> None:
        self._looking = False
        self._drain()

    def post(self, run: Run, kind: str, event: bytes) -> None:
        """Queue what happened to *run*. Any thread, never blocks."""
        self._items.append((run, kind, event))
        # The drain clears the flags before it looks, so what is appended is seen or wakes it again.
        if not self._awake and not (self._looking and kind == "started"):
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                self._items.clear()

    def _drain(self) -> None:
        self._awake = False
        for _ in range(len(self._items)):  # not until it is empty: a flood must not hold the loop
            run, kind, event = self._items.popleft()
            run.owner.happened(run, kind, event)


class HostConnection:
    """Obey one host. *limit* is the largest message in bytes that it accepts.

    *batching* (for hosts of this package) lets small events share a message as a list.
    """

    def __init__(
        self,
        socket: ServerConnection,
        *,
        engine: Engine,
        outbox: Outbox,
        expect_beats: Callable[[Run], None],
        counters: Counter[str],
        limit: int,
        batching: bool,
    ) -> None:
        self._socket = socket
        self._engine = engine
        self._outbox = outbox
        self._expect_beats = expect_beats
        self._counters = counters
        self._limit = limit
        self._batch_bytes = min(_SMALL, limit) if batching else 0
        self._runs = RunTable()
        self._small: collections.deque[bytes | Run] = collections.deque()
        self._large: collections.deque[bytes] = collections.deque()
        self._queued_logs = 0
        self._idle_writer: asyncio.Future[None] | None = None

    async def serve(self) -> None:
        """Read commands until the connection ends, then drop what is left of its runs."""
        writer = asyncio.create_task(self._write())
        try:
            while True:
                message = await self._socket.recv(decode=False)
                try:
                    command = read(message)
                except InvalidMessage as exc:
                    await self._refuse(exc)
                    return
                finally:
                    del message
                self._obey(command)
                del command
        except ConnectionClosed:
            return
        finally:
            self._drop_runs()
            writer.cancel()
            await asyncio.wait([writer])

    async def _refuse(self, exc: InvalidMessage) -> None:
        self._counters["invalid_message"] += 1
        _logger.warning("A host sent what is no command: %s. Closing its connection.", exc)
        self._drop_runs()
        await self._socket.close(exc.close_code, str(exc)[:120])

    def _obey(self, command: Command) -> None:
        if isinstance(command, RunTask):
            self._run_task(command)
        elif isinstance(command, CancelTask):
            run = self._runs.get(command.run_id)
            if run is None:
                self._counters["unknown_run"] += 1
            else:
                self._cancel(run, command.cancel_mode)
        elif isinstance(command, MalformedRun):
            self._malformed(command)
        elif isinstance(command, Ignored):
            self._counters[f"ignored_{command.reason}"] += 1
        else:
            for run in self._runs:
                self._cancel(run, None)

    def _run_task(self, command: RunTask) -> None:
        run = self._runs.accept(command, self)
        if run is None:
            self._counters["duplicate_run"] += 1
            return
        run.job = Job(command, functools.partial(self._outbox.post, run), self._limit)
        self._expect_beats(run)
        self._outbox.look_soon()
        try:
            self._engine.submit(run.job)
        except RuntimeError as exc:  # no more threads, or the service is stopping
            run.job.abandoned = True
            error = plain_error(type(exc).__name__, f"The worker cannot take the run: {exc}.", "executor")
            self.happened(run, "ended", error_event(run.run_id, run.task_id, {**error, "retryable": True}))

    def _malformed(self, command: MalformedRun) -> None:
        self._counters["malformed_run"] += 1
        if self._runs.get(command.run_id) is None:  # or the error would end the run that has this id
            error = plain_error("MalformedFrame", command.message, "payload")
            self._send(error_event(command.run_id, command.task_id, error))

    def _cancel(self, run: Run, mode: str | None) -> None:
        stopped = self._engine.cancel(run.job)
        if not self._runs.cancelled(run, stopped, mode):
            return
        run.job.abandoned = True
        run.job = None
        self._send(cancelled_event(run.run_id, run.task_id))

    def _drop_runs(self) -> None:
        for run in self._runs.clear():
            run.job.abandoned = True
            self._engine.cancel(run.job)
            run.job = None

    def happened(self, run: Run, kind: str, event: bytes) -> None:
        """Take what a job reports of *run*: "started", "log" or "ended"."""
        if kind == "started":
            if self._runs.started(run):
                self._send(event)
        elif kind == "ended":
            if self._runs.ended(run):
                self._send(event)
            else:
                self._counters["late_result"] += 1
            run.job = None  # the two know each other, which only the collector would undo
        elif run.state is RunState.RUNNING:
            self._log(event)

    def beat(self, run: Run) -> None:
        """Send a heartbeat of *run*, unless one of it is waiting already."""
        if not run.beat_queued:
            run.beat_queued = True
            self._small.append(run)
            self._wake_writer()

    def _log(self, event: bytes) -> None:
        if self._queued_logs >= _MAX_QUEUED_LOGS or len(event) > self._limit:
            self._counters["dropped_log"] += 1
            return
        self._queued_logs += 1
        self._send(_Log(event))

    def _send(self, event: bytes) -> None:
        if len(event) <= _SMALL or isinstance(event, _Log):
            self._small.append(event)
        else:
            self._large.append(event)
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._idle_writer is not None and not self._idle_writer.done():
            self._idle_writer.set_result(None)

    async def _write(self) -> None:
        """Send what is queued: small events, then one large one, then again."""
        try:
            while True:
                if not self._small and not self._large:
                    self._idle_writer = asyncio.get_running_loop().create_future()
                    await self._idle_writer
                message = self._next_small()
                if message:
                    await self._socket.send(message, text=True)
                if self._large:
                    message = self._large.popleft()
                    await self._socket.send(
                        message if len(message) <= _FRAGMENT else _fragments(message), text=True
                    )
                del message
        except ConnectionClosed:
            return
        except Exception:
            _logger.exception("Sending events to a host failed; closing its connection.")
            await self._socket.close(1011)

    def _next_small(self) -> bytes:
        """Return the next message of small events; b"" if there is nothing to say."""
        batch: list[bytes] = []
        size = 2
        while self._small:
            event = self._take_small()
            if not event:
                continue
            if not self._batch_bytes:
                return event
            size += len(event) + 1
            if batch and size > self._batch_bytes:
                self._small.appendleft(event)
                self._queued_logs += isinstance(event, _Log)
                break
            batch.append(event)
        if len(batch) <= 1:
            return batch[0] if batch else b""
        return b"[" + b",".join(batch) + b"]"

    def _take_small(self) -> bytes:
        item = self._small.popleft()
        if isinstance(item, bytes):
            self._queued_logs -= isinstance(item, _Log)
            return item
        item.beat_queued = False
        if item.state is RunState.ENDED:
            return b""
        return encode({"type": "heartbeat", "run_id": item.run_id, "task_id": item.task_id})


def _fragments(message: bytes) -> Iterator[memoryview]:
    view = memoryview(message)
    for start in range(0, len(view), _FRAGMENT):
        yield view[start : start + _FRAGMENT]
