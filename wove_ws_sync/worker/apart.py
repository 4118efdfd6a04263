"""A job that is executed apart from the service, in a process of its own or on another machine.

Owns: what both kinds of processes do with a command. Never: knows how the command came
there, nor how the reports of the job travel back.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable
from typing import Any

from . import logs
from .commands import RunTask
from .jobs import Job
from .loops import finish

__all__ = ["execute", "perform"]

_logger = logging.getLogger("wove_ws_sync.worker")


def execute(job: Job) -> None:
    """Execute *job* in this thread, an awaitable that its task returns as well."""
    job.run(_drive)


def perform(command: RunTask, limit: int) -> list[tuple[str, bytes]]:
    """Execute the task of *command* and return what it logs and its end, which comes last.

    What it says of its progress would be stale by then.
    """
    reports: list[tuple[str, bytes]] = []

    def report(kind: str, event: bytes) -> None:
        if kind in ("log", "ended"):
            reports.append((kind, event))

    logs.install()
    try:
        execute(Job(command, report, limit))
    finally:
        logs.uninstall()
    return reports


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
