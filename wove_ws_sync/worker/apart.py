"""A job that is executed apart from the service, in a process of its own or on another machine.

Owns: what both kinds of processes do with a command. Never: knows how the command came
there, nor how the reports of the job travel back.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any

from ..frames import encode
from . import logs
from .commands import RunTask
from .jobs import Job
from .loops import finish

__all__ = ["execute", "perform"]

#: So many log records of one run come with its end, the newest.
_MOST_LOGS = 10_000

_logger = logging.getLogger("wove_ws_sync.worker")


def execute(job: Job) -> None:
    """Execute *job* in this thread, an awaitable that its task returns as well."""
    job.run(_drive)


def perform(command: RunTask, limit: int) -> list[tuple[str, bytes]]:
    """Execute the task of *command* and return what the job reports, its end last.

    Of its progress that is the newest report, of its log records a bounded number, of its
    beats nothing: by then they are not news.
    """
    reports = _Reports(command)
    logs.install()
    try:
        execute(Job(command, reports.take, limit))
    finally:
        logs.uninstall()
    return reports.all()


class _Reports:
    """What one job reports, bounded. Any thread."""

    def __init__(self, command: RunTask) -> None:
        self._head = {"type": "log", "run_id": command.run_id, "task_id": command.task_id}
        self._logs: deque[bytes] = deque(maxlen=_MOST_LOGS)
        self._logged = 0
        self._newest: dict[str, bytes] = {}

    def take(self, kind: str, event: bytes) -> None:
        if kind == "log":
            self._logged += 1
            self._logs.append(event)
        elif kind in ("progress", "ended"):
            self._newest[kind] = event

    def all(self) -> list[tuple[str, bytes]]:
        records = list(self._logs)
        if left_out := self._logged - len(records):
            text = f"{left_out} earlier log records of this run were left out, as they all come with its end."
            own = {"level": "WARNING", "logger": "wove_ws_sync.task", "message": text, "created": time.time()}
            records.insert(0, encode({**self._head, **own}))
        newest = [(kind, self._newest[kind]) for kind in ("progress", "ended") if kind in self._newest]
        return [*(("log", record) for record in records), *newest]


def _drive(job: Job, awaitable: Awaitable[Any], context: contextvars.Context) -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    task = loop.create_task(job.drive(awaitable), context=context)
    while not task.done():
        try:
            loop.run_until_complete(task)
        except BaseException:  # a SystemExit out of a task that the coroutine started ends here
            if not task.done():
                _logger.warning("A background task of a coroutine tried to end the worker.", exc_info=True)
    finish(loop)
    task.result()  # raises what reporting raised
