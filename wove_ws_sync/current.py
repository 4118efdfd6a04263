"""Which run the executing code belongs to.

Owns: the context variables that say so, and :func:`current_run`. Never: sends anything
itself: whoever executes the run gives it a voice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, overload

from ._progress import Progress, checked

__all__ = ["CurrentRun", "LogSink", "Voice", "current_run", "enter", "log_sink", "unheard"]

_T = TypeVar("_T")


class Voice(Protocol):
    """How a run speaks to its host. Any thread."""

    def beat(self) -> None:
        """Say that the run is alive."""

    def tell(self, progress: Progress) -> None:
        """Say how far it is."""

    @property
    def is_cancelled(self) -> bool:
        """Tell whether it is to end."""


class LogSink(Protocol):
    """Where the log records of a run go. Any thread."""

    def admits_log(self) -> bool:
        """Tell whether a record may be sent now, and count it if not."""

    def log(self, fields: Mapping[str, Any]) -> None:
        """Send the fields of one record."""


#: The sink of the run whose code is executing; None outside of tasks.
log_sink: ContextVar[LogSink | None] = ContextVar("wove_ws_sync_log_sink", default=None)


class CurrentRun:
    """The run whose code is executing, as :func:`current_run` returns it. Thread-safe.

    ``run_id`` is what ``RunFuture.run_id`` is on the host, ``task_id`` the task's name. When
    the run is over, nothing more is sent.
    """

    __slots__ = ("_voice", "run_id", "task_id")

    def __init__(self, run_id: str, task_id: str, voice: Voice) -> None:
        self.run_id = run_id
        self.task_id = task_id
        self._voice = voice

    def __repr__(self) -> str:
        return f"<CurrentRun {self.run_id!r}>"

    def heartbeat(self) -> None:
        """Tell the host now that the run is alive; more than ten calls a second are one.

        The worker service beats for every run by itself, as often as the host asks for it.
        """
        self._voice.beat()

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Tell the host that *done* of *total* (None: unknown) is done; *message* is for people.

        Call it as often as you like: at most ten reports a second leave, the newest wins, and
        the last one arrives before the result. A message is cut to 256 characters. A host that
        does not know of progress (Wove's own executor, say) is told nothing.

        Raises TypeError or ValueError for what is no finite number, or no string.
        """
        self._voice.tell(checked(done, total, message))

    def cancelled(self) -> bool:
        """Tell whether the run was cancelled, or nobody wants its result any more.

        A long synchronous task should look from time to time and end: by a plain return, or by
        raising ``concurrent.futures.CancelledError``, which confirms the cancellation.
        """
        return self._voice.is_cancelled


_current: ContextVar[CurrentRun] = ContextVar("wove_ws_sync_current_run")


class _Missing:
    """Stands for no default."""


_MISSING = _Missing()


@overload
def current_run() -> CurrentRun: ...


@overload
def current_run(default: _T) -> CurrentRun | _T: ...


def current_run(default: Any = _MISSING) -> Any:
    """Return the run whose code calls this, or *default* outside of a run.

    It works in synchronous tasks, in coroutines, and in threads that were started with a copy
    of the context: ``Thread(target=contextvars.copy_context().run, args=(fn,))``, or
    ``asyncio.to_thread``.

    Raises RuntimeError outside of a run if there is no *default*.
    """
    run = _current.get(None)
    if run is not None:
        return run
    if default is _MISSING:
        raise RuntimeError(
            "current_run() was called outside of a run: it is for code that a worker service executes. "
            "In a thread that a task started, copy its context: contextvars.copy_context().run(fn); "
            "where there may be no run, call current_run(None)."
        )
    return default


def enter(run: CurrentRun, sink: LogSink) -> None:
    """Have the code of this context belong to *run*, and its log records go to *sink*."""
    _current.set(run)
    log_sink.set(sink)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Send no log record meanwhile: what handles records must not make further ones of them."""
    token = log_sink.set(None)
    try:
        yield
    finally:
        log_sink.reset(token)
