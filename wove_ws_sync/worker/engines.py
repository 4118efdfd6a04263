"""What executes jobs: the one protocol of all engines, and the choice of one by its name.

Owns: what an engine is, what ``--engine`` may say. Never: runs a job; each engine is a
module of its own, imported when it is asked for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Protocol

from .jobs import Job
from .runs import Stopped

__all__ = ["Engine", "EngineError", "check_engine", "check_workers", "default_threads", "make_engine"]

_CHOICES = "threads, processes, dask:ADDRESS or module:factory"


class EngineError(RuntimeError):
    """An engine that cannot be had: its package is missing, its cluster does not answer."""


class Engine(Protocol):
    """What the service needs of an engine. All methods are called from the service's loop.

    ``workers`` is how many jobs run at once. ``cancels`` says which jobs can be kept from
    ending by themselves: "queued" ones, "coroutines", running "calls". Hosts are told, as what
    cannot be stopped is not acknowledged either.
    """

    name: str
    workers: int
    cancels: frozenset[str]

    def start(self) -> None:
        """Get ready to run jobs. Raises RuntimeError, mostly EngineError, if that is impossible."""

    def submit(self, job: Job) -> None:
        """Have *job* executed as soon as there is a free slot. Raises RuntimeError if it cannot be taken."""

    def cancel(self, job: Job) -> Stopped:
        """Stop the job if that is possible, and say what was.

        Called again once nobody waits for the job any more, with ``job.abandoned`` set.
        """

    def close(self, timeout: float) -> bool:
        """Stop everything, blocking up to *timeout* seconds; return whether nothing is left running."""


def default_threads() -> int:
    """Return how many threads run tasks unless someone says otherwise."""
    return min(32, (os.cpu_count() or 1) + 4)


def check_workers(workers: int | None) -> int | None:
    """Return *workers*. Raises TypeError or ValueError for what is not a whole number from 1 up, nor None."""
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int)):
        raise TypeError(f"workers must be a whole number, not {workers!r}.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}.")
    return workers


def check_engine(name: str) -> str:
    """Return *name* if it has the form of an engine's. Raises ValueError."""
    kind, colon, rest = name.partition(":")
    if name in ("threads", "processes") or (kind and rest):
        return name
    if colon and kind == "dask":
        raise ValueError(f"The engine {name!r} needs the address of a scheduler, as in dask:tcp://HOST:8786.")
    raise ValueError(f"Unknown engine {name!r}: choose {_CHOICES}.")


def make_engine(name: str, workers: int | None = None) -> Engine:
    """Return the engine called *name*, not started.

    Raises ValueError for a name that is none, EngineError for an engine that cannot be had here.
    """
    kind, _, rest = check_engine(name).partition(":")
    if name == "threads":
        from .thread_engine import ThreadEngine

        return ThreadEngine(workers)
    if name == "processes":
        from .process_engine import ProcessEngine

        return ProcessEngine(workers)
    from .future_engine import FutureEngine

    if kind == "dask":
        from .dask_engine import DaskEngine

        return DaskEngine(rest, workers)
    return FutureEngine(_factory(kind, rest), name=name, workers=workers)


def _factory(module: str, attribute: str) -> Callable[[], Executor]:
    """Return what makes the executor of ``module:factory``. Raises ValueError."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError as exc:
        raise ValueError(f"Unknown engine '{module}:{attribute}': {exc}. Choose {_CHOICES}.") from exc
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{module!r} has nothing called {attribute!r} that makes an executor.")
    return found  # type: ignore[no-any-return]
