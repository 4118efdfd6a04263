"""A connection that ends, vanishes, trickles or breaks the protocol: noticed, and dealt with run by run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
from fault_helpers import GRACE, MIB, WAIT, descriptors, link_of, own_threads, python, resident, until, within
from fault_proxy import FaultProxy
from scripted_worker import ScriptedWorker, result, task
from wove.environment import EnvironmentExecutionError
from ws_peer import CONT, TEXT, frame

from wove_ws_sync import ConnectionLost, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker, close_links

POLICIES = ("cancel", "fail", "detach", "requeue")


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize(
    "where", [0, 1, 6, 70_000], ids=["between frames", "in the header", "in the length", "in the payload"]
)
def test_f8_each_run_by_its_policy(where: int, how: Any) -> None:
    """The end is noticed as such, by no ping; "requeue" runs again, the rest ends, none is forgotten."""
    with ScriptedWorker() as worker, FaultProxy(worker.url) as proxy:
        with WebSocketExecutor(proxy.url_for(worker.url), ping_interval=3600.0) as pool:
            futures = {
                policy: [pool.with_options(delivery_orphan_policy=policy).submit(task) for _ in range(5)]
                for policy in POLICIES
            }
            connection = worker.connection()
            connection.commands(20)
            proxy.pause()
            proxy.set(proxy.down, cut_after=proxy.passed()[1] + where, cut_by=how)
            if where:
                connection.say(result(futures["cancel"][0].run_id, "x" * 100_000))
            proxy.wait_for(lambda: not proxy.open_passages())
            for policy in POLICIES[:3]:
                for future in futures[policy]:
                    with pytest.raises(ConnectionLost) as caught:
                        future.result(WAIT)
                    assert (caught.value.run_id, caught.value.maybe_executed) == (future.run_id, True)
                    assert caught.value.close_code is None
                    assert ("orphaned" in str(caught.value)) == (policy != "cancel")
            assert not any(future.done() for future in futures["requeue"])
            proxy.heal()
            proxy.resume()
            again = worker.connection()
            commands = again.commands(5)
            assert [command["run_id"] for command in commands] == [f.run_id for f in futures["requeue"]]
            assert {command["attempt"] for command in commands} == {2}
            again.say(*[result(future.run_id, future.run_id) for future in futures["requeue"]])
            assert [f.result(WAIT) for f in futures["requeue"]] == [f.run_id for f in futures["requeue"]]
            assert link_of(pool).stats()["losses"] == 1


@pytest.mark.parametrize("state", ["idle", "busy", "full"])
def test_f10_a_peer_that_vanished(state: str) -> None:
    """Nothing arrives any more and nothing is refused: lost after two ping times, also with a full buffer.

    What had not left goes out again over the next connection.
    """
    with ScriptedWorker() as worker, FaultProxy(worker.url) as proxy:
        url = proxy.url_for(worker.url)
        pool = WebSocketExecutor(url, ping_interval=0.5, pong_timeout=0.5, resume_window=WAIT)
        with pool, concurrent.futures.ThreadPoolExecutor(1) as threads:
            sent = pool.submit(task)
            connection = worker.connection()
            connection.commands(1)
            connection.say({"type": "task_started", "run_id": sent.run_id})
            until(sent.running)
            proxy.pause()
            if state == "full":
                proxy.set(stalled=True)
            else:
                proxy.set(swallow=True)
            stuck = None
            with within(1.0):
                if state != "idle":
                    stuck = threads.submit(pool.submit, len, b"x" * 16 * MIB)
                with pytest.raises(ConnectionLost) as caught:
                    sent.result(WAIT)
            assert caught.value.maybe_executed
            assert "no bytes for 0.5 s after a ping" in caught.value.reason
            proxy.heal()
            proxy.resume()
            late = None if stuck is None else stuck.result(WAIT)
            last = pool.submit(task)
            again = worker.connection()
            again.say(*[result(run["run_id"], 6) for run in again.commands(1)])
            if late is not None and (state == "full" or not late.done()):
                commands = {run["run_id"]: run for run in again.commands(2)}
                assert "attempt" not in commands[late.run_id]
                again.say(result(last.run_id, 6), result(late.run_id, 6))
                assert late.result(WAIT) == 6
            elif late is not None:
                # The kernel took all of it, and so perhaps did the peer.
                assert late.exception(WAIT).maybe_executed
            assert last.result(WAIT) == 6


VANISH = """
    import subprocess, sys, threading, time
    from wove_ws_sync import ConnectionLost, WebSocketExecutor
    from wove_ws_sync.connection import Connection
    from wove_ws_sync.testing import LoopbackWorker

    net = sys.argv[1]
    def lo(state):
        subprocess.run([net, "link", "set", "lo", state], check=True)

    async def forever():
        import asyncio
        await asyncio.sleep(600)

    lo("up")
    if sys.argv[2] == "second net":
        Connection.check = lambda self, *args, **kwargs: None  # nobody minds the pings
    with LoopbackWorker() as worker:
        timing = {"ping_interval": 0.5, "pong_timeout": 0.5, "resume_window": 0.0, "close_timeout": 0.5}
        with WebSocketExecutor(**worker.config, **timing, open_timeout=1.0) as pool:
            run = pool.submit(forever)
            while not run.running():
                time.sleep(0.01)
            lo("down")
            started = time.monotonic()
            behind, said = None, []
            if sys.argv[2] != "idle":
                def send():
                    try:
                        pool.submit(len, b"x" * 10_000_000).result(30)
                    except Exception as exc:
                        said.append(f"behind: {isinstance(exc, OSError)}")
                behind = threading.Thread(target=send)
                behind.start()
            try:
                run.result(40)
            except ConnectionLost as exc:
                print("lost:", exc.reason)
            print("in time:", time.monotonic() - started < 15.0)
            if behind is not None:
                behind.join()
            print(*said, sep="\\n")
            lo("up")
            print(pool.submit(len, b"123").result(40))
"""


@pytest.mark.parametrize("state", ["idle", "busy", "second net"])
def test_f10_packets_are_dropped(state: str) -> None:
    """In a network of its own that goes down: pings notice it, and TCP_USER_TIMEOUT without them."""
    unshare, net = shutil.which("unshare"), shutil.which("ip") or "/usr/sbin/ip"
    if unshare is None or not Path(net).exists():
        pytest.skip("needs unshare and ip")
    if subprocess.run([unshare, "-rn", net, "link", "set", "lo", "up"], check=False).returncode:
        pytest.skip("this system allows no network namespaces")
    out, err, status = python(VANISH, net, state, prefix=[unshare, "-rn"], timeout=100)
    assert (err, status) == ("", 0), out + err
    lines = out.splitlines()
    assert lines[-1] == "3"
    assert "in time: True" in lines
    [lost] = [line for line in lines if line.startswith("lost: ")]
    if state == "second net":
        # The kernel says why to one system call only, that of the reader or that of the writer.
        assert "timed out" in lost or "Broken pipe" in lost
    elif state == "idle":
        assert "no bytes for 0.5 s after a ping" in lost
    if state != "idle":
        assert "behind: True" in lines


@pytest.mark.soak
def test_f12_a_message_that_trickles_in_real_time() -> None:
    """One byte a second inside a message is no sign of progress: lost after half a minute."""
    with ScriptedWorker() as worker, FaultProxy(worker.url) as proxy:
        with WebSocketExecutor(proxy.url_for(worker.url)) as pool:
            future = pool.submit(task)
            connection = worker.connection()
            connection.commands(1)
            proxy.set(proxy.down, bandwidth=20.0)
            started = time.monotonic()
            connection.say(result(future.run_id, "x" * 50_000))
            with pytest.raises(ConnectionLost) as caught:
                future.result(WAIT)
            assert "arrived inside a message" in caught.value.reason
            assert 29.0 <= time.monotonic() - started <= 31.0 + GRACE
            assert proxy.passed()[1] < 5_000


class Flapping:
    """Cut every connection of *proxy* again and again while the block runs."""

    def __init__(self, proxy: FaultProxy, interval: float) -> None:
        self.cuts = 0
        self._proxy = proxy
        self._interval = interval
        self._over = threading.Event()
        self._random = random.Random(16)
        self._thread = threading.Thread(target=self._run, name="flapping")

    def _run(self) -> None:
        while not self._over.wait(self._interval):
            self.cuts += self._proxy.end_all("rst" if self._random.random() < 0.5 else "fin")

    def __enter__(self) -> Flapping:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(WAIT)


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "seconds",
    [3.0, pytest.param(60.0, marks=[pytest.mark.slow, pytest.mark.soak])],
    ids=["short", "long"],
)
def test_f16_a_connection_that_is_cut_all_the_time(
    worker: LoopbackWorker, tmp_path: Path, seconds: float
) -> None:
    """Work goes on, every run has the right result, dials stay apart, nothing piles up."""
    with FaultProxy(worker.url) as proxy:
        config = {"url": proxy.url_for(worker.url), "security": worker.security}
        settings = {"delivery_orphan_policy": "requeue", "max_requeues": 1000, "resume_window": WAIT}
        pool = WebSocketExecutor(**config, **settings)
        with pool:
            assert pool.submit(len, b"123").result(WAIT) == 3
            before = descriptors(), len(own_threads())
            memory = 0
            numbers = itertools.count()
            ends_at = time.monotonic() + seconds
            with Flapping(proxy, 0.2) as flapping:
                while time.monotonic() < ends_at or flapping.cuts < 5:
                    runs = [f"run-{next(numbers)}" for _ in range(20)]
                    futures = [pool.submit(ledger.record, str(tmp_path), run, run) for run in runs]
                    assert [future.result(WAIT) for future in futures] == runs
                    memory = memory or resident()
            assert pool.submit(len, b"123").result(WAIT) == 3
            stats = link_of(pool).stats()
            done = next(numbers)
            counts = ledger.executions(tmp_path)
            assert set(counts) == {f"run-{number}" for number in range(done)}
            assert done >= 40
            # The pause before a dial is 0.08 s at least, and each cut costs one dial, perhaps two.
            assert stats["losses"] <= stats["dials"] <= 2 * flapping.cuts + 2
            assert stats["dials"] <= (time.monotonic() - ends_at + seconds) / 0.08 + 2
            assert stats["runs"] == 0
            until(lambda: (descriptors(), len(own_threads())) <= before)
            assert resident() - memory < 32 * MIB


REFUSED: dict[str, tuple[bytes, int]] = {
    "1 TB": (struct.pack("!BBQ", 0x81, 127, 1 << 40), 1009),
    "highest bit": (struct.pack("!BBQ", 0x81, 127, (1 << 63) + 5), 1009),
    "100 MB": (struct.pack("!BBQ", 0x81, 127, 100 * MIB) + b"x" * 100_000, 1009),
    "10,000 fragments": (
        frame(TEXT, b"[" + b"1" * 1023, fin=False) + frame(CONT, b"x" * 1024, fin=False) * 10_000,
        1009,
    ),
    "masked": (frame(TEXT, b"{}", mask=b"abcd"), 1002),
    "reserved bit": (frame(TEXT, b"{}", rsv=4), 1002),
}


@pytest.mark.parametrize(("data", "code"), REFUSED.values(), ids=REFUSED)
def test_f27_refused_by_its_header(data: bytes, code: int) -> None:
    """Closed with the code that says why, at no cost of memory; what may run again does."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, max_message_bytes=8 * MIB) as pool:
        lost = pool.submit(task)
        again = [pool.with_options(delivery_orphan_policy="requeue").submit(task) for _ in range(99)]
        connection = worker.connection()
        connection.commands(100)
        before = resident()
        threading.Thread(target=_say_bytes, args=(connection, data)).start()
        with pytest.raises(ConnectionLost) as caught:
            lost.result(WAIT)
        assert caught.value.close_code == code
        assert resident() - before < 16 * MIB  # the limit itself, and some for noise
        assert connection.ended.wait(WAIT)
        assert connection.close_code == code
        second = worker.connection()
        second.commands(99)
        second.say([result(future.run_id, future.run_id) for future in again])
        assert [future.result(WAIT) for future in again] == [future.run_id for future in again]


def _say_bytes(connection: Any, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the host may hang up before it has all of it
        connection.say_bytes(data)


def test_f27_10000_fragments_within_the_limit() -> None:
    """They are one message, and the run's result."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        future = pool.submit(task)
        connection = worker.connection()
        text = b'{"type": "task_result", "run_id": "%b", "result": "%b"}' % (
            future.run_id.encode(),
            b"x" * 200_000,
        )
        pieces = [text[start : start + 20] for start in range(0, len(text), 20)]
        assert len(pieces) > 10_000
        kinds = [TEXT, *[CONT] * (len(pieces) - 1)]
        frames = [
            frame(kind, piece, fin=piece is pieces[-1]) for kind, piece in zip(kinds, pieces, strict=True)
        ]
        connection.commands(1)
        connection.say_bytes(b"".join(frames))
        assert future.result(WAIT) == "x" * 200_000


def sized(size: int) -> bytes:
    return b"x" * size


def test_f27_100_mb_from_our_worker(worker: LoopbackWorker) -> None:
    """It knows what this host takes: one error of that run, and 99 others never hear of it."""
    before = resident()
    with WebSocketExecutor(worker.url, security=worker.security, max_message_bytes=8 * MIB) as pool:
        large = pool.submit(sized, 100 * MIB)
        small = [pool.submit(sized, number) for number in range(99)]
        with pytest.raises(EnvironmentExecutionError, match="max_message_bytes") as caught:
            large.result(WAIT)
        assert caught.value.payload["kind"] == "ResultTooLarge"
        assert [len(future.result(WAIT)) for future in small] == list(range(99))
        assert link_of(pool).stats()["dials"] == 1
        close_links()
    assert resident() - before < 16 * MIB
