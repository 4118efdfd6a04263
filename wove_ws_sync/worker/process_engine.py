"""The engine ``processes``: each slot is a process, which is killed with the task that is to stop.

Owns: a thread for each slot, the line of jobs, the connections to the processes. ``pebble``
starts the processes and replaces those that end. Never: unpickles what a task is or returns.

A process gets its jobs over a connection of its own and not from pebble, whose one channel
is shared by all: a process killed while it holds the lock of that would stop the others. So a
process may be killed at any moment, and the end of its connection says that it is gone,
whatever its exit code was. For pebble each process has one task that never ends.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from typing import Any

from .engines import EngineError, check_workers
from .events import service_error
from .jobs import Job
from .process_child import serve
from .runs import Stopped

__all__ = ["ProcessEngine"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()

#: How long the first process may take to start, in seconds.
_START_TIMEOUT = 60.0
#: How long pebble may take to tell how a process ended, in seconds; it looks every 0.1 s.
_EXIT_CODE_TIMEOUT = 2.0
#: Between two attempts to start a process, in seconds.
_PAUSE = 1.0
#: After a connection that failed, in seconds.
_BETWEEN_ACCEPTS = 0.05
#: A job that ends so many processes before it begins is not given to another one.
_MAX_ATTEMPTS = 3


class ProcessEngine:
    """Run each task, coroutine or not, in one of *workers* processes (default: one for each CPU)."""

    name = "processes"
    cancels = frozenset({"queued", "coroutines", "calls"})

    def __init__(self, workers: int | None = None) -> None:
        self.workers = check_workers(workers) or os.cpu_count() or 1
        self._closing = threading.Event()
        # Guards all that follows, and each slot's job and child; notifies slots that wait for a job.
        self._changed = threading.Condition()
        self._line: deque[Job] = deque()
        self._waiting: dict[int, SimpleQueue[_Child | None]] = {}
        self._failure = ""
        self._pools: list[Any] = []  # the last one is in use
        self._listener: Listener | None = None
        self._key = secrets.token_bytes(32)
        self._serials = itertools.count()
        self._slots = [_Slot(self) for _ in range(self.workers)]
        self._threads: list[threading.Thread] = []
        self._is_up = threading.Event()

    # -- the service's loop ------------------------------------------------------

    def start(self) -> None:
        """See Engine. Blocks until the first process is there."""
        self._add_pool()
        self._listener = Listener(backlog=self.workers + 8, authkey=self._key)
        self._start_thread(f"wove-ws-accept-{next(_numbers)}", self._accept)
        for slot in self._slots:
            self._start_thread(f"wove-ws-slot-{next(_numbers)}", slot.run)
        if not self._is_up.wait(_START_TIMEOUT):
            raise EngineError(self._failure or f"No process of the engine was ready in {_START_TIMEOUT:g} s.")

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def submit(self, job: Job) -> None:
        """See Engine."""
        with self._changed:
            if self._closing.is_set():
                raise RuntimeError("the worker service is stopping")
            self._line.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> Stopped:
        """See Engine. A task that runs ends with its process, at once."""
        with self._changed:
            repeated, job.cancel_requested = job.cancel_requested, True
            slot: _Slot | None = job.future
            if slot is None:  # whoever takes it from the line looks at the flag
                job.forget()
                return Stopped.WITHDRAWN
            if not repeated and slot.job is job:
                slot.kill()
        return Stopped.STOPPING

    def close(self, timeout: float) -> bool:
        """See Engine."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._closing.set()
            self._line.clear()
            for slot in self._slots:
                slot.kill()
            for inbox in self._waiting.values():
                inbox.put(None)
            self._changed.notify_all()
        if self._listener is not None:
            with contextlib.suppress(Exception):  # what waits in accept() has to be woken, if it still does:
                Client(self._listener.address).close()  # so nothing is said, nor waited for
            self._listener.close()
        self._start_thread(f"wove-ws-closer-{next(_numbers)}", self._end_pools)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- the processes -----------------------------------------------------------

    def _add_pool(self) -> None:
        try:
            from pebble import ProcessPool
        except ImportError:
            raise EngineError(
                "The engine 'processes' needs the package pebble: pip install \"wove_ws_sync[processes]\""
            ) from None
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([serve.__module__])
        self._pools.append(ProcessPool(max_workers=self.workers, context=context))

    def _end_pools(self) -> None:
        for pool in self._pools:
            pool.stop()
            pool.join()

    def hire(self) -> _Child | None:
        """Return a process that is ready, None if the engine is closed. Blocks."""
        while True:
            inbox: SimpleQueue[_Child | None] = SimpleQueue()
            with self._changed:
                if self._closing.is_set():
                    return None
                number = next(self._serials)
                self._waiting[number] = inbox
                employment = self._employ(number)
            employment.add_done_callback(functools.partial(_tell_end, inbox))
            child = inbox.get()
            with self._changed:
                del self._waiting[number]
            if child is not None:
                child.employment = employment
                self._is_up.set()
                return child
            self._pause(employment)

    def _employ(self, number: int) -> Future[None]:
        """Have pebble call ``serve`` in a process that has no other task. Hold ``_changed``."""
        assert self._listener is not None
        level = logging.getLogger().level
        arguments = (self._listener.address, self._key, number, level, _stderr_formatter())
        try:
            return self._pools[-1].schedule(serve, arguments)  # type: ignore[no-any-return]
        except RuntimeError:  # it broke, as it does when a process without a task is killed
            self._add_pool()  # what runs in the other one goes on
            return self._pools[-1].schedule(serve, arguments)  # type: ignore[no-any-return]

    def _pause(self, employment: Future[None]) -> None:
        """Wait before the next attempt to have a process."""
        if not self._closing.is_set():
            self._failure = f"A process of the engine could not be started: {employment.exception()}."
            _logger.error("%s", self._failure)
            self._closing.wait(_PAUSE)

    def _accept(self) -> None:
        """Take the connections of processes that have started."""
        assert self._listener is not None
        while not self._closing.is_set():
            try:
                self._welcome(self._listener.accept())
            except Exception:  # one that broke off, or cannot say who it is; or no descriptor is to be had
                self._closing.wait(_BETWEEN_ACCEPTS)

    def _welcome(self, connection: Connection) -> None:
        number, pid = connection.recv()
        with self._changed:
            inbox = self._waiting.get(number)
        if inbox is None:
            connection.close()  # which ends the process
        else:
            inbox.put(_Child(connection, pid))

    # -- the line ------------------------------------------------------------------

    def next_job(self, slot: _Slot) -> Job | None:
        """Return the next job for *slot*, None if the engine is closed. Blocks."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closing.is_set() or self._line)
                if self._closing.is_set():
                    return None
                job = self._line.popleft()
                if not job.cancel_requested and not job.abandoned:
                    job.future = slot
                    slot.job = job
                    return job

    def ended(self, slot: _Slot) -> bool:
        """Note that the job of *slot* has ended; return whether its process may take another."""
        with self._changed:
            slot.job = None
            return slot.child is not None

    def lost(self, slot: _Slot) -> None:
        """Note that the process of *slot* is gone, and its number may be another's."""
        with self._changed:
            slot.child = None

    def put_back(self, slot: _Slot, job: Job) -> bool:
        """Let another process have a job that did not begin; return whether that is wanted."""
        with self._changed:
            slot.job = None
            if self._closing.is_set() or job.cancel_requested or job.attempts >= _MAX_ATTEMPTS:
                return False
            job.future = None
            self._line.appendleft(job)
            self._changed.notify()
            return True


def _stderr_formatter() -> logging.Formatter | None:
    """Return how the service writes its log to stderr, None if it does not."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            return handler.formatter
    return None


def _tell_end(inbox: SimpleQueue[_Child | None], employment: Future[None]) -> None:
    inbox.put(None)  # which matters only if the process did not even get ready


class _Child:
    """A process that is ready, and the connection to it."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.employment: Future[None] | None = None

    def dismiss(self) -> int | None:
        """Wait until the process is gone, which it is with its connection; return its exit code if known."""
        self.connection.close()
        assert self.employment is not None
        try:
            error = self.employment.exception(_EXIT_CODE_TIMEOUT)
        except Exception:
            error = None
        self.employment.cancel()  # pebble does not notice the end of a process whose exit code is 0
        code: int | None = getattr(error, "exitcode", None)
        return code


class _Slot:
    """A thread with a process at a time."""

    def __init__(self, engine: ProcessEngine) -> None:
        self._engine = engine
        self.job: Job | None = None
        self.child: _Child | None = None  # None as well once it was killed

    def kill(self) -> None:
        """End the process, if it executes a job. Hold the engine's ``_changed``.

        An idle one ends with its connection. It may have ended long ago, and its number be another's.
        """
        if self.job is None:
            return
        child, self.child = self.child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and what its task has started

    def run(self) -> None:
        """Execute jobs until the engine is closed."""
        while (child := self._engine.hire()) is not None:
            self.child = child
            try:
                self._use(child)
            except Exception:
                _logger.exception("A slot of the engine failed.")
            finally:
                self.child = None
                child.connection.close()

    def _use(self, child: _Child) -> None:
        """Have *child* execute jobs until one of the two is gone."""
        while (job := self._engine.next_job(self)) is not None:
            begun, ended = self._execute(child, job)
            if not ended:
                self._lost(child, job, begun=begun)
                return
            if not self._engine.ended(self):
                child.dismiss()
                return

    def _execute(self, child: _Child, job: Job) -> tuple[bool, bool]:
        """Return whether the job began, and whether it ended."""
        begun = False
        try:
            if job.attempts and child.connection.poll():  # this one as well ended while it was idle
                return False, False
            job.attempts += 1
            child.connection.send(job.order())
            while True:
                kind = child.connection.recv_bytes().decode("ascii")
                event = child.connection.recv_bytes()
                if not begun:
                    begun = True
                    job.forget()  # its payload is elsewhere now, or this kept it in memory twice
                job.relay(kind, event)
                if kind == "ended":
                    return True, True
        except (EOFError, OSError):
            return begun, False

    def _lost(self, child: _Child, job: Job, *, begun: bool) -> None:
        """End a job whose process is gone."""
        self._engine.lost(self)
        code = child.dismiss()
        if not begun and self._engine.put_back(self, job):
            return
        self._engine.ended(self)
        if job.cancel_requested:
            job.relay_cancelled()
        else:
            job.relay("ended", _died(job, code))


def _died(job: Job, code: int | None) -> bytes:
    how = "it ended itself" if code is None else f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += ", perhaps because memory was short"
    message = f"The process that executed the task is gone ({how}). The task may be run again."
    return service_error(job.run_id, job.task_id, "WorkerProcessDied", message, retryable=True)
