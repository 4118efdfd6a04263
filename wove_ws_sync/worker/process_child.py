"""A process of the engine ``processes``, seen from inside: it executes one job after the other.

Owns: the connection to the service and the main thread, which executes the jobs. Never:
outlives the service.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from multiprocessing.connection import Client, Connection
from queue import SimpleQueue
from typing import Any

from . import logs
from .apart import execute
from .commands import RunTask
from .jobs import Job, Report

__all__ = ["reporter", "serve"]


def serve(address: Any, key: bytes, number: int, level: int, formatter: logging.Formatter | None) -> None:
    """Execute what the service at *address* sends, until it is gone.

    *number* is what the service knows this process by; *level* and *formatter* are those of its root logger.
    """
    # A signal to the whole process group is for the service to obey, which ends its processes itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgrp()  # what a task starts ends with it
    connection = Client(address, authkey=key)
    # A process that a task forks must not keep the connection open: its end says that this one is gone.
    os.register_at_fork(after_in_child=connection.close)
    connection.send((number, os.getpid()))
    _log(level, formatter)
    logs.install()
    jobs: SimpleQueue[tuple[RunTask, int]] = SimpleQueue()
    name = "wove-ws-service-0"
    threading.Thread(target=_receive, args=(connection, jobs), name=name, daemon=True).start()
    try:
        while True:
            execute(_next(jobs, connection))
    finally:  # the service is gone, or this is a process that the task forked, or nothing to rely on any more
        os._exit(1)


def _next(jobs: SimpleQueue[tuple[RunTask, int]], connection: Connection) -> Job:
    """Return the next job, whose payload nobody else keeps in memory."""
    command, limit = jobs.get()
    return Job(command, reporter(connection), limit)


def reporter(connection: Connection) -> Report:
    """Return what sends the reports of one job, nothing after its end: by then others use the connection."""
    # Around the two messages of a report: a task may log in several threads. Reentrant, as a finalizer
    # that logs may strike in the middle of a report; what it says waits its turn.
    lock = threading.RLock()
    waiting: deque[tuple[str, bytes]] = deque()
    writing = ended = False

    def report(kind: str, event: bytes) -> None:
        nonlocal ended, writing
        if connection.closed:  # this is a process that a task forked
            if kind != "ended":
                return
            raise OSError("no connection to the service")
        with lock:
            waiting.append((kind, event))
            if writing:
                return
            writing = True
            try:
                while waiting:
                    kind, event = waiting.popleft()
                    if not ended:
                        ended = kind == "ended"
                        connection.send_bytes(kind.encode("ascii"))
                        connection.send_bytes(event)
            finally:
                writing = False

    return report


def _receive(connection: Connection, jobs: SimpleQueue[tuple[RunTask, int]]) -> None:
    """Pass on what the service sends; end this process with it, and what its task has started."""
    try:
        while True:
            jobs.put(connection.recv())
    finally:
        os.killpg(0, signal.SIGKILL)


def _log(level: int, formatter: logging.Formatter | None) -> None:
    """Have the tasks log as they do in the service's own process."""
    root = logging.getLogger()
    root.setLevel(level)
    if formatter is not None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(formatter)
        root.addHandler(handler)
