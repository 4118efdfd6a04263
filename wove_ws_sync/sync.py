"""The blocking executor: Wove's four executor methods, without async.

Owns: the queue of event frames of one ``start()`` … ``stop()``. Never: keeps a thread or a
table of its own; both are the link's.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Any

from . import _fork, security
from ._carry import Carrier
from .errors import ExecutorClosed
from .frames import COMMANDS, TERMINAL_EVENTS
from .link import Link
from .options import DeliveryOptions
from .session import SPARABLE, Session, open_session

__all__ = ["NOT_STARTED", "SyncWebSocketEnvironmentExecutor", "check_frame", "frame_delivery", "run_defaults"]

NOT_STARTED = "websocket executor is not started."
# An event that waits in a queue, empty once somebody has taken it.
_Box = list[dict[str, Any]]


class SyncWebSocketEnvironmentExecutor:
    """Send command frames and receive event frames from any thread, without an event loop.

    The frames and their keys are Wove's. All methods are thread-safe; several threads
    may send and receive at once, and each event goes to one of the receivers. With *progress*
    :meth:`recv` also returns ``progress`` frames, which Wove does not know.
    """

    _session: Session | None = None  # for one whose __init__ did not run
    _stopped: Session | None = None  # the one that stop() has ended, until start()

    def __init__(self, *, progress: bool = False) -> None:
        self._progress = progress
        self._carrier = Carrier()
        self._lock = threading.Lock()
        self._session = None
        self._defaults: dict[str, Any] = {}
        self._events: SimpleQueue[_Box | None] = SimpleQueue()
        _fork.forget_in_child(self)

    def __repr__(self) -> str:
        session = self._session
        return f"<{type(self).__name__} {session.link if session else 'not started'}>"

    def __del__(self) -> None:
        session = self._session
        if session is not None and session.drop():
            warnings.warn(f"unclosed {self!r}; call its stop()", ResourceWarning, stacklevel=2, source=self)

    def abandon_after_fork(self) -> None:
        """Make fresh locks in a forked child; the session says there whose it is."""
        self._lock = threading.Lock()
        self._stopped = None
        self._events = SimpleQueue()

    def start(
        self,
        *,
        environment_name: str,
        environment_config: Mapping[str, Any],
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Check the configuration and connect, within ``open_timeout``.

        *environment_config* is Wove's ``executor_config``; *run_config* may hold defaults for
        ``delivery_heartbeat_seconds`` and ``delivery_orphan_policy``.

        Raises ValueError, TypeError or RuntimeError for wrong settings, and what the dial
        raised: HandshakeRejected, TimeoutError, ConnectionError, ssl.SSLError, OSError.
        """
        options = security.link_options(environment_config)
        carrier = Carrier(options.context_vars)
        session = open_session(options, environment_name)
        try:
            session.connect()
        except BaseException:
            session.close()
            raise
        self._carrier = carrier
        self._replace(session, run_defaults(run_config))

    def send(self, frame: Mapping[str, Any]) -> None:
        """Send one command frame: ``run_task``, ``cancel_task`` or ``shutdown``.

        ``run_task`` blocks until the frame left this process, at most until its
        ``delivery_timeout``. ``shutdown`` ends the runs of this executor and no others.

        Raises RuntimeError before ``start()``, ValueError for unknown types, missing keys, ids in
        flight and frames over ``max_message_bytes``, and whatever pickling the arguments raises.
        """
        _fork.check()
        with self._lock:
            session, events = self._started(), self._events
        kind = check_frame(frame)
        if kind == "run_task":
            delivery = frame_delivery(frame, self._defaults)
            deadline = session.link.deadline(delivery)
            encoded = session.encode(self._carrier.wrap_frame(frame))
            session.submit(encoded, delivery, self._sink(session, events), deadline=deadline)
        elif kind == "cancel_task":
            session.cancel(frame["run_id"])
        else:
            session.abandon()

    def attach(self, run_id: str, **delivery: Any) -> None:
        """Have the events of a detached run come to :meth:`recv`, the terminal one at least.

        *delivery* are ``delivery_*`` settings that apply from now on. A worker service that does not
        have the run answers with a ``task_error`` of the kind UnknownRun.

        Raises RuntimeError before ``start()``, ValueError for an id in flight.
        """
        _fork.check()
        with self._lock:
            session, events = self._started(), self._events
        options = DeliveryOptions.from_mapping({**self._defaults, **delivery})
        session.attach(run_id, options, self._sink(session, events))

    @property
    def link(self) -> Link | None:
        """Return the link in use, whose ``stats()`` counts what happened; None if not started."""
        return None if self._session is None else self._session.link

    def recv(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next event frame, decoded here, in the calling thread.

        *timeout* is in seconds; None waits without limit, 0 or less not at all. Raises TimeoutError
        when no event came in time, ExecutorClosed when ``stop()`` ends the wait. The ends of runs that
        ``stop()`` has ended can be received until the next ``start()``; then RuntimeError is raised.
        """
        _fork.check()
        with self._lock:
            stopped = self._stopped if self._session is None else None
            session, events = stopped or self._started(), self._events
        limit = None if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
        try:
            event = _next_of(events, limit)
        except Empty:
            raise TimeoutError(f"no event frame came within {timeout} s") from None
        if event is None:
            events.put(None)  # for other receivers
            event = _next_of(events, None)  # one that was put back, see below
        if event is None:
            events.put(None)
            if stopped is not None:
                raise RuntimeError(NOT_STARTED)
            raise ExecutorClosed("websocket executor was stopped.")
        try:
            return session.decode(event)
        except BaseException:  # Ctrl-C, or what a signal handler raises: it was not the event's fault
            events.put([event])
            raise

    def stop(self) -> None:
        """End this executor's runs by their orphan policies and let go of the link. Idempotent.

        What was not received stays in memory until the next ``start()``.
        """
        _fork.check()
        self._replace(None, {})

    def _replace(self, session: Session | None, defaults: dict[str, Any]) -> None:
        with self._lock:
            previous, self._session = self._session, session
            events = self._events
            if session is not None:
                self._stopped, self._events = None, SimpleQueue()
            elif previous is not None:
                self._stopped = previous
            self._defaults = defaults
        if previous is not None:
            try:
                previous.close()
            finally:
                events.put(None)  # whoever waits in recv() hears of it

    def _sink(self, session: Session, events: SimpleQueue[_Box | None]) -> Callable[[dict[str, Any]], None]:
        """Return a sink that puts into *events* what is asked for and not to be dropped."""

        def put(event: dict[str, Any]) -> None:
            kind = event["type"]
            if kind in SPARABLE and (session.drops(events.qsize()) or (kind == "progress" and not wanted)):
                return
            if kind in TERMINAL_EVENTS:
                # It comes again if an exception struck before it was known that it is in here.
                if not ends:
                    ends.append([event])
                events.put(ends[0])
            else:
                events.put([event])

        ends: list[_Box] = []
        wanted = self._progress
        return put

    def _started(self) -> Session:
        session = self._session
        if session is None:
            raise RuntimeError(NOT_STARTED)
        session.check_process()
        return session


def check_frame(frame: Mapping[str, Any]) -> str:
    """Return the type of a command frame; raise ValueError or TypeError for what is none."""
    if not isinstance(frame, Mapping):
        raise TypeError(f"A command frame is a mapping with a 'type', not {type(frame).__name__}.")
    kind = frame.get("type")
    if kind not in COMMANDS:
        raise ValueError(f"Unsupported frame type: {kind}")
    wanted = {"run_task": ("run_id", "task_id"), "cancel_task": ("run_id",)}.get(kind, ())
    for key in wanted:
        if not isinstance(frame.get(key), str) or not frame[key]:
            raise ValueError(f"A {kind} frame needs {key!r}, a non-empty string.")
    if kind == "run_task" and "callable" not in frame:
        raise ValueError("A run_task frame needs 'callable'.")
    return str(kind)


def run_defaults(run_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a weave's ``run_config``, if there is one, says about delivery, without None."""
    run_config = run_config or {}
    keys = ("delivery_heartbeat_seconds", "delivery_orphan_policy")
    return {key: run_config[key] for key in keys if run_config.get(key) is not None}


def frame_delivery(frame: Mapping[str, Any], defaults: Mapping[str, Any]) -> DeliveryOptions:
    """Return the delivery settings of a ``run_task`` frame."""
    delivery = frame.get("delivery") or {}
    if not isinstance(delivery, Mapping):
        raise TypeError(f"delivery of a run_task frame must be a mapping, not {type(delivery).__name__}.")
    return DeliveryOptions.from_mapping({**defaults, **delivery})


def _next_of(events: SimpleQueue[_Box | None], timeout: float | None) -> dict[str, Any] | None:
    """Take the next event out, None for the end of them. Raises Empty after *timeout* seconds."""
    ends_at = None if timeout is None else time.monotonic() + timeout
    while True:
        box = events.get(timeout=None if ends_at is None else max(0.0, ends_at - time.monotonic()))
        if box is None:
            return None
        with contextlib.suppress(IndexError):  # it was in the queue twice
            return box.pop()
