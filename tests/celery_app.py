"""The Celery app of the tests, for workers in processes of their own.

``WOVE_WS_TEST_CELERY`` holds its settings as JSON.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from pathlib import Path
from typing import Any

import celery_files  # noqa: F401  # makes the broker known
import celery_work
from celery import Celery, signals
from celery.exceptions import SoftTimeLimitExceeded
from wove import weave

import wove_ws_sync
from wove_ws_sync.contrib.celery import WoveWSTask, executor

app = Celery("celery_app")
app.conf.update(json.loads(os.environ["WOVE_WS_TEST_CELERY"]))
wove_ws_sync.config(
    environments={"socket_workers": {"executor": "websocket", "executor_config": dict(app.conf.wove_ws)}}
)


@signals.worker_init.connect
def use_in_parent(**_: Any) -> None:
    """Have a connection in the process that Celery forks its children from, if the test wants that."""
    if app.conf.get("use_in_parent"):
        assert executor.submit(celery_work.square, 2).result() == 4


@app.task
def nothing() -> int:
    return os.getpid()


@app.task
def square(number: int) -> list[int]:
    return [executor.submit(celery_work.square, number).result(), os.getpid()]


@app.task
def squares(numbers: list[int]) -> list[int]:
    futures = [executor.submit(celery_work.square, number) for number in numbers]
    assert len(list(concurrent.futures.as_completed(futures, 60))) == len(numbers)
    return list(executor.map(celery_work.square, numbers))


@app.task
def weave_square(number: int) -> int:
    with weave() as w:

        @w.do(environment="socket_workers")
        def squared() -> int:
            return number * number

    return int(w.result.final)


@app.task(acks_late=True, reject_on_worker_lost=True)
def lost_once(number: int, pid_file: str, gate: str) -> list[int]:
    """Write down the child's process id and wait for *gate* at the worker service."""
    Path(pid_file).write_text(str(os.getpid()))
    executor.submit(celery_work.hold, gate).result()
    return [executor.submit(celery_work.square, number).result(), os.getpid()]


@app.task(acks_late=True, reject_on_worker_lost=True)
def square_late(number: int) -> list[int]:
    return [executor.submit(celery_work.square, number).result(), os.getpid()]


@app.task
def hold(gate: str, how: str) -> str:
    """Wait for three runs in one of the ways in which a task may."""
    futures = [executor.submit(celery_work.hold, gate) for _ in range(3)]
    if how == "result":
        return futures[0].result()
    if how == "exception":
        return str(futures[0].exception())
    if how == "wait":
        concurrent.futures.wait(futures)
    if how == "sleep":
        time.sleep(60)
    if how == "caught":
        try:
            return futures[0].result()
        except SoftTimeLimitExceeded:
            return f"caught, and {executor.submit(celery_work.square, 3).result()}"
    return "waited"


@app.task
def hold_map(gate: str) -> list[str]:
    return list(executor.map(celery_work.hold, [gate] * 3))


@app.task
def hold_weave(gate: str) -> None:
    with weave() as w:

        @w.do(environment="socket_workers")
        async def one() -> str:
            return await celery_work.hold(gate)

        @w.do(environment="socket_workers")
        async def two() -> str:
            return await celery_work.hold(gate)


@app.task(base=WoveWSTask, retry_backoff=False, default_retry_delay=0.1)
def lose_service(mark: str) -> str:
    return executor.submit(celery_work.end_service_once, mark).result()


@app.task(bind=True, base=WoveWSTask, retry_backoff=False, default_retry_delay=0.1, max_retries=2)
def in_vain(self: Any, count: str) -> None:
    """Count the deliveries of a task whose worker service is not there."""
    with Path(count).open("a") as stream:
        stream.write("x")
    executor.submit(celery_work.square, 1).result()


@app.task
def forget(gate: str) -> int:
    """Leave a run behind that nobody waits for."""
    executor.submit(celery_work.hold, gate)
    return os.getpid()
