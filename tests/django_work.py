"""Functions that tests of Django have a worker service run."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from django import VERSION
from django.db import connection, connections
from jobs.models import Order

from wove_ws_sync import current_run

if VERSION >= (6,):
    from django.tasks import task
    from django.tasks.signals import task_finished
else:
    from django_tasks import task
    from django_tasks.signals import task_finished


def connected_before() -> tuple[int, bool]:
    """Return which thread this is and whether it came with an open connection; leave one open."""
    found = connection.connection is not None
    Order.objects.count()
    return threading.get_ident(), found


async def asks_in_a_coroutine() -> int:
    return await Order.objects.acount()


# Two tasks in one process: the first is in the middle of its rows until the other has been.
_between, _others_were = threading.Event(), threading.Event()


async def reads_rows() -> int:
    """Read one row, have the others come and go, read the rest."""
    rows = 0
    async for _ in Order.objects.order_by("pk").aiterator(chunk_size=1):
        rows += 1
        _between.set()
        await asyncio.to_thread(_others_were.wait, 30)
    return rows


async def comes_between(last: bool) -> None:
    """Use the database while ``reads_rows`` does."""
    await asyncio.to_thread(_between.wait, 30)
    await Order.objects.acount()
    if last:
        _others_were.set()


def database_name() -> str:
    return str(connections["default"].settings_dict["NAME"])


def orders_here(amount: int) -> int:
    return Order.objects.filter(amount=amount).count()


unpickled: list[str] = []


class UnpickledTo:
    """A result that says in the host that it was unpickled."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __reduce__(self) -> Any:
        return _unpickle, (self._text,)


def _unpickle(text: str) -> str:
    unpickled.append(text)
    return text


def fails(text: str) -> None:
    raise LookupError(text)


def tells() -> str:
    run = current_run()
    run.progress(1, 2, "half")
    return run.run_id


async def doubled(number: int) -> int:
    return 2 * number


@task
def add(first: int, second: int) -> int:
    return first + second


@task
def leaves() -> None:
    raise SystemExit("as it was told")


@task
def breaks() -> None:
    raise ValueError("as it was told")


@task(takes_context=True)
def says_what_it_is(context: Any) -> list[Any]:
    return [context.task_result.id, context.attempt, os.getpid()]


@task
async def waits(number: int) -> int:
    return number


@task
def stops_at_nothing() -> None:
    threading.Event().wait(60)


finished: list[tuple[str, str]] = []


def note_finished(sender: Any, task_result: Any, **_: Any) -> None:
    finished.append((task_result.id, task_result.status))


def listen() -> None:
    """Have ``finished`` tell what this process hears of tasks that have ended."""
    task_finished.connect(note_finished)


def heard() -> list[tuple[str, str]]:
    return finished
