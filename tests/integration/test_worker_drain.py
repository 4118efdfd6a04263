"""The extension ``drain``, and what hosts that do not know it see of a service that is about to stop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import socket
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from raw_host import PATIENCE, RawHost, occupy, plain_error, wait_until
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from wove_ws_sync.worker import WorkerService

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERYTHING = "resume,ack,drain"


class Running:
    """A worker service on an event loop in a thread of its own."""

    security = None

    def __init__(self, workers: int) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="service-under-test", daemon=True)
        self._thread.start()
        self.service = WorkerService(port=0, workers=workers)
        self.call(self.service.start()).result(PATIENCE)
        self.url = self.service.url

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def drain(self, timeout: float = PATIENCE) -> concurrent.futures.Future[Any]:
        """Begin to drain; return once no new run is taken."""
        future = self.call(self.service.drain(timeout))
        wait_until(lambda: future.done() or "serving" not in repr(self.service))
        return future

    def close(self) -> None:
        self.call(self.service.stop()).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


@pytest.fixture
def running(gate: Path) -> Iterator[Running]:
    """A service with one slot, so that a second run is queued."""
    service = Running(workers=1)
    yield service
    gate.touch()
    service.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A file that lets tasks end."""
    return tmp_path / "gate"


def full_host(running: Running, **said: Any) -> RawHost:
    return RawHost(running, extensions=EVERYTHING, name=secrets.token_hex(16), **said)


def closed_with(host: RawHost) -> int:
    """Return the code with which the service closes; nothing else may come before."""
    with pytest.raises(ConnectionClosed) as caught:
        host.event()
    assert caught.value.rcvd is not None
    return int(caught.value.rcvd.code)


def test_runs_that_are_there_are_finished(running: Running, gate: Path) -> None:
    """Running and queued ones, of every kind of host; then connections are closed with 1001."""
    with full_host(running) as host, RawHost(running) as foreign:
        host.run(occupy(str(gate)), "running")
        host.wait("running", "task_started")
        host.run(lambda: "mine", "queued")
        foreign.run(lambda: "yours", "queued")
        assert host.resume("running", "queued") == {"alive": ["running", "queued"]}
        host.notice("task_started")
        foreign.socket.ping().wait(PATIENCE)
        drained = running.drain(20.0)
        notice = host.notice("draining")
        assert set(notice) == {"type", "timeout"} and 0 < notice["timeout"] <= 20.0
        with pytest.raises((OSError, InvalidHandshake)):
            RawHost(running)
        gate.touch()
        assert host.result("running") is None
        assert host.result("queued") == "mine"
        assert [event["type"] for event in foreign.wait("queued")] == ["task_started", "task_result"]
        host.ack("running", "queued")
        assert closed_with(host) == closed_with(foreign) == 1001
        assert drained.result(PATIENCE) is True
        assert "stopped" in repr(running.service)


def test_new_runs_are_refused(running: Running, gate: Path) -> None:
    """With a plain error that says that the task was not begun, also to a foreign host."""
    with full_host(running) as host, RawHost(running) as foreign:
        for each in (host, foreign):
            each.run(occupy(str(gate)), "old")
        host.wait("old", "task_started")
        foreign.socket.ping().wait(PATIENCE)
        drained = running.drain()
        host.notice("draining")
        for each in (host, foreign):
            each.run(lambda: None, "old")  # it is known, so it is not refused
            each.run(lambda: None, "new")
            [event] = each.wait("new")  # by now the one before was read as well
            error = plain_error(event, "WorkerStopping")
            assert error["retryable"] is True and error["started"] is False
        gate.touch()
        for each in (host, foreign):
            assert each.result("old") is None
        host.ack("old")
        assert closed_with(host) == closed_with(foreign) == 1001
        assert drained.result(PATIENCE) is True
    assert running.service.counters["refused_run"] == 2


def test_it_waits_for_acknowledgements(running: Running) -> None:
    """An end that was sent may be lost yet; with the last ``event_ack`` the drain is over."""
    with full_host(running) as host:
        host.run(lambda: 1)
        assert host.result() == 1
        drained = running.drain()
        host.notice("draining")
        host.run(lambda: 1)
        assert host.result() == 1
        assert not drained.done()
        host.ack("r")
        assert closed_with(host) == 1001
        assert drained.result(PATIENCE) is True


@pytest.mark.parametrize("timeout", [0.0, 0.3])
def test_what_has_not_ended_in_time_is_given_up(running: Running, gate: Path, timeout: float) -> None:
    """Each run has an error that says whether its task may have begun; the queued one never does."""
    with full_host(running) as host, RawHost(running) as foreign:
        host.run(occupy(str(gate)), "running")
        host.wait("running", "task_started")
        host.run(occupy(str(gate) + ".never"), "queued")
        foreign.run(occupy(str(gate) + ".never"), "queued")
        assert host.resume("queued", "running") == {"alive": ["queued", "running"]}
        host.notice("task_started")
        foreign.socket.ping().wait(PATIENCE)
        drained = running.drain(timeout)
        host.notice("draining")
        for each, run_id, started in (
            (host, "running", True),
            (host, "queued", False),
            (foreign, "queued", False),
        ):
            error = plain_error(each.wait(run_id)[-1], "WorkerStopping")
            assert (error["retryable"], error["started"]) == (True, started)
        assert closed_with(host) == closed_with(foreign) == 1001
        gate.touch()
        drained.result(PATIENCE)
    assert not Path(f"{gate}.never.running").exists()


def test_a_coroutine_that_is_given_up_is_cancelled(running: Running, tmp_path: Path) -> None:
    """It may clean up before the service is gone."""

    async def task(path: str) -> None:
        import asyncio
        import pathlib

        pathlib.Path(path + ".running").touch()
        try:
            await asyncio.Event().wait()
        finally:
            pathlib.Path(path).touch()

    with full_host(running) as host:
        host.run(task, path=str(tmp_path / "cleaned"))
        host.wait(kind="task_started")
        wait_until((tmp_path / "cleaned.running").exists)
        drained = running.drain(0.1)
        host.notice("draining")
        assert plain_error(host.wait()[-1], "WorkerStopping")["started"] is True
        assert drained.result(PATIENCE) is True
    assert (tmp_path / "cleaned").exists()


def test_runs_without_a_host_are_waited_for(running: Running, gate: Path) -> None:
    """Of a host that is away, and such as were let go."""
    with full_host(running) as host:
        host.run(occupy(str(gate)), "let go")
        host.wait("let go", "task_started")
        host.run(lambda path: open(path, "w").close(), "left", path=f"{gate}.left")
        host.send(type="detach_task", run_id="let go")
        assert host.resume("left") == {"alive": ["left"]}
        host.cut()
    drained = running.drain()
    assert not drained.done()
    gate.touch()
    assert drained.result(PATIENCE) is True
    assert Path(f"{gate}.left").exists()


def test_without_runs_it_is_a_stop(running: Running) -> None:
    """At once, however many hosts are connected; a service is drained once."""
    with full_host(running) as host, RawHost(running) as foreign:
        assert running.drain().result(PATIENCE) is True
        assert host.notice("draining") and closed_with(host) == closed_with(foreign) == 1001
    with pytest.raises(RuntimeError, match="drained once"):
        running.call(running.service.drain()).result(PATIENCE)


def test_a_host_that_leaves_is_not_waited_for(running: Running, gate: Path) -> None:
    """Its runs end with its connection, and with them the drain."""
    with RawHost(running) as foreign:
        foreign.run(occupy(str(gate)))
        foreign.wait(kind="task_started")
        drained = running.drain()
        foreign.cut()
        gate.touch()
        drained.result(PATIENCE)


def test_stop_ends_a_drain(running: Running, gate: Path) -> None:
    """Whoever waits for the drain has its result; runs are dropped, as ``stop()`` says."""
    with RawHost(running) as foreign:
        foreign.run(occupy(str(gate)))
        foreign.wait(kind="task_started")
        drained = running.drain()
        assert running.call(running.service.stop(0.0)).result(PATIENCE) is False
        gate.touch()
        drained.result(PATIENCE)


def test_serve_forever_outlasts_the_drain(running: Running, gate: Path) -> None:
    """It does not take the closed listener for the end of the service."""
    served = running.call(running.service.serve_forever())
    with full_host(running) as host:
        host.run(occupy(str(gate)))
        host.wait(kind="task_started")
        host.send(type="detach_task", run_id="r")
        host.send(type="shutdown")
    drained = running.drain()
    gate.touch()
    assert drained.result(PATIENCE) is True
    served.result(PATIENCE)


def test_a_slow_host_has_its_results_before_the_drain_is_over(running: Running, gate: Path) -> None:
    """A foreign host that reads nothing for a while: what this process still has counts as unwritten."""
    assert running.service._server is not None
    for listener in running.service._server.sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    small_buffer = socket.socket()
    small_buffer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    host, port = running.url.removeprefix("ws://").partition("/")[0].split(":")
    small_buffer.connect((host, int(port)))
    with RawHost(running, sock=small_buffer, max_queue=1) as foreign:
        foreign.run(occupy(str(gate)), "first")  # there is one slot, so the others wait for it
        for number in range(45):
            foreign.run(lambda: b"x" * 4_000, f"r{number}")
        wait_until(lambda: alive(running) == 46)
        gate.touch()
        wait_until(lambda: alive(running) == 0)
        drained = running.drain(PATIENCE)
        with pytest.raises(concurrent.futures.TimeoutError):
            drained.result(3.0)  # longer than a close is waited for
        results = {f"r{number}": foreign.result(f"r{number}") for number in range(45)}
        assert all(len(result) == 4_000 for result in results.values())
        assert closed_with(foreign) == 1001
        drained.result(PATIENCE)


def alive(running: Running) -> int:
    assert running.service._dispatcher is not None
    return running.service._dispatcher.counts()[0]
