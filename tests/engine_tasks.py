"""Tasks for the tests of the engines, and executors of one's own: imported by workers, wherever they are."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import threading
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import wove_ws_sync

__all__ = [
    "Fickle",
    "Unpicklable",
    "busy",
    "ends_behind",
    "ends_itself",
    "fails",
    "forks",
    "hold_interpreter",
    "hold_until",
    "leaves_a_task",
    "leaves_a_thread",
    "logs_and_returns",
    "make_broken",
    "make_nothing",
    "make_processes",
    "meet",
    "reports_progress",
    "returns_twice",
    "says_how_far",
    "slow_square",
    "square",
    "square_later",
    "unpicklable",
    "where",
]


def square(number: int) -> int:
    return number * number


def slow_square(number: int, seconds: float = 0.02) -> int:
    time.sleep(seconds)
    return number * number


async def square_later(number: int) -> int:
    await asyncio.sleep(0.01)
    return number * number


async def leaves_a_thread(gate: str) -> str:
    """Return while a thread of the loop's executor is busy until the file *gate* exists."""
    asyncio.get_running_loop().run_in_executor(None, hold_until, gate)
    await asyncio.sleep(0)
    return gate


async def leaves_a_task(gate: str) -> str:
    """Return while a task ignores that it is cancelled, until the file *gate* exists."""

    async def stay() -> None:
        while not os.path.exists(gate):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    left = asyncio.create_task(stay())
    await asyncio.sleep(0)
    assert not left.done()
    return gate


async def ends_behind(gate: str) -> str:
    """Return although a task that it started raised SystemExit."""

    async def leave() -> None:
        raise SystemExit(3)

    left = asyncio.create_task(leave())
    while not left.done():
        await asyncio.sleep(0.01)
    return gate


def fails(text: str) -> None:
    raise LookupError(text)


def where() -> int:
    return os.getpid()


def busy(marker: str) -> None:
    """Compute until the end of time, having written who does."""
    Path(marker).write_text(str(os.getpid()), "ascii")
    while True:
        pass


def forks(marker: str, code: int | None) -> None:
    """Start a process that sleeps for long; then end this one with *code*, or compute for ever."""
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    scratch = Path(f"{marker}.new")
    scratch.write_text(f"{os.getpid()} {pid}", "ascii")
    scratch.rename(marker)
    if code is not None:
        os._exit(code)
    while True:
        pass


def returns_twice() -> int:
    """Return here and in a forked process."""
    return os.fork()


def ends_itself(code: int) -> None:
    os._exit(code)


def hold_interpreter(marker: str, length: int = 26) -> bool:
    """Keep every other thread of this process from running for seconds: a match never lets them."""
    Path(marker).touch()
    return re.fullmatch("(a|a)*b", "a" * length) is None


def hold_until(gate: str, limit: float = 60.0) -> str:
    """Return when the file *gate* exists."""
    ends_at = time.monotonic() + limit
    while not os.path.exists(gate):
        if time.monotonic() > ends_at:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.01)
    return gate


def meet(mine: str, other: str) -> int:
    """Return the process that met the other one: each is seen by the other while it computes."""
    Path(mine).touch()
    ends_at = time.monotonic() + 60.0
    while not os.path.exists(other):
        if time.monotonic() > ends_at:
            raise TimeoutError("the other one does not run")
    return os.getpid()


class Fickle(ThreadPoolExecutor):
    """An executor that cancels by itself what it was given, as a client does that lost its cluster."""

    def __init__(self) -> None:
        super().__init__(1)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        gate = threading.Event()
        super().submit(gate.wait)
        future = super().submit(fn, *args, **kwargs)
        threading.Timer(0.2, lambda: (future.cancel(), gate.set())).start()
        return future


def reports_progress(gate: str) -> int:
    """Say how far it is, and go on when the file *gate* exists."""
    wove_ws_sync.current_run().progress(3, 4, "nearly")
    hold_until(gate)
    return os.getpid()


def says_how_far(total: int) -> int:
    for done in range(1, total + 1):
        wove_ws_sync.current_run().progress(done, total, "all" if done == total else "")
    return total


def logs_and_returns(text: str) -> str:
    logging.getLogger("engine_tasks").warning("a word: %s", text)
    return text


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def unpicklable() -> Unpicklable:
    return Unpicklable()


def make_processes() -> Executor:
    """Make the standard library's pool of two processes."""
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


def make_broken() -> Executor:
    raise OSError("the cluster is away")


def make_nothing() -> Any:
    return threading.Lock()
