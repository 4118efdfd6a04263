"""The engine ``threads``: synchronous tasks in a thread pool, coroutines on one event loop of their own.

Owns: the task threads and the thread of the task loop. Never: touches a connection, and
never runs a job in the thread that asks for it. It cannot stop a synchronous call that is running.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .engines import check_workers, default_threads
from .jobs import Job
from .loops import finish
from .runs import Stopped

__all__ = ["ThreadEngine"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()

#: Threads that start with the service; further ones start with the tasks that need them.
_EARLY_THREADS = 64


class ThreadEngine:
    """Run synchronous tasks in *workers* threads and coroutines on one loop of their own."""

    name = "threads"
    cancels = frozenset({"queued", "coroutines"})

    def __init__(self, workers: int | None = None) -> None:
        self.workers = check_workers(workers) or default_threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix=f"wove-ws-task-{next(_numbers)}")
        self._loop = _TaskLoop()

    def start(self) -> None:
        """See Engine. Starting a thread while others keep the interpreter busy would stall the service."""
        gate = threading.Event()
        try:
            for _ in range(min(self.workers, _EARLY_THREADS)):
                self._pool.submit(gate.wait)
        finally:
            gate.set()

    def submit(self, job: Job) -> None:
        """See Engine."""
        job.future = self._pool.submit(job.run, self._loop.adopt)

    def cancel(self, job: Job) -> Stopped:
        """See Engine."""
        repeated, job.cancel_requested = job.cancel_requested, True
        if job.future is None or job.future.cancel():
            job.forget()
            return Stopped.WITHDRAWN
        # A call that is about to return an awaitable counts as unstoppable: the flag above
        # keeps that awaitable from being driven.
        if not job.coroutine:
            return Stopped.UNSTOPPABLE
        if not repeated:  # a second cancellation would interrupt the cleaning up after the first
            self._loop.cancel(job)
        return Stopped.STOPPING

    def close(self, timeout: float) -> bool:
        """See Engine."""
        deadline = time.monotonic() + timeout
        self._pool.shutdown(wait=False, cancel_futures=True)
        stopped = self._loop.close(timeout)
        # The pool can only be waited for without a limit, so that is left to a thread.
        name = f"wove-ws-closer-{next(_numbers)}"
        closer = threading.Thread(target=self._pool.shutdown, name=name, daemon=True)
        closer.start()
        closer.join(max(0.0, deadline - time.monotonic()))
        return stopped and not closer.is_alive()


class _TaskLoop:
    """An event loop in a thread, started by the first coroutine. A blocking coroutine blocks only it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _loop, _thread and _closed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()  # of the loop's thread

    def adopt(self, job: Job, awaitable: Awaitable[Any], context: contextvars.Context) -> None:
        """Drive *awaitable* on the loop. Any thread."""
        with self._lock:
            loop = None if self._closed else self._running()
        if loop is None:
            job.refuse(awaitable)
        else:
            loop.call_soon_threadsafe(self._drive, job, awaitable, context)

    def _running(self) -> asyncio.AbstractEventLoop:
        """Hold ``_lock``."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            name = f"wove-ws-tasks-{next(_numbers)}"
            self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name=name, daemon=True)
            self._thread.start()
        return self._loop

    def _drive(self, job: Job, awaitable: Awaitable[Any], context: contextvars.Context) -> None:
        if job.cancel_requested:
            context.run(job.refuse, awaitable)
            return
        job.task = asyncio.get_running_loop().create_task(job.drive(awaitable), context=context)
        self._tasks.add(job.task)
        job.task.add_done_callback(self._tasks.discard)

    def cancel(self, job: Job) -> None:
        """Cancel the coroutine of *job*, wherever it is on its way. Any thread."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(_cancel_task, job)

    def close(self, timeout: float) -> bool:
        """Cancel every coroutine and stop the loop; return whether it stopped within *timeout* seconds."""
        with self._lock:
            if self._closed or self._loop is None or self._thread is None:
                self._closed = True
                return True
            self._closed = True
            loop, thread = self._loop, self._thread
            loop.call_soon_threadsafe(self._cancel_all, loop, timeout / 2)
        thread.join(timeout)
        return not thread.is_alive()

    def _cancel_all(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if not tasks:
            loop.stop()
            return
        loop.call_later(grace, loop.stop)
        for task in tasks:
            task.add_done_callback(lambda _: None if self._tasks else loop.stop())


def _cancel_task(job: Job) -> None:
    if job.task is not None:
        job.task.cancel()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except BaseException:  # a SystemExit out of a task that a coroutine started ends here
            _logger.warning("A background task of a coroutine tried to end the worker.", exc_info=True)
        else:
            break
    finish(loop)
