"""The engine ``dask:ADDRESS``: tasks run on the Dask cluster whose scheduler is at ADDRESS.

Owns: the client of that cluster. Never: starts a scheduler or a worker. A task whose Dask
worker is lost is executed again by another one, as often as Dask is configured to; Dask
cannot stop what runs, and does not tell what has begun.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

from .engines import EngineError
from .future_engine import FutureEngine
from .jobs import Job

__all__ = ["DaskEngine"]

#: How long the scheduler may take to answer, in seconds.
_CONNECT_TIMEOUT = 10


class DaskEngine(FutureEngine):
    """Run tasks on a Dask cluster; *workers* bounds how many it has at once (default: no bound)."""

    cancels = frozenset()

    def __init__(self, address: str, workers: int | None = None) -> None:
        super().__init__(self._connect, name=f"dask:{address}", workers=workers)
        self._address = address
        self._client: Any = None

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
        # Dask takes calls with equal arguments for one and the same unless told that they are not pure.
        return self._client.get_executor(pure=False)  # type: ignore[no-any-return]

    def _make(self) -> Executor:
        return self._connect()

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
