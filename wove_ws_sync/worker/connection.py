"""One connection of a host to the worker service.

Owns: the socket, the reading of commands from it, the order in which events leave. Never:
knows what a command does, never executes user code, never looks at credentials.

Everything here happens on the event loop that serves connections.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from ..frames import InvalidMessage
from .commands import Command, read
from .events import life_event
from .greeting import Greeting
from .runs import Run, RunState

__all__ = ["CLOSE_TIMEOUT", "HostConnection"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: How long, in seconds, a host may take to answer the close of its connection.
CLOSE_TIMEOUT = 1.0
#: Events up to this size go before larger ones and may share a message.
_SMALL = 64 * 1024
#: A larger message leaves in pieces of this size, so that pings and pongs get in between.
_FRAGMENT = 1024 * 1024
#: Log records that wait for a slow host; further ones are dropped and counted.
_MAX_QUEUED_LOGS = 2000


class _Log(bytes):
    """A log event in the queue."""


class HostConnection:
    """Read the commands of one host and write its events. *greeting* is how it introduced itself.

    Small events for hosts of this package may share a message as a list. ``host`` is the
    owner of its runs, which is somebody else's to set; ``on_idle`` is called whenever
    everything queued has been written.
    """

    def __init__(self, socket: ServerConnection, greeting: Greeting, counters: Counter[str]) -> None:
        self.host: Any = None
        self.greeting = greeting
        self.on_idle: Callable[[], None] | None = None
        self._socket = socket
        self._counters = counters
        self._batch_bytes = min(_SMALL, greeting.limit) if greeting.ours else 0
        self._small: collections.deque[bytes | Run] = collections.deque()
        self._large: collections.deque[bytes] = collections.deque()
        self._queued_logs = 0
        self._idle_writer: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    async def serve(
        self,
        obey: Callable[[HostConnection, Command], None],
        gone: Callable[[HostConnection], None],
    ) -> None:
        """Read commands for *obey* until the connection ends or is retired, then tell *gone*."""
        writer = asyncio.create_task(self._write())
        try:
            while True:
                message = await self._socket.recv(decode=False)
                try:
                    command = None if self._closing else read(message)
                except InvalidMessage as exc:
                    gone(self)
                    await self._refuse(exc)
                    return
                finally:
                    del message
                if command is None:
                    self._counters["stale_command"] += 1
                else:
                    obey(self, command)
                del command
        except ConnectionClosed:
            return
        finally:
            gone(self)
            self._forget_queue()
            writer.cancel()
            await asyncio.wait([writer] if self._closing is None else [writer, self._closing])

    async def _refuse(self, exc: InvalidMessage) -> None:
        self._counters["invalid_message"] += 1
        _logger.warning("A host sent what is no command: %s. Closing its connection.", exc)
        await self._socket.close(exc.close_code, str(exc)[:120])

    def retire(self) -> None:
        """Obey and send nothing more, and close with 1001: this connection does not count any more."""
        if self._closing is None:
            self._forget_queue()
            self._closing = asyncio.create_task(self.close(1001))

    async def close(self, code: int) -> None:
        """Close, and break the connection if the peer has not answered that in time."""
        try:
            await asyncio.wait_for(self._socket.close(code), CLOSE_TIMEOUT + 0.5)
        except TimeoutError:  # it waits behind a message that the peer does not read
            self._socket.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Tell whether everything that was to be sent is written."""
        waiting = self._idle_writer is not None and not self._idle_writer.done()
        return waiting and not self._small and not self._large

    def send(self, event: bytes) -> None:
        """Queue an event: small ones go before large ones, in order otherwise."""
        if len(event) <= _SMALL:
            self._small.append(event)
        else:
            self._large.append(event)
        self._wake_writer()

    def send_first(self, event: bytes) -> None:
        """Queue an event that must not be overtaken by what is queued later, whatever its size."""
        self._small.append(event)
        self._wake_writer()

    def beat(self, run: Run) -> None:
        """Send a heartbeat of *run*, unless one of it is waiting already."""
        if not run.beat_queued:
            run.beat_queued = True
            self._small.append(run)
            self._wake_writer()

    def log(self, event: bytes) -> None:
        """Send a log event, unless too many wait already."""
        if self._queued_logs >= _MAX_QUEUED_LOGS or len(event) > self.greeting.limit:
            self._counters["dropped_log"] += 1
            return
        self._queued_logs += 1
        self._small.append(_Log(event))
        self._wake_writer()

    def _forget_queue(self) -> None:
        for item in self._small:
            if isinstance(item, Run):
                item.beat_queued = False
        self._small.clear()
        self._large.clear()

    def _wake_writer(self) -> None:
        if self._idle_writer is not None and not self._idle_writer.done():
            self._idle_writer.set_result(None)

    async def _write(self) -> None:
        """Send what is queued: small events, then one large one, then again."""
        try:
            while True:
                if not self._small and not self._large:
                    self._idle_writer = asyncio.get_running_loop().create_future()
                    if self.on_idle is not None:
                        self.on_idle()
                    await self._idle_writer
                message = self._next_small()
                if message:
                    await self._socket.send(_whole_or_pieces(message), text=True)
                if self._large:
                    message = self._large.popleft()
                    await self._socket.send(_whole_or_pieces(message), text=True)
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
        if item.state is RunState.ENDED or item.owner is not self.host:
            return b""
        return life_event(item.run_id, item.task_id, started=False)


def _whole_or_pieces(message: bytes) -> bytes | Iterator[memoryview]:
    return message if len(message) <= _FRAGMENT else _fragments(message)


def _fragments(message: bytes) -> Iterator[memoryview]:
    view = memoryview(message)
    for start in range(0, len(view), _FRAGMENT):
        yield view[start : start + _FRAGMENT]
