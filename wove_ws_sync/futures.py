"""``concurrent.futures`` over a link.

Owns: :class:`WebSocketExecutor`; :class:`RunFuture` is what it gives out. Never: keeps a thread or
a table of runs of its own, never unpickles in the reader thread unless a done-callback asks for
the result there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NoReturn, ParamSpec, TypeVar

from wove.runtime import runtime

from . import _fork, _variables, security
from ._checks import callable_only, map_sizes
from ._executor_core import ExecutorCore, Owner
from ._observe import OnEvent
from ._run_future import RunFuture
from .errors import ExecutorClosed
from .link import Link
from .options import DeliveryOptions, LinkOptions, check_keys
from .session import exiting

__all__ = ["RunFuture", "WebSocketExecutor"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
# So many messages of map() share a system call, while the worker begins with the ones before.
_TOGETHER = 32
_DELIVERY_KEYS = frozenset(field.name for field in dataclasses.fields(DeliveryOptions))
_KEYWORDS = _DELIVERY_KEYS | {"environment", "on_event"}


class WebSocketExecutor(concurrent.futures.Executor):
    """Run functions on a worker service: ``submit``, ``map`` and ``shutdown`` of the standard library.

    *url* and the keywords of ``executor_config`` say where; *environment* takes everything
    from ``wove.config`` instead; with neither, the variables ``WOVE_WS_URL`` and so on say what
    the keywords do not. ``delivery_*`` keywords say how runs are delivered. All
    executors with the same settings share one connection, which is dialled on first use.
    *on_event* is called with every event frame of this executor's runs, logs and progress
    included and pickles left out, before the future knows of it; in the thread that brings it:
    mostly the reader, so it must be quick. What it raises is logged.
    Thread-safe. Source: PEP 3148.
    """

    # What submit() and attach() give out; a framework may have a kind of its own.
    _future_type: type[RunFuture[Any]] = RunFuture

    def __init__(
        self,
        url: str | None = None,
        *,
        environment: str | None = None,
        on_event: OnEvent | None = None,
        **settings: Any,
    ) -> None:
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event must be callable, not {type(on_event).__name__}.")
        if url is not None:
            settings["url"] = url
        options, self._delivery = _settle(environment, settings)
        self._core = ExecutorCore(options, environment or "", on_event)
        self._owner = Owner(self._core)

    def __repr__(self) -> str:
        _fork.check()
        return repr(self._core)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"A {type(self).__name__} is not pickled: it has a connection. Make one where it is used; "
            "a task that is to submit others makes its own."
        )

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

        Raises TypeError for what cannot be called, and ExecutorClosed, a RuntimeError, after
        :meth:`shutdown`.
        """
        callable_only(fn)
        future: RunFuture[_T] = self._future_type(self._core.new_run_id(fn), self._core)
        self._core.submit(future, functools.partial(fn, *args) if args else fn, kwargs, self._delivery)
        return future

    def connect(self) -> None:
        """Wait for a usable connection, ``open_timeout`` at most; nobody has to, ``submit`` does not.

        Raises what the dial raised, and ExecutorClosed, a RuntimeError, after :meth:`shutdown`.
        """
        self._core.connect()

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
        future = self._future_type(run_id, self._core)
        self._core.enter(future, lambda session: session.attach(run_id, self._delivery, future._on_event))
        return future

    @property
    def is_shut(self) -> bool:
        """Tell whether :meth:`shutdown` was called: nothing more is taken."""
        return self._core.closed

    @property
    def link(self) -> Link | None:
        """Return the link in use, whose ``stats()`` counts what happened.

        None before the first use and after :meth:`shutdown`.
        """
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
        Once iteration has begun, runs not yet consumed are cancelled when the iterator is closed.
        """
        callable_only(fn)
        map_sizes(chunksize, buffersize)
        if chunksize > 1 and self._core.options.result_format == "json":
            raise ValueError("chunksize must be 1 with result_format='json': a chunk has no name.")
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
                future = self._future_type(self._core.new_run_id(fn), self._core)
                futures.append(future)
                self._core.submit(future, functools.partial(fn, *item), {}, self._delivery, send=send)
        except BaseException:  # nobody gets them
            for future in futures:
                future._cancel_soon()
            raise
        finally:
            self._core.flush()
        # The iterator must not keep a forgotten executor alive.
        submit = functools.partial(
            _submit_more, weakref.ref(self._owner), self._future_type, self._delivery, fn
        )

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

        It waits for done-callbacks, too. Called in one it does not wait, as nothing could arrive meanwhile.
        """
        pending = self._core.shut()
        if cancel_futures:
            for future in pending:
                if not future.running():
                    future._ask_to_cancel()
        if wait and not exiting() and not any(future._in_links_thread() for future in pending):
            for future in pending:
                self._core.await_end(future)


def _settle(environment: str | None, settings: dict[str, Any]) -> tuple[LinkOptions, DeliveryOptions]:
    """Return what *settings*, and beneath them an environment of Wove's or variables, ask for."""
    check_keys(settings, _KEYWORDS)
    if environment is not None:
        known = runtime.resolve_environment_settings(environment)
        delivery = {key: known[key] for key in _DELIVERY_KEYS if known.get(key) is not None}
        return _options({**known["executor_config"], **delivery, **settings})
    if settings.get("url") is not None:  # a secret in a variable is not for this address
        return _options(settings)
    found = _variables.read(os.environ)
    with found.blamed(settings):
        return _options({**found.settings, **settings})


def _options(settings: Mapping[str, Any]) -> tuple[LinkOptions, DeliveryOptions]:
    delivery = {key: settings[key] for key in settings if key in _DELIVERY_KEYS}
    config = {key: settings[key] for key in settings if key not in _DELIVERY_KEYS}
    return security.link_options(config), DeliveryOptions.from_mapping(delivery)


def _submit_more(
    owned: Callable[[], Owner | None],
    kind: type[RunFuture[Any]],
    delivery: DeliveryOptions,
    fn: Callable[..., Any],
    item: tuple[Any, ...],
) -> RunFuture[Any]:
    owner = owned()
    if owner is None:
        raise ExecutorClosed("cannot schedule new futures after the executor was dropped")
    future = kind(owner.core.new_run_id(fn), owner.core)
    owner.core.submit(future, functools.partial(fn, *item), {}, delivery)
    return future


def _result_or_cancel(future: RunFuture[Any], ends_at: float | None) -> Any:
    try:
        try:
            return future.result(None if ends_at is None else ends_at - time.monotonic())
        finally:
            future._ask_to_cancel()  # does not wait for the worker's answer, as nobody has the future
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
