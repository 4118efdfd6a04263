"""The backend ``immediate``, for tests: each call runs at once, in the thread that submits it.

Owns: :class:`ImmediateExecutor`. Never: connects; arguments, results and exceptions travel through
pickle all the same, so that what would not reach a worker service fails here too.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from asgiref.sync import async_to_sync

from ... import current, payloads
from ..._carry import Carrier
from ..._checks import callable_only, map_sizes
from ..._exact import to_json
from ..._named import encode_frame
from ..._observe import OnEvent
from ..._progress import Progress
from ...errors import ExecutorClosed
from ...futures import RunFuture, WebSocketExecutor

__all__ = ["ImmediateExecutor"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ImmediateExecutor(WebSocketExecutor):
    """Run what is submitted at once, in this thread, and return a finished :class:`RunFuture`.

    Code of a test sees the same database transaction. ``current_run()`` works, delivery settings have
    no effect, context variables travel only if *context_vars* names them. With *result_format* "json" it
    refuses what has no name or is no JSON. Thread-safe.
    """

    on_event: OnEvent | None = None

    def __init__(self, context_vars: Iterable[Any] = (), *, result_format: str = "pickle") -> None:
        self._carrier = Carrier(tuple(context_vars))
        self._travel = _as_json if result_format == "json" else _as_pickle
        self._shut = False

    def __repr__(self) -> str:
        return "<ImmediateExecutor>"

    @property
    def is_shut(self) -> bool:
        """Tell whether :meth:`shutdown` was called."""
        return self._shut

    @property
    def link(self) -> None:
        """Return None: there is no connection."""
        return

    def with_options(self, **delivery: Any) -> ImmediateExecutor:
        """Return this executor."""
        return self

    def connect(self) -> None:
        """Do nothing: there is no connection."""

    def attach(self, run_id: str) -> RunFuture[Any]:
        """Raise RuntimeError: nothing goes on anywhere else."""
        raise RuntimeError("The backend 'immediate' has no detached runs.")

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> RunFuture[_T]:
        """Call ``fn(*args, **kwargs)`` and return its future, which is done."""
        callable_only(fn)
        if self._shut:
            raise ExecutorClosed("cannot schedule new futures after shutdown")
        name = getattr(fn, "__name__", type(fn).__name__)
        future: RunFuture[_T] = RunFuture(f"{name}:{uuid4().hex}", self)
        try:
            call = self._carrier.wrap(functools.partial(fn, *args) if args else fn)
            future.set_result(self._travel(call, kwargs, future))
        except Exception as exc:
            future.set_exception(exc)
        return future

    def map(
        self,
        fn: Callable[..., _T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[_T]:
        """Return an iterator over the results; beyond *buffersize* a call waits for its ``next()``."""
        callable_only(fn)
        map_sizes(chunksize, buffersize)
        items = zip(*iterables)  # noqa: B905  # as the standard library
        called = [self.submit(fn, *item) for item in itertools.islice(items, buffersize)]
        later = (self.submit(fn, *item) for item in items)
        return (future.result() for future in itertools.chain(called, later))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work."""
        self._shut = True

    def ended(self, future: RunFuture[Any]) -> None:
        """See Keeper: a future that is done is kept by nobody."""


def _as_pickle(call: Callable[..., Any], given: Mapping[str, Any], future: RunFuture[Any]) -> Any:
    """Call with what comes out of a pickle, and return what comes out of one."""
    call, given = payloads.decode_value(payloads.encode_value((call, given)))
    value = contextvars.Context().run(_called, call, given, future)
    return payloads.decode_value(payloads.encode_value(value))


def _as_json(call: Callable[..., Any], given: Mapping[str, Any], future: RunFuture[Any]) -> Any:
    """Call what can be named with what JSON carries exactly, and return such a value."""
    encode_frame({"callable": call, "args": given})
    value = contextvars.Context().run(_called, copy.deepcopy(call), copy.deepcopy(given), future)
    return json.loads(to_json(value, "the result"))


def _called(task: Callable[..., Any], given: Mapping[str, Any], future: RunFuture[Any]) -> Any:
    """Call the task as a worker service does; runs in a context of its own."""
    voice = _Voice(future)
    current.enter(current.CurrentRun(future.run_id, future.run_id.rpartition(":")[0], voice), voice)
    value = task(**given)
    return async_to_sync(_awaited)(value) if inspect.isawaitable(value) else value


async def _awaited(value: Any) -> Any:
    return await value


class _Voice:
    """What a run says to its future; its log records are in this process's log anyway."""

    def __init__(self, future: RunFuture[Any]) -> None:
        self._future = future

    def beat(self) -> None:
        """See Voice."""

    def tell(self, progress: Progress) -> None:
        """See Voice."""
        done, total, message = progress
        self._future._observe({"type": "progress", "done": done, "total": total, "message": message}, None)

    @property
    def is_cancelled(self) -> bool:
        """See Voice."""
        return False

    def admits_log(self) -> bool:
        """See LogSink."""
        return False

    def log(self, fields: Mapping[str, Any]) -> None:
        """See LogSink."""
