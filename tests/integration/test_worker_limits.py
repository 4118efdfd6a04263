"""What a worker service does with more than it takes: errors that can be retried, and reading that pauses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import cloudpickle
import pytest
from engine_tasks import square
from fault_helpers import MIB, WAIT, resident, until
from ledger import record
from raw_host import TERMINAL, RawHost, occupy, plain_error, unpickled
from service_thread import ServiceThread
from wove.environment import EnvironmentExecutionError

from wove_ws_sync import RunFuture, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker.connection import HostConnection

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
        """It says that the run was not begun and may come again; connection and other runs live."""
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
            assert "--max-queue" in error["message"] and "runs (2)" in error["message"]
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


def hold(gate: str, number: int) -> int:
    """Return *number* once *gate* exists. Runs in the worker."""
    import pathlib
    import time

    while not pathlib.Path(gate).exists():
        time.sleep(0.01)
    return number


class TestInFlight:
    """``--max-in-flight``: runs of one host that were taken and have not ended."""

    def test_many_runs_at_a_small_limit(self, tmp_path: Path) -> None:
        """20,000 wait: memory is bounded, another host is served, cancels are obeyed; then all run."""
        gate, count, limit = tmp_path / "gate", 20_000, 100
        with (
            LoopbackWorker(workers=limit + 2, args=["--max-in-flight", str(limit)]) as worker,
            WebSocketExecutor(worker.url, security=worker.security) as pool,
            RawHost(worker) as other,
        ):
            holding = [pool.submit(hold, str(gate), number) for number in range(limit)]
            until(lambda: all(future.running() for future in holding))
            before, peak = resident(worker.pid), 0
            futures = [pool.submit(square, number) for number in range(count)]
            for number in range(20):
                other.run(square, f"r{number}", number=number)
                assert other.result(f"r{number}") == number**2
                peak = max(peak, resident(worker.pid))
            asked = pool.with_options(delivery_cancel_mode="require_ack").submit(square, 2)
            assert asked.cancel() and futures[1000].cancel() and holding[0].cancel()
            assert not any(future.done() for future in futures[limit:] if not future.cancelled())
            gate.touch()
            for number, future in enumerate(futures):
                assert future.cancelled() if number == 1000 else future.result(WAIT) == number**2
            assert [future.result(WAIT) for future in holding[1:]] == list(range(1, limit))
            peak = max(peak, resident(worker.pid))
            stats = pool.link.stats()
        assert peak - before < 48 * MIB  # without the limit it is more than that
        assert stats["connects"] == 1, stats

    @pytest.mark.parametrize("extensions", ["", EVERYTHING])
    def test_nothing_but_runs_has_to_wait(self, tmp_path: Path, extensions: str) -> None:
        """Cancels are obeyed, also of what waits; heartbeats, pings and acknowledgements go on."""
        gate = tmp_path / "gate"
        beats = {"delivery_heartbeat_seconds": 0.3}
        said = {"extensions": extensions, "name": "a" * 32} if extensions else {}
        with (
            LoopbackWorker(workers=8, args=["--max-in-flight", "3"]) as worker,
            RawHost(worker, **said) as host,
        ):
            for number in range(6):
                host.run(hold, f"r{number}", gate=str(gate), number=number, delivery=beats)
                if number < 3:
                    host.wait(f"r{number}", "task_started")
            host.cancel("r4")
            assert [event["type"] for event in host.wait("r4")] == ["task_cancelled"]
            assert host.socket.ping().wait(WAIT)
            host.wait("r0", "heartbeat")
            assert host.wait("r5", "heartbeat")[0]["type"] == "heartbeat"  # it waits and lives
            host.cancel("r1")
            assert host.wait("r1")[-1]["type"] == "task_cancelled"
            assert host.wait("r3", "task_started")[0]["type"] == "task_started"  # it took the place
            if extensions:
                host.ack("r1", "r4")
                assert host.resume("r0", "r1") == {"alive": ["r0"], "lost": ["r1"]}
            gate.touch()
            ends = {}
            while len(ends) < 4:
                event = host.event()
                if event["type"] in TERMINAL:
                    ends[event["run_id"]] = unpickled(event["result_pickle"])
            assert ends == {"r0": 0, "r2": 2, "r3": 3, "r5": 5}

    def test_a_host_that_leaves_takes_what_waits_with_it(self, tmp_path: Path) -> None:
        """After ``shutdown`` nothing of it begins, and each of its runs ends as cancelled."""
        gate = tmp_path / "gate"
        with (
            LoopbackWorker(workers=8, args=["--max-in-flight", "1"]) as worker,
            RawHost(worker) as host,
        ):
            host.run(hold, "first", gate=str(gate), number=1)
            host.wait("first", "task_started")
            for number in range(50):
                host.run(record, f"r{number}", folder=str(tmp_path), run=f"r{number}")
            host.send(type="shutdown")
            ends = [host.event() for _ in range(51)]
            assert {event["type"] for event in ends} == {"task_cancelled"}
            assert {event["run_id"] for event in ends} == {"first", *(f"r{number}" for number in range(50))}
            gate.touch()
            assert host.is_quiet()
        assert not list(tmp_path.glob("r*"))

    def test_what_is_let_go_outlives_a_host_with_too_many_runs(self) -> None:
        """Its ``shutdown`` takes along what is not let go, and nothing else."""
        with LoopbackWorker(workers=8, args=["--max-in-flight", "2"]) as worker:
            with RawHost(worker, extensions=EVERYTHING, name="a" * 32) as host:
                for number in range(4):
                    delivery = {"delivery_orphan_policy": "detach"}
                    host.run(slowly, f"r{number}", number=number, delivery=delivery)
                    if number < 2:
                        host.wait(f"r{number}", "task_started")
                for number in (0, 2, 3):
                    host.send(type="detach_task", run_id=f"r{number}", task_id="task")
                host.send(type="shutdown")
            with RawHost(worker, extensions=EVERYTHING, name="b" * 32) as host:
                for number in (0, 2, 3):
                    host.send(type="attach_task", run_id=f"r{number}", task_id="task")
                    assert host.result(f"r{number}") == number
                    host.ack(f"r{number}")
                host.send(type="attach_task", run_id="r1", task_id="task")
                plain_error(host.wait("r1")[-1], "UnknownRun")

    def test_what_is_attached_while_others_wait_can_be_cancelled(self, tmp_path: Path) -> None:
        """The cancel has it attached before, or it would find no run."""
        gate = tmp_path / "gate"
        with LoopbackWorker(workers=8, args=["--max-in-flight", "1"]) as worker:
            with RawHost(worker, extensions=EVERYTHING, name="a" * 32) as host:
                host.run(hold, "old", gate=str(gate), number=1, delivery={"delivery_orphan_policy": "detach"})
                host.wait("old", "task_started")
                host.send(type="detach_task", run_id="old", task_id="task")
            with RawHost(worker, extensions=EVERYTHING, name="b" * 32) as host:
                host.run(slowly, "first", number=1)
                host.wait("first", "task_started")
                delivery = {"delivery_cancel_mode": "best_effort"}
                host.send(type="attach_task", run_id="old", task_id="task", delivery=delivery)
                host.cancel("old")
                assert host.wait("old")[-1]["type"] == "task_cancelled"
                assert host.result("first") == 1
            gate.touch()

    def test_a_rest_does_not_go_on_with_what_websockets_has_stopped(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """It stops reading when it has too many frames; to go on behind its back would fill the memory."""
        rests: list[tuple[bool, bool]] = []
        rest = HostConnection._rest

        async def noted(self: HostConnection, room: asyncio.Future[None]) -> None:
            before = self._socket.transport.is_reading()
            await rest(self, room)
            rests.append((before, self._socket.transport.is_reading()))

        monkeypatch.setattr(HostConnection, "_rest", noted)
        with (
            ServiceThread(workers=1, max_in_flight=1) as service,
            RawHost(service, extensions=EVERYTHING, name="a" * 32, headers={}, ping_interval=None) as host,
        ):
            host.run(hold, "first", gate=str(tmp_path / "gate"), number=1)
            host.wait("first", "task_started")
            text = json.dumps({"type": "attach_task", "run_id": "r", "task_id": "t"}).encode()
            frames = (bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text) * 40_000
            flood = threading.Thread(target=_send_all, args=(host.socket.socket, frames))
            flood.start()
            until(lambda: any(not before for before, _ in rests))
            (tmp_path / "gate").touch()
            host.cut()
            flood.join(WAIT)
        assert (False, True) not in rests

    @pytest.mark.parametrize("named", [True, False])
    def test_the_wire_is_held_back_and_nothing_is_lost(self, tmp_path: Path, named: bool) -> None:
        """Beyond 8 MiB that wait the host cannot send on; when runs end it can, and all of them run."""
        gate, count, size = tmp_path / "gate", 400, 128 * 1024
        said = {"extensions": EVERYTHING, "name": "a" * 32} if named else {}
        with (
            LoopbackWorker(workers=2, args=["--max-in-flight", "1"]) as worker,
            RawHost(worker, ping_interval=None, **said) as host,
        ):
            before = resident(worker.pid)
            host.run(hold, "first", gate=str(gate), number=1)
            host.wait("first", "task_started")
            sent: list[int] = []

            def send() -> None:
                for number in range(count):
                    host.run(length, f"r{number}", text="x" * size)
                    sent.append(number)

            sender = threading.Thread(target=send)
            sender.start()
            until(lambda: len(sent) * size > 8 * MIB)
            threading.Event().wait(2.5)  # some rests and what is read between them
            assert len(sent) < count and resident(worker.pid) - before < 64 * MIB
            host.socket.pong()
            gate.touch()
            results = {}
            while len(results) < count + 1:
                event = host.event()
                if event["type"] in TERMINAL:
                    results[event["run_id"]] = unpickled(event["result_pickle"])
            sender.join(WAIT)
        assert results == {"first": 1, **{f"r{number}": size for number in range(count)}}

    def test_a_link_outlives_a_pause_that_is_longer_than_its_patience(self, tmp_path: Path) -> None:
        """Nothing can be sent for longer than ping_interval and pong_timeout allow, and nobody is cut off."""
        gate = tmp_path / "gate"
        with (
            LoopbackWorker(workers=1, args=["--max-in-flight", "1"]) as worker,
            WebSocketExecutor(
                worker.url, security=worker.security, ping_interval=2.0, pong_timeout=2.0
            ) as pool,
        ):
            first = pool.submit(hold, str(gate), 1)
            until(first.running)
            futures: list[RunFuture[int]] = []
            count = 60
            sender = threading.Thread(
                target=lambda: [futures.append(pool.submit(length, "x" * MIB)) for _ in range(count)]
            )
            sender.start()
            threading.Event().wait(8.0)
            assert len(futures) < count, "nothing was held back"
            gate.touch()
            sender.join(WAIT)
            assert [future.result(WAIT) for future in futures] == [MIB] * count
            assert pool.link.stats()["connects"] == 1, pool.link.stats()

    def test_a_drain_hands_back_what_waits(self, tmp_path: Path) -> None:
        """At once, and unstarted; what was accepted ends as usual."""
        gate = tmp_path / "gate"
        with (
            ServiceThread(workers=4, max_in_flight=1) as service,
            RawHost(service, extensions=EVERYTHING, name="a" * 32, headers={}) as host,
        ):
            host.run(hold, "first", gate=str(gate), number=1)
            host.wait("first", "task_started")
            for number in range(100):
                host.run(record, f"r{number}", folder=str(tmp_path), run=f"r{number}")
            assert host.socket.ping().wait(WAIT)
            drained = service.drain(WAIT)
            for number in range(100):
                error = plain_error(host.wait(f"r{number}")[-1], "WorkerStopping")
                assert error["started"] is False
            gate.touch()
            assert host.result("first") == 1
            host.ack("first")
            drained.result(WAIT)
        assert not list(tmp_path.glob("r*"))

    def test_a_host_that_is_gone_leaves_no_reader_behind(self, tmp_path: Path) -> None:
        """Its connection ends while reading pauses: what waits is dropped, and the run is cancelled."""
        gate = tmp_path / "gate"
        with LoopbackWorker(workers=2, args=["--max-in-flight", "1"]) as worker:
            with RawHost(worker) as host:
                host.run(hold, "first", gate=str(gate), number=1)
                host.wait("first", "task_started")
                for number in range(20):
                    host.run(record, f"r{number}", folder=str(tmp_path), run=f"r{number}")
                assert host.socket.ping().wait(WAIT)
                host.cut()
            until(lambda: worker.log.count("is gone") == 1)
            with RawHost(worker) as host:
                assert host.is_quiet()
        assert not list(tmp_path.glob("r*"))


def _send_all(wire: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the connection is cut meanwhile
        wire.sendall(data)


def slowly(number: int) -> int:
    """Runs in the worker."""
    import time

    time.sleep(1.0)
    return number


def length(text: str) -> int:
    """Runs in the worker."""
    return len(text)
