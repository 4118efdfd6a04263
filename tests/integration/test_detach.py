"""Runs that outlive who submitted them: detached by one process or executor, fetched by another."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import WAIT, search_path, until
from fault_proxy import FaultProxy
from ledger import executions, record_and_hold
from wove.environment import EnvironmentExecutionError

from wove_ws_sync import ConnectionLost, SyncWebSocketEnvironmentExecutor, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

SCRIPT = """
    import os, sys
    from ledger import record_and_hold
    from wove_ws_sync import WebSocketExecutor

    url, secret, ledger, gate = sys.argv[1:]
    security = {"type": "signed", "secret": secret}
    pool = WebSocketExecutor(url, security=security, delivery_orphan_policy="detach")
    future = pool.submit(record_and_hold, ledger, "run", gate)
    while not os.listdir(ledger):
        pass
    print(future.run_id)
    pool.shutdown(wait=False)
"""


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=4) as running:
        yield running


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where runs write down that they are executed."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    return folder


def outcome(executor: SyncWebSocketEnvironmentExecutor, run_id: str) -> dict[str, Any]:
    """Return the terminal event of the run."""
    while True:
        event = executor.recv(WAIT)
        if (
            event["run_id"] == run_id
            and event["type"].startswith("task_")
            and event["type"] != "task_started"
        ):
            return event


def test_a_run_outlives_its_process(worker: LoopbackWorker, ledger: Path) -> None:
    """The process ends, its run does not; another one with the key gets the result, once."""
    assert worker.security is not None
    gate = ledger.parent / "gate"
    arguments = [worker.url, worker.security["secret"], str(ledger), str(gate)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env={**os.environ, "PYTHONPATH": search_path()},
        check=True,
    )
    run_id = done.stdout.strip()
    assert done.stderr == ""
    with WebSocketExecutor(worker.url, security=worker.security) as pool:
        future = pool.attach(run_id)
        assert future.run_id == run_id
        gate.touch()
        assert future.result(WAIT) == "run"
        with pytest.raises(EnvironmentExecutionError) as caught:
            pool.attach("nobody:0").result(WAIT)
        assert caught.value.payload["kind"] == "UnknownRun"
    assert executions(ledger) == {"run": 1}


def test_a_run_outlives_its_executor(worker: LoopbackWorker, ledger: Path) -> None:
    """stop() lets go of it; a later start() takes it up again, after its end as well."""
    gate = ledger.parent / "gate"
    config = {"url": worker.url, "security": worker.security}
    executor = SyncWebSocketEnvironmentExecutor()
    for held in (True, False):
        run_id = f"run-{held}"
        executor.start(environment_name="e", environment_config=config, run_config={})
        frame = {"type": "run_task", "run_id": run_id, "task_id": "t", "callable": record_and_hold}
        args = {"folder": str(ledger), "run": run_id, "gate": str(gate)}
        executor.send({**frame, "args": args, "delivery": {"delivery_orphan_policy": "detach"}})
        until(lambda run_id=run_id: (ledger / run_id).exists())
        executor.stop()
        executor.start(environment_name="e", environment_config=config, run_config={})
        executor.attach(run_id)
        gate.touch()
        assert outcome(executor, run_id)["result"] == run_id
        executor.stop()
    assert executions(ledger) == {"run-True": 1, "run-False": 1}


def test_a_run_outlives_its_connection(ledger: Path) -> None:
    """Away for longer than the window: ConnectionLost here, while the run waits to be attached to."""
    gate = ledger.parent / "gate"
    with LoopbackWorker(workers=2) as worker, FaultProxy(worker.url) as proxy:
        options: dict[str, Any] = {"security": worker.security, "resume_window": 0.3}
        detached = {"delivery_orphan_policy": "detach"}
        with WebSocketExecutor(proxy.url_for(worker.url), **options, **detached) as pool:
            future = pool.submit(record_and_hold, str(ledger), "run", str(gate))
            until(lambda: executions(ledger))
            proxy.pause()
            proxy.end_all()
            with pytest.raises(ConnectionLost) as caught:
                future.result(WAIT)
            assert caught.value.maybe_executed and caught.value.run_id == future.run_id
            proxy.resume()
            again = pool.attach(future.run_id)
            gate.touch()
            assert again.result(WAIT) == "run"
    assert executions(ledger) == {"run": 1}


def test_attaching_to_a_run_that_is_here_hurts_nobody(worker: LoopbackWorker, ledger: Path) -> None:
    """A ValueError from the second future of a run_id; the run of the first one goes on."""
    gate = ledger.parent / "gate"
    with WebSocketExecutor(worker.url, security=worker.security) as pool:
        future = pool.submit(record_and_hold, str(ledger), "run", str(gate))
        until(future.running)
        with pytest.raises(ValueError, match="already in flight"):
            pool.attach(future.run_id).result(WAIT)
        gate.touch()
        assert future.result(WAIT) == "run"
    assert executions(ledger) == {"run": 1}
