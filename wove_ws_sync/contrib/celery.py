"""The executor of a Celery worker.

Owns: which executor a process uses for a Celery app, what a time limit does to the runs of a task,
and which errors :class:`WoveWSTask` retries. Never: connects before it is asked to, or is told
anything by Celery that it could not do without: signals only make it faster and tidier.
"""

from __future__ import annotations

import concurrent.futures
import logging
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

try:
    from celery import Celery, Task, current_app, current_task, signals
    from celery.exceptions import ImproperlyConfigured, SoftTimeLimitExceeded
    from celery.local import Proxy
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "celery":
        raise
    raise ModuleNotFoundError(
        "wove_ws_sync.contrib.celery needs Celery, which is not installed: "
        'pip install "wove_ws_sync[celery]"',
        name=exc.name,
    ) from exc

from .._executor_core import ExecutorCore
from .._run_future import Keeper, RunFuture
from ..errors import AuthenticationRejected
from ..futures import WebSocketExecutor
from ..session import close_links
from ..timing import Clock, Deadline

__all__ = ["WoveWSTask", "executor", "get_executor"]

_T = TypeVar("_T")
_SETTING = "wove_ws"
# Celery kills a child that is not ready after 4 seconds (worker_proc_alive_timeout).
_PRECONNECT_TIMEOUT = 2.0
# What a process that ends gives to the runs that nobody waits for, and then to its goodbye.
_DRAIN_TIMEOUT, _CLOSE_TIMEOUT = 3.0, 1.0

_log = logging.getLogger("wove_ws_sync.host")


class WoveWSTask(Task):  # type: ignore[misc]  # Celery has no types
    """A task that Celery runs again when the worker service was lost or could not be reached.

    For ``@app.task(base=WoveWSTask)`` or ``Celery(task_cls=WoveWSTask)``: nothing but Celery's own
    settings for automatic retries, with other defaults. A retry runs the whole task once more, and
    what was lost may have been executed: see ``ConnectionLost.maybe_executed``.
    """

    abstract = True
    #: ``ConnectionLost``, and what a dial raises: neither is the fault of the task.
    autoretry_for = (ConnectionError,)
    #: A wrong secret is not better the next time.
    dont_autoretry_for = (AuthenticationRejected,)
    max_retries = 5
    retry_backoff = True
    retry_backoff_max = 60


class _TaskFuture(RunFuture[_T]):
    """A future that belongs to the Celery task that made it."""

    def __init__(self, run_id: str, keeper: Keeper) -> None:
        super().__init__(run_id, keeper)
        self.celery_id = _current_id()

    def result(self, timeout: float | None = None) -> _T:
        try:
            return super().result(timeout)
        except BaseException as exc:
            self._interrupted(exc)
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        except BaseException as exc:
            self._interrupted(exc)
            raise

    def set_exception(self, exception: BaseException | None) -> None:
        """Hear of what went wrong while the run was submitted; the soft time limit is for the task."""
        super().set_exception(exception)
        if isinstance(exception, SoftTimeLimitExceeded):
            _cancel_runs_of(self.celery_id)
            raise exception

    def _interrupted(self, exc: BaseException) -> None:
        """Cancel the runs of this task if *exc* ends the wait from outside: nobody will wait again.

        That is the soft time limit, and what is no Exception: gevent's time limit, the end of a
        greenlet or of the worker. A task at the worker service may raise such a thing, too.
        """
        if isinstance(exc, SoftTimeLimitExceeded) or not (self.done() or isinstance(exc, Exception)):
            self._ask_to_cancel()
            _cancel_runs_of(self.celery_id)


class _TaskExecutor(WebSocketExecutor):
    """An executor whose futures know their Celery task."""

    _future_type = _TaskFuture


class _Made(NamedTuple):
    settings: Mapping[str, Any]
    executor: _TaskExecutor


# The executor of each app in this process. A forked child uses it with a connection of its own.
_made: weakref.WeakKeyDictionary[Celery, _Made] = weakref.WeakKeyDictionary()


def get_executor(app: Celery | None = None) -> WebSocketExecutor:
    """Return this process's executor for *app*, by default the current one.

    It is made of ``app.conf.wove_ws``, the keywords of ``WebSocketExecutor``, on first use, and anew when
    the setting has changed. Thread-safe.

    Raises ImproperlyConfigured without that setting, ValueError and TypeError for a wrong one.
    """
    if app is None:
        task = current_task._get_current_object()
        app = current_app._get_current_object() if task is None else task.app
    settings, made = app.conf.get(_SETTING), _made.get(app)
    if made is not None and (made.settings != settings or made.executor._core.closed):
        made.executor.shutdown(wait=False)
        if _made.get(app) is made:
            _made.pop(app, None)
        made = None
    if made is None:
        if not isinstance(settings, Mapping) or not settings:
            raise ImproperlyConfigured(
                f"The Celery app {app.main!r} has no worker service: set app.conf.{_SETTING} to the keywords "
                'of WebSocketExecutor, such as {"url": "wss://worker.example/wove"}.'
            )
        # Threads that come here together all get the first one's; another one has not connected yet.
        made = _made.setdefault(app, _Made(dict(settings), _TaskExecutor(**settings)))
        weakref.finalize(app, _forget, made.executor._core).atexit = False
    return made.executor


def _forget(core: ExecutorCore) -> None:
    """Let go of the connection when the app is collected, perhaps under any lock: takes none."""
    core.closed = True
    session = core.session
    if session is not None:
        session.drop()


#: What :func:`get_executor` returns, looked up whenever it is used.
executor = cast(WebSocketExecutor, Proxy(get_executor))


def _current_id() -> str | None:
    """Return the id of the Celery task that runs here, if one does."""
    task = current_task._get_current_object()
    return None if task is None else task.request.id


def _cancel_runs_of(celery_id: str | None) -> None:
    """Tell the worker service to cancel what a Celery task has begun and has not ended."""
    if celery_id is None:
        return
    for made in list(_made.values()):
        core = made.executor._core
        with core.lock:
            pending = list(core.pending)
        for future in pending:
            if isinstance(future, _TaskFuture) and future.celery_id == celery_id:
                future._ask_to_cancel()


def _on_failure(task_id: str | None = None, exception: BaseException | None = None, **_: Any) -> None:
    """Cancel the runs of a task that its soft time limit has ended, wherever in the task that struck."""
    if isinstance(exception, SoftTimeLimitExceeded):
        _cancel_runs_of(task_id)


def _on_retry(request: Any = None, **_: Any) -> None:
    """Cancel the runs of a task that will be run again, and so submit them again."""
    if request is not None:
        _cancel_runs_of(request.id)


def _preconnect(**_: Any) -> None:
    """Connect before the first task, if ``app.conf.wove_ws_preconnect`` says so."""
    if not current_app.conf.get(f"{_SETTING}_preconnect"):
        return
    try:
        core = get_executor()._core
        core.connect(Deadline.after(_PRECONNECT_TIMEOUT, Clock().monotonic()))
    except Exception as exc:  # the first task that needs it will say so again
        _log.warning("The worker service could not be reached before the first task: %s", exc)


def _close(**_: Any) -> None:
    """Let runs end that nobody waits for, and say goodbye: a child of Celery's runs no atexit functions."""
    pending: set[RunFuture[Any]] = set()
    for made in list(_made.values()):
        pending.update(made.executor._core.shut())
    if pending:
        _log.info("waiting %s s at most for %s runs that have not ended", _DRAIN_TIMEOUT, len(pending))
        concurrent.futures.wait(pending, _DRAIN_TIMEOUT)
    close_links(_CLOSE_TIMEOUT)


def _connect_signals() -> None:
    for signal, receiver in (
        (signals.task_failure, _on_failure),
        (signals.task_retry, _on_retry),
        (signals.worker_process_init, _preconnect),
        (signals.worker_process_shutdown, _close),
        (signals.worker_shutdown, _close),
    ):
        signal.connect(receiver, weak=False, dispatch_uid=f"{__name__}.{receiver.__name__}")


_connect_signals()
