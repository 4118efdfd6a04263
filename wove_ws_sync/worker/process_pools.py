"""Processes for the engine ``processes``, each of which does one thing until it ends.

Owns: the pools of ``pebble``, which starts processes and replaces those that have ended.
Never: knows what a process does, never talks to one.

A pool breaks for good when a process is killed while it starts or has nothing to do: it gives
none any more, and may never tell what became of one that it was asked for. What runs in it goes
on. A new one takes its place then, as in that of one that gives no process in time, and it is
ended with the last process of it that is used.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue
from typing import Any

from .engines import EngineError

__all__ = ["Employment", "ProcessPools"]

_numbers = itertools.count()

#: How long to wait, in seconds, for a process of a pool that broke meanwhile; it may have started before.
_BROKEN_TIMEOUT = 5.0
#: How often to look whether the pool has, in seconds.
_LOOK = 0.5


class ProcessPools:
    """Start processes that call *function*, up to *workers* at a time in each pool. Thread-safe.

    Raises EngineError if pebble is not installed.
    """

    def __init__(self, function: Callable[..., None], workers: int) -> None:
        self._function = function
        self._workers = workers
        self._lock = threading.Lock()  # guards all that follows
        self._is_closed = False
        self._used: dict[Any, int] = {}  # how many employments of each pool go on
        self._newest = self._add()
        self._closers: list[threading.Thread] = []

    def _add(self) -> Any:
        try:
            from pebble import ProcessPool
        except ImportError:
            raise EngineError(
                "The engine 'processes' needs the package pebble: pip install \"wove_ws_sync[processes]\""
            ) from None
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([self._function.__module__])
        pool = ProcessPool(max_workers=self._workers, context=context)
        self._used[pool] = 0
        return pool

    def employ(self, arguments: tuple[Any, ...]) -> Employment | None:
        """Have a process call the function with *arguments*; None if the pools are closed.

        Raises whatever starting a process raises: OSError if descriptors are short, say.
        """
        with self._lock:
            if self._is_closed:
                return None
            try:
                future = self._newest.schedule(self._function, arguments)
            except RuntimeError:  # it broke
                self._newest = self._add()
                self._end_unused()
                future = self._newest.schedule(self._function, arguments)
            self._used[self._newest] += 1
            return Employment(self, self._newest, future)

    def leave(self, pool: Any, *, is_stuck: bool) -> None:
        """Note that one of the employments of *pool* is over; have no more of it if it *is_stuck*."""
        with self._lock:
            self._used[pool] -= 1
            if self._is_closed:
                return
            if is_stuck and pool is self._newest:
                self._newest = self._add()
            self._end_unused()

    def _end_unused(self) -> None:
        """Hold ``_lock``."""
        self._closers = [closer for closer in self._closers if closer.is_alive()]
        for pool in [each for each, count in self._used.items() if not count and each is not self._newest]:
            name = f"wove-ws-pool-closer-{next(_numbers)}"
            closer = threading.Thread(target=_end, args=(pool,), name=name, daemon=True)
            try:
                closer.start()
            except RuntimeError:  # there are too many threads: another time
                return
            self._closers.append(closer)
            del self._used[pool]

    def close(self) -> None:
        """End every process. Blocks."""
        with self._lock:
            self._is_closed = True
        for pool in self._used:
            _end(pool)
        for closer in self._closers:
            closer.join()


def _end(pool: Any) -> None:
    multiprocessing.active_children()  # notices which are gone: their numbers may be another's
    pool.stop()
    pool.join()


class Employment:
    """What one process is there for. ``end()`` has to be called once, whatever became of it."""

    def __init__(self, pools: ProcessPools, pool: Any, future: Future[None]) -> None:
        self._pools = pools
        self._pool = pool
        self._future = future
        self._is_stuck = False

    def first_of(self, inbox: SimpleQueue[Any], timeout: float) -> Any:
        """Return what comes to *inbox*, None if the process ended before or none is to be expected.

        Waits *timeout* seconds at most. None in *inbox* ends that, too.
        """
        self._future.add_done_callback(lambda _: inbox.put(None))
        began = time.monotonic()
        while time.monotonic() - began < (timeout if self._pool.active else min(timeout, _BROKEN_TIMEOUT)):
            try:
                return inbox.get(timeout=_LOOK)
            except Empty:
                continue
        self._is_stuck = True
        return None

    def failure(self) -> str:
        """Return why there is no process."""
        try:
            error = self._future.exception(0)
        except (TimeoutError, CancelledError):
            return "its pool is broken, or it took too long"
        return "it ended at once" if error is None else str(error) or type(error).__name__

    def exit_code(self, timeout: float) -> int | None:
        """Return how a process that is gone ended, None if pebble does not tell within *timeout* seconds."""
        try:
            error = self._future.exception(timeout)
        except (TimeoutError, CancelledError):
            error = None
        code: int | None = getattr(error, "exitcode", None)
        return code

    def end(self) -> None:
        """Let go of the process, which is ended if it is still there."""
        self._future.cancel()
        self._pools.leave(self._pool, is_stuck=self._is_stuck)
