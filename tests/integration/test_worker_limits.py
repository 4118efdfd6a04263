"""What a worker service does with more than it takes: errors that can be retried, and reading that pauses."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

import cloudpickle
import pytest
from engine_tasks import square
from fault_helpers import WAIT, until
from raw_host import RawHost, occupy, plain_error
from wove.environment import EnvironmentExecutionError

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERYTHING = "resume,ack,drain"


def readiness(worker: LoopbackWorker) -> tuple[int, str]:
    """Return what ``/readyz`` answers."""
    address = worker.url.replace("ws://", "http://").removesuffix("/wove")
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=WAIT) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode().strip()


class TestQueue:
    """``--max-queue``: runs of all hosts that were taken and have not begun."""

    @pytest.mark.parametrize("extensions", ["", EVERYTHING])
    def test_a_full_queue_is_an_error_of_the_run(self, tmp_path: Path, extensions: str) -> None:
        """It says that the run was not begun and may come again; the connection lives, and so do the others."""
        gate = tmp_path / "gate"
        said = {"extensions": extensions, "name": "a" * 32} if extensions else {}
        with (
            LoopbackWorker(workers=1, args=["--max-queue", "2"]) as worker,
            RawHost(worker, **said) as host,
            RawHost(worker) as other,
        ):
            host.run(occupy(str(gate)), "running")
            host.wait("running", "task_started")
            assert readiness(worker) == (200, "ready")
            host.run(square, "first", number=2)
            host.run(square, "second", number=3)
            host.run(square, "third", number=4)
            error = plain_error(host.wait("third")[-1], "QueueFull")
            assert (error["retryable"], error["started"]) == (True, False)
            assert "--max-queue" in error["message"] and "2 runs" in error["message"]
            assert readiness(worker) == (503, "queue full")
            other.run(square, "theirs", number=5)
            plain_error(other.wait("theirs")[-1], "QueueFull")
            gate.touch()
            assert [host.result(run_id) for run_id in ("first", "second")] == [4, 9]
            assert readiness(worker) == (200, "ready")
            host.run(square, "third", number=4)
            other.run(square, "theirs", number=5)
            assert (host.result("third"), other.result("theirs")) == (16, 25)

    @pytest.mark.parametrize("policy", ["cancel", "requeue"])
    def test_our_host_ends_the_run_with_that_error(self, tmp_path: Path, policy: str) -> None:
        """It does not send it again and again by itself; a later submission works."""
        gate = tmp_path / "gate"
        with (
            LoopbackWorker(workers=1, args=["--max-queue", "1"]) as worker,
            WebSocketExecutor(worker.url, security=worker.security, delivery_orphan_policy=policy) as pool,
        ):
            running = pool.submit(occupy(str(gate)))
            until(running.running)  # the worker service knows by then that it has begun
            waiting = pool.submit(square, 2)
            refused = pool.submit(square, 3)
            with pytest.raises(EnvironmentExecutionError, match="--max-queue") as caught:
                refused.result(WAIT)
            assert caught.value.payload["kind"] == "QueueFull"
            assert caught.value.payload["retryable"] is True
            assert not waiting.done()
            gate.touch()
            assert (running.result(WAIT), waiting.result(WAIT)) == (None, 4)
            assert pool.submit(square, 3).result(WAIT) == 9
