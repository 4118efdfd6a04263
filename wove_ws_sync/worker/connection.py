"""One connection of a host to the worker service.

Owns: the socket, the reading of commands from it, the writing of events to it. Never:
knows what a command does, never executes user code, never looks at credentials.

Everything here happens on the event loop that serves connections.
"""

from __future__ import annotations

import asyncio
import collections
import functools
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
from .sendqueue import SMALL, SendQueue

__all__ = ["CLOSE_TIMEOUT", "HostConnection"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: How long, in seconds, a host may take to answer the close of its connection.
CLOSE_TIMEOUT = 1.0
#: A larger message leaves in pieces of this size, so that pings and pongs get in between.
_FRAGMENT = 1024 * 1024
#: Where answers of more than this wait to be written, in bytes, no further command is read. What is
#: kept for the host anyway does not count: a large result must not delay its commands.
_MAX_WAITING = 8 * 1024 * 1024
#: What a heartbeat takes, about.
_BEAT_SIZE = 64


class HostConnection:
    """Read the commands of one host and write its events. *greeting* is how it introduced itself.

    Small events for hosts of this package may share a message as a list. ``host`` is the
    owner of its runs, which is somebody else's to set, as are its ``key`` id and ``since``
    when it is served; ``on_idle`` is called whenever everything queued has been written.
    """

    def __init__(self, socket: ServerConnection, greeting: Greeting, counters: Counter[str]) -> None:
        self.host: Any = None
        self.key = ""
        self.since = 0.0
        self.received_bytes = self.sent_bytes = 0  # of messages; what TLS and frames add is not counted
        self.greeting = greeting
        self.on_idle: Callable[[], None] | None = None
        self._socket = socket
        self._counters = counters
        self._queue = SendQueue(min(SMALL, greeting.limit) if greeting.ours else 0)
        self._parked: collections.deque[bytes] = collections.deque()  # read while nothing was obeyed
        self._parked_bytes = 0
        self._idle_writer: asyncio.Future[None] | None = None
        self._full_reader: asyncio.Future[None] | None = None
        self._must_flush = False
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
                if self._parked:
                    message = self._parked.popleft()
                    self._parked_bytes -= len(message)
                else:
                    message = await self._socket.recv(decode=False)
                self.received_bytes += len(message)
                try:
                    command = None if self._closing else read(message)
                except InvalidMessage as exc:
                    gone(self)
                    self._forget_queue()
                    await self._refuse(exc)
                    return
                finally:
                    del message
                if command is None:
                    self._counters["stale_command"] += 1
                else:
                    obey(self, command)
                del command
                while self._queue.bytes > _MAX_WAITING and not writer.done():
                    await self._wait_for_room()
        except ConnectionClosed:
            return
        finally:
            gone(self)
            self._forget_queue()
            writer.cancel()
            await asyncio.wait([writer] if self._closing is None else [writer, self._closing])

    async def _wait_for_room(self) -> None:
        """Obey nothing for now. As much as may wait is read nonetheless: a pong may be behind it."""
        room = self._full_reader = asyncio.get_running_loop().create_future()
        while self._parked_bytes <= _MAX_WAITING and not room.done():
            reading = asyncio.ensure_future(self._socket.recv(decode=False))
            try:
                await asyncio.wait((reading, room), return_when=asyncio.FIRST_COMPLETED)
            finally:
                reading.cancel()  # which loses nothing
            try:
                self._parked.append(await reading)
            except (asyncio.CancelledError, ConnectionClosed):
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                break
            self._parked_bytes += len(self._parked[-1])
        if not room.done():
            self._socket.transport.pause_reading()
            await room
            self._socket.transport.resume_reading()

    async def _refuse(self, exc: InvalidMessage) -> None:
        self._counters["invalid_message"] += 1
        _logger.warning("A host sent what is no command: %s. Closing its connection.", exc)
        await self.close(exc.close_code, str(exc)[:120])

    def retire(self) -> None:
        """Obey and send nothing more, and close with 1001: this connection does not count any more."""
        if self._closing is None:
            self._forget_queue()
            self._closing = asyncio.create_task(self.close(1001))

    async def close(self, code: int, reason: str = "") -> None:
        """Close, and break the connection if the peer has not answered that in time. Never raises."""
        try:
            await asyncio.wait_for(self._socket.close(code, reason), CLOSE_TIMEOUT + 0.5)
        except TimeoutError:  # it waits behind a message that the peer does not read
            self._abort()
        except Exception:  # websockets breaks connections as well, and fails if that is done already
            _logger.debug("Closing the connection of a host failed.", exc_info=True)
            self._abort()

    def _abort(self) -> None:
        try:
            self._socket.transport.abort()
        except Exception:
            _logger.debug("Breaking the connection of a host failed.", exc_info=True)

    def write_through(self) -> None:
        """Take nothing for written from now on that this process still has, as its end would lose it."""
        self._socket.transport.set_write_buffer_limits(0)
        self._must_flush = True
        _wake(self._idle_writer)

    @property
    def peer(self) -> str:
        """Return the address and the port of the host, "" once they are not known any more."""
        address = self._socket.remote_address
        if not isinstance(address, tuple):
            return ""
        return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"

    @property
    def is_idle(self) -> bool:
        """Tell whether everything that was to be sent is written."""
        return self._idle_writer is not None and not self._idle_writer.done() and not self._queue

    @property
    def waiting_bytes(self) -> int:
        """Return how much memory waits to be written."""
        return self._queue.bytes

    def send(self, event: bytes) -> None:
        """Queue an event: small ones go before large ones, in order otherwise."""
        self._queue.put(event)
        _wake(self._idle_writer)

    def send_first(self, event: bytes) -> None:
        """Queue an event that must not be overtaken by what is queued later, whatever its size."""
        self._queue.put(event, first=True)
        _wake(self._idle_writer)

    def send_later(self, size: int, make: Callable[[], bytes]) -> None:
        """Queue an event of about *size* bytes that *make* returns in its turn, b"" if there is none."""
        self._queue.put_later(size, make)
        _wake(self._idle_writer)

    def beat(self, run: Run) -> None:
        """Send a heartbeat of *run*, unless one of it is waiting already."""
        if not run.beat_queued:
            run.beat_queued = True
            self.send_later(_BEAT_SIZE, functools.partial(self._beat_of, run))

    def _beat_of(self, run: Run) -> bytes:
        if run.owner is not self.host:
            return b""
        run.beat_queued = False
        return b"" if run.state is RunState.ENDED else life_event(run.run_id, run.task_id, started=False)

    def log(self, event: bytes) -> None:
        """Send a log event, unless too many wait already."""
        if len(event) > self.greeting.limit or not self._queue.put_log(event):
            self._counters["dropped_log"] += 1
            return
        _wake(self._idle_writer)

    def _forget_queue(self) -> None:
        self._queue.clear()
        _wake(self._full_reader)

    async def _write(self) -> None:
        """Send what is queued: small events, then one large one, then again."""
        try:
            while True:
                if self._must_flush:
                    self._must_flush = False
                    await self._socket.ping()  # it leaves after what was written before
                if not self._queue:
                    self._idle_writer = asyncio.get_running_loop().create_future()
                    if self.on_idle is not None:
                        self.on_idle()
                    await self._idle_writer
                for following in (self._queue.next_small, self._queue.next_large):
                    message = following()
                    if message:
                        await self._socket.send(_whole_or_pieces(message), text=True)
                        self.sent_bytes += len(message)
                    del message
                    if self._queue.bytes <= _MAX_WAITING:
                        _wake(self._full_reader)
        except ConnectionClosed:
            return
        except Exception:
            _logger.exception("Sending events to a host failed; closing its connection.")
            await self.close(1011)
        finally:
            _wake(self._full_reader)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _whole_or_pieces(message: bytes) -> bytes | Iterator[memoryview]:
    return message if len(message) <= _FRAGMENT else _fragments(message)


def _fragments(message: bytes) -> Iterator[memoryview]:
    view = memoryview(message)
    for start in range(0, len(view), _FRAGMENT):
        yield view[start : start + _FRAGMENT]
