"""One life of a connection, from its dial to its end: the transport and who may write.

Owns: the write lock, the waker, liveness by pings, the acknowledgements that wait to be sent.
Never: knows what a run is, takes the link's state lock, starts a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import frames
from ._waker import Waker
from .options import LinkOptions
from .timing import Clock, Deadline
from .transport import Parcel, Transport, TransportClosed

__all__ = ["Connection"]

# The longest single wait of a thread that sends, in seconds.
_PATIENCE = 1.0
# Acknowledgements wait for each other so many seconds, or until there are so many.
_ACK_DELAY = 0.5
_MANY_ACKS = 256
# With more bytes than these unsent, only the ends of known runs are acknowledged.
_MOST_UNREAD = 1024 * 1024
# A list of run ids is cut into messages of about this size.
_LIST_BYTES = 64 * 1024


class Connection:
    """What a link holds while it dials and while it is connected. Thread-safe but for the
    attributes, which belong to the link's two threads.
    """

    def __init__(self, generation: int, clock: Clock, dial_at: float) -> None:
        self.generation = generation
        # The thread that starts the watchdog, and whether that one has begun.
        self.made_by = threading.get_ident()
        self.watched = False
        self.dial_at: float | None = dial_at
        self.told_to_wait = False
        self.up_since = 0.0
        self.waker = Waker()
        self.transport: Transport | None = None
        self.error: BaseException | None = None
        self.close_reason = ""
        # The worker has said that it stops: it finishes what it has.
        self.draining = False
        # How many answers to resume are still to come, and until when they are waited for.
        self.unanswered = 0
        self._answers_by = 0.0
        # Set when both threads are gone and the descriptors are given back.
        self.over = threading.Event()
        self.reader: threading.Thread | None = None
        self.watchdog: threading.Thread | None = None
        self.watching_until: float | None = 0.0
        self._clock = clock
        # Held around one transport.pump(); the reader never waits for it. An RLock because that one
        # knows its owner; a second pump() inside the first is prevented by _writer, its thread.
        self._write_lock = threading.RLock()
        self._writer = 0
        self._stuck = False
        self._pinged_at: float | None = None
        # Runs whose terminal events have arrived and that the worker has not been told of yet.
        self._arrived: dict[str, None] = {}
        # Guards those until they are queued. Reentrant: finalizers and signal handlers may come here.
        self._ack_lock = threading.RLock()
        self._ack_at: float | None = None

    def connected(self, transport: Transport) -> None:
        """Take the transport over once it is dialled."""
        transport.wake = self._answer_is_queued
        self.transport = transport

    def _answer_is_queued(self) -> None:
        """Have the watchdog send what the reader, which never sends, owes the peer."""
        self._stuck = True
        self.waker.wake()

    def offers(self, feature: str) -> bool:
        """Tell whether the worker agreed to the extension *feature*."""
        features = None if self.transport is None else self.transport.features
        return features is not None and feature in features

    def extra(self, action: str) -> dict[str, Any]:
        """Return what log records about this connection have beside their text."""
        return {"action": action, "run_id": None, "generation": self.generation}

    # -- writing -----------------------------------------------------------------

    def push(self, parcel: Parcel, deadline: Deadline, given_up: Callable[[], bool]) -> None:
        """Send until *parcel* has left or *deadline* has come; then others go on with the rest.

        *given_up* is asked once a second whether the message was taken back meanwhile.
        """
        while not parcel.sent and not given_up():
            remaining = deadline.remaining(self._clock.monotonic())
            if remaining == 0.0:
                break
            try:
                self._pump(parcel, _PATIENCE if remaining is None else min(remaining, _PATIENCE))
            except TransportClosed:
                return  # the reader sees it too and tells every run
        self.flush()

    def flush(self) -> None:
        """Send what goes without blocking; the rest is for whoever holds the lock, or the watchdog."""
        transport = self.transport
        while transport is not None and transport.wants_write:
            try:
                done = self._pump(None, 0.0)
            except TransportClosed:
                return
            if done is False:
                self._stuck = True
                if threading.current_thread() is not self.watchdog:  # which looks at _stuck before it sleeps
                    self.waker.wake()
            if not done:
                return

    def _pump(self, parcel: Parcel | None, timeout: float) -> bool | None:
        """Call ``transport.pump()`` under the write lock; return None if that was not to be had in time."""
        me = threading.get_ident()
        if self.transport is None or self._writer == me:  # in a signal handler or finalizer inside pump()
            return None
        try:
            if not self._write_lock.acquire(timeout=timeout):
                return None
            self._writer = me
            return self.transport.pump(parcel, timeout)
        finally:
            # Ctrl-C may strike right behind acquire(): what counts is whether this thread has the lock.
            if self._writer == me:
                self._writer = 0
            try:  # noqa: SIM105  # entering a context manager would be one more place for it to strike
                self._write_lock.release()
            except RuntimeError:
                pass

    def wait(self, timeout: float | None) -> None:
        """Wait in the watchdog for a moment or a nudge; go on writing when the peer reads again."""
        writable = self.transport.fileno() if self.transport is not None and self._stuck else -1
        self.waker.wait(timeout, writable)
        if self._stuck:
            self._stuck = False
            self.flush()

    def behind(self) -> bool:
        """Tell whether bytes have arrived that the reader has not dealt with."""
        return self.transport is not None and not self.transport.idle()

    # -- extensions --------------------------------------------------------------

    def resume(self, run_ids: Sequence[str], patience: float) -> None:
        """Ask what became of runs that an earlier connection carried, and give the worker time to answer."""
        assert self.transport is not None
        lists = list(_lists(run_ids))
        self.unanswered = len(lists)
        self._answers_by = self._clock.monotonic() + patience
        for position, some in enumerate(lists):
            frame = {"type": "resume", "run_ids": some, "more": position + 1 < len(lists)}
            self.transport.post(frames.encode(frame))

    def awaits_answers(self) -> bool:
        """Tell whether the worker may still say what it has of the runs it was asked for."""
        return self.unanswered > 0 and self._clock.monotonic() < self._answers_by

    def arrived(self, run_id: str, *, known: bool) -> None:
        """Note that the terminal event of a run has arrived; no I/O. Reader thread only.

        For runs that nobody knows a worker that does not read gets no more acknowledgements, or it
        could have this process hold any number of them.
        """
        assert self.transport is not None
        if self.offers("ack") and (known or self.transport.queued_bytes < _MOST_UNREAD):
            with self._ack_lock:
                self._arrived[run_id] = None

    def acknowledge(self) -> None:
        """Tell the worker, soon, what has arrived. Reader thread only."""
        if self._arrived and (self.draining or len(self._arrived) >= _MANY_ACKS):
            self.post_acks()
            self.flush()
        elif self._arrived and self._ack_at is None:
            self._ack_at = self._clock.monotonic() + _ACK_DELAY

    def post_acks(self) -> None:
        """Queue what is to be acknowledged."""
        self._ack_at = None
        with self._ack_lock:
            for some in _lists(list(self._arrived)) if self._arrived else ():
                assert self.transport is not None
                self.transport.post(frames.encode({"type": "event_ack", "run_ids": some}))
            self._arrived.clear()

    def make_way(self, run_id: str) -> None:
        """Have the worker forget an earlier run of that id first: its end would come again. No I/O."""
        with self._ack_lock:
            if run_id in self._arrived:
                self.post_acks()

    # -- liveness ----------------------------------------------------------------

    def next_check(self, options: LinkOptions) -> float | None:
        """Return when :meth:`check` has something to decide."""
        if self.transport is None:
            return None
        if self._ping_is_out(self.transport):
            assert self._pinged_at is not None
            moment = self._pinged_at + options.pong_timeout
        else:
            moment = self.transport.last_byte_at + options.ping_interval
        return Deadline(moment).earliest(Deadline(self._ack_at)).at

    def check(self, options: LinkOptions, now: float, *, behind: bool) -> None:
        """Ping a quiet peer, and cut when no byte came within ``pong_timeout`` of a ping.

        *behind* says that the reader has bytes left to read: the peer is alive.
        """
        transport = self.transport
        if transport is None:
            return
        if Deadline(self._ack_at).expired(now):
            self.post_acks()
            self.flush()
        moment = self.next_check(options)
        if moment is None or now < moment:
            return
        if behind or not self._ping_is_out(transport):
            self._pinged_at = now
            transport.ping()
            self.flush()
        else:
            self.cut(f"no bytes for {options.pong_timeout} s after a ping")

    def _ping_is_out(self, transport: Transport) -> bool:
        return self._pinged_at is not None and transport.last_byte_at <= self._pinged_at

    # -- ending ------------------------------------------------------------------

    def say_goodbye(self) -> None:
        """Queue ``shutdown`` and a close frame; never blocks."""
        self.close_reason = "closed by this side"
        if self.transport is not None:
            self.post_acks()
            self.transport.post(frames.encode({"type": "shutdown"}))
            self.transport.close(1000, "")
            self.flush()
        self.waker.wake()

    def cut(self, reason: str) -> None:
        """Wake the reader and every writer with the end of the connection; never blocks."""
        self.close_reason = self.close_reason or reason
        if self.transport is not None:
            self.transport.abort()

    def dispose(self) -> None:
        """Give the descriptors back; only after the reader has ended."""
        with self._write_lock:
            if self.transport is not None:
                self.transport.dispose()
        self.waker.close()
        self.over.set()

    def abandon_after_fork(self) -> None:
        """Close the inherited descriptors in a forked child; takes no lock, says nothing."""
        self.waker.close_after_fork()
        if self.transport is not None:
            self.transport.detach_after_fork()


def _lists(run_ids: Sequence[str]) -> Iterator[list[str]]:
    """Yield *run_ids* in lists that fit into a message; one empty list for none."""
    some: list[str] = []
    size = 0
    for run_id in run_ids:
        size += len(run_id) + 3
        if some and size > _LIST_BYTES:
            yield some
            some, size = [], len(run_id) + 3
        some.append(run_id)
    yield some
