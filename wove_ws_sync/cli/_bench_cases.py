"""What ``bench`` measures: the contestants of each case, on one worker service.

Owns: the worker, the connections and what one sample of each contestant is. Never: does
statistics, prints.
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

from .. import frames, payloads
from ..aio import AsyncWebSocketEnvironmentExecutor
from ..futures import WebSocketExecutor
from ..options import DeliveryOptions
from ..session import close_links
from ..testing import LoopbackWorker

__all__ = ["CASES", "Case", "Contestant", "Ground", "Ratio"]

_LOCAL, _WOVE, _OURS = "bench_local", "bench_wove", "bench_ours"
_MIB = 1024 * 1024
# Seconds that no healthy call takes.
_TIMEOUT = 60.0


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


# -- the tasks; both executors pickle them by their name ------------------------------


def noop() -> None:
    """Do nothing."""


def nothing(item: int) -> None:
    """Do nothing with *item*."""


def length(blob: bytes) -> int:
    """Return how many bytes arrived."""
    return len(blob)


def zeros(size: int) -> bytes:
    """Return *size* bytes."""
    return bytes(size)


def compute(steps: int) -> int:
    """Compute in pure Python."""
    total = 0
    for number in range(steps):
        total += number
    return total


# -- the ground they run on -----------------------------------------------------------


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
                _LOCAL: {"executor": "local"},
                _WOVE: {"executor": wove.WebSocketEnvironmentExecutor(), "executor_config": target},
                _OURS: {"executor": AsyncWebSocketEnvironmentExecutor(), "executor_config": target},
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
        plain = websocket.create_connection(server, timeout=_TIMEOUT)
        self._stack.callback(plain.close)
        unchecked = websocket.create_connection(server, timeout=_TIMEOUT, skip_utf8_validation=True)
        self._stack.callback(unchecked.close)
        return plain, unchecked

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


def _median(times: int, unit: float, call: Callable[[], Any]) -> Callable[[], float]:
    """Return a sample: the median time of one *call* among *times*, in *unit* seconds."""

    def sample() -> float:
        taken = []
        for _ in range(times):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken) / unit

    return sample


def _rate(count: int, call: Callable[[], Sequence[Any]]) -> Callable[[], float]:
    """Return a sample: tasks a second of one *call* that returns *count* results."""

    def sample() -> float:
        begun = time.perf_counter()
        _check(len(call()), count)
        return count / (time.perf_counter() - begun)

    return sample


def _weave(environment: str, task: Callable[..., Any], items: Any = None, **values: Any) -> Any:
    """Run one weave with one task in *environment*, and return its result."""
    with wove.weave(**values) as w:
        w.do(items, environment=environment)(task)
    return w.result.final


def _check(got: Any, wanted: Any) -> None:
    if got != wanted:
        raise RuntimeError(f"a task returned {got!r} and not {wanted!r}")


# -- the cases ------------------------------------------------------------------------


def weave(ground: Ground, quick: bool) -> Case:
    """A warm weave with one task that does nothing."""
    times = 5 if quick else 20

    def contestant(name: str, environment: str) -> Contestant:
        return Contestant(name, _median(times, 1e-3, lambda: _check(_weave(environment, noop), None)))

    return Case(
        "weave",
        "warm weave with one no-op",
        "ms",
        (contestant("local", _LOCAL), contestant("wove", _WOVE), contestant("ours", _OURS)),
        (Ratio("overhead over local, ours / wove", "ours", "wove", 0.5, at_most=True, over="local"),),
    )


def roundtrip(ground: Ground, quick: bool) -> Case:
    """One submit and its result, against an echo of as many bytes."""
    times, (plain, unchecked), pool = 100 if quick else 500, ground.echoes(), ground.pool
    names = {"type": "run_task", "run_id": f"noop:{'0' * 32}", "task_id": "noop"}
    pickles = payloads.encode_frame({"callable": noop, "args": {}})
    message = frames.encode({**names, **pickles, "delivery": DeliveryOptions().as_frame({})}).decode()

    def echo(connection: websocket.WebSocket) -> None:
        connection.send(message)
        _check(connection.recv(), message)

    def submit() -> None:
        _check(pool.submit(noop).result(_TIMEOUT), None)

    return Case(
        "roundtrip",
        f"one round trip of {len(message)} bytes",
        "µs",
        (
            Contestant("echo", _median(times, 1e-6, lambda: echo(plain))),
            Contestant("echo, UTF-8 unchecked", _median(times, 1e-6, lambda: echo(unchecked))),
            Contestant("ours", _median(times, 1e-6, submit)),
        ),
        (
            Ratio("submit().result() / bare echo", "ours", "echo", 3.0, at_most=True),
            Ratio("the same / unchecked echo", "ours", "echo, UTF-8 unchecked", 3.0, at_most=True),
        ),
    )


def pipelined(ground: Ground, quick: bool) -> Case:
    """Many tasks that do nothing, all on their way at once."""
    count, pool, processes = 200 if quick else 1000, ground.pool, ground.processes()
    contestants = (
        Contestant("wove weave", _rate(count, lambda: _weave(_WOVE, nothing, range(count)))),
        Contestant("ours weave", _rate(count, lambda: _weave(_OURS, nothing, range(count)))),
        Contestant("ours map", _rate(count, lambda: list(pool.map(nothing, range(count), timeout=_TIMEOUT)))),
        Contestant("processes map", _rate(count, lambda: list(processes.map(nothing, range(count))))),
    )
    ratios = (
        Ratio("mapped weave, ours / wove", "ours weave", "wove weave", 1.0, at_most=False),
        Ratio("ours map / wove weave", "ours map", "wove weave", 1.0, at_most=False),
    )
    return Case("pipelined", f"{count} no-ops at once", "tasks/s", contestants, ratios)


def large(ground: Ground, quick: bool) -> Case:
    """A large argument, a large result, and the largest result Wove's own executor can take."""
    size, small, times = 16 * _MIB, _MIB // 2, 2 if quick else 10
    blob, none = os.urandom(size), bytes(small)

    def argument(environment: str) -> Callable[[], float]:
        return _median(1, 1e-3, lambda: _check(_weave(environment, length, blob=blob), size))

    def result(environment: str, wanted: int, times: int) -> Callable[[], float]:
        return _median(times, 1e-3, lambda: _check(len(_weave(environment, zeros, size=wanted)), wanted))

    contestants = (
        Contestant("argument 16 MiB, wove", argument(_WOVE)),
        Contestant("argument 16 MiB, ours", argument(_OURS)),
        Contestant("result 512 KiB, wove", result(_WOVE, len(none), times)),
        Contestant("result 512 KiB, ours", result(_OURS, len(none), times)),
        Contestant("result 16 MiB, ours", result(_OURS, size, 1)),
    )
    ratios = (
        Ratio("argument, ours / wove", contestants[1].name, contestants[0].name, 1.0, at_most=True),
        Ratio("result, ours / wove", contestants[3].name, contestants[2].name, 1.0, at_most=True),
    )
    return Case("large", "one weave with large payloads", "ms", contestants, ratios)


def cores(ground: Ground, quick: bool) -> Case:
    """Tasks that compute, one and two at a time, on threads and on processes."""
    steps = 1_000_000 if quick else 5_000_000
    engines = {"threads": ground.pool, "processes": ground.process_engine()}

    def at_once(pool: WebSocketExecutor, count: int) -> Callable[[], float]:
        def run() -> None:
            for result in pool.map(compute, [steps] * count, timeout=_TIMEOUT):
                _check(result, steps * (steps - 1) // 2)

        return _median(1, 1e-3, run)

    contestants = tuple(
        Contestant(f"{name}, {count} at a time", at_once(pool, count))
        for name, pool in engines.items()
        for count in (1, 2)
    )
    ratios = tuple(
        Ratio(f"{name}, two / one", f"{name}, 2 at a time", f"{name}, 1 at a time", goal, at_most=True)
        for name, goal in (("processes", 1.25), ("threads", 2.5))
    )
    return Case("cores", f"tasks of {steps:,} additions", "ms", contestants, ratios)


CASES: dict[str, Callable[[Ground, bool], Case]] = {
    "weave": weave,
    "roundtrip": roundtrip,
    "pipelined": pipelined,
    "large": large,
    "cores": cores,
}
