"""A transport without a socket and a clock without time, for tests of threads.

Owns: :class:`MemoryTransport` and :class:`ManualClock`, exported by ``wove_ws_sync.testing``.
Never: waits for anything but what a test does.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from .options import LinkOptions
from .timing import Clock
from .transport import Parcel, TransportClosed

__all__ = ["ManualClock", "MemoryTransport"]


class ManualClock(Clock):
    """A clock that stands still until :meth:`advance`. Thread-safe."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._wakes: list[Callable[[], None]] = []

    def monotonic(self) -> float:
        """Return the chosen moment, in seconds."""
        return self._now

    def wait_time(self, moment: float | None) -> float | None:
        """Return 0.0 for a moment that has come, None (wait for a nudge) for one that has not."""
        return 0.0 if moment is not None and moment <= self._now else None

    def subscribe(self, wake: Callable[[], None]) -> None:
        """Have *wake* called at every :meth:`advance`."""
        self._wakes.append(wake)

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, and wake whoever waits for a moment."""
        self._now += seconds
        for wake in self._wakes:
            wake()


class MemoryTransport:
    """The worker's side of a connection, played by a test. Thread-safe.

    Pass :meth:`dial` to a ``Link``; ``feed()`` what the worker says, ``sent()`` what the
    host said. With ``reading = False`` the peer stops reading: nothing leaves any more.
    """

    peer_max_message_bytes: int | None = None
    cancels: frozenset[str] | None = None

    def __init__(
        self, clock: Clock, *, features: frozenset[str] | None = frozenset(), worker: str = ""
    ) -> None:
        self.wake: Callable[[], None] = lambda: None
        self.features = features
        self.worker = worker
        self.dial_error: BaseException | None = None
        self.reading = True
        self.pings = 0
        self.closes: list[tuple[int, str]] = []
        self.disposed = False
        self.last_byte_at = clock.monotonic()
        self.partial_at = 0.0
        self._clock = clock
        self._changed = threading.Condition()
        self._inbound: deque[bytes] = deque()
        self._queue: deque[Parcel] = deque()
        self._sent: list[dict[str, Any]] = []
        self._waiting = False
        self._end: TransportClosed | None = None
        self._goodbye: TransportClosed | None = None

    def dial(self, options: LinkOptions, headers: Mapping[str, str], *, clock: Clock) -> MemoryTransport:
        """Stand in for ``transport.dial``; raises ``dial_error`` if a test set one."""
        if self.dial_error is not None:
            raise self.dial_error
        return self

    # -- what a test does --------------------------------------------------------

    def feed(self, *events: Any) -> None:
        """Let each of *events* (a JSON value, or bytes as they are) arrive as one message."""
        with self._changed:
            for item in events:
                self._inbound.append(item if isinstance(item, bytes) else json.dumps(item).encode())
            self.last_byte_at = self._clock.monotonic()
            self._changed.notify_all()

    def hang_up(self, close_code: int | None = None, reason: str = "") -> None:
        """Let the peer close the connection, after what was fed before."""
        with self._changed:
            self._end = TransportClosed("the peer closed", close_code=close_code, reason=reason)
            self._changed.notify_all()

    def sent(self, count: int, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Return the frames sent so far, once there are *count*; raise TimeoutError otherwise."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._sent) >= count, timeout):
                raise TimeoutError(f"{len(self._sent)} frames of {count} were sent within {timeout} s")
            return list(self._sent)

    def settle(self, timeout: float = 10.0) -> None:
        """Wait until the reader has dealt with everything that was fed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting and not self._inbound, timeout):
                raise TimeoutError(f"the reader was not done within {timeout} s")

    # -- what the link does ------------------------------------------------------

    def recv(self) -> bytes:
        """Return the next message fed; raise TransportClosed at the end."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._inbound or self._end)
            self._waiting = False
            if self._inbound:
                return self._inbound.popleft()
            assert self._end is not None
            raise self._end

    def idle(self) -> bool:
        """Tell whether the reader waits and nothing is unread."""
        with self._changed:
            return self._waiting and not self._inbound

    @property
    def wants_write(self) -> bool:
        """Tell whether something is queued that could leave."""
        return self._end is None and bool(self._queue or self._goodbye)

    @property
    def queued_bytes(self) -> int:
        """Return the size of what has not left."""
        return sum(len(parcel.data) for parcel in self._queue)

    def post(self, message: bytes | Parcel) -> Parcel:
        """Queue one message."""
        parcel = message if isinstance(message, Parcel) else Parcel(message)
        parcel.outbox = self
        self._queue.append(parcel)
        parcel.queued = True
        return parcel

    def withdraw(self, parcel: Parcel) -> bool:
        """Take a message back that has not left."""
        with self._changed:
            if not parcel.queued:
                return False
            parcel.queued = False
            self._queue.remove(parcel)
            parcel.data = b""
            return True

    def pump(self, until: Parcel | None = None, timeout: float | None = 0.0) -> bool:
        """Send what is queued, if the peer reads; otherwise wait as the real one would."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.reading or self._end, timeout):
                return False
            if self._end is not None:
                raise self._end
            while self._queue:
                parcel = self._queue.popleft()
                parcel.queued, parcel.started = False, True
                parcel.sent_at = self._clock.monotonic()
                self._sent.append(json.loads(parcel.data))
            self._end = self._goodbye
            self._changed.notify_all()
            return True

    def resume_reading(self) -> None:
        """Let the peer read again."""
        with self._changed:
            self.reading = True
            self._changed.notify_all()

    def ping(self) -> None:
        """Count a ping."""
        with self._changed:
            self.pings += 1
            self._changed.notify_all()

    def close(self, code: int, reason: str) -> None:
        """Queue a close frame; the peer answers as soon as it has left, as a healthy one does."""
        with self._changed:
            self.closes.append((code, reason))
            self._goodbye = TransportClosed("closed by this side", close_code=code, reason=reason)

    def abort(self) -> None:
        """End the connection at once."""
        with self._changed:
            if self._end is None:
                self._end = TransportClosed("aborted")
            self._changed.notify_all()

    def dispose(self) -> None:
        """Note that the descriptors were given back."""
        self.disposed = True

    def detach_after_fork(self) -> None:
        """Note the same of a forked child."""
        self.disposed = True

    def fileno(self) -> int:
        """Return -1: there is nothing to poll."""
        return -1
