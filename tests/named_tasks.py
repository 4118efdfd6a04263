"""Tasks that a registry may offer: imported by hosts and workers alike."""

from __future__ import annotations

import asyncio
import concurrent.futures
import datetime
import logging
import os
import threading
import time
from typing import Any

import wove_ws_sync

__all__ = [
    "VERSION",
    "Box",
    "add",
    "boom",
    "count",
    "depth_of",
    "echo",
    "hold",
    "later",
    "loose",
    "now",
    "pid",
    "stops",
]

#: Listed, and nothing that could be called.
VERSION = 3


def add(a: int, b: int = 10) -> int:
    return a + b


def echo(*values: Any, **named: Any) -> list[Any]:
    return [list(values), named]


def boom(text: str) -> None:
    raise LookupError(text)


def pid() -> int:
    return os.getpid()


def count(total: int) -> int:
    """Say how far it is, and log."""
    for done in range(1, total + 1):
        wove_ws_sync.current_run().progress(done, total, "all" if done == total else "")
    logging.getLogger("named_tasks").warning("counted to %d", total)
    return total


def depth_of(value: Any) -> int:
    """Return how many lists are in each other."""
    depth = 0
    while isinstance(value, list):
        value, depth = value[0] if value else None, depth + 1
    return depth


async def later(value: Any) -> Any:
    await asyncio.sleep(0.01)
    return value


def hold(gate: str, note: str = "") -> str:
    """Write *gate*.running and return when the file *gate* exists; append a line to *note*."""
    if note:
        with open(note, "a", encoding="ascii") as stream:
            stream.write("ran\n")
    open(f"{gate}.running", "w").close()
    ends_at = time.monotonic() + 60.0
    while not os.path.exists(gate):
        if time.monotonic() > ends_at:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.01)
    return gate


def stops(gate: str) -> None:
    """Write *gate*.running and go on until the run is cancelled, which it confirms."""
    open(f"{gate}.running", "w").close()
    run, pause = wove_ws_sync.current_run(), threading.Event()
    while not run.cancelled():
        pause.wait(0.01)
    raise concurrent.futures.CancelledError


def now() -> datetime.datetime:
    """Return what JSON does not carry."""
    return datetime.datetime.now(datetime.UTC)


def loose(kind: str) -> Any:
    """Return something that is nearly JSON."""
    return {"tuple": (1, 2), "key": {1: 2}, "nan": float("nan"), "set": {1}, "bytes": b"x"}[kind]


def unlisted(path: str) -> None:
    """Leave a trace: nobody may call this through a registry."""
    os.mkdir(path)


class Box:
    """A class whose methods are not listed."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    @staticmethod
    def double(number: int) -> int:
        return 2 * number

    @classmethod
    def name(cls) -> str:
        return cls.__name__
