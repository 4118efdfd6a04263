"""What ``bench`` measures on: the worker service, its rivals, and what a sample is.

Owns: them, while the context lasts. Never: knows a case, does statistics over samples, prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Any

import websocket
import wove

from ..aio import AsyncWebSocketEnvironmentExecutor
from ..futures import WebSocketExecutor
from ..session import close_links
from ..testing import LoopbackWorker

__all__ = [
    "LOCAL",
    "MIB",
    "OURS",
    "TIMEOUT",
    "WOVE",
    "Case",
    "Contestant",
    "Ground",
    "Ratio",
    "check",
    "median",
    "rate",
]

#: The environments of a Ground.
LOCAL, WOVE, OURS = "bench_local", "bench_wove", "bench_ours"
MIB = 1024 * 1024
#: Seconds that no healthy call takes.
TIMEOUT = 60.0


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the same thing; ``sample`` does it and returns one measurement."""

    name: str
    sample: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Two contestants compared: ``of`` divided by ``to``; ``over`` is taken off both first."""

    name: str
    of: str
    to: str
    goal: float
    at_most: bool
    over: str | None = None

    def met(self, value: float | None) -> bool | None:
        """Tell whether *value* reaches the goal; None if there is no value to judge."""
        if value is None:
            return None
        return value <= self.goal if self.at_most else value >= self.goal


@dataclasses.dataclass(frozen=True)
class Case:
    """Contestants that are measured in turn, and how they are compared."""

    name: str
    title: str
    unit: str
    contestants: Sequence[Contestant]
    ratios: Sequence[Ratio]


class Ground:
    """The worker service, and Wove's configuration for it, while the context lasts.

    Two environments name the same service, one on Wove's own executor, one on ours.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Ground:
        with contextlib.ExitStack() as stack:
            self.worker = stack.enter_context(LoopbackWorker())
            stack.callback(close_links)
            target = self.worker.config
            environments: Any = {
                LOCAL: {"executor": "local"},
                WOVE: {"executor": wove.WebSocketEnvironmentExecutor(), "executor_config": target},
                OURS: {"executor": AsyncWebSocketEnvironmentExecutor(), "executor_config": target},
            }
            nothing_left: Any = dict.fromkeys(environments)
            stack.callback(wove.config, environments=nothing_left)
            wove.config(environments=environments)
            self.pool = stack.enter_context(WebSocketExecutor(**target))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def echoes(self) -> tuple[websocket.WebSocket, websocket.WebSocket]:
        """Return two connections of websocket-client to an echo server in a process of its own.

        The first is the library as it comes, the second is spared its check of UTF-8.
        """
        command = [sys.executable, "-m", f"{__package__}._bench_echo"]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        server = self._stack.enter_context(_server(command, {**os.environ, "PYTHONPATH": paths}))
        plain = websocket.create_connection(server, timeout=TIMEOUT)
        self._stack.callback(plain.close)
        unchecked = websocket.create_connection(server, timeout=TIMEOUT, skip_utf8_validation=True)
        self._stack.callback(unchecked.close)
        return plain, unchecked

    def executor(self, **config: Any) -> WebSocketExecutor:
        """Return a further executor on the worker service, on a connection of its own if *config* differs."""
        return self._stack.enter_context(WebSocketExecutor(**self.worker.config, **config))

    def process_engine(self) -> WebSocketExecutor:
        """Return an executor on a worker service of its own, whose engine has two processes."""
        worker = self._stack.enter_context(LoopbackWorker(workers=2, args=["--engine", "processes"]))
        return self._stack.enter_context(WebSocketExecutor(**worker.config))

    def processes(self) -> ProcessPoolExecutor:
        """Return a pool of processes, one for each CPU."""
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        return self._stack.enter_context(ProcessPoolExecutor(os.cpu_count(), mp_context=spawn))


@contextlib.contextmanager
def _server(command: list[str], env: dict[str, str]) -> Iterator[str]:
    """Run *command* for as long as the context lasts; the value is its first line."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError("the echo server did not start")
            yield line
        finally:
            process.kill()


def median(times: int, unit: float, call: Callable[[], Any]) -> Callable[[], float]:
    """Return a sample: the median time of one *call* among *times*, in *unit* seconds."""

    def sample() -> float:
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken) / unit

    return sample


def rate(count: int, call: Callable[[], Sequence[Any]]) -> Callable[[], float]:
    """Return a sample: tasks a second of one *call* that returns *count* results."""

    def sample() -> float:
        begun = time.perf_counter()
        check(len(call()), count)
        return count / (time.perf_counter() - begun)

    return sample


def check(got: Any, wanted: Any) -> None:
    if got != wanted:
        raise RuntimeError(f"a task returned {got!r} and not {wanted!r}")
