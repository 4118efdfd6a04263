"""What an executor of ``concurrent.futures`` and its ``with_options`` views share.

Owns: the session, the futures that have not ended, the run ids, and the warning about an executor
that nobody shut down. Never: waits for a run; :mod:`wove_ws_sync.futures` does.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from . import _fork, payloads
from ._carry import Carrier
from ._condition import Condition
from ._observe import OnEvent
from ._run_future import RunFuture, in_a_callback
from .errors import ExecutorClosed
from .options import DeliveryOptions, LinkOptions
from .runs import InFlight
from .session import Session, open_session
from .timing import Deadline

__all__ = ["ExecutorCore", "Owner"]

#: So much of the name of a function, in characters, is in the ids of its runs.
_MAX_NAME = 1000


class ExecutorCore:
    """What an executor and its ``with_options`` views share."""

    def __init__(self, options: LinkOptions, environment: str, on_event: OnEvent | None = None) -> None:
        self.options = options
        self.on_event = on_event
        self.carrier = Carrier(options.context_vars)
        self.environment = environment
        # Guards the session, the set of futures and the closed flag.
        self.lock = threading.Lock()
        self.session: Session | None = None
        self.pending: set[RunFuture[Any]] = set()
        # Says that a future has left that set.
        self.left = Condition()
        self.closed = False
        self._name_runs()
        _fork.forget_in_child(self)

    def __repr__(self) -> str:
        where = self.session.link if self.session else f"{self.options.host}:{self.options.port}"
        return f"<WebSocketExecutor {where} pending={len(self.pending)}>"

    def abandon_after_fork(self) -> None:
        """Start anew in a forked child: its first submit opens a session of its own."""
        self.lock = threading.Lock()
        self.left = Condition()
        self.session = None
        self._name_runs()
        pending, self.pending = self.pending, set()
        for future in pending:
            future.abandon_after_fork()

    def _name_runs(self) -> None:
        """Begin a series of run ids that nobody else has, without a random number for each."""
        self._series = uuid4().hex[:24]
        self._serials = itertools.count()

    def new_run_id(self, fn: Any) -> str:
        """Return an id for a run of *fn*: its name, for people, and 32 hexadecimal digits."""
        _fork.check()  # a child has a series of its own
        name = str(getattr(fn, "__name__", type(fn).__name__))
        return f"{name[:_MAX_NAME]}:{self._series}{next(self._serials):08x}"

    def submit(
        self,
        future: RunFuture[Any],
        fn: Any,
        kwargs: dict[str, Any],
        delivery: DeliveryOptions,
        *,
        send: bool = True,
    ) -> None:
        """Start *future*; without *send* its message leaves with the next one."""

        def start(session: Session) -> None:
            deadline = session.link.deadline(delivery)
            command = {
                "type": "run_task",
                "run_id": future.run_id,
                "task_id": future.run_id.rpartition(":")[0],
                **session.encode({"callable": self.carrier.wrap(fn), "args": kwargs}),
                "delivery": delivery.as_frame(kwargs),
            }
            session.submit(command, delivery, future._on_event, deadline=deadline, wait=send, flush=send)

        self.enter(future, start)

    def enter(self, future: RunFuture[Any], start: Callable[[Session], object]) -> None:
        """Have *start* begin the run of *future* on this executor's session; its errors are the future's."""
        _fork.check()
        session: Session | None = None
        try:
            with self.lock:
                future._session = session = self._opened()
                self.pending.add(future)
            start(session)
            if future._unwanted:
                session.cancel(future.run_id)
        except BaseException as exc:
            if session is None:
                raise
            self._fail(future, exc, session)
            # Of Ctrl-C or a time limit hears who submits; nobody will hold the future then.
            if not isinstance(exc, Exception) or payloads.is_of_a_signal_handler(exc):
                raise

    def _fail(self, future: RunFuture[Any], exc: BaseException, session: Session) -> None:
        """End a future whose run could not be begun, or of which that is not known."""
        try:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # its end has just come
                if not future.done():
                    future.set_exception(exc)
        finally:
            self.ended(future)
            if not isinstance(exc, InFlight):  # which is the run of another future
                session.cancel(future.run_id)

    def connect(self, deadline: Deadline | None = None) -> None:
        """Connect before the first run, by *deadline* or else within ``open_timeout`` seconds.

        Raises what ``Link.connect`` raises.
        """
        _fork.check()
        with self.lock:
            session = self._opened()
        if deadline is None:
            session.connect()
        else:
            session.link.connect(deadline)

    def _opened(self) -> Session:
        """Return the session, a new one before the first use. Hold ``lock``."""
        if self.closed:
            raise ExecutorClosed("cannot schedule new futures after shutdown")
        if self.session is None:
            self.session = open_session(self.options, self.environment)
        return self.session

    def flush(self) -> None:
        session = self.session
        if session is not None and not session.foreign:
            session.link.flush()

    def ended(self, future: RunFuture[Any]) -> None:
        with self.lock:
            self.pending.discard(future)
            done = self.closed and not self.pending
        self.left.notify_all()
        if done:
            self.close()

    def await_end(self, future: RunFuture[Any]) -> None:
        """Wait until *future* has ended and, but in a done-callback, until its own callbacks are through.

        Those that a thread runs which cancels are its own affair.
        """
        future._await_end(None)
        while future in self.pending and not in_a_callback():
            self.left.until(lambda: future not in self.pending, None)

    def shut(self) -> list[RunFuture[Any]]:
        _fork.check()
        with self.lock:
            self.closed = True
            pending = list(self.pending)
        if not pending:
            self.close()
        return pending

    def close(self) -> None:
        with self.lock:
            session, self.session = self.session, None
        if session is not None:
            session.close()


class Owner:
    """What an executor and its views hold together: nobody uses the session once it is collected."""

    def __init__(self, core: ExecutorCore) -> None:
        self.core = core

    def __del__(self) -> None:
        session = self.core.session
        if session is not None and not self.core.closed and session.drop():
            warnings.warn(
                f"unclosed {self.core!r}; use it in a with statement",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )
