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
import random
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Any

from . import frames, security
from .connection import Connection
from .errors import ExecutorClosed, HandshakeRejected
from .options import LinkOptions
from .runs import CancelAtWorker, Deliver, Effect, Run, RunTable, connection_lost
from .timing import Backoff, Clock, Deadline
from .transport import Parcel, Transport, TransportClosed, dial

__all__ = ["Dial", "Link", "LinkState", "too_large"]

Dial = Callable[..., Transport]

_log = logging.getLogger("wove_ws_sync.host")
_task_log = logging.getLogger("wove_ws_sync.task")
_numbers = itertools.count(1)
# In a reader or watchdog thread: whose it is.
_running = threading.local()

# How often and how many times the watchdog looks again before it judges while the reader
# still has bytes to read: a process that was suspended reads first and judges then.
_LOOK_AGAIN = 0.005
_LOOKS = 20
# A connection that lasted so many seconds was a good one, whatever came over it.
_STABLE = 10.0


class LinkState(enum.Enum):
    """Where a link is. BACKOFF: runs wait for the next dial. FATAL: the worker refused this host."""

    IDLE = "idle"
    DIALING = "dialing"
    READY = "ready"
    LOST = "lost"
    BACKOFF = "backoff"
    FATAL = "fatal"
    CLOSING = "closing"
    CLOSED = "closed"


class Link:
    """A connection that sessions share. Every public method may be called from any thread.

    Threads start with the first dial and end with the connection; the next use dials
    again. ``repr()`` shows state, runs in flight and generation.
    """

    def __init__(
        self,
        options: LinkOptions,
        *,
        dial: Dial = dial,
        clock: Clock | None = None,
        spread: Callable[[], float] = lambda: random.uniform(-1.0, 1.0),
    ) -> None:
        self.options = options
        self.pid = os.getpid()
        # Sessions whose executors were collected, for the watchdog: a finalizer may take no lock.
        self._dropped: SimpleQueue[Hashable] = SimpleQueue()
        self._unwanted: SimpleQueue[str] = SimpleQueue()
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
        self._spread = spread
        # Dials in a row that brought nothing, and since when there is no connection.
        self._failures = 0
        self._connecting = 0
        self._lost_at: float | None = None
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
            counts = {**self._counts, "requeues": self._table.requeues}
            return {**counts, **dropped, "runs": len(self._table), "sessions": len(self._sessions)}

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

    def cancel_soon(self, run_id: str) -> None:
        """Cancel a run from a finalizer: takes no lock, the watchdog does the rest."""
        self._unwanted.put(run_id)
        connection = self._connection
        if connection is not None:
            connection.waker.wake()

    def _forget(self, session: Hashable, idle_since: float) -> None:
        """Hold ``_state_lock``."""
        self._sessions.discard(session)
        if not self._sessions:
            self._idle_since = idle_since

    # -- runs --------------------------------------------------------------------

    def submit(self, run: Run, *, wait: bool = True, flush: bool = True) -> None:
        """Take *run* in and send it, now or as soon as there is a connection and a slot.

        With *wait* the call returns when the message has left this process, at the run's
        deadline at the latest; without, and in the link's own threads, it never blocks. With
        neither *wait* nor *flush* it leaves with the next message, or by :meth:`flush`.

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
        if effects:
            self._apply(effects)
        if connection is None:
            try:
                self._start()
            except BaseException as exc:  # no descriptor, no thread, Ctrl-C: nobody would send it
                with self._state_lock:
                    effects = [] if run.terminal else self._table.fail(run, exc)
                self._apply(effects)
                raise
        elif wait and isinstance(run.receipt, Parcel) and not self.in_own_thread():
            connection.push(run.receipt, run.deadline, lambda: run.terminal)
        elif wait or flush:
            connection.flush()

    def find(self, run_id: str) -> Run | None:
        """Return the run if it is on its way."""
        with self._state_lock:
            return self._table.get(run_id)

    def cancel(self, run: Run) -> None:
        """Cancel *run* by its cancel mode; nothing happens if it has ended."""
        effects: list[Effect] = []
        try:
            with self._state_lock:
                effects = self._table.cancel(run, self._clock.monotonic())
                self._post_into(effects)
                moment = self._next_decision()
        finally:  # also when Ctrl-C strikes: what was decided must be told
            self._apply(effects)
        self._mind(moment)

    def connect(self, deadline: Deadline) -> None:
        """Dial if need be and wait until the link is READY.

        Raises what the dial raised, or TimeoutError at *deadline*.
        """
        connection = self._start()
        with self._changed:
            self._connecting += 1
            try:
                if self._state is LinkState.BACKOFF and not connection.told_to_wait:
                    connection.dial_at = self._clock.monotonic()  # somebody asks: no use in waiting longer
                    connection.waker.wake()
                while self._connection is connection and self._state in (
                    LinkState.DIALING,
                    LinkState.BACKOFF,
                ):
                    remaining = deadline.remaining(self._clock.monotonic())
                    if remaining == 0.0:
                        raise TimeoutError("timed out during opening handshake")
                    self._changed.wait(remaining)
            finally:
                self._connecting -= 1
        if connection.error is not None:
            raise _same_error(connection.error)

    def start_closing(self, *, tell: bool = True) -> None:
        """End every run by its policy and say goodbye; never blocks. Idempotent.

        Without *tell* the worker hears of it, but nobody in this process.
        """
        with self._state_lock:
            connection = self._connection
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                return
            if connection is not None and connection.dial_at is not None:  # nobody was dialled yet
                connection.error = TransportClosed("closed by this side")
                self._connection = None
            self._set_state(LinkState.CLOSING if self._connection else LinkState.CLOSED)
            effects: list[Effect] = []
            for session in {run.session for run in self._table.of_all()}:
                effects += self._table.abandon(session)
        self._apply([effect for effect in effects if tell or isinstance(effect, CancelAtWorker)])
        if connection is not None:
            connection.say_goodbye()

    def close(self, timeout: float) -> None:
        """Close and wait up to *timeout* seconds for the peer, then cut. Idempotent."""
        self.start_closing()
        connection = self._last_connection
        if connection is not None and not self.in_own_thread():
            connection.over.wait(timeout)
            connection.cut("closed by this side")
            if connection.transport is not None:  # a dial ends by its own deadline
                connection.over.wait(1.0)

    def abandon_after_fork(self) -> None:
        """Close the inherited descriptors in a forked child and nothing else; takes no lock."""
        connection, self._connection, self._last_connection = self._connection, None, None
        self._state = LinkState.CLOSED
        if connection is not None:
            connection.abandon_after_fork()

    # -- starting ----------------------------------------------------------------

    def _start(self) -> Connection:
        """Return the present connection, a new one that dials at once if there is none."""
        with self._state_lock:
            if self._state in (LinkState.CLOSING, LinkState.CLOSED):
                raise ExecutorClosed("The link to the worker service is closed; make a new executor.")
            if self._connection is not None:
                return self._connection
            connection = self._new_connection(self._clock.monotonic())
            self._set_state(LinkState.DIALING)
        self._begin(connection)
        return connection

    def _new_connection(self, dial_at: float) -> Connection:
        """Hold ``_state_lock``."""
        self._generation += 1
        self._connection = self._last_connection = Connection(self._generation, self._clock, dial_at)
        return self._connection

    def _begin(self, connection: Connection) -> None:
        """Start the watchdog, which starts the reader when it is time to dial."""
        try:
            self._clock.subscribe(connection.waker.wake)
            name = f"wove-ws-watchdog-{next(_numbers)}"
            connection.watchdog = threading.Thread(
                target=self._watch, args=(connection,), name=name, daemon=True
            )
            connection.watchdog.start()
        except BaseException as exc:  # the system gives no more threads, or Ctrl-C
            if connection.watchdog is None or not connection.watchdog.is_alive():
                self._end(connection, exc)
                connection.dispose()
            raise

    def _dial_if_due(self, connection: Connection, now: float) -> None:
        """Start the reader, which dials. Watchdog thread only."""
        with self._state_lock:
            if not Deadline(connection.dial_at).expired(now) or self._connection is not connection:
                return
            connection.dial_at = None
            if self._state is LinkState.BACKOFF:
                if not len(self._table) and not self._connecting:  # those who waited have been cancelled
                    self._connection = None
                    self._set_state(LinkState.IDLE)
                    return
                self._set_state(LinkState.DIALING)
            if self._state is not LinkState.DIALING:
                return
            self._counts["dials"] += 1
        name = f"wove-ws-reader-{next(_numbers)}"
        connection.reader = threading.Thread(target=self._read, args=(connection,), name=name, daemon=True)
        try:
            connection.reader.start()
        except RuntimeError as exc:  # the system gives no more threads
            connection.reader = None
            self._end(connection, exc)

    def _set_state(self, state: LinkState) -> None:
        """Hold ``_state_lock``."""
        self._news.append((self._state, state))
        self._state = state
        self._changed.notify_all()

    def _extra(self, action: str, run_id: str | None = None) -> dict[str, Any]:
        return {"action": action, "run_id": run_id, "generation": self._generation}

    # -- the reader thread -------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        _running.link = self
        try:
            headers = security.handshake_headers(self.options)
            transport = self._dial(self.options, headers, clock=self._clock)
            self._connected(connection, transport)
            while True:
                self._take(connection, transport.recv())
        except Exception as exc:
            if not isinstance(exc, TransportClosed | OSError | ValueError | RuntimeError):
                _note(_log, logging.ERROR, "the reader failed", exc_info=True, extra=self._extra("lose"))
            self._end(connection, exc)
        except BaseException as exc:
            self._end(connection, exc)
            raise

    def _connected(self, connection: Connection, transport: Transport) -> None:
        """Become READY and send what waits; raise TransportClosed if nobody wants the connection any more."""
        with self._state_lock:
            connection.connected(transport)
            if self._connection is not connection or self._state is not LinkState.DIALING:
                raise TransportClosed("closed by this side")
            connection.up_since = self._clock.monotonic()
            self._table.heartbeat_factor = 1.0 if transport.features is not None else 2.0
            self._set_state(LinkState.READY)
            effects = self._post_ready(self._clock.monotonic())
        where = (self.options.host, self.options.port)
        _note(_log, logging.INFO, "connected to %s:%s", *where, extra=self._extra("connect"))
        self._apply(effects)
        connection.flush()
        connection.waker.wake()

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
            if decoded.events:  # the handshake alone does not show that a worker is behind it
                self._failures, self._lost_at = 0, None
            for event in decoded.events:
                effects += self._table.receive(event, now)
            self._post_into(effects)
            moment = self._next_decision()
        self._apply(effects)
        self._mind(moment)

    def _end(self, connection: Connection, exc: BaseException) -> None:
        """End the connection, once; dial again after a while if runs wait for that."""
        connection.close_reason = connection.close_reason or getattr(exc, "reason", "") or str(exc)
        if connection.transport is not None:
            connection.flush()  # the answer to the peer's close frame
            connection.transport.abort()  # before it is decided what had left: nothing may leave after that
        now = self._clock.monotonic()
        code = getattr(exc, "close_code", None)
        with self._state_lock:
            if self._connection is not connection:
                return
            self._connection = None
            closing = self._state is LinkState.CLOSING
            was_up = connection.transport is not None
            self._set_state(
                LinkState.LOST if was_up else LinkState.FATAL if _is_fatal(exc) else LinkState.IDLE
            )
            if was_up:
                self._counts["losses"] += not closing
                effects = self._table.lost(code, connection.close_reason, self.options.max_requeues)
                if self._lost_at is None or now >= connection.up_since + _STABLE:
                    self._lost_at, self._failures = now, 0
            else:
                effects = []
                connection.error = exc
            delay = self._backoff(exc)
            effects += self._give_up(exc, now + delay, code, connection.close_reason)
            successor = None
            if closing:
                self._set_state(LinkState.CLOSED)
            elif len(self._table):
                try:
                    successor = self._new_connection(now + delay)
                    successor.told_to_wait = getattr(exc, "retry_after", None) is not None
                    self._failures += 1
                    self._set_state(LinkState.BACKOFF)
                except OSError as no_descriptor:
                    for run in self._table.of_all():
                        effects += self._table.fail(run, _same_error(no_descriptor))
                    self._set_state(LinkState.IDLE)
            elif was_up:
                self._set_state(LinkState.IDLE)
        if was_up and not closing:
            reason = connection.close_reason
            _note(_log, logging.INFO, "connection lost: %s", reason, extra=self._extra("lose"))
        connection.waker.wake()
        if successor is not None:  # before any callback: the deadlines of those who wait go on
            with contextlib.suppress(RuntimeError):  # no thread to be had: every run was told
                self._begin(successor)
        self._apply(effects)

    def _give_up(self, exc: BaseException, dial_at: float, code: int | None, reason: str) -> list[Effect]:
        """End the runs for which the next dial would come too late. Hold ``_state_lock``.

        A run with a ``delivery_timeout`` waits for a later dial until then; one without waits for
        ``resume_window``, and only if there was a connection before. Nothing waits for a fatal answer.
        """
        patient = self._lost_at is not None and dial_at < self._lost_at + self.options.resume_window
        lost = isinstance(exc, TransportClosed)
        effects: list[Effect] = []
        for run in self._table.of_all():
            if _is_fatal(exc) or not (patient or run.deadline.at is not None):
                error = connection_lost(run, code, reason) if lost else _same_error(exc)
                effects += self._table.fail(run, error)
        return effects

    def _backoff(self, exc: BaseException) -> float:
        """Return the seconds until the next dial. Hold ``_state_lock``."""
        backoff = Backoff(self.options.reconnect_initial_delay, self.options.reconnect_max_delay)
        delay = backoff.delay(self._failures, self._spread())
        return max(delay, getattr(exc, "retry_after", None) or 0.0)

    # -- the watchdog thread -----------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        _running.link = self
        try:
            self._keep_deadlines(connection)
        except BaseException as exc:  # nobody would keep them any more
            _note(_log, logging.ERROR, "the watchdog failed", exc_info=True, extra=self._extra("lose"))
            self._end(connection, exc)
        if connection.reader is not None:
            connection.reader.join()
        connection.dispose()

    def _keep_deadlines(self, connection: Connection) -> None:
        looks = 0
        while self._connection is connection:
            self._bury_dropped_sessions()
            self._cancel_unwanted()
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

    def _next_moment(self, connection: Connection) -> float | None:
        with self._state_lock:
            moment = Deadline(connection.next_check(self.options)).earliest(Deadline(connection.dial_at))
            connection.watching_until = moment.earliest(Deadline(self._next_decision())).at
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
        self._dial_if_due(connection, now)
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

    def _cancel_unwanted(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                run = self.find(self._unwanted.get_nowait())
                if run is not None:
                    self.cancel(run)

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
        while ready := self._table.take_ready():  # a run that fails here gives its slot to another
            for run in ready:
                if limit is not None and len(run.message) > limit:
                    error = too_large(run.run_id, len(run.message), limit)
                    effects += self._table.fail(run, error)
                else:
                    message = frames.with_attempt(run.message, run.attempt)
                    self._table.sent(run, connection.transport.post(message), now)
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
                change = (self.options.host, old.name, new.name)
                _note(_log, logging.DEBUG, "link %s: %s -> %s", *change, extra=self._extra("state"))
        rest = iter(effects)
        try:
            for effect in rest:
                self._act(effect)
        finally:  # an exception that strikes a caller's thread must not cost other runs their end
            for effect in rest:
                self._act(effect)
        if effects:
            self.flush()  # cancels, and runs that got a slot

    def flush(self) -> None:
        """Send what was submitted with ``flush=False``, as far as it goes without blocking."""
        connection = self._connection
        if connection is not None:
            connection.flush()

    def _act(self, effect: Effect) -> None:
        if isinstance(effect, Deliver):
            self._deliver(effect.run, effect.event)
        else:
            self._cancel_at_worker(effect)

    def _deliver(self, run: Run, event: dict[str, Any]) -> None:
        kind = event["type"]
        if _log.isEnabledFor(logging.DEBUG):
            extra = {**self._extra("event", run.run_id), "event_type": kind, "task_id": run.task_id}
            _note(_log, logging.DEBUG, "%s %s", kind, run.run_id, extra=extra)
        if kind == "log":
            _forward(run, event)
        try:
            run.sink(event)
            if kind in frames.TERMINAL_EVENTS:
                run.sink = _nobody  # its alarm may lie in the table for long, with all that the sink holds
        except BaseException as exc:  # a done-callback may call sys.exit()
            if not isinstance(exc, Exception) and not self.in_own_thread():
                raise
            extra = self._extra("event", run.run_id)
            _note(_log, logging.ERROR, "a receiver of events failed", exc_info=True, extra=extra)

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
        return getattr(_running, "link", None) is self


def too_large(run_id: str, size: int, limit: int) -> ValueError:
    """Return the error for a command that no message may carry."""
    return ValueError(
        f"Run {run_id!r} is a message of {size} bytes, more than the {limit} bytes that may be sent at once. "
        "Pass a reference to the data instead, or raise max_message_bytes on both sides."
    )


def _nobody(event: dict[str, Any]) -> None:
    pass


def _is_fatal(exc: BaseException) -> bool:
    """Tell whether dialling again would only get the same answer."""
    if isinstance(exc, HandshakeRejected):
        return exc.status is None or exc.status in (101, 401, 403, 404) or 300 <= exc.status < 400
    return isinstance(exc, ssl.SSLCertVerificationError | ValueError | RuntimeError)


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
        extra = {
            "action": "log",
            "run_id": run.run_id,
            "task_id": run.task_id,
            "task_logger": event.get("logger"),
        }
        _note(_task_log, level, "%s", event.get("message", ""), extra=extra)


def _note(logger: logging.Logger, level: int, text: str, *args: Any, **details: Any) -> None:
    """Log, and take it calmly if a handler fails: a full disk must not end a connection."""
    with contextlib.suppress(Exception):
        logger.log(level, text, *args, stacklevel=2, **details)
