"""A peer that stands still, and a host that did: everybody keeps their deadlines."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import wove
from fault_helpers import search_path
from scripted_worker import face_on, run_frame
from wove import weave

import wove_ws_sync
from wove_ws_sync import ConnectionLost, DeliveryTimeout, SyncWebSocketEnvironmentExecutor, WebSocketExecutor
from wove_ws_sync.link import Link
from wove_ws_sync.session import links
from wove_ws_sync.testing import LoopbackWorker, close_links

WAIT = 60.0
# What a machine under load may add to any deadline, in seconds.
GRACE = 3.0
LARGE = b"x" * 30_000_000


@pytest.fixture
def worker() -> Iterator[LoopbackWorker]:
    """A worker of the test's own, which runs again at the end."""
    with LoopbackWorker(workers=4) as running:
        try:
            yield running
        finally:
            go_on(running)


def stop(worker: LoopbackWorker) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)


def go_on(worker: LoopbackWorker) -> None:
    if worker.pid is not None:
        os.kill(worker.pid, signal.SIGCONT)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer than *seconds* and the grace."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= seconds + GRACE, f"took {took:.1f} s, {seconds} s were allowed"


def pool_on(worker: LoopbackWorker, **settings: Any) -> WebSocketExecutor:
    """Return an executor that trusts a silent connection for a minute, unless told otherwise."""
    patient = {"ping_interval": 30.0, "pong_timeout": 30.0, **settings}
    return WebSocketExecutor(worker.url, security=worker.security, **patient)


def the_link(worker: LoopbackWorker) -> Link:
    [link] = [link for link in links() if link.options.url == worker.url]
    return link


def add(a: int, b: int) -> int:
    return a + b


async def forever() -> None:
    import asyncio

    await asyncio.sleep(600)


def wait_running(future: Any) -> None:
    ends_at = time.monotonic() + WAIT
    while not future.running():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def test_f11_delivery_timeout_covers_queue_and_send(worker: LoopbackWorker) -> None:
    """30 MB that nobody reads and a small run behind it: submit() and result() keep the deadline."""
    with pool_on(worker) as pool:
        assert pool.submit(add, 1, 1).result(WAIT) == 2
        stop(worker)
        hasty = pool.with_options(delivery_timeout=1.0)
        with within(1.0):
            large = hasty.submit(len, LARGE)
        with within(1.0):
            small = hasty.submit(add, 1, 2)
        with within(1.0):
            for future in (large, small):
                with pytest.raises(DeliveryTimeout, match="Delivery timeout exceeded"):
                    future.result(WAIT)
        go_on(worker)
        assert pool.submit(add, 2, 2).result(WAIT) == 4
        assert the_link(worker).stats()["dials"] == 1


def test_f11_threads_behind_a_large_send_keep_their_deadlines(worker: LoopbackWorker) -> None:
    """While one thread sends without any limit, another one's submit() ends at its own deadline."""
    with pool_on(worker) as pool, concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert pool.submit(add, 1, 1).result(WAIT) == 2
        stop(worker)
        unlimited = threads.submit(pool.submit, len, LARGE)
        while the_link(worker).stats()["runs"] == 0:
            time.sleep(0.01)
        hasty = pool.with_options(delivery_timeout=1.0)
        with within(1.0):
            submitted = [threads.submit(hasty.submit, add, 1, number) for number in range(3)]
            for future in submitted:
                with pytest.raises(DeliveryTimeout):
                    future.result(WAIT).result(WAIT)
        assert not unlimited.done()
        go_on(worker)
        assert unlimited.result(WAIT).result(WAIT) == len(LARGE)
        assert the_link(worker).stats()["dials"] == 1


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_f11_f29_cancel_keeps_its_deadline(worker: LoopbackWorker, mode: str) -> None:
    """At once, or after cancel_ack_timeout without an answer; for sent, half-sent and queued runs."""
    with pool_on(worker, cancel_ack_timeout=1.0, delivery_cancel_mode=mode) as pool:
        running = pool.submit(forever)
        wait_running(running)
        stop(worker)
        half_sent = pool.with_options(delivery_timeout=30.0)
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            sending = thread.submit(half_sent.submit, len, LARGE)
            while the_link(worker).stats()["runs"] < 2:
                time.sleep(0.01)
            allowed = 0.0 if mode == "best_effort" else 1.0
            with within(allowed):
                assert running.cancel() and running.cancelled()
            with pytest.raises(concurrent.futures.CancelledError) as caught:
                running.result(WAIT)
            assert getattr(caught.value, "acknowledged", None) is False
            [run] = the_link(worker)._table.of_all()
            with within(allowed):
                the_link(worker).cancel(run)
                with pytest.raises(concurrent.futures.CancelledError):
                    _ended(the_link(worker), run)
            go_on(worker)
            sending.result(WAIT)
        assert pool.submit(add, 2, 2).result(WAIT) == 4


def _ended(link: Link, run: Any) -> None:
    ends_at = time.monotonic() + WAIT
    while not run.terminal:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    raise concurrent.futures.CancelledError


def test_f11_stop_of_the_sync_executor(worker: LoopbackWorker) -> None:
    """stop() returns at once, whatever is stuck, ends the runs and frees who waits in send() and recv()."""
    executor = SyncWebSocketEnvironmentExecutor()
    config = {**worker.config, "ping_interval": 30.0, "pong_timeout": 30.0}
    executor.start(environment_name="e", environment_config=config, run_config={})
    stop(worker)
    with within(1.0):
        executor.send(run_frame("r1", args={"a": LARGE}, delivery={"delivery_timeout": 1.0}))
    event = executor.recv(WAIT)
    assert event["run_id"] == "r1" and isinstance(event["exception"], DeliveryTimeout)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        sending = threads.submit(executor.send, run_frame("r2"))
        while the_link(worker).stats()["runs"] == 0:
            time.sleep(0.01)
        receiving = threads.submit(executor.recv)
        with within(0.0):
            executor.stop()
        with within(1.0):
            sending.result(WAIT)
            assert receiving.result(WAIT)["type"] == "task_cancelled"
    with within(2.0):
        close_links()


def test_f11_close_links_keeps_close_timeout(worker: LoopbackWorker) -> None:
    """With several links whose peers stand still, all of them together."""
    pools = [pool_on(worker, close_timeout=1.0, idle_timeout=60.0 + number) for number in range(4)]
    futures = [pool.submit(forever) for pool in pools]
    for future in futures:
        wait_running(future)
    stop(worker)
    with within(1.0):
        close_links()
    for future in futures:
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(WAIT)
    for pool in pools:
        pool.shutdown()


def test_f11_a_with_block_ends(worker: LoopbackWorker) -> None:
    """shutdown(wait=True) waits for runs that end at their deadlines."""
    with within(3.0):
        with pool_on(worker, delivery_timeout=1.0) as pool:
            pool.with_options(delivery_timeout=None).submit(add, 1, 1).result(WAIT)
            stop(worker)
            futures = [pool.submit(add, 1, 1) for _ in range(100)]
        assert all(isinstance(future.exception(), DeliveryTimeout) for future in futures)


def configure(worker: LoopbackWorker, **config: Any) -> None:
    wove_ws_sync.config(
        environments={
            "socket_workers": {"executor": "websocket", "executor_config": {**worker.config, **config}}
        }
    )


def test_f11_a_weave_keeps_its_deadline(worker: LoopbackWorker) -> None:
    """A large argument and small tasks in one weave: Wove's own error at the deadline, and the weave ends."""
    configure(worker, ping_interval=30.0, pong_timeout=30.0)
    with weave() as w:
        w.do(environment="socket_workers")(warm_up)
    assert w.result.warm_up == 1
    stop(worker)
    data = LARGE
    with within(2.0), weave() as w:

        @w.do(environment="socket_workers", delivery_timeout=1.0)
        def large() -> int:
            return len(data)

        @w.do(range(10), environment="socket_workers", delivery_timeout=1.0)
        def small(item: int) -> int:
            return item

    # The large one is submitted first, and its deadline counts while it is pickled; it ends its siblings.
    with pytest.raises(wove.DeliveryTimeoutError):
        _ = w.result.large
    go_on(worker)
    with weave() as w:
        w.do(environment="socket_workers")(warm_up)
    assert w.result.warm_up == 1


def warm_up() -> int:
    return 1


@pytest.mark.parametrize("full", [False, True], ids=["idle", "full buffer"])
def test_f9_a_dead_peer_is_noticed_without_any_deadline(worker: LoopbackWorker, full: bool) -> None:
    """ping_interval + pong_timeout after the last byte, with a full send buffer too; then all works again."""
    timing = {"ping_interval": 0.5, "pong_timeout": 0.5, "open_timeout": 1.0, "resume_window": 0.5}
    with pool_on(worker, **timing) as pool, concurrent.futures.ThreadPoolExecutor(1) as thread:
        sent = pool.submit(forever)
        wait_running(sent)
        stop(worker)
        with within(1.0):
            stuck = thread.submit(pool.submit, len, LARGE) if full else None
            with pytest.raises(ConnectionLost) as caught:
                sent.result(WAIT)
        assert caught.value.maybe_executed and caught.value.run_id == sent.run_id
        if stuck is not None:
            # It had not left: later connections are tried for it, for ten seconds.
            with within(10.0 + 2 * 1.0), pytest.raises((ConnectionLost, TimeoutError)):
                stuck.result(WAIT).result(WAIT)
        go_on(worker)
        assert pool.submit(add, 2, 2).result(WAIT) == 4
        assert the_link(worker).stats()["dials"] >= 2


def test_f9_a_weave_without_deadline_ends_when_the_peer_is_dead(worker: LoopbackWorker) -> None:
    """ConnectionLost out of the weave, and the next weave works on a new connection."""
    configure(worker, ping_interval=0.5, pong_timeout=0.5, resume_window=0.5, open_timeout=1.0)
    with weave() as w:
        w.do(environment="socket_workers")(warm_up)
    assert w.result.warm_up == 1
    stop(worker)
    with within(1.0), weave() as w:
        w.do(environment="socket_workers")(warm_up)
    with pytest.raises(ConnectionLost):
        _ = w.result.warm_up
    go_on(worker)
    with weave() as w:
        w.do(environment="socket_workers")(warm_up)
    assert w.result.warm_up == 1


HOST = """
    import sys, time, threading
    import wove_ws_sync
    from wove import weave
    from wove_ws_sync import WebSocketExecutor

    url, secret, kind = sys.argv[1:4]
    seconds = float(sys.argv[4])
    config = {"url": url, "security": {"type": "signed", "secret": secret}}
    config.update(ping_interval=1.0, pong_timeout=1.0)

    def long():
        import time
        time.sleep(seconds)
        return "done"

    if kind == "futures":
        with WebSocketExecutor(**config, delivery_heartbeat_seconds=1.0) as pool:
            future = pool.submit(long)
            while not future.running():
                time.sleep(0.01)
            print("running", flush=True)
            print(future.result())
            link = pool._core.session.link
            assert link.stats()["dials"] == 1, link.stats()
    else:
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": config}})
        threading.Timer(1.5, lambda: print("running", flush=True)).start()
        with weave() as w:
            w.do(environment="w", delivery_heartbeat_seconds=1.0)(long)
        print(w.result.long)
"""


@pytest.mark.parametrize("seconds", [4.0, pytest.param(60.0, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["futures", "weave"])
def test_f46_a_suspended_host_does_not_kill_a_healthy_run(
    worker: LoopbackWorker, kind: str, seconds: float
) -> None:
    """Stopped for four or 60 seconds with a heartbeat of one: what arrived is read before it is judged."""
    secret = (worker.security or {})["secret"]
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOST), worker.url, secret, kind, str(seconds + 3.0)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path()},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
    assert (out, err, process.returncode) == ("done\n", "", 0)


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "upstream"])
@pytest.mark.parametrize("kind", ["futures", "sync", "shim"])
def test_a_silent_worker(kind: str, foreign: bool) -> None:
    """DeliveryTimeout and cancel_task at the heartbeat deadline, at twice the value for a foreign worker."""
    allowed = 1.0 if foreign else 0.5
    started = time.monotonic()
    silence = {"delivery_heartbeat_seconds": 0.5}
    with face_on(kind, 3, foreign=foreign, delivery=silence) as (face, connection, ids, _):
        text = "Delivery heartbeat timed out for task '.*' after 0.5s without heartbeat"
        with pytest.raises(wove.DeliveryTimeoutError, match=text):
            face.outcome(ids[0])
        took = time.monotonic() - started
        assert allowed <= took <= allowed + GRACE
        assert {command["run_id"] for command in connection.commands(3, "cancel_task")} == set(ids)
        again = face.submit()
        connection.say({"type": "task_result", "run_id": again, "result": 1})
        assert face.outcome(again) == 1


def test_beats_keep_a_silent_task_alive() -> None:
    """A worker that only beats, for several times the deadline, loses nothing."""
    with face_on("futures", 1) as (face, connection, ids, _):
        future = face.pool.with_options(delivery_heartbeat_seconds=0.6).submit(add, 1, 1)  # type: ignore[attr-defined]
        for _ in range(12):
            connection.say({"type": "heartbeat", "run_id": future.run_id})
            time.sleep(0.2)
        connection.say({"type": "task_result", "run_id": future.run_id, "result": 2})
        assert future.result(WAIT) == 2
        connection.say({"type": "task_result", "run_id": ids[0], "result": 3})
        assert face.outcome(ids[0]) == 3
