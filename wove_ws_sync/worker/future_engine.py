"""An engine made of any ``concurrent.futures.Executor``: ``--engine module:factory``.

Owns: how many jobs that executor is given at once, and what its futures mean. Never:
unpickles what a task is or returns; that happens wherever the executor executes it, which
needs this package there. What a task says comes with its end.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from typing import Any

from ..frames import encode
from .apart import perform
from .engines import EngineError, check_workers
from .events import service_error
from .jobs import Job
from .runs import Stopped

__all__ = ["FutureEngine"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()

#: In place of the number of attempts of a job that was taken back from the executor.
_WITHDRAWN = -1


class FutureEngine:
    """Run tasks on the executor that *factory* makes, which is shut down with the service.

    *workers* is how many jobs it has at once (default: as many as it has workers, if it says;
    else all that there are). A job counts as started when the executor has it.
    """

    cancels = frozenset({"queued"})

    def __init__(self, factory: Callable[[], Executor], *, name: str, workers: int | None = None) -> None:
        self.name = name
        self.workers = check_workers(workers) or 0
        self._factory = factory
        self._executor: Executor | None = None
        self._lock = threading.Lock()  # guards the line and the number of jobs that are out
        self._line: deque[Job] = deque()
        self._out = 0
        self._closed = False
        self._remaking = threading.Lock()  # an executor that broke, a process pool say, is replaced once

    def start(self) -> None:
        """See Engine."""
        self._executor = self._make()
        self.workers = self.workers or self._size(self._executor)

    def _make(self) -> Executor:
        try:
            executor = self._factory()
        except Exception as exc:
            raise EngineError(
                f"The engine {self.name!r} cannot be made: {type(exc).__name__}: {exc}."
            ) from exc
        if not callable(getattr(executor, "submit", None)):
            made = type(executor).__name__
            raise EngineError(f"The engine {self.name!r} made a {made}, not a concurrent.futures.Executor.")
        return executor

    def _size(self, executor: Any) -> int:
        size = getattr(executor, "_max_workers", 0)
        return size if isinstance(size, int) else 0

    def submit(self, job: Job) -> None:
        """See Engine."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker service is stopping")
            self._line.append(job)
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the executor what it may have. Any thread; the executor may call back from within."""
        while (job := self._next()) is not None:
            job.relay("started", _started(job))
            try:
                job.future = self._give(job)
            except Exception as exc:
                self._took_back()
                job.relay("ended", self._broken(job, exc))
            else:
                job.forget()  # its payload is the executor's now, or this kept it in memory twice
                job.future.add_done_callback(functools.partial(self._done, job))

    def _give(self, job: Job) -> Future[list[tuple[str, bytes]]]:
        executor = self._executor
        assert executor is not None
        try:
            return executor.submit(perform, *job.order())
        except BrokenExecutor as exc:
            with self._remaking:
                if self._executor is executor:
                    _logger.warning("The engine %r broke (%s) and is made anew.", self.name, exc)
                    self._executor = self._make()
                executor = self._executor
            assert executor is not None
            return executor.submit(perform, *job.order())

    def _next(self) -> Job | None:
        with self._lock:
            while self._line and (not self.workers or self._out < self.workers):
                job = self._line.popleft()
                if not job.cancel_requested and not job.abandoned:
                    job.attempts = 1  # it is not in the line any more
                    self._out += 1
                    return job
            return None

    def _took_back(self) -> None:
        with self._lock:
            self._out -= 1

    def _done(self, job: Job, future: Future[list[tuple[str, bytes]]]) -> None:
        self._took_back()
        try:
            reports = future.result(0)
        except CancelledError as exc:
            if job.attempts != _WITHDRAWN and not job.abandoned:  # the executor's own decision
                job.relay("ended", self._broken(job, exc))
        except BaseException as exc:  # of the executor: what a task raises is among the reports
            job.relay("ended", self._broken(job, exc))
        else:
            for kind, event in reports:
                job.relay(kind, event)
        job.future = None  # which has the result, and is known to its own callback
        self._hand_over()

    def _broken(self, job: Job, exc: BaseException) -> bytes:
        reason = f"{type(exc).__name__}: {str(exc)[:1024]}"
        message = f"The engine {self.name!r} did not execute the task ({reason}). It may be run again."
        return service_error(job.run_id, job.task_id, "EngineFailed", message, retryable=True)

    def cancel(self, job: Job) -> Stopped:
        """See Engine."""
        with self._lock:
            job.cancel_requested = True
            withdrawn = not job.attempts
        if withdrawn or self._withdraw(job):
            job.forget()
            return Stopped.WITHDRAWN
        return Stopped.UNSTOPPABLE

    def _withdraw(self, job: Job) -> bool:
        """Take back a job that the executor has; return whether it is certain that it never runs."""
        future = job.future  # which its callback, in another thread, takes away
        job.attempts = _WITHDRAWN  # before that is called
        if future is not None and future.cancel():
            return True
        job.attempts = 1
        return False

    def close(self, timeout: float) -> bool:
        """See Engine."""
        with self._lock:
            self._closed = True
            self._line.clear()
        if self._executor is None:
            return True
        # It can only be waited for without a limit, so that is left to a thread.
        name = f"wove-ws-closer-{next(_numbers)}"
        closer = threading.Thread(target=self._shut_down, args=(self._executor,), name=name, daemon=True)
        closer.start()
        closer.join(timeout)
        return not closer.is_alive()

    def _shut_down(self, executor: Executor) -> None:
        with contextlib.suppress(TypeError):  # many executors do not know cancel_futures
            executor.shutdown(wait=True, cancel_futures=True)
            return
        executor.shutdown(wait=True)


def _started(job: Job) -> bytes:
    return encode({"type": "task_started", "run_id": job.run_id, "task_id": job.task_id})
