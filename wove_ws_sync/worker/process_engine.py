"""The engine ``processes``: each slot is a process, which is killed with the task that is to stop.

Owns: a thread for each slot, the line of jobs, the connections to the processes. Never:
unpickles what a task is or returns.

A process gets its jobs over a connection of its own and not from its pool, whose one channel
is shared by all: a process killed while it holds the lock of that would stop the others. So a
process may be killed at any moment, and the end of its connection says that it is gone,
whatever its exit code was. For the pool each process has one task that never ends.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue

from .engines import EngineError, check_workers
from .events import service_error
from .jobs import Job
from .process_child import serve
from .process_pools import Employment, ProcessPools
from .runs import Stopped

__all__ = ["ProcessEngine"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()

#: How long a process may take to start, in seconds.
_START_TIMEOUT = 60.0
#: How long the pool may take to tell how a process ended, in seconds; it looks every 0.1 s.
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
        self._waiting: dict[int, SimpleQueue[tuple[Connection, int] | None]] = {}
        self._failure = ""
        self._pools: ProcessPools | None = None
        self._listener: Listener | None = None
        self._key = secrets.token_bytes(32)
        self._serials = itertools.count()
        self._slots = [_Slot(self) for _ in range(self.workers)]
        self._threads: list[threading.Thread] = []
        self._is_up = threading.Event()

    # -- the service's loop ------------------------------------------------------

    def start(self) -> None:
        """See Engine. Blocks until the first process is there."""
        self._pools = ProcessPools(serve, self.workers)
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
        if self._pools is not None:
            self._start_thread(f"wove-ws-closer-{next(_numbers)}", self._pools.close)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # -- the processes -----------------------------------------------------------

    def hire(self) -> _Child | None:
        """Return a process that is ready, None if the engine is closed. Blocks."""
        assert self._pools is not None
        assert self._listener is not None
        level, formatter = logging.getLogger().level, _stderr_formatter()
        while True:
            inbox: SimpleQueue[tuple[Connection, int] | None] = SimpleQueue()
            with self._changed:
                if self._closing.is_set():
                    return None
                number = next(self._serials)
                self._waiting[number] = inbox
            try:
                employment = self._pools.employ((self._listener.address, self._key, number, level, formatter))
            except Exception as exc:  # descriptors or memory are short, say
                with self._changed:
                    del self._waiting[number]
                self._pause(f"{type(exc).__name__}: {exc}")
                continue
            if employment is None:  # closed meanwhile
                return None
            arrived = employment.first_of(inbox, _START_TIMEOUT)
            with self._changed:
                del self._waiting[number]  # so that nothing arrives any more
            while arrived is None and not inbox.empty():
                arrived = inbox.get()
            if arrived is not None:
                self._is_up.set()
                connection, pid = arrived
                return _Child(connection, pid, employment)
            failure = employment.failure()
            employment.end()
            self._pause(failure)

    def _pause(self, failure: str) -> None:
        """Wait before the next attempt to have a process."""
        if not self._closing.is_set():
            self._failure = f"A process of the engine could not be started: {failure}."
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
            if inbox is not None:
                inbox.put((connection, pid))
                return
        connection.close()  # which ends the process

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

    def kill(self, slot: _Slot) -> None:
        """End the process of *slot* with the job that it executes."""
        with self._changed:
            slot.kill()

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


class _Child:
    """A process that is ready, and the connection to it."""

    def __init__(self, connection: Connection, pid: int, employment: Employment) -> None:
        self.connection = connection
        self.pid = pid
        self._employment = employment

    def dismiss(self) -> int | None:
        """Wait until the process is gone, which it is with its connection; return its exit code if known."""
        self.connection.close()
        return self._employment.exit_code(_EXIT_CODE_TIMEOUT)

    def leave(self) -> None:
        """End what there is of the process. To be called once."""
        self.connection.close()
        self._employment.end()  # the pool does not notice the end of a process whose exit code is 0


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
                child.leave()

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
        except Exception:  # memory was short, say: what the process does from here on is not known
            _logger.exception("A process of the engine is ended, as talking to it failed.")
            self._engine.kill(self)
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
