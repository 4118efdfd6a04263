"""The worker service behind TLS: the same faces over wss, and clear errors where trust is missing."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from wove import weave

import wove_ws_sync
from wove_ws_sync import SyncWebSocketEnvironmentExecutor, WebSocketExecutor
from wove_ws_sync.session import links
from wove_ws_sync.testing import LoopbackWorker

WAIT = 60.0


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """A worker service with a certificate of its own making."""
    with LoopbackWorker(workers=16, tls=True) as running:
        yield running


def echo(value: Any) -> Any:
    return value


def test_futures_over_tls(worker: LoopbackWorker) -> None:
    """Small and large values pass, and a task's exception is itself."""
    with WebSocketExecutor(worker.url, security=worker.security, ca_file=worker.ca_file) as pool:
        assert list(pool.map(echo, range(100))) == list(range(100))
        data = bytes(range(256)) * 65536
        assert pool.submit(echo, data).result(WAIT) == data
        with pytest.raises(ZeroDivisionError):
            pool.submit(divmod, 1, 0).result(WAIT)


def test_a_weave_over_tls(worker: LoopbackWorker) -> None:
    """Through wove.config, mapped and with a heartbeat."""
    wove_ws_sync.config(
        environments={"socket_workers": {"executor": "websocket", "executor_config": worker.config}}
    )
    with weave() as w:

        @w.do(range(20), environment="socket_workers", delivery_heartbeat_seconds=5.0)
        def square(item: int) -> int:
            return item * item

        @w.do(environment="socket_workers")
        def total(square: list[int]) -> int:
            return sum(square)

    assert w.result.total == sum(n * n for n in range(20))


def test_the_sync_executor_over_tls(worker: LoopbackWorker) -> None:
    """start() verifies the certificate, and frames go both ways."""
    executor = SyncWebSocketEnvironmentExecutor()
    executor.start(environment_name="e", environment_config=worker.config, run_config={})
    try:
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable": echo, "args": {"value": 7}}
        executor.send(frame)
        while (event := executor.recv(WAIT))["type"] != "task_result":
            pass
        assert event["result"] == 7
    finally:
        executor.stop()


@pytest.fixture
def another_ca(tmp_path: Path) -> str:
    """The file of an authority that did not sign the worker's certificate."""
    path = tmp_path / "another.pem"
    trustme.CA().cert_pem.write_to_path(path)
    return str(path)


def test_an_untrusted_certificate_is_refused(worker: LoopbackWorker, another_ca: str) -> None:
    """By every face, with the place and the reason in the error; nothing is retried behind it."""
    config = {**worker.config, "ca_file": another_ca}
    with WebSocketExecutor(**config) as pool:
        with pytest.raises(ssl.SSLCertVerificationError, match=r"certificate of .*:\d+ was refused"):
            pool.submit(echo, 1).result(WAIT)
        [link] = [link for link in links() if link.options.ca_file == another_ca]
        assert link.stats()["dials"] == 1 and link.stats()["runs"] == 0
    executor = SyncWebSocketEnvironmentExecutor()
    with pytest.raises(ssl.SSLCertVerificationError):
        executor.start(environment_name="e", environment_config=config, run_config={})
    wove_ws_sync.config(environments={"socket_workers": {"executor": "websocket", "executor_config": config}})
    with pytest.raises(ssl.SSLCertVerificationError), weave() as w:
        w.do(environment="socket_workers")(echo_one)


def echo_one() -> int:
    return 1


@pytest.mark.parametrize("name", ["another.example", "127.0.0.2"])
def test_a_certificate_for_another_name_is_refused(worker: LoopbackWorker, name: str) -> None:
    """The host's name is checked, or the one that server_hostname gives."""
    with (
        WebSocketExecutor(**worker.config, server_hostname=name) as pool,
        pytest.raises(ssl.SSLCertVerificationError, match="was refused"),
    ):
        pool.submit(echo, 1).result(WAIT)


def test_ws_to_a_worker_that_speaks_tls(worker: LoopbackWorker) -> None:
    """A clear error of the connection, at once."""
    url = worker.url.replace("wss://", "ws://")
    with WebSocketExecutor(url, security=worker.security, open_timeout=5.0) as pool:
        started = time.monotonic()
        with pytest.raises((ConnectionError, TimeoutError)) as caught:
            pool.submit(echo, 1).result(WAIT)
        assert time.monotonic() - started < 10.0
        assert "handshake" in str(caught.value)


def test_sixteen_threads_both_ways(worker: LoopbackWorker) -> None:
    """Large and small messages in both directions at once: nothing is lost, nothing is mixed up."""
    wrong: list[Any] = []
    rounds: list[int] = []
    ends_at = time.monotonic() + 4.0

    def use(pool: WebSocketExecutor, number: int) -> None:
        count = 0
        while time.monotonic() < ends_at:
            value = bytes([number]) * (300_000 if number % 4 == 0 else 200) + str(count).encode()
            if pool.submit(echo, value).result(WAIT) != value:
                wrong.append((number, count))
            count += 1
        rounds.append(count)

    with WebSocketExecutor(**worker.config, delivery_heartbeat_seconds=20.0) as pool:
        threads = [threading.Thread(target=use, args=(pool, number)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert wrong == []
        assert len(rounds) == 16 and min(rounds) > 0
        [link] = [link for link in links() if link.options.url == worker.url]
        assert link.stats()["dials"] == 1
