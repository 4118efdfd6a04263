"""The engine ``dask:ADDRESS``: tasks run on the Dask cluster whose scheduler is at ADDRESS.

Owns: the client of that cluster. Never: starts a scheduler or a worker. A task whose Dask
worker is lost is executed again by another one, as often as Dask is configured to; Dask
cannot stop what runs, and does not tell what has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from typing import Any

from .engines import EngineError
from .future_engine import FutureEngine
from .jobs import Job

__all__ = ["DaskEngine"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()

#: How long the scheduler may take to answer, in seconds.
_CONNECT_TIMEOUT = 10
#: Between two attempts to find it again, in seconds.
_PAUSE = 1.0


class _Cluster(Executor):
    """A Dask client as an executor.

    Dask has one of its own. That takes a result for an error if the worker that holds it is lost
    in the moment in which it is fetched.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have the cluster call *fn*; see ``concurrent.futures.Executor``."""
        # Dask takes calls with equal arguments for one and the same unless told that they are not pure.
        distant = self._client.submit(fn, *args, **kwargs, pure=False)
        future: Future[Any] = Future()
        future.add_done_callback(functools.partial(_give_up, distant))
        self._client.loop.add_callback(_fetch, distant, future)
        return future


def _give_up(distant: Any, future: Future[Any]) -> None:
    if future.cancelled() and distant.status != "cancelled":
        distant.cancel()


async def _fetch(distant: Any, future: Future[Any]) -> None:
    """Await a future of Dask, on its client's loop, and hand on what comes of it."""
    try:
        result = await distant
    except (CancelledError, asyncio.CancelledError):
        future.cancel()
    except BaseException as exc:
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            future.set_exception(exc)
    else:
        with contextlib.suppress(InvalidStateError):
            future.set_result(result)


class DaskEngine(FutureEngine):
    """Run tasks on a Dask cluster; *workers* bounds how many it has at once (default: no bound)."""

    cancels = frozenset()

    def __init__(self, address: str, workers: int | None = None) -> None:
        super().__init__(self._connect, name=f"dask:{address}", workers=workers)
        self._address = address
        self._client: Any = None
        self._ending = threading.Event()
        self._searching = threading.Lock()  # held while a thread looks for the scheduler

    def _connect(self) -> Executor:
        try:
            from dask.distributed import Client
        except ImportError:
            raise EngineError(
                "The engine 'dask:ADDRESS' needs the package distributed: pip install \"wove_ws_sync[dask]\""
            ) from None
        try:
            self._client = Client(  # type: ignore[no-untyped-call]
                self._address, timeout=_CONNECT_TIMEOUT, set_as_default=False, asynchronous=False
            )
        except Exception as exc:
            raise EngineError(
                f"No Dask scheduler answers at {self._address}: {str(exc) or type(exc).__name__}. "
                "Start one with 'dask scheduler', or correct the address."
            ) from exc
        return _Cluster(self._client)

    def _make(self) -> Executor:
        return self._connect()

    def _give(self, job: Job) -> Future[list[tuple[str, bytes]]]:
        """Refuse jobs, which may be run again, once the client has closed itself: its patience is short."""
        self._refuse_if_lost()
        future = super()._give(job)
        self._refuse_if_lost()  # what a client gets while it closes itself has no end
        return future

    def _refuse_if_lost(self) -> None:
        if self._client.status in ("closing", "closed"):
            if self._searching.acquire(blocking=False):
                name = f"wove-ws-dask-{next(_numbers)}"
                threading.Thread(target=self._search, name=name, daemon=True).start()
            raise EngineError(f"the connection to the scheduler at {self._address} was lost")

    def _search(self) -> None:
        """Replace the client as soon as the scheduler answers."""
        before = self._client
        try:
            while not self._ending.is_set():
                with contextlib.suppress(EngineError):
                    self._executor = self._connect()
                    _logger.warning("The scheduler at %s answers again.", self._address)
                    break
                self._ending.wait(_PAUSE)
            if self._ending.is_set():  # and close() knew of the one before, perhaps
                self._client.close()
        finally:
            self._searching.release()
        with contextlib.suppress(Exception):
            before.close()  # ends its threads

    def close(self, timeout: float) -> bool:
        """See Engine."""
        self._ending.set()
        return super().close(timeout)

    def _size(self, executor: Any) -> int:
        return 0

    def _withdraw(self, job: Job) -> bool:
        future = job.future  # which its callback, in another thread, takes away
        if job.abandoned and future is not None:
            future.cancel()  # frees what Dask keeps of it, and takes it from its queue
        return False

    def _shut_down(self, executor: Executor) -> None:
        executor.shutdown(wait=False)
        self._client.close()
