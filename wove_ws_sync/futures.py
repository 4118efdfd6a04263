"""``concurrent.futures`` over a link.

Owns: :class:`RunFuture` and :class:`WebSocketExecutor`. Never: keeps a thread or a table
of runs of its own, never unpickles in the reader thread unless a done-callback asks for
the result there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from wove.runtime import runtime

from . import _fork, payloads, security
from ._condition import Condition
from .errors import DeliveryCancelled, ExecutorClosed, ForkedError
from .frames import TERMINAL_EVENTS
from .link import Link
from .options import DeliveryOptions, LinkOptions
from .session import Session, exiting, open_session

__all__ = ["RunFuture", "WebSocketExecutor"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
# So many messages of map() share a system call, while the worker begins with the ones before.
_TOGETHER = 32
_CANCELLED = concurrent.futures._base.CANCELLED
_FINISHED = concurrent.futures._base.FINISHED
_ENDED = (_CANCELLED, concurrent.futures._base.CANCELLED_AND_NOTIFIED, _FINISHED)
_DELIVERY_KEYS = frozenset(field.name for field in dataclasses.fields(DeliveryOptions))


class RunFuture(concurrent.futures.Future[_T]):
    """The future of one run. ``run_id`` names it in logs, events and errors.

    The result is unpickled once, by the first thread that asks. Thread-safe.
    """

    def __init__(self, run_id: str, core: _Core) -> None:
        self._pid = os.getpid()
        super().__init__()
        self.run_id = run_id
        self._core = core
        self._session: Session | None = None
        self._started = False
        self._unwanted = False
        self._acknowledged = False
        self._event: dict[str, Any] | None = None
        # Held while the result is unpickled, so that it happens once.
        self._decoding = threading.RLock()

    @property
    def _condition(self) -> Condition:
        """Return what guards the state: the standard library begins here with all that it does to a future.

        A forked child gets a condition of its own, as nobody may be left there to release the parent's.
        """
        pid = os.getpid()
        if pid == self._pid:
            return self._own_condition
        _fork.check()
        condition: Condition = self.__dict__.setdefault(f"_condition_{pid}", Condition())
        return condition

    @_condition.setter
    def _condition(self, condition: threading.Condition) -> None:
        self._own_condition = Condition()  # in place of the one that the standard library sets

    def __repr__(self) -> str:
        state = "running" if self.running() else "done" if self.done() else "pending"
        return f"<{type(self).__name__} {self.run_id} {'cancelled' if self.cancelled() else state}>"

    def running(self) -> bool:
        """Tell whether the worker has started the run and it has not ended."""
        return self._started and not self.done()

    def cancel(self) -> bool:
        """Cancel the run, a running one too; return whether it is cancelled now.

        With ``delivery_cancel_mode="best_effort"`` this returns at once. With "require_ack"
        it blocks until the worker answers, ``cancel_ack_timeout`` at most; False means that
        the result came first. ``result()`` raises DeliveryCancelled, whose ``acknowledged``
        says whether the worker confirmed.
        """
        self._check_process()
        if not self.done() and self._session is not None:
            self._session.cancel(self.run_id)
            if not self._in_links_thread() and not exiting():
                self._await_end(None)
        return self.cancelled()

    def _ask_to_cancel(self) -> None:
        """Cancel without waiting for an acknowledgement."""
        self._unwanted = True  # for a submit() that is still pickling
        if not self.done() and self._session is not None:
            self._session.cancel(self.run_id)

    def _cancel_soon(self) -> None:
        """Cancel from a finalizer: takes no lock."""
        session = self._session
        if session is not None and not session.foreign:
            session.link.cancel_soon(self.run_id)

    def result(self, timeout: float | None = None) -> _T:
        """Return what the task returned, or raise what it raised, unpickled in this thread.

        Raises TimeoutError if the run has not ended within *timeout* seconds (it goes on),
        DeliveryCancelled, DeliveryTimeout, ConnectionLost, PayloadError, or ForkedError in a
        forked child.
        """
        self._decode(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what :meth:`result` would raise, None for a success."""
        self._decode(timeout)
        return super().exception(0)

    def _await_end(self, timeout: float | None) -> bool:
        """Wait until the run has ended; return whether it has. An exception may strike anywhere here."""
        return self._own_condition.until(self._has_ended, timeout)

    def _has_ended(self) -> bool:
        """Tell the same as ``done()``, which looks whose process this is and takes the lock."""
        return self._state in _ENDED

    def _decode(self, timeout: float | None) -> None:
        self._check_process()
        if not self._has_ended() and self._in_links_thread():
            raise RuntimeError(
                f"Run '{self.run_id}' has not ended, and waiting for it in a done-callback would keep its "
                "result from arriving; wait in a thread of your own."
            )
        ends_at = None if timeout is None else time.monotonic() + timeout
        try:
            if exiting() and not self._has_ended():  # asked by another function that runs at exit
                raise concurrent.futures.CancelledError
            if not self._await_end(timeout):
                raise TimeoutError
            if self._state != _FINISHED:
                raise concurrent.futures.CancelledError
        except concurrent.futures.CancelledError:
            raise DeliveryCancelled(
                f"Run '{self.run_id}' was cancelled.", run_id=self.run_id, acknowledged=self._acknowledged
            ) from None
        if self._event is None:
            return
        # Another thread may be unpickling: this one keeps its own deadline.
        remaining = (
            -1 if ends_at is None else min(max(0.0, ends_at - time.monotonic()), threading.TIMEOUT_MAX)
        )
        try:
            if not self._decoding.acquire(timeout=remaining):
                raise TimeoutError
            self._load()
        finally:
            try:  # noqa: SIM105  # no call may come between an exception that strikes and the release
                self._decoding.release()
            except RuntimeError:  # not acquired
                pass

    def _load(self) -> None:
        """Unpickle what the run brought, unless that is done. Hold ``_decoding``."""
        if self._event is None:
            return
        assert self._session is not None
        decoded = self._session.decode(self._event)
        if decoded["type"] == "task_error":
            self._exception = decoded["exception"]
        else:
            self._result = decoded["result"]
        self._event = None

    def _get_snapshot(self) -> Any:
        # How newer versions of asyncio read a finished future, instead of result() and exception().
        if self.done() and not self.cancelled():
            self._decode(0)
        return super()._get_snapshot()  # type: ignore[misc]

    def _in_links_thread(self) -> bool:
        return self._session is not None and self._session.link.in_own_thread()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            _fork.check()
            raise self._forked()

    def _forked(self) -> ForkedError:
        return ForkedError(f"Run '{self.run_id}' belongs to the parent of this forked process.")

    def abandon_after_fork(self) -> None:
        """Fail in a forked child, where no result will come; takes no lock of the parent's, calls nobody."""
        self._waiters = []
        self._done_callbacks: list[Any] = []
        if not self.done():
            self.set_exception(self._forked())

    def _on_event(self, event: dict[str, Any]) -> None:
        """Take one event frame: the run's sink."""
        kind = event["type"]
        if kind == "task_started":
            self._started = True
        elif kind in TERMINAL_EVENTS:
            try:
                self._end(kind, event)
            except BaseException:  # of a callback, or Ctrl-C in cancel(): the end must come all the same
                self._end(kind, event)
                raise

    def _end(self, kind: str, event: dict[str, Any]) -> None:
        if self._has_ended():
            self._core.ended(self)
        elif kind == "task_cancelled":
            self._acknowledged = bool(event.get("acknowledged"))
            with self._condition:  # notified first: a callback may wait for this future, or raise SystemExit
                self._state = _CANCELLED
                self.set_running_or_notify_cancel()
                self._condition.notify_all()
            self._core.ended(self)
            self._invoke_callbacks()  # type: ignore[attr-defined]  # the standard library's own, untyped
        else:
            self._event = event
            try:
                self.set_result(None)  # type: ignore[arg-type]  # the value is decoded when it is asked for
            finally:
                self._core.ended(self)


class _Core:
    """What an executor and its ``with_options`` views share."""

    def __init__(self, options: LinkOptions, environment: str) -> None:
        self.options = options
        self.environment = environment
        # Guards the session, the set of futures and the closed flag.
        self.lock = threading.Lock()
        self.session: Session | None = None
        self.pending: set[RunFuture[Any]] = set()
        self.closed = False
        self._name_runs()
        _fork.forget_in_child(self)

    def __repr__(self) -> str:
        where = self.session.link if self.session else f"{self.options.host}:{self.options.port}"
        return f"<WebSocketExecutor {where} pending={len(self.pending)}>"

    def abandon_after_fork(self) -> None:
        """Start anew in a forked child: its first submit opens a session of its own."""
        self.lock = threading.Lock()
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
        return f"{getattr(fn, '__name__', type(fn).__name__)}:{self._series}{next(self._serials):08x}"

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
            command = {
                "type": "run_task",
                "run_id": future.run_id,
                "task_id": future.run_id.rpartition(":")[0],
                **payloads.encode_frame({"callable": fn, "args": kwargs}),
                "delivery": delivery.as_frame(kwargs),
            }
            session.submit(command, delivery, future._on_event, wait=send, flush=send)

        self.enter(future, start)

    def enter(self, future: RunFuture[Any], start: Callable[[Session], object]) -> None:
        """Have *start* begin the run of *future* on this executor's session; its errors are the future's."""
        _fork.check()
        session: Session | None = None
        try:
            with self.lock:
                if self.closed:
                    raise ExecutorClosed("cannot schedule new futures after shutdown")
                if self.session is None:
                    self.session = open_session(self.options, self.environment)
                future._session = session = self.session
                self.pending.add(future)
            start(session)
            if future._unwanted:
                session.cancel(future.run_id)
        except Exception as exc:
            if session is None:
                raise
            self.ended(future)
            if not future.done():
                future.set_exception(exc)
            session.cancel(future.run_id)  # a signal handler's exception may come when it was sent already
        except BaseException:  # Ctrl-C: nobody will hold the future
            if session is not None:
                session.cancel(future.run_id)
            self.ended(future)
            raise

    def flush(self) -> None:
        session = self.session
        if session is not None and not session.foreign:
            session.link.flush()

    def ended(self, future: RunFuture[Any]) -> None:
        with self.lock:
            self.pending.discard(future)
            done = self.closed and not self.pending
        if done:
            self.close()

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


class _Owner:
    """What an executor and its views hold together: nobody uses the session once it is collected."""

    def __init__(self, core: _Core) -> None:
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


class WebSocketExecutor(concurrent.futures.Executor):
    """Run functions on a worker service: ``submit``, ``map`` and ``shutdown`` of the standard library.

    *url* and the keywords of ``executor_config`` say where; *environment* takes everything
    from ``wove.config`` instead; ``delivery_*`` keywords say how runs are delivered. All
    executors with the same settings share one connection, which is dialled on first use.
    Thread-safe. Source: PEP 3148.
    """

    def __init__(self, url: str | None = None, *, environment: str | None = None, **settings: Any) -> None:
        config: dict[str, Any] = {}
        delivery: dict[str, Any] = {}
        if environment is not None:
            known = runtime.resolve_environment_settings(environment)
            config.update(known["executor_config"])
            delivery.update({key: known[key] for key in _DELIVERY_KEYS if known.get(key) is not None})
        delivery.update({key: settings.pop(key) for key in list(settings) if key in _DELIVERY_KEYS})
        config.update(settings)
        if url is not None:
            config["url"] = url
        self._delivery = DeliveryOptions(
            **{key: value for key, value in delivery.items() if value is not None}
        )
        self._core = _Core(security.link_options(config), environment or "")
        self._owner = _Owner(self._core)

    def __repr__(self) -> str:
        _fork.check()
        return repr(self._core)

    def with_options(self, **delivery: Any) -> WebSocketExecutor:
        """Return a view of this executor with other ``delivery_*`` settings, on the same link."""
        view = object.__new__(type(self))
        view._core, view._owner = self._core, self._owner
        view._delivery = self._delivery.replace(**delivery)
        return view

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> RunFuture[_T]:
        """Send ``fn(*args, **kwargs)`` to the worker service and return its future.

        Every keyword goes to *fn*; delivery settings go to :meth:`with_options`. What cannot
        be pickled or sent is raised by the future. The call blocks while the message leaves
        this process, at most until ``delivery_timeout``.

        Raises ExecutorClosed, a RuntimeError, after :meth:`shutdown`.
        """
        future: RunFuture[_T] = RunFuture(self._core.new_run_id(fn), self._core)
        self._core.submit(future, functools.partial(fn, *args) if args else fn, kwargs, self._delivery)
        return future

    def attach(self, run_id: str) -> RunFuture[Any]:
        """Return a future for a run that was detached, by this process or another with the same key.

        A run with ``delivery_orphan_policy="detach"`` goes on at the worker service when its process ends
        or its connection is lost for longer than ``resume_window``; its result is kept there for 15
        minutes and given out once. The future raises EnvironmentExecutionError of the
        kind UnknownRun if the worker service does not have the run, RuntimeError if it is not one of
        this package. The ``delivery_*`` settings of this executor apply from now on.

        Raises ExecutorClosed, a RuntimeError, after :meth:`shutdown`.
        """
        if not isinstance(run_id, str) or not run_id:
            raise TypeError(f"run_id must be a non-empty string, as RunFuture.run_id is, not {run_id!r}.")
        future: RunFuture[Any] = RunFuture(run_id, self._core)
        self._core.enter(future, lambda session: session.attach(run_id, self._delivery, future._on_event))
        return future

    @property
    def link(self) -> Link | None:
        """Return the link in use, whose ``stats()`` counts what happened; None before the first use."""
        session = self._core.session
        return None if session is None else session.link

    def map(
        self,
        fn: Callable[..., _T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[_T]:
        """Return an iterator over ``fn(*items)`` in order, computed at the worker service.

        *timeout* in seconds counts from this call; *chunksize* items travel in one run;
        *buffersize* limits the runs submitted ahead of the consumer (None: all at once).
        Runs not yet consumed are cancelled when the iterator is closed.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and (not isinstance(buffersize, int) or isinstance(buffersize, bool)):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        ends_at = None if timeout is None else time.monotonic() + timeout
        items = zip(*iterables)  # noqa: B905  # stops at the shortest, as the standard library does
        batched = all(isinstance(iterable, Sized) for iterable in iterables)
        if chunksize == 1:
            return self._results(fn, items, ends_at, buffersize, batched)
        chunks = ((chunk,) for chunk in _chunks(items, chunksize))
        return _flattened(self._results(_chunk_runner(fn), chunks, ends_at, buffersize, batched))

    def _results(
        self,
        fn: Callable[..., Any],
        items: Iterator[tuple[Any, ...]],
        ends_at: float | None,
        ahead: int | None,
        batched: bool,
    ) -> Iterator[Any]:
        """Submit now, yield later; what is yielded is forgotten here."""
        futures: deque[RunFuture[Any]] = deque()
        try:
            for item in itertools.islice(items, ahead):
                # The next item of a sized iterable comes at once: its message may share a system call.
                send = not batched or len(futures) % _TOGETHER == 0
                future: RunFuture[Any] = RunFuture(self._core.new_run_id(fn), self._core)
                self._core.submit(future, functools.partial(fn, *item), {}, self._delivery, send=send)
                futures.append(future)
        finally:
            self._core.flush()
        # The iterator must not keep a forgotten executor alive.
        submit = functools.partial(_submit_more, weakref.ref(self._owner), self._delivery, fn)

        def results() -> Iterator[Any]:
            try:
                while futures:
                    if ahead is not None:
                        futures.extend(submit(item) for item in itertools.islice(items, 1))
                    yield _result_or_cancel(futures.popleft(), ends_at)  # no name here may keep the value
            finally:  # perhaps in the garbage collector, and so under any lock: takes none
                for future in futures:
                    future._cancel_soon()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; wait for what is on its way, or cancel what has not started. Idempotent.

        Called in a done-callback it does not wait, as nothing could arrive meanwhile.
        """
        pending = self._core.shut()
        if cancel_futures:
            for future in pending:
                if not future.running():
                    future._ask_to_cancel()
        if wait and not exiting() and not any(future._in_links_thread() for future in pending):
            for future in pending:
                future._await_end(None)


def _submit_more(
    owned: Callable[[], _Owner | None],
    delivery: DeliveryOptions,
    fn: Callable[..., Any],
    item: tuple[Any, ...],
) -> RunFuture[Any]:
    owner = owned()
    if owner is None:
        raise ExecutorClosed("cannot schedule new futures after the executor was dropped")
    future: RunFuture[Any] = RunFuture(owner.core.new_run_id(fn), owner.core)
    owner.core.submit(future, functools.partial(fn, *item), {}, delivery)
    return future


def _result_or_cancel(future: RunFuture[Any], ends_at: float | None) -> Any:
    try:
        try:
            return future.result(None if ends_at is None else ends_at - time.monotonic())
        finally:
            future.cancel()
    finally:
        # A traceback of an exception raised here must not keep the future, and so the value.
        del future


def _flattened(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk


def _chunks(items: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def _chunk_runner(fn: Callable[..., _T]) -> Callable[[tuple[Any, ...]], list[_T]]:
    """Return a function that travels by value, so that a worker without this package can run it."""

    def run_chunk(chunk: tuple[Any, ...]) -> list[_T]:
        return [fn(*args) for args in chunk]

    return run_chunk
