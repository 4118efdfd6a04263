"""joblib on a worker service: ``parallel_config("wove_ws")``.

Owns: the backend, its executor between two calls of Parallel, the thread in which joblib learns
of results. Never: limits how many runs there are; joblib submits what it wants under way.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

try:
    import joblib
    from joblib.parallel import (
        AutoBatchingMixin,
        ParallelBackendBase,
        SequentialBackend,
        register_parallel_backend,
    )
except ModuleNotFoundError as exc:
    if exc.name != "joblib":
        raise
    raise ModuleNotFoundError(
        'wove_ws_sync.contrib.joblib needs the package joblib: pip install "wove_ws_sync[joblib]"',
        name="joblib",
    ) from None

from ..futures import RunFuture, WebSocketExecutor

__all__ = ["NAME", "WoveBackend", "register"]

#: What joblib knows the backend by.
NAME = "wove_ws"
_numbers = itertools.count()
#: What Parallel hands to every backend, for pools of processes on this machine.
_LOCAL = frozenset({"max_nbytes", "mmap_mode", "temp_folder", "verbose", "context", "idle_worker_timeout"})

_Callback = Callable[[RunFuture[Any]], object]
_Ended = tuple[_Callback, RunFuture[Any]]


def register(*, make_default: bool = False) -> None:
    """Make ``"wove_ws"`` a backend of joblib; *make_default* uses it wherever none is named. Idempotent."""
    register_parallel_backend(NAME, WoveBackend, make_default=make_default)


class WoveBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """Run the batches of ``joblib.Parallel`` on a worker service.

    *executor* is one to use, which stays open; else *settings* are those of :class:`WebSocketExecutor`,
    and without them the ``WOVE_WS_*`` variables. *slots* is what ``n_jobs=-1`` means; by default
    the CPUs that a task may use there, which one run finds out, and 2 at least.
    """

    supports_retrieve_callback = True
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        executor: WebSocketExecutor | None = None,
        slots: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or slots < 1):
            raise ValueError(f"slots must be a whole number from 1 up, not {slots!r}.")
        if executor is not None and settings:
            raise TypeError(f"With executor= there are no settings, not {sorted(settings)}.")
        self._given = executor
        self._settings = settings
        self._slots = slots
        self._pool: WebSocketExecutor | None = None
        self._ended: SimpleQueue[_Ended | None] = SimpleQueue()
        # Guards the futures, which are added and taken out in different threads.
        self._lock = threading.Lock()
        self._futures: set[RunFuture[Any]] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many runs are to be under way: *n_jobs*, or from -1 down the slots and fewer."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        if self._slots is None:
            with self._some_executor() as pool:
                # With a single slot joblib would not ask the worker service, but call the tasks here.
                self._slots = max(2, pool.submit(joblib.cpu_count).result())
        return max(1, self._slots + 1 + n_jobs)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **settings: Any
    ) -> int:
        """Get ready for a call of Parallel; *settings* are added to those of the backend.

        For a single run at a time nothing is needed: joblib calls the tasks in this thread then.
        """
        self.parallel = parallel
        own = {key: value for key, value in settings.items() if key not in _LOCAL}
        self._settings = {**self._settings, **own}
        jobs = self.effective_n_jobs(n_jobs)  # joblib does not call terminate() if this fails, nor for 1
        if self._pool is None and jobs > 1:
            self._pool = self._given or WebSocketExecutor(**self._settings)
            self._ended = SimpleQueue()
            name = f"wove-ws-joblib-{next(_numbers)}"
            threading.Thread(target=_tell, args=(self._ended,), name=name, daemon=True).start()
        return jobs

    def submit(self, func: Callable[[], Any], callback: _Callback | None = None) -> RunFuture[Any]:
        """Send one batch; *callback* is called with its future in a thread of the backend's."""
        assert self._pool is not None
        ended = self._ended
        future = self._pool.submit(func)
        with self._lock:
            self._futures.add(future)

        def done(future: RunFuture[Any]) -> None:
            with self._lock:
                self._futures.discard(future)
            if callback is not None:
                ended.put((callback, future))

        future.add_done_callback(done)  # type: ignore[arg-type]  # it is called with this future
        return future

    def retrieve_result_callback(self, out: RunFuture[Any]) -> Any:
        """Return what the batch returned, or raise what it raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel what is under way, without waiting for an acknowledgement."""
        with self._lock:
            futures = list(self._futures)
        for future in futures:
            future._ask_to_cancel()

    def terminate(self) -> None:
        """Let go of the executor; its connection stays for the next call, for ``idle_timeout``."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        self._ended.put(None)
        self.reset_batch_stats()
        if pool is not self._given:
            pool.shutdown(wait=False, cancel_futures=True)

    def get_nested_backend(self) -> tuple[Any, None]:
        """Return what a Parallel inside a task uses: no parallelism, as the slots are taken by tasks."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None

    @contextlib.contextmanager
    def _some_executor(self) -> Iterator[WebSocketExecutor]:
        """Give out the executor, or one that lives just as long as this context."""
        found = self._pool or self._given
        if found is not None:
            yield found
            return
        with WebSocketExecutor(**self._settings) as pool:
            yield pool


def _tell(ended: SimpleQueue[_Ended | None]) -> None:
    """Tell joblib of the ends: it unpickles and submits there, for which the reader has no time."""
    while (item := ended.get()) is not None:
        callback, future = item
        callback(future)
        del item, callback, future  # or the last result would stay for as long as this waits
