"""Hosts that do not read: what waits for them is bounded, and they lose no more than they must."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from raw_host import PATIENCE, TERMINAL, RawHost, occupy, wait_until

from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker.channel import Channel
from wove_ws_sync.worker.connection import HostConnection
from wove_ws_sync.worker.greeting import Greeting

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERYTHING = "resume,ack,drain"
MIB = 1024 * 1024


@pytest.fixture
def worker() -> Iterator[LoopbackWorker]:
    """A worker of the test's own, whose memory is looked at."""
    with LoopbackWorker(workers=4, args=["--max-kept-bytes", str(64 * MIB)]) as running:
        yield running


def resident(worker: LoopbackWorker) -> int:
    """Return the resident memory of the worker, in MiB."""
    text = Path(f"/proc/{worker.pid}/statm").read_text()
    return int(text.split()[1]) * 4096 // MIB


def slow_host(worker: LoopbackWorker, **said: Any) -> RawHost:
    """Return a host that reads a few messages only, until it is asked for events."""
    return RawHost(worker, max_queue=1, close_timeout=0.5, **said)


def produce(size: int) -> bytes:
    """Return *size* bytes. Runs in the worker."""
    return b"x" * size


@pytest.mark.parametrize("said", [{"extensions": EVERYTHING, "name": "a" * 32}, {"extensions": "ack"}, {}])
def test_results_for_a_host_that_does_not_read_are_bounded(
    worker: LoopbackWorker, said: dict[str, Any]
) -> None:
    """300 MiB of them take 64 MiB and what is on its way; each run ends, if need be by ResultDropped."""
    size, count = (3 * MIB, 100) if said else (700_000, 420)
    before = resident(worker)
    with slow_host(worker, **said) as host:
        sender = threading.Thread(
            target=lambda: [host.run(produce, f"r{number}", size=size) for number in range(count)]
        )
        sender.start()  # it may have to wait, as the worker does not read when too much waits
        peak, settled = 0, threading.Event()
        for _ in range(40):
            settled.wait(0.05)
            peak = max(peak, resident(worker) - before)
        ends: list[dict[str, Any]] = []
        while len(ends) < count:
            event = host.event()
            if event["type"] in TERMINAL:
                ends.append(event)
                if "ack" in host.features:
                    host.ack(event["run_id"])
        sender.join(PATIENCE)
    assert peak < 200
    assert {event["run_id"] for event in ends} == {f"r{number}" for number in range(count)}
    dropped = [event["error"]["kind"] for event in ends if event["type"] == "task_error"]
    assert set(dropped) <= {"ResultDropped"} and len(dropped) < count


@pytest.mark.parametrize("ack", [True, False])
def test_results_of_runs_that_were_there_already_are_bounded(
    worker: LoopbackWorker, ack: bool, tmp_path: Path
) -> None:
    """The commands have been read before the first result waits: older or newer results are dropped."""
    gate, count, size = tmp_path / "gate", 60, 4 * MIB

    def task(gate: str, size: int) -> bytes:
        import pathlib
        import time

        while not pathlib.Path(gate).exists():
            time.sleep(0.01)
        return b"x" * size

    said = {"extensions": "ack"} if ack else {"limit": 100 * MIB}
    before = resident(worker)
    with slow_host(worker, **said) as host:
        for number in range(count):
            host.run(task, f"r{number}", gate=str(gate), size=size)
        host.run(task, "beats", gate=str(gate), size=1, delivery={"delivery_heartbeat_seconds": 0.1})
        host.wait("beats", "heartbeat")
        gate.touch()
        peak, settled = 0, threading.Event()
        for _ in range(60):
            settled.wait(0.05)
            peak = max(peak, resident(worker) - before)
        kinds = {}
        while len(kinds) < count:
            event = host.event()
            if event["type"] in TERMINAL and event["run_id"] != "beats":
                kinds[event["run_id"]] = event.get("error", {}).get("kind")
    assert peak < 200
    assert set(kinds.values()) == {None, "ResultDropped"}


class OneWriter:
    """A socket on which a test sends frames of its own: a pong of the library must not come in between.

    It is left out then, as it could not be sent before the worker reads on, nor anything be read.
    """

    def __init__(self, wrapped: socket.socket) -> None:
        self._wrapped = wrapped
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def send_whole(self, frame: bytes) -> None:
        with self._lock:
            self._wrapped.sendall(frame)

    def sendall(self, data: bytes) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._wrapped.sendall(data)
            finally:
                self._lock.release()


def test_answers_for_a_host_that_does_not_read_are_bounded(worker: LoopbackWorker) -> None:
    """When 8 MiB of them wait no further command is read; once they are read, all is answered."""
    ids = [f"{number:020d}" for number in range(20_000)]
    message = json.dumps({"type": "resume", "run_ids": ids, "more": True}).encode()
    # websockets cannot send and receive at once, so the frames are made by hand, masked with zeros.
    frame = b"\x81\xff" + len(message).to_bytes(8, "big") + bytes(4) + message
    before, count = resident(worker), 200
    with slow_host(worker, extensions=EVERYTHING, name="a" * 32, ping_interval=None) as host:
        writer = host.socket.socket = OneWriter(host.socket.socket)
        sender = threading.Thread(target=lambda: [writer.send_whole(frame) for _ in range(count)])
        sender.start()
        peak, settled = 0, threading.Event()
        for _ in range(60):
            settled.wait(0.05)
            peak = max(peak, resident(worker) - before)
        answers = [host.notice("resume_state")["lost"] for _ in range(count)]
        sender.join(PATIENCE)
    assert all(len(lost) == 20_000 for lost in answers)
    assert peak < 80


def test_an_acknowledged_end_is_not_sent_again(worker: LoopbackWorker) -> None:
    """It waited to be written once more, and its acknowledgement came before its turn."""
    with slow_host(worker, extensions=EVERYTHING, name="a" * 32) as host:
        host.run(lambda: b"x" * (2 * MIB))
        assert len(host.result()) == 2 * MIB
        for _ in range(5):
            host.send(type="resume", run_ids=["r"], more=True)
        host.ack("r")
        host.send(type="resume", run_ids=["r"])
        ends = 0
        while True:
            event = host.event()
            ends += event["type"] in TERMINAL
            if event["type"] == "resume_state" and event["lost"]:
                break
        assert ends <= 5 and host.is_quiet()


class TestBeats:
    """Heartbeats belong to a run and not to one of its connections."""

    def stuffed(self, worker: LoopbackWorker, name: str, gate: Path) -> RawHost:
        """Return a host that does not read, with the heartbeat of a run in the queue for it."""
        host = slow_host(worker, extensions=EVERYTHING, name=name)
        host.run(occupy(str(gate)), delivery={"delivery_heartbeat_seconds": 0.05})
        host.wait(kind="heartbeat")
        for number in range(60):  # not in fragments: the one that is on its way must not be broken off
            host.run(produce, f"large{number}", size=600_000)
        threading.Event().wait(1.0)
        return host

    def test_an_attached_run_beats_for_its_new_host(self, worker: LoopbackWorker, tmp_path: Path) -> None:
        """Though a beat waits in the queue of the host that let go of it and does not read."""
        gate = tmp_path / "gate"
        with self.stuffed(worker, "a" * 32, gate) as host:
            host.send(type="detach_task", run_id="r")
            with RawHost(worker, extensions=EVERYTHING, name="b" * 32) as other:

                def attached() -> bool:
                    other.send(
                        type="attach_task",
                        run_id="r",
                        task_id="task",
                        delivery={"delivery_heartbeat_seconds": 0.05},
                    )
                    return bool(other.event()["type"] == "task_started")

                wait_until(attached)
                other.wait(kind="heartbeat")
                gate.touch()
                assert other.wait()[-1]["type"] == "task_result"

    def test_a_resumed_run_beats_for_its_next_connection(
        self, worker: LoopbackWorker, tmp_path: Path
    ) -> None:
        """Though the one before sent nonsense and does not read; it is closed in bounded time."""
        gate = tmp_path / "gate"
        with self.stuffed(worker, "a" * 32, gate) as host:
            host.socket.send("{")
            with RawHost(worker, extensions=EVERYTHING, name="a" * 32) as again:
                assert again.resume("r") == {"alive": ["r"]}
                again.wait(kind="heartbeat")
                again.wait(kind="heartbeat")
                gate.touch()
                assert again.wait()[-1]["type"] == "task_result"
            wait_until(lambda: worker.log.count("is gone") == 2)


class Broken:
    """A connection whose close fails, as one that the peer has just closed may."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error
        self.aborted = 0
        self.transport = self

    def abort(self) -> None:
        self.aborted += 1
        raise AttributeError("'NoneType' object has no attribute 'abort'")

    async def close(self, code: int, reason: str = "") -> None:
        if self._error is None:
            await asyncio.Event().wait()
        else:
            raise self._error


@pytest.mark.parametrize("error", [None, AttributeError("no transport")])
def test_a_close_that_fails_is_a_close(error: BaseException | None) -> None:
    """Be it ours, after a while, or that of websockets: nobody is told of an exception."""
    broken: Any = Broken(error)
    greeting = Greeting(False, (), 1000, "", 0.0)

    async def check() -> None:
        await HostConnection(broken, Channel(broken, 1 << 20, None), greeting, Counter()).close(1001)

    asyncio.run(check())
    assert broken.aborted == 1
