"""The worker of docs/examples in JavaScript serves a Python host, as the how-to says."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wove
from fault_helpers import WAIT, until
from raw_host import RawHost, pickled, signed
from websockets.exceptions import ConnectionClosed, InvalidStatus
from wove import weave
from wove.environment import EnvironmentExecutionError
from ws_peer import TEXT, frame

import wove_ws_sync
from wove_ws_sync import (
    AuthenticationRejected,
    DeliveryCancelled,
    HandshakeRejected,
    WebSocketExecutor,
    named,
)
from wove_ws_sync.testing import LoopbackWorker

NODE = shutil.which("node")
SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "node_worker" / "worker.mjs"
SECRET = "a secret of the tests, long enough"

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


@contextmanager
def node_worker() -> Iterator[SimpleNamespace]:
    assert NODE is not None
    with subprocess.Popen(
        [NODE, str(SCRIPT)],
        env={**os.environ, "WOVE_WORKER_SECRET": SECRET},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url.startswith("ws://127.0.0.1:")
            yield SimpleNamespace(url=url, security={"type": "signed", "secret": SECRET}, process=process)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def worker() -> Iterator[SimpleNamespace]:
    with node_worker() as running:
        yield running


@pytest.fixture
def pool(worker: SimpleNamespace) -> Iterator[WebSocketExecutor]:
    with WebSocketExecutor(worker.url, security=worker.security, result_format="json") as made:
        yield made


def failure(future: Any) -> dict[str, Any]:
    """Return the error of the run as the worker has it."""
    error = future.exception(WAIT)
    assert isinstance(error, EnvironmentExecutionError), repr(error)
    return dict(error.payload)


def code_of(worker: SimpleNamespace, data: bytes) -> int:
    """Return with which code the worker closes a connection that brings *data*."""
    with RawHost(worker) as host:
        host.socket.socket.sendall(data)
        with pytest.raises(ConnectionClosed) as caught:
            host.event()
        assert caught.value.rcvd is not None
        return caught.value.rcvd.code


# Who may not connect, and what is not obeyed


def test_without_a_secret_it_does_not_start() -> None:
    environ = {name: text for name, text in os.environ.items() if name != "WOVE_WORKER_SECRET"}
    done = subprocess.run(
        [str(NODE), str(SCRIPT)], env=environ, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 11 and "WOVE_WORKER_SECRET is not set" in done.stderr


def test_a_wrong_secret_is_refused(worker: SimpleNamespace) -> None:
    with WebSocketExecutor(
        worker.url, security={"type": "signed", "secret": "another one"}, result_format="json"
    ) as stranger:
        assert isinstance(stranger.submit(named("add"), 1, 2).exception(WAIT), AuthenticationRejected)


@pytest.mark.parametrize("change", ["none", "signature", "target", "timestamp", "future", "nonce", "nothing"])
def test_only_a_signature_of_now_and_for_this_is_accepted_once(worker: SimpleNamespace, change: str) -> None:
    headers = signed(worker)
    if change == "signature":
        headers["X-Wove-Signature"] = headers["X-Wove-Signature"][:-1]
    elif change == "target":
        headers = signed(worker, "/wove?other")
    elif change in ("timestamp", "future"):
        moment = time.time() + (400 if change == "future" else -400)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wove.security.time, "time", lambda: moment)
            headers = signed(worker)
    elif change == "nonce":
        headers["X-Wove-Nonce"] += "x"
    elif change == "nothing":
        headers = {}
    if change == "none":
        with RawHost(worker, headers=headers):
            pass
    with pytest.raises(InvalidStatus) as caught, RawHost(worker, headers=headers):
        pass
    assert caught.value.response.status_code == 401


def test_another_path_is_not_found(worker: SimpleNamespace) -> None:
    url = worker.url + "r"
    with WebSocketExecutor(url, security=worker.security, result_format="json") as lost:
        error = lost.submit(named("add"), 1, 2).exception(WAIT)
        assert isinstance(error, HandshakeRejected) and error.status == 404


def test_pickles_are_refused_one_by_one(worker: SimpleNamespace) -> None:
    """Our host with pickles hears it as the error of its run; what is hidden beside a name as well."""
    with WebSocketExecutor(worker.url, security=worker.security) as pickling:
        assert failure(pickling.submit(time.time))["kind"] == "PickleRefused"
    with RawHost(worker) as host:
        run = {"type": "run_task", "run_id": "r", "task_id": "t", "callable": "add", "positional": [1, 2]}
        host.send(**run, args_pickle=pickled({}))
        assert host.wait()[-1]["error"]["kind"] == "PickleRefused"
        host.send(**run)
        assert host.wait()[-1]["result"] == 3


@pytest.mark.parametrize("name", ["subtract", "constructor", "__proto__", "toString", "hasOwnProperty", ""])
def test_a_name_that_is_no_task_is_unknown(worker: SimpleNamespace, name: str) -> None:
    """What every object of the language has is none."""
    with RawHost(worker) as host:
        host.send(type="run_task", run_id="r", task_id="t", callable=name)
        error = host.wait()[-1]["error"]
        assert error["kind"] == "UnknownTask" and error["retryable"] is False


@pytest.mark.parametrize("fields", [{"positional": {}}, {"positional": "x"}, {"args": [1]}, {"args": None}])
def test_malformed_arguments_are_an_error_of_the_run(worker: SimpleNamespace, fields: dict[str, Any]) -> None:
    with RawHost(worker) as host:
        host.send(type="run_task", run_id="r", task_id="t", callable="add", **fields)
        assert host.wait()[-1]["error"]["kind"] == "MalformedFrame"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"{}"), 1002),
        (frame(TEXT, b"{}", mask=b"abcd", rsv=4), 1002),
        (frame(TEXT, b"{", mask=b"abcd"), 1007),
        (frame(TEXT, b'"\xff"', mask=b"abcd"), 1007),
        (frame(0x2, b"{}", mask=b"abcd"), 1003),
        (frame(0x0, b"{}", mask=b"abcd"), 1002),
        (frame(0x9, b"", fin=False, mask=b"abcd"), 1002),
        (struct.pack("!BBQ", 0x81, 0xFF, 17 << 20) + b"abcd", 1009),
        (struct.pack("!BBQ", 0x81, 0xFF, 2**63) + b"abcd", 1009),
    ],
)
def test_what_is_no_websocket_message_of_ours_closes_the_connection(
    worker: SimpleNamespace, data: bytes, code: int
) -> None:
    assert code_of(worker, data) == code


@pytest.mark.parametrize("odd", ["null", "5", "[]", '"text"', "{}", '{"type":"run_task"}', '{"run_id":"r"}'])
def test_json_that_is_no_command_is_ignored(worker: SimpleNamespace, odd: str) -> None:
    with RawHost(worker) as host:
        host.socket.send(odd)
        host.send(type="run_task", run_id="r", task_id="t", callable="add", positional=[1, 2])
        assert host.wait()[-1]["result"] == 3


def test_a_failing_task_and_one_whose_result_is_not_json(pool: WebSocketExecutor) -> None:
    error = failure(pool.submit(named("fail"), text="no such thing"))
    assert (error["kind"], error["message"], error["source"]) == ("RangeError", "no such thing", "task")
    assert "tasks.mjs" in error["traceback"] and error["retryable"] is False
    error = failure(pool.submit(named("nothing")))
    assert error["kind"] == "ResultNotJSON" and "NaN" in error["message"]
    assert pool.submit(named("add"), 1, 2).result(WAIT) == 3


def test_a_result_that_is_too_large_for_its_host(worker: SimpleNamespace) -> None:
    with RawHost(worker, limit=4096) as host:
        host.send(type="run_task", run_id="r", task_id="t", callable="echo", positional=["x" * 5000])
        assert host.wait()[-1]["error"]["kind"] == "ResultTooLarge"
        host.send(type="run_task", run_id="e", task_id="t", callable="fail", args={"text": "x" * 5000})
        assert host.wait("e")[-1]["error"]["kind"] == "RangeError"


# What works


def test_values_of_every_kind(pool: WebSocketExecutor) -> None:
    value = {"a": [1, -2.5, None, True, "grüße 🐍"], "": {}, "__proto__": [[]], "long": "x" * (3 << 20)}
    assert pool.submit(named("echo"), value, x=value).result(WAIT) == {
        "positional": [value],
        "args": {"x": value},
    }
    assert list(pool.map(named("add"), range(100), range(100))) == [2 * n for n in range(100)]
    assert pool.submit(named("greet"), name="Wove").result(WAIT) == "Hello, Wove!"


def test_progress_and_logs(worker: SimpleNamespace) -> None:
    events: list[dict[str, Any]] = []
    config = {"security": worker.security, "result_format": "json", "on_event": events.append}
    with WebSocketExecutor(worker.url, **config) as pool:
        future = pool.submit(named("count"), 5)
        assert future.result(WAIT) == 5
    assert future.progress == (5, 5, "step 5")
    assert [event["message"] for event in events if event["type"] == "log"] == ["counted to 5"]


def test_heartbeats_come_at_a_third(worker: SimpleNamespace) -> None:
    events: list[dict[str, Any]] = []
    config = {"security": worker.security, "result_format": "json", "on_event": events.append}
    with WebSocketExecutor(worker.url, **config, delivery_heartbeat_seconds=3.0) as pool:
        future = pool.submit(named("wait"), 600)
        until(lambda: sum(event["type"] == "heartbeat" for event in events) >= 2)
        assert not future.done() and future.cancel()


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_a_cancel_stops_a_task_that_looks_at_its_signal(pool: WebSocketExecutor, mode: str) -> None:
    future = pool.with_options(delivery_cancel_mode=mode).submit(named("wait"), 600)
    until(future.running)
    assert future.cancel()
    with pytest.raises(DeliveryCancelled) as caught:
        future.result(WAIT)
    assert caught.value.acknowledged == (mode == "require_ack")
    assert pool.submit(named("wait"), 0).result(WAIT) == "rested"


def test_shutdown_ends_every_run(worker: SimpleNamespace) -> None:
    with RawHost(worker) as host:
        for run_id in ("a", "b"):
            host.send(type="run_task", run_id=run_id, task_id="t", callable="wait", positional=[600])
        host.send(type="shutdown")
        assert [host.wait(run_id)[-1]["type"] for run_id in ("a", "b")] == ["task_cancelled"] * 2


def test_a_weave(worker: SimpleNamespace) -> None:
    """Tasks of both languages in one graph."""
    config = {"url": worker.url, "security": worker.security, "result_format": "json"}
    wove_ws_sync.config(environments={"node": {"executor": "websocket", "executor_config": config}})
    with weave() as w:

        @w.do
        def name() -> str:
            return "Wove"

        w.do(environment="node")(named("greet", "name"))

        @w.do
        def shout(greet: str) -> str:
            return greet.upper()

    assert w.result.shout == "HELLO, WOVE!"


def test_the_runs_of_a_worker_that_dies_are_told(tmp_path: Path) -> None:
    """It keeps nothing: their policy decides, as with any worker without resume."""
    with node_worker() as mortal:
        config = {"security": mortal.security, "result_format": "json", "delivery_orphan_policy": "fail"}
        with WebSocketExecutor(mortal.url, **config) as pool:
            future = pool.submit(named("wait"), 600)
            until(future.running)
            mortal.process.kill()
            assert isinstance(future.exception(WAIT), wove_ws_sync.ConnectionLost)


def test_check_says_that_it_takes_no_pickles(worker: SimpleNamespace) -> None:
    """The command of the how-to."""
    done = subprocess.run(
        [sys.executable, "-m", "wove_ws_sync", "check", worker.url, "--security", "env:WOVE_WORKER_SECRET"],
        env={**os.environ, "WOVE_WORKER_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skip  run" in done.stdout and "calls by name" in done.stdout


def test_the_same_program_runs_on_a_python_worker() -> None:
    """Names decide, not the language."""
    with (
        LoopbackWorker(args=["--registry", "named_tasks"]) as python,
        WebSocketExecutor(python.url, security=python.security, result_format="json") as pool,
    ):
        assert pool.submit(named("add"), 1, 2).result(WAIT) == 3
