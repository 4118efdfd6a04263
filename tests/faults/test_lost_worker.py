"""A worker process that dies with runs on it, and comes back on the same port."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wove_ws_sync import ConnectionLost, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

WAIT = 60.0


@pytest.fixture
def worker() -> Iterator[LoopbackWorker]:
    """A worker of the test's own, to be killed."""
    with LoopbackWorker(workers=8) as running:
        yield running


def record(ledger: str, number: int, gate: str) -> int:
    """Write down that this ran, hold until the gate is open, and answer."""
    with open(Path(ledger) / f"{number}", "a") as line:
        line.write("x")
    for _ in range(6000):
        if Path(gate).exists():
            return number * number
        time.sleep(0.01)
    raise TimeoutError("nobody opened the gate")


def submit_all(pool: WebSocketExecutor, path: Path, count: int) -> list[concurrent.futures.Future[int]]:
    ledger = path / "ledger"
    ledger.mkdir()
    futures: list[Any] = [
        pool.submit(record, str(ledger), number, str(path / "gate")) for number in range(count)
    ]
    started, _ = concurrent.futures.wait(futures, 0.0)
    assert not started
    for _ in range(3000):
        if any(ledger.iterdir()):
            return futures
        time.sleep(0.01)
    raise TimeoutError("no run started")


def executions(path: Path) -> list[int]:
    return [len(line.read_text()) for line in (path / "ledger").iterdir()]


@pytest.mark.parametrize("policy", ["cancel", "fail", "detach"])
def test_f13_a_killed_worker_is_an_answer(worker: LoopbackWorker, tmp_path: Path, policy: str) -> None:
    """kill -9 with 1,000 runs in flight: every run that had left ends at once, none ran twice."""
    with WebSocketExecutor(worker.url, security=worker.security, delivery_orphan_policy=policy) as pool:
        futures = submit_all(pool, tmp_path, 1000)
        worker.kill()
        done, rest = concurrent.futures.wait(futures, WAIT)
        assert not rest
        assert all(isinstance(future.exception(), ConnectionLost) for future in done)
    assert max(executions(tmp_path)) <= 1  # 0: killed between opening the line and writing it


def test_f13_requeue_brings_every_result(worker: LoopbackWorker, tmp_path: Path) -> None:
    """kill -9 with 1,000 runs in flight, back within seconds: 1,000 right results, 2 executions at most."""
    with WebSocketExecutor(worker.url, security=worker.security, delivery_orphan_policy="requeue") as pool:
        futures = submit_all(pool, tmp_path, 1000)
        worker.kill()
        (tmp_path / "gate").touch()
        worker.restart()
        assert [future.result(WAIT) for future in futures] == [number * number for number in range(1000)]
    assert max(executions(tmp_path)) <= 2
