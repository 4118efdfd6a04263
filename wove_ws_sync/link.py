"""One kept connection to one worker service: two threads and two locks.

Owns: the reader and the watchdog thread, the write lock, the state lock, the link's
states. Never: pickles, and runs no user code but done-callbacks and logging handlers.

Decide under the state lock, act after it. Lock order: the write lock may take the state
lock inside it, never the reverse; the state lock is a leaf (no I/O, no callback).
"""

from __future__ import annotations

import contextlib
import copy
import enum
import itertools
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Any

from . import frames, security
from .connection import Connection
from .errors import ExecutorClosed, HandshakeRejected
from .options import LinkOptions
from .runs import CancelAtWorker, Deliver, Effect, Run, RunTable
from .timing import Clock, Deadline
from .transport import Parcel, Transport, TransportClosed, dial

__all__ = ["Dial", "Link", "LinkState", "too_large"]

Dial = Callable[..., Transport]

_log = logging.getLogger("wove_ws_sync.host")
_task_log = logging.getLogger("wove_ws_sync.task")
_numbers = itertools.count(1)

# How often and how many times the watchdog looks again before it judges while the reader
# still has bytes to read: a process that was suspended reads first and judges then.
_LOOK_AGAIN = 0.005
_LOOKS = 20


class LinkState(enum.Enum):
    """Where a link is; BACKOFF and DRAINING belong to reconnecting under runs in flight."""

    IDLE = "idle"
    DIALING = "dialing"
    READY = "ready"
    LOST = "lost"
    BACKOFF = "backoff"
    DRAINING = "draining"
    FATAL = "fatal"
    CLOSING = "closing"
    CLOSED = "closed"


class Link:
    """A connection that sessions share. Every public method may be called from any thread.

    Threads start with the first dial and end with the connection; the next use dials
    again. ``repr()`` shows state, runs in flight and generation.
    """

    def __init__(self, options: LinkOptions, *, dial: Dial = dial, clock: Clock | None = None) -> None:
        self.options = options
        self.pid = os.getpid()
        # Sessions whose executors were collected, for the watchdog: a finalizer may take no lock.
        self._dropped: SimpleQueue[Hashable] = SimpleQueue()
        # State changes to log once the state lock is released.
        self._news: deque[tuple[LinkState, LinkState]] = deque()
        self._dial = dial
        self._clock = clock or Clock()
        # Guards the run table, the state, the sessions and the connection. A leaf.
        self._state_lock = threading.Lock()
        # Says that one of those changed in a way that somebody may wait for.
        self._changed = threading.Condition(self._state_lock)
        self._table = RunTable(cancel_ack_timeout=options.cancel_ack_timeout)
        self._sessions: set[Hashable] = set()
        self._counts: Counter[str] = Counter()
        self._state = LinkState.IDLE
        self._connection: Connection | None = None
        self._last_connection: Connection | None = None
        self._generation = 0
        self._idle_since = self._clock.monotonic()

    def __repr__(self) -> str:
        return (
            f"<Link {self.options.host}:{self.options.port} {self._state.name} "
            f"runs={len(self._table)} sessions={len(self._sessions)} generation={self._generation}>"
        )

    @property
    def state(self) -> LinkState:
        """Return the state at this moment."""
        return self._state

    def stats(self) -> dict[str, int]:
        """Return counters since the link was made: dials, losses, events, dropped_<reason>, and runs now."""
        with self._state_lock:
            dropped = {f"dropped_{reason}": count for reason, count in self._table.dropped.items()}
            return {**self._counts, **dropped, "runs": len(self._table), "sessions": len(self._sessions)}

    # -- sessions ----------------------------------------------------------------

    def attach(self, session: Hashable) -> bool:
        """Count *session* in; False if the link is closing and another one must be made."""
        with self._state_lock:
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                return False
            self._sessions.add(session)
            return True

    def detach(self, session: Hashable) -> None:
        """Count *session* out and end what it left, each run by its orphan policy."""
        with self._state_lock:
            effects = self._table.abandon(session)
            self._forget(session, self._clock.monotonic())
            moment = self._next_decision()
        self._apply(effects)
        self._mind(moment)

    def abandon(self, session: Hashable) -> None:
        """End the runs of *session*, each by its orphan policy."""
        with self._state_lock:
            effects = self._table.abandon(session)
        self._apply(effects)

    def drop(self, session: Hashable) -> None:
        """Count *session* out from a finalizer: takes no lock, the watchdog does the rest."""
        self._dropped.put(session)
        connection = self._connection
        if connection is not None:
            connection.waker.wake()

    def _forget(self, session: Hashable, idle_since: float) -> None:
        """Hold ``_state_lock``."""
        self._sessions.discard(session)
        if not self._sessions:
            self._idle_since = idle_since

    # -- runs --------------------------------------------------------------------

    def submit(self, run: Run, *, wait: bool = True) -> None:
        """Take *run* in and send it, now or as soon as there is a connection and a slot.

        With *wait* the call returns when the message has left this process, at the run's
        deadline at the latest; without, and in the link's own threads, it never blocks.

        Raises ValueError for a run_id in flight, ExecutorClosed after :meth:`close`.
        """
        now = self._clock.monotonic()
        with self._state_lock:
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                raise ExecutorClosed("The link to the worker service is closed; make a new executor.")
            self._table.register(run, now)
            effects = self._post_ready(now)
            moment = self._next_decision()
            connection = self._connection
        self._mind(moment)
        if connection is None:
            self._start()
        elif wait and isinstance(run.receipt, Parcel) and not self.in_own_thread():
            connection.push(run.receipt, run.deadline)
        self._apply(effects)

    def find(self, run_id: str) -> Run | None:
        """Return the run if it is on its way."""
        with self._state_lock:
            return self._table.get(run_id)

    def cancel(self, run: Run) -> None:
        """Cancel *run* by its cancel mode; nothing happens if it has ended."""
        with self._state_lock:
            effects = self._table.cancel(run, self._clock.monotonic())
            self._post_into(effects)
            moment = self._next_decision()
        self._apply(effects)
        self._mind(moment)

    def connect(self, deadline: Deadline) -> None:
        """Dial if need be and wait until the link is READY.

        Raises what the dial raised, or TimeoutError at *deadline*.
        """
        connection = self._start()
        with self._changed:
            while self._connection is connection and self._state is LinkState.DIALING:
                remaining = deadline.remaining(self._clock.monotonic())
                if remaining == 0.0:
                    raise TimeoutError("timed out during opening handshake")
                self._changed.wait(remaining)
        if connection.error is not None:
            raise _same_error(connection.error)

    def start_closing(self) -> None:
        """End every run by its policy and say goodbye; never blocks. Idempotent."""
        with self._state_lock:
            connection = self._connection
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                return
            self._set_state(LinkState.CLOSING if connection else LinkState.CLOSED)
            effects: list[Effect] = []
            for session in {run.session for run in self._table.of_all()}:
                effects += self._table.abandon(session)
        self._apply(effects)
        if connection is not None:
            connection.say_goodbye()

    def close(self, timeout: float) -> None:
        """Close and wait up to *timeout* seconds for the peer, then cut. Idempotent."""
        self.start_closing()
        connection = self._last_connection
        if connection is not None and not self.in_own_thread():
            connection.over.wait(timeout)
            connection.cut("closed by this side")
            connection.over.wait(1.0)

    def abandon_after_fork(self) -> None:
        """Close the inherited descriptors in a forked child and nothing else; takes no lock."""
        connection, self._connection, self._last_connection = self._connection, None, None
        self._state = LinkState.CLOSED
        if connection is not None:
            connection.abandon_after_fork()

    # -- starting ----------------------------------------------------------------

    def _start(self) -> Connection:
        """Return the present connection, a new one that dials if there is none."""
        with self._state_lock:
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                raise ExecutorClosed("The link to the worker service is closed; make a new executor.")
            if self._connection is not None:
                return self._connection
            self._generation += 1
            self._counts["dials"] += 1
            connection = self._connection = self._last_connection = Connection(self._generation, self._clock)
            self._set_state(LinkState.DIALING)
        self._clock.subscribe(connection.waker.wake)
        number = next(_numbers)
        watchdog = threading.Thread(
            target=self._watch, args=(connection,), name=f"wove-ws-watchdog-{number}", daemon=True
        )
        reader = threading.Thread(target=self._read, args=(connection,), name=f"wove-ws-reader-{number}", daemon=True)
        connection.reader, connection.watchdog = reader, watchdog
        try:
            watchdog.start()
            reader.start()
        except RuntimeError as exc:  # the system gives no more threads
            connection.reader = None
            self._end(connection, exc)
            if not watchdog.is_alive():
                connection.dispose()
            raise
        return connection

    def _set_state(self, state: LinkState) -> None:
        """Hold ``_state_lock``."""
        self._news.append((self._state, state))
        self._state = state
        self._changed.notify_all()

    def _extra(self, action: str, run_id: str | None = None) -> dict[str, Any]:
        return {"action": action, "run_id": run_id, "generation": self._generation}

    # -- the reader thread -------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        try:
            headers = security.handshake_headers(self.options)
            transport = self._dial(self.options, headers, clock=self._clock)
        except BaseException as exc:
            self._end(connection, exc)
            return
        with self._state_lock:
            connection.connected(transport)
            wanted = self._connection is connection and self._state is LinkState.DIALING
            effects: list[Effect] = []
            if wanted:
                self._table.heartbeat_factor = 1.0 if transport.features is not None else 2.0
                self._set_state(LinkState.READY)
                effects = self._post_ready(self._clock.monotonic())
        if not wanted:
            self._end(connection, TransportClosed("closed by this side"))
            return
        _log.info("connected to %s:%s", self.options.host, self.options.port, extra=self._extra("connect"))
        self._apply(effects)
        connection.flush()
        connection.waker.wake()
        try:
            while True:
                self._take(connection, transport.recv())
        except TransportClosed as exc:
            self._end(connection, exc)
        except BaseException as exc:
            _log.exception("reader failed", extra=self._extra("lose"))
            self._end(connection, exc)

    def _take(self, connection: Connection, message: bytes | bytearray) -> None:
        try:
            decoded = frames.decode(message)
        except frames.InvalidMessage as exc:
            assert connection.transport is not None
            connection.transport.close(exc.close_code, str(exc))
            connection.flush()
            raise TransportClosed(str(exc), close_code=exc.close_code, reason=str(exc)) from None
        now = self._clock.monotonic()
        effects: list[Effect] = []
        with self._state_lock:
            self._counts["events"] += len(decoded.events)
            for reason in decoded.ignored:
                self._table.dropped[reason] += 1
            for event in decoded.events:
                effects += self._table.receive(event, now)
            self._post_into(effects)
            idle_until = self._idle_until()
        self._apply(effects)
        self._mind(idle_until)

    def _end(self, connection: Connection, exc: BaseException) -> None:
        """End the connection once: every run ends, the watchdog cleans up, the next use dials."""
        code = getattr(exc, "close_code", None)
        reason = connection.close_reason or getattr(exc, "reason", "") or str(exc)
        with self._state_lock:
            if self._connection is not connection:
                return
            self._connection = None
            closing = self._state is LinkState.CLOSING
            if connection.transport is None:
                connection.error = exc
                effects: list[Effect] = []
                for run in self._table.of_all():
                    effects += self._table.fail(run, _same_error(exc))
                fatal = isinstance(exc, HandshakeRejected)
                self._set_state(LinkState.CLOSED if closing else LinkState.FATAL if fatal else LinkState.IDLE)
            else:
                self._counts["losses"] += not closing
                self._set_state(LinkState.LOST)
                effects = self._table.lost(code, reason)
                self._set_state(LinkState.CLOSED if closing else LinkState.IDLE)
        if connection.transport is not None:
            connection.flush()  # the answer to the peer's close frame
            connection.transport.abort()
            if not closing:
                _log.info("connection lost: %s", reason, extra=self._extra("lose"))
        self._apply(effects)
        connection.waker.wake()

    # -- the watchdog thread -----------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        looks = 0
        while self._connection is connection:
            self._bury_dropped_sessions()
            now = self._clock.monotonic()
            moment = self._next_moment(connection)
            if moment is None or moment > now:
                connection.wait(self._clock.wait_time(moment))
            elif looks < _LOOKS and connection.behind():
                looks += 1
                connection.waker.wait(_LOOK_AGAIN)
            else:
                self._judge(connection, now, behind=looks >= _LOOKS)
                looks = 0
        if connection.reader is not None:
            connection.reader.join()
        connection.dispose()

    def _next_moment(self, connection: Connection) -> float | None:
        with self._state_lock:
            check = Deadline(connection.next_check(self.options))
            connection.watching_until = check.earliest(Deadline(self._next_decision())).at
            return connection.watching_until

    def _next_decision(self) -> float | None:
        """Return when a run or the link itself is due. Hold ``_state_lock``."""
        return Deadline(self._table.next_alarm()).earliest(Deadline(self._idle_until())).at

    def _judge(self, connection: Connection, now: float, *, behind: bool) -> None:
        """Decide what is due. *behind*: unread bytes are left, and count as life for every run."""
        floor = now if behind else connection.transport.partial_at if connection.transport else 0.0
        with self._state_lock:
            effects = self._table.tick(now, floor)
            self._post_into(effects)
        self._apply(effects)
        connection.check(self.options, now, behind=behind)
        self._close_if_idle(connection, now)

    def _idle_until(self) -> float | None:
        """Return when the link closes for want of users. Hold ``_state_lock``."""
        if self._sessions or len(self._table) or self._state is not LinkState.READY:
            return None
        return None if self.options.idle_timeout is None else self._idle_since + self.options.idle_timeout

    def _close_if_idle(self, connection: Connection, now: float) -> None:
        with self._state_lock:
            if not Deadline(self._idle_until()).expired(now):
                return
            self._set_state(LinkState.CLOSING)
        connection.say_goodbye()
        assert connection.reader is not None
        connection.reader.join(self.options.close_timeout)
        connection.cut("idle")

    def _bury_dropped_sessions(self) -> None:
        """Close at once behind executors that were collected: their runs go on, their links do not linger."""
        with contextlib.suppress(Empty):
            while True:
                session = self._dropped.get_nowait()
                with self._state_lock:
                    self._forget(session, float("-inf"))

    # -- going out ---------------------------------------------------------------

    def _post_ready(self, now: float) -> list[Effect]:
        """Hand what may go to the transport's queue (no I/O). Hold ``_state_lock``."""
        connection = self._connection
        if connection is None or connection.transport is None or self._state is not LinkState.READY:
            return []
        effects: list[Effect] = []
        limit = connection.transport.peer_max_message_bytes
        for run in self._table.take_ready():
            if limit is not None and len(run.message) > limit:
                error = too_large(run.run_id, len(run.message), limit)
                effects += self._table.fail(run, error)
            else:
                self._table.sent(run, connection.transport.post(run.message), now)
        return effects

    def _post_into(self, effects: list[Effect]) -> None:
        """Hand what a freed slot lets go to the transport. Hold ``_state_lock``."""
        if effects:
            effects += self._post_ready(self._clock.monotonic())

    def _apply(self, effects: list[Effect]) -> None:
        """Act on what was decided; hold no lock."""
        with contextlib.suppress(IndexError):
            while self._news:
                old, new = self._news.popleft()
                _log.debug("link %s: %s -> %s", self.options.host, old.name, new.name, extra=self._extra("state"))
        for effect in effects:
            if isinstance(effect, Deliver):
                self._deliver(effect.run, effect.event)
            else:
                self._cancel_at_worker(effect)
        connection = self._connection
        if connection is not None:
            connection.flush()  # cancels, and runs that got a slot

    def _deliver(self, run: Run, event: dict[str, Any]) -> None:
        kind = event["type"]
        if _log.isEnabledFor(logging.DEBUG):
            extra = {**self._extra("event", run.run_id), "event_type": kind, "task_id": run.task_id}
            _log.debug("%s %s", kind, run.run_id, extra=extra)
        if kind == "log":
            _forward(run, event)
        try:
            run.sink(event)
        except Exception:
            _log.exception("a receiver of events failed", extra=self._extra("event", run.run_id))

    def _cancel_at_worker(self, effect: CancelAtWorker) -> None:
        run, connection = effect.run, self._connection
        if run.receipt is None or connection is None or connection.transport is None:
            return
        if isinstance(run.receipt, Parcel) and connection.transport.withdraw(run.receipt):
            return
        command = {
            "type": "cancel_task",
            "run_id": run.run_id,
            "task_id": run.task_id,
            "delivery_cancel_mode": run.delivery.delivery_cancel_mode,
            "delivery_orphan_policy": run.delivery.delivery_orphan_policy,
        }
        connection.transport.post(frames.encode(command))

    def _mind(self, moment: float | None) -> None:
        """Wake the watchdog if it means to sleep beyond *moment*."""
        connection = self._connection
        if connection is not None and moment is not None:
            until = connection.watching_until
            if until is None or moment < until:
                connection.waker.wake()

    def in_own_thread(self) -> bool:
        """Tell whether the caller is one of the link's threads, which must not wait for the link."""
        connection = self._last_connection
        return connection is not None and threading.current_thread() in (connection.reader, connection.watchdog)


def too_large(run_id: str, size: int, limit: int) -> ValueError:
    """Return the error for a command that no message may carry."""
    return ValueError(
        f"Run {run_id!r} is a message of {size} bytes, more than the {limit} bytes that may be sent at once. "
        "Pass a reference to the data instead, or raise max_message_bytes on both sides."
    )


def _same_error(exc: BaseException) -> BaseException:
    """Return a copy to raise in another thread, so that tracebacks do not mix."""
    try:
        return copy.copy(exc)
    except Exception:
        return exc


def _forward(run: Run, event: dict[str, Any]) -> None:
    """Give a task's log record to this side's logging."""
    level = logging.getLevelNamesMapping().get(str(event.get("level", "INFO")).upper(), logging.INFO)
    if _task_log.isEnabledFor(level):
        _task_log.log(
            level,
            "%s",
            event.get("message", ""),
            extra={"action": "log", "run_id": run.run_id, "task_id": run.task_id, "task_logger": event.get("logger")},
        )
