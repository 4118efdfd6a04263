"""What a link's two threads do: dial, read, keep deadlines, notice the end, dial again.

Owns: the reader and the watchdog thread of each connection. Never: pickles, runs no user code but
done-callbacks and logging handlers, and leaves it to ``_link_ends`` what an end means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
from queue import Empty
from typing import Any

from . import frames, security
from ._link_core import OVER, LinkState, running
from ._link_ends import LinkEnds
from ._tell import host_log, note
from .connection import Connection
from .errors import ExecutorClosed, HandshakeRejected
from .runs import Effect
from .timing import Deadline
from .transport import Transport, TransportClosed

__all__ = ["LinkThreads"]

_numbers = itertools.count(1)

# How often and how many times the watchdog looks again before it judges while the reader
# still has bytes to read: a process that was suspended reads first and judges then.
_LOOK_AGAIN = 0.005
_LOOKS = 20
# A reader that reads, and never comes to the end for _BUSY seconds, is kept busy by somebody, and what
# it has not read counts as life for nobody any more; one that has not read for _STUCK is held up itself.
_BUSY = 30.0
_STUCK = 1.0
# Such a reader is looked at so often; if it was not for _STOPPED seconds, this process stood still.
_LOOK_AT_BUSY = 1.0
_STOPPED = 5.0
# A worker that is asked what became of earlier runs has so many seconds to answer.
_RESUME_PATIENCE = 5.0
_SEALED_BEFORE = (
    "This link was sealed before and does not go on without, as an attacker might want that. If the worker "
    "service was replaced by one that does not seal, restart this process or set executor_config.seal='off'."
)


# The kinds of running tasks that a worker may say it can stop.
_RUNNING = frozenset({"coroutines", "calls"})


class LinkThreads(LinkEnds):
    """A link that dials and reads; :class:`~wove_ws_sync.link.Link` is what others use of it."""

    # -- starting ----------------------------------------------------------------

    def _start(self) -> Connection:
        """Return the present connection, a new one that dials at once if there is none."""
        try:
            with self._state_lock:
                if self._state in OVER:
                    raise ExecutorClosed("The link to the worker service is closed; make a new executor.")
                if self._connection is not None:
                    return self._connection
                connection = self._new_connection(self._clock.monotonic())
                self._set_state(LinkState.DIALING)
            self._begin(connection)
        except BaseException:
            self._begin_again()
            raise
        return connection

    def _begin_again(self) -> None:
        """Begin what this thread was about to begin when an exception struck it: others may wait for it."""
        with self._state_lock:
            connection = self._connection
            mine = connection is not None and connection.made_by == threading.get_ident()
            if connection is None or not mine or self._is_watched(connection):
                return
            if self._state not in (LinkState.DIALING, LinkState.BACKOFF):
                self._set_state(LinkState.DIALING)
        self._begin(connection)

    def _begin(self, connection: Connection) -> None:
        """Start the watchdog, which starts the reader when it is time to dial."""
        try:
            self._clock.subscribe(connection.waker.wake)
            name = f"wove-ws-watchdog-{next(_numbers)}"
            connection.watchdog = threading.Thread(
                target=self._watch, args=(connection,), name=name, daemon=True
            )
            connection.watchdog.start()
        except (RuntimeError, MemoryError) as exc:  # the system gives no more threads
            if not self._is_watched(connection):
                self._end(connection, exc)
                connection.dispose()
            raise

    def _is_watched(self, connection: Connection) -> bool:
        started = connection.watchdog is not None and connection.watchdog.is_alive()
        return connection.watched or started

    def _dial_if_due(self, connection: Connection, now: float) -> None:
        """Start the reader, which dials. Watchdog thread only."""
        with self._state_lock:
            if not Deadline(connection.dial_at).expired(now) or self._connection is not connection:
                return
            connection.dial_at = None
            if self._state is LinkState.BACKOFF:
                if not self._table.homeless() and not self._connecting:  # who waited has been cancelled
                    self._retire(connection)
                    self._set_state(self._rest())
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

    # -- the reader thread -------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        running.link = self
        try:
            transport = self._open()
            self._connected(connection, transport)
            while True:
                self._take(connection, transport.recv())
        except Exception as exc:
            if not isinstance(exc, TransportClosed | OSError | ValueError | RuntimeError):
                note(
                    host_log,
                    logging.ERROR,
                    "the reader failed",
                    exc_info=True,
                    extra=connection.extra("lose"),
                )
            self._end(connection, exc)
        except BaseException as exc:
            self._end(connection, exc)
            raise

    def _open(self) -> Transport:
        options, headers = security.ready_to_dial(self.options)
        if self._sealed:  # that the worker service does not know of it any more is what an attacker says
            options = dataclasses.replace(options, seal="require")
        try:
            return self._dial(options, headers | self._introduction(), clock=self._clock)
        except HandshakeRejected as exc:
            if exc.status == 401:
                security.token_refused(self.options, headers)
            if self._sealed and self.options.seal != "require" and exc.status in (101, 401):
                raise type(exc)(f"{exc} {_SEALED_BEFORE}", status=exc.status) from None
            raise

    def _introduction(self) -> dict[str, str]:
        """Return the headers that offer the extensions."""
        return {
            "X-Wove-Sync": f"1; f={frames.offered(self.options.result_format)}",
            "X-Wove-Host": self._name,
            "X-Wove-Resume-Window": str(self.options.resume_window),
        }

    def _connected(self, connection: Connection, transport: Transport) -> None:
        """Become READY and send what waits; raise TransportClosed if nobody wants the connection any more."""
        with self._state_lock:
            connection.connected(transport)
            if self._connection is not connection or self._state is not LinkState.DIALING:
                raise TransportClosed("closed by this side")
            now = connection.up_since = self._clock.monotonic()
            self._counts["connects"] += 1
            self._sealed = self._sealed or "seal" in (transport.features or ())
            self._table.dial_error = None
            self._table.heartbeat_factor = 1.0 if transport.features is not None else 2.0
            stoppable = transport.cancels
            self._table.stops_running = stoppable is None or not stoppable.isdisjoint(_RUNNING)
            self._set_state(LinkState.READY)
            effects = self._find_runs(connection, transport.worker, now)
            effects += self._post_ready(now)
            moment = self._next_decision()
        where = (self.options.host, self.options.port)
        note(host_log, logging.INFO, "connected to %s:%s", *where, extra=connection.extra("connect"))
        self._apply(effects)
        connection.flush()
        self._mind(moment)
        connection.waker.wake()

    def _find_runs(self, connection: Connection, worker: str, now: float) -> list[Effect]:
        """Ask for the runs of the connection before, or give them up. Hold ``_state_lock``."""
        known = connection.offers("resume") and worker == self._worker
        self._worker = worker
        if not known:
            asked = any(each.awaits_answers() for each in self._live.values())
            return [] if asked else self._table.forsake()
        self._counts["resumes"] += 1
        self._table.resuming(now + _RESUME_PATIENCE, now, connection.generation)
        connection.resume(self._table.limbo(), _RESUME_PATIENCE)
        return []

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
            generation, proven = connection.generation, False
            for event in decoded.events:
                kind = event["type"]
                if kind in frames.NOTICES:
                    effects += self._take_notice(connection, event, now)
                    continue
                proven = True
                if kind in frames.EXTENDED_EVENTS and not connection.offers(kind):
                    self._table.dropped["type"] += 1
                    continue
                run_id, ended = event["run_id"], kind in frames.TERMINAL_EVENTS
                if ended and not self._table.waits_elsewhere(run_id, generation):
                    # Before the id can be used again.
                    connection.arrived(run_id, known=self._table.knows(run_id))
                effects += self._table.receive(event, now, generation)
            if proven and self._connection is connection:
                self._reconnect.proven()
            self._follow_up(effects)
            asked = connection.awaits_answers()
            empty = connection.draining and not asked and not self._table.carried(connection.generation)
            homeless = self._connection is None and self._state not in OVER and self._table.homeless()
            waiting = homeless and not asked
            moment = self._next_decision()
        connection.acknowledge()
        self._apply(effects)
        if waiting:
            self._start_again()
        if empty and not connection.close_reason:
            connection.say_goodbye()
        self._mind(Deadline(moment).earliest(Deadline(connection.next_check(self.options))).at)

    def _take_notice(self, connection: Connection, notice: dict[str, Any], now: float) -> list[Effect]:
        """Apply what a worker says of itself. Hold ``_state_lock``."""
        if notice["type"] == "resume_state" and connection.offers("resume"):
            connection.unanswered = max(0, connection.unanswered - 1)
            return self._table.resumed(notice, now, connection.generation)
        if notice["type"] == "draining" and connection.offers("drain"):
            if not connection.draining and self._connection is connection and self._state not in OVER:
                connection.draining = True
                self._counts["drains"] += 1
                self._connection = None
                self._reconnect.draining(now, notice.get("timeout"))
                self._set_state(LinkState.DRAINING)
        else:
            self._table.dropped["type"] += 1
        return []

    def _start_again(self) -> None:
        """Dial for runs that a worker that stops will not take."""
        try:
            with self._state_lock:
                refusal = self._reconnect.refusal(self._clock.monotonic())
            if refusal is not None:
                raise refusal
            self._start()
        except Exception as exc:  # no descriptor, no thread
            with self._state_lock:
                effects = self._fail_homeless(exc)
            self._apply(effects)

    # -- the end of a connection --------------------------------------------------

    def _end(self, connection: Connection, exc: BaseException) -> None:
        """End the connection, once; dial again after a while if runs wait for that."""
        connection.close_reason = connection.close_reason or getattr(exc, "reason", "") or str(exc)
        if connection.transport is not None:
            connection.flush()  # the answer to the peer's close frame
            connection.transport.abort()  # before it is decided what had left: nothing may leave after that
        now = self._clock.monotonic()
        with self._state_lock:
            end = self._decide_end(connection, exc, now)
        if end is None:
            return
        if end.lost:
            note(
                host_log, logging.INFO, "connection lost: %s", end.loss.reason, extra=connection.extra("lose")
            )
        connection.waker.wake()
        try:
            if end.successor is not None:  # before any callback: the deadlines of those who wait go on
                with contextlib.suppress(RuntimeError):  # no thread to be had: every run was told
                    self._begin(end.successor)
        finally:
            self._apply(end.effects)

    # -- the watchdog thread -----------------------------------------------------

    def _watch(self, connection: Connection) -> None:
        with self._state_lock:
            if connection.watched:  # it was not known that the first one had started
                return
            connection.watched, connection.watchdog = True, threading.current_thread()
        running.link = self
        try:
            self._keep_deadlines(connection)
        except BaseException as exc:  # nobody would keep them any more
            note(
                host_log, logging.ERROR, "the watchdog failed", exc_info=True, extra=connection.extra("lose")
            )
            self._end(connection, exc)
        if connection.reader is not None:
            connection.reader.join()
        connection.dispose()

    def _keep_deadlines(self, connection: Connection) -> None:
        looks = 0
        while connection.generation in self._live:
            self._bury_dropped_sessions()
            self._cancel_unwanted()
            now = self._clock.monotonic()
            moment = self._next_moment(connection)
            if moment is None or moment > now:
                connection.wait(self._clock.wait_time(moment))
            elif looks < _LOOKS and self._behind():
                looks += 1
                connection.waker.wait(_LOOK_AGAIN)
            else:
                self._judge(connection, now, behind=looks >= _LOOKS)
                looks = 0

    def _behind(self) -> bool:
        return any(connection.behind() for connection in list(self._live.values()))

    def _next_moment(self, connection: Connection) -> float | None:
        with self._state_lock:
            moment = Deadline(connection.next_check(self.options)).earliest(Deadline(connection.dial_at))
            if self._busy_since is not None:
                moment = moment.earliest(Deadline(self._judged_at + _LOOK_AT_BUSY))
            connection.watching_until = moment.earliest(Deadline(self._next_decision())).at
            return connection.watching_until

    def _judge(self, connection: Connection, now: float, *, behind: bool) -> None:
        """Decide what is due. *behind*: unread bytes are left, which are life for every run, for a while."""
        transports = [each.transport for each in list(self._live.values()) if each.transport is not None]
        read_at = max((each.last_byte_at for each in transports), default=now)
        if not behind or now - read_at >= _STUCK:
            self._busy_since = None
        elif self._busy_since is None or now - self._judged_at >= _STOPPED:
            self._busy_since = now
        self._judged_at = now
        spared = behind and not Deadline.after(_BUSY, self._busy_since or now).expired(now)
        floor = now if spared else max((each.partial_at for each in transports), default=0.0)
        with self._state_lock:
            effects = self._table.tick(now, floor)
            self._follow_up(effects)
        try:
            connection.check(self.options, now, behind=behind)
            self._dial_if_due(connection, now)
        finally:
            self._apply(effects)  # last: a callback may take its time
        self._close_if_idle(connection, now)

    def _close_if_idle(self, connection: Connection, now: float) -> None:
        with self._state_lock:
            if self._connection is not connection or not Deadline(self._idle_until()).expired(now):
                return
            self._set_state(LinkState.CLOSING)
            leaving = list(self._live.values())
        for each in leaving:
            each.say_goodbye()
        assert connection.reader is not None
        connection.reader.join(self.options.close_timeout)
        connection.cut("idle")

    def _cancel_unwanted(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._cancel(self._unwanted.get_nowait())

    def _bury_dropped_sessions(self) -> None:
        """Close at once behind executors that were collected: their runs go on, their links do not linger."""
        with contextlib.suppress(Empty):
            while True:
                session = self._dropped.get_nowait()
                with self._state_lock:
                    self._forget(session, float("-inf"))
