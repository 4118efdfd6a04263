"""What ``bench`` measures: the contestants of each case.

Owns: what one sample of each contestant is. Never: does statistics, prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import websocket
import wove

from .. import frames, payloads
from ..futures import WebSocketExecutor
from ..options import DeliveryOptions
from ._bench_ground import (
    LOCAL,
    MIB,
    OURS,
    TIMEOUT,
    WOVE,
    Case,
    Contestant,
    Ground,
    Ratio,
    check,
    median,
    rate,
)

__all__ = ["CASES"]

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


def _weave(environment: str, task: Callable[..., Any], items: Any = None, **values: Any) -> Any:
    """Run one weave with one task in *environment*, and return its result."""
    with wove.weave(**values) as w:
        w.do(items, environment=environment)(task)
    return w.result.final


# -- the cases ------------------------------------------------------------------------


def weave(ground: Ground, quick: bool) -> Case:
    """A warm weave with one task that does nothing."""
    times = 5 if quick else 20

    def contestant(name: str, environment: str) -> Contestant:
        return Contestant(name, median(times, 1e-3, lambda: check(_weave(environment, noop), None)))

    return Case(
        "weave",
        "warm weave with one no-op",
        "ms",
        (contestant("local", LOCAL), contestant("wove", WOVE), contestant("ours", OURS)),
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
        check(connection.recv(), message)

    def submit() -> None:
        check(pool.submit(noop).result(TIMEOUT), None)

    return Case(
        "roundtrip",
        f"one round trip of {len(message)} bytes",
        "µs",
        (
            Contestant("echo", median(times, 1e-6, lambda: echo(plain))),
            Contestant("echo, UTF-8 unchecked", median(times, 1e-6, lambda: echo(unchecked))),
            Contestant("ours", median(times, 1e-6, submit)),
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
        Contestant("wove weave", rate(count, lambda: _weave(WOVE, nothing, range(count)))),
        Contestant("ours weave", rate(count, lambda: _weave(OURS, nothing, range(count)))),
        Contestant("ours map", rate(count, lambda: list(pool.map(nothing, range(count), timeout=TIMEOUT)))),
        Contestant("processes map", rate(count, lambda: list(processes.map(nothing, range(count))))),
    )
    ratios = (
        Ratio("mapped weave, ours / wove", "ours weave", "wove weave", 1.0, at_most=False),
        Ratio("ours map / wove weave", "ours map", "wove weave", 1.0, at_most=False),
    )
    return Case("pipelined", f"{count} no-ops at once", "tasks/s", contestants, ratios)


def large(ground: Ground, quick: bool) -> Case:
    """A large argument, a large result, and the largest result Wove's own executor can take."""
    size, small, times = 16 * MIB, MIB // 2, 2 if quick else 10
    blob, none = os.urandom(size), bytes(small)

    def argument(environment: str) -> Callable[[], float]:
        return median(1, 1e-3, lambda: check(_weave(environment, length, blob=blob), size))

    def result(environment: str, wanted: int, times: int) -> Callable[[], float]:
        return median(times, 1e-3, lambda: check(len(_weave(environment, zeros, size=wanted)), wanted))

    contestants = (
        Contestant("argument 16 MiB, wove", argument(WOVE)),
        Contestant("argument 16 MiB, ours", argument(OURS)),
        Contestant("result 512 KiB, wove", result(WOVE, len(none), times)),
        Contestant("result 512 KiB, ours", result(OURS, len(none), times)),
        Contestant("result 16 MiB, ours", result(OURS, size, 1)),
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
            for result in pool.map(compute, [steps] * count, timeout=TIMEOUT):
                check(result, steps * (steps - 1) // 2)

        return median(1, 1e-3, run)

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


def seal(ground: Ground, quick: bool) -> Case:
    """What it costs to seal every message, on connections without TLS."""
    times, size = 100 if quick else 500, 16 * MIB
    blob = os.urandom(size)
    pools = {name: ground.executor(seal=name) for name in ("off", "require")}

    def submit(pool: WebSocketExecutor) -> Callable[[], float]:
        return median(times, 1e-6, lambda: check(pool.submit(noop).result(TIMEOUT), None))

    def argument(pool: WebSocketExecutor) -> Callable[[], float]:
        return median(1, 1e-3, lambda: check(pool.submit(length, blob).result(TIMEOUT), size))

    def result(pool: WebSocketExecutor) -> Callable[[], float]:
        return median(1, 1e-3, lambda: check(len(pool.submit(zeros, size).result(TIMEOUT)), size))

    kinds = {"round trip, µs": (submit, 1.15), "argument, ms": (argument, 1.43), "result, ms": (result, 1.43)}
    return Case(
        "seal",
        "sealed messages: a no-op, an argument and a result of 16 MiB",
        "µs, ms",
        tuple(
            Contestant(f"{kind}, {name}", sample(pool))
            for kind, (sample, _) in kinds.items()
            for name, pool in pools.items()
        ),
        tuple(
            Ratio(
                f"{kind.partition(',')[0]}, sealed / not",
                f"{kind}, require",
                f"{kind}, off",
                goal,
                at_most=True,
            )
            for kind, (_, goal) in kinds.items()
        ),
    )


CASES: dict[str, Callable[[Ground, bool], Case]] = {
    "weave": weave,
    "roundtrip": roundtrip,
    "pipelined": pipelined,
    "large": large,
    "cores": cores,
    "seal": seal,
}
