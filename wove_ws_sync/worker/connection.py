"""One connection of a host to the worker service.

Owns: the socket, the reading of commands from it, the writing of events to it. Never:
knows what a command does, never executes user code, never looks at credentials.

Everything here happens on the event loop that serves connections.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from ..frames import InvalidMessage
from .alarm import Alarm
from .channel import Channel
from .commands import Command, RunTask, read
from .events import life_event, queue_full_event
from .greeting import Greeting
from .parked import Parked
from .runs import Run, RunState
from .sendqueue import SMALL, SendQueue

__all__ = ["CLOSE_TIMEOUT", "DEFAULT_MAX_IN_FLIGHT", "HostConnection"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: Enough for any number of workers; a tenth of what may wait to begin, of all hosts.
DEFAULT_MAX_IN_FLIGHT = 10_000
#: How long, in seconds, a host may take to answer the close of its connection.
CLOSE_TIMEOUT = 1.0
#: Where answers of more than this wait to be written, in bytes, no further command is read. What is
#: kept for the host anyway does not count: a large result must not delay its commands.
_MAX_WAITING = 8 * 1024 * 1024
#: Where a host has too many runs this much is read per rest of so many seconds. The window of TCP must
#: open now and then, or the host gives the connection up, and it sees that this side lives.
_TRICKLE_BYTES = 256 * 1024
_REST = 1.0
#: A run beyond so much that waits, in bytes, is refused.
_MAX_PARKED = 64 * 1024 * 1024
#: Room for this many runs, or an eighth of the limit, is waited for: waking for each would cost.
_MOST_ROOM = 64
#: What a heartbeat takes, about.
_BEAT_SIZE = 64


class HostConnection:
    """Read the commands of one host and write its events. *greeting* is how it introduced itself,
    *channel* has the messages of *socket*.

    While the host has *max_in_flight* runs no further one is accepted; ``has_room()`` is to be
    called when some have ended. Small events for hosts of this package may share a message as
    a list. ``host`` is the owner of its runs, which is somebody else's to set, as are its
    ``key`` id and ``since`` when it is served; ``on_idle`` is called whenever everything
    queued has been written.
    """

    def __init__(
        self,
        socket: ServerConnection,
        channel: Channel,
        greeting: Greeting,
        counters: Counter[str],
        *,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
    ) -> None:
        self.host: Any = None
        self.key = ""
        self.since = 0.0
        self.greeting = greeting
        self.on_idle: Callable[[], None] | None = None
        self._socket = socket
        self._channel = channel
        self._counters = counters
        self._queue = SendQueue(min(SMALL, greeting.limit) if greeting.ours else 0)
        self._max_in_flight = max_in_flight
        self._parked = Parked()
        self._beat_alarm: Alarm | None = None
        self._is_over = False  # nothing more can be read
        self._progressing: set[Run] = set()  # those of which a report of progress is queued
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
        beats = self._beat_alarm = Alarm(
            asyncio.get_running_loop(), self._parked.beats.next_at, self._beat_parked
        )
        try:
            while True:
                item = self._parked.take() if self._parked else await self._read()
                if isinstance(item, InvalidMessage):
                    gone(self)
                    self._forget_queue()
                    await self._refuse(item)
                    return
                self._pass_on(item, obey)
                del item
                if self._parked:  # there may be many to be obeyed at once
                    await asyncio.sleep(0)
                while self._must_wait() and not writer.done():
                    await self._wait_for_room(obey)
        except ConnectionClosed:
            return
        finally:
            beats.stop()
            gone(self)
            self._forget_queue()
            writer.cancel()
            await asyncio.wait([writer] if self._closing is None else [writer, self._closing])

    async def _read(self) -> Command | InvalidMessage | None:
        """Return the next command, None if none counts any more."""
        try:
            return self._understand(await self._channel.receive())
        except InvalidMessage as exc:
            return exc

    def _understand(self, message: bytes | bytearray) -> Command | InvalidMessage | None:
        try:
            return None if self._closing else read(message)
        except InvalidMessage as exc:
            return exc

    def _pass_on(self, command: Command | None, obey: Callable[[HostConnection, Command], None]) -> None:
        if command is None or self._closing:
            self._counters["stale_command"] += 1
        else:
            obey(self, command)

    def _is_stuffed(self) -> bool:
        return self._queue.bytes > _MAX_WAITING

    def _must_wait(self, *, spare: int = 0) -> bool:
        """Tell whether no run is to be accepted: too much waits to be written, or too many have not ended."""
        if self._is_stuffed():
            return True
        too_many = self.host is not None and len(self.host.runs) + spare >= self._max_in_flight
        return too_many and not self._is_over and self._closing is None

    def read_on(self) -> None:
        """Pass on everything from now on: no run is accepted any more, and each is to be told."""
        self._max_in_flight = sys.maxsize
        self.has_room()

    def has_room(self) -> None:
        """Go on reading, if that had to wait and need not any more."""
        if self._full_reader is not None and not self._must_wait(
            spare=min(_MOST_ROOM, self._max_in_flight // 8)
        ):
            _wake(self._full_reader)

    async def _wait_for_room(self, obey: Callable[[HostConnection, Command], None]) -> None:
        """Accept no run for now. As much as may wait is read nonetheless: a pong may be behind it."""
        room = self._full_reader = asyncio.get_running_loop().create_future()
        most = _MAX_WAITING
        while not room.done() and not self._is_over:
            if self._parked.bytes > most:
                most = self._parked.bytes + _TRICKLE_BYTES
                await self._rest(room)
            else:
                await self._read_ahead(room, obey)
        if self._is_stuffed():  # the end of the writer will tell
            await room
        self._full_reader = None

    async def _read_ahead(
        self, room: asyncio.Future[None], obey: Callable[[HostConnection, Command], None]
    ) -> None:
        """Read one command, unless there is room before; obey it if it has not to wait."""
        reading = asyncio.ensure_future(self._channel.receive())
        try:
            await asyncio.wait((reading, room), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reading.cancel()  # which loses nothing
        try:
            message = await reading
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return
        except InvalidMessage as exc:  # who sent that is not known: it does not wait for its turn
            await self._refuse(exc)
            return
        except ConnectionClosed:
            self._is_over = True
            if not self.greeting.host_id:  # nothing outlives it
                self._parked.clear()
            return
        size, item = len(message), self._understand(message)
        del message
        if item is None:
            self._counters["stale_command"] += 1
            return
        urgent = [] if self._is_stuffed() else self._parked.overtakes(item)
        for command in urgent:
            self._pass_on(command, obey)
        if urgent:
            self.has_room()
        elif (
            isinstance(item, RunTask) and self._parked.bytes > _MAX_PARKED and item.run_id not in self._parked
        ):
            if self.host is not None and self.host.has(item.run_id):
                self._pass_on(item, obey)  # which begins nothing
                return
            self._counters["queue_full"] += 1
            self.send(queue_full_event(item.run_id, item.task_id, self._max_in_flight, "--max-in-flight"))
        elif not self._parked.put(item, size, asyncio.get_running_loop().time(), self.host):
            self._counters["duplicate_run"] += 1
        elif self._beat_alarm is not None:
            self._beat_alarm.arm()

    async def _rest(self, room: asyncio.Future[None]) -> None:
        """Read nothing for a moment; for longer if the host does not read either."""
        transport = self._socket.transport
        was_reading = transport.is_reading()  # websockets stops that as well, until it is read from
        transport.pause_reading()
        if self._is_stuffed():
            await room
        else:
            await asyncio.wait((room,), timeout=_REST)
            self._must_flush = True  # by a ping, so that a host that hears nothing else hears that
            _wake(self._idle_writer)
        if was_reading:
            transport.resume_reading()

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
    def received_bytes(self) -> int:
        """Return how many bytes of messages came from the host."""
        return self._channel.received_bytes

    @property
    def sent_bytes(self) -> int:
        """Return how many bytes of messages went to it."""
        return self._channel.sent_bytes

    @property
    def is_idle(self) -> bool:
        """Tell whether everything that was to be sent is written, and all that was read obeyed."""
        is_waiting = self._idle_writer is not None and not self._idle_writer.done()
        return is_waiting and not self._queue and not self._parked

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

    def _beat_parked(self, now: float) -> None:
        for run in self._parked.beats.due(now):
            self.beat(run)

    def _beat_of(self, run: Run) -> bytes:
        if run.owner is not self.host:
            return b""
        run.beat_queued = False
        return b"" if run.state is RunState.ENDED else life_event(run.run_id, run.task_id, started=False)

    def progress(self, run: Run) -> None:
        """Send the newest progress of *run* to a host that knows of it, unless one waits already."""
        if run.progress is None or run in self._progressing or "progress" not in self.greeting.features:
            return
        self._progressing.add(run)
        self.send_later(len(run.progress), functools.partial(self._progress_of, run))

    def _progress_of(self, run: Run) -> bytes:
        self._progressing.discard(run)
        if run.owner is not self.host or run.progress is None or len(run.progress) > self.greeting.limit:
            return b""
        return run.progress

    def log(self, event: bytes) -> None:
        """Send a log event, unless too many wait already."""
        if len(event) > self.greeting.limit or not self._queue.put_log(event):
            self._counters["dropped_log"] += 1
            return
        _wake(self._idle_writer)

    def _forget_queue(self) -> None:
        self._queue.clear()
        self._progressing.clear()
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
                        await self._channel.send(message)
                    del message
                    self.has_room()
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
