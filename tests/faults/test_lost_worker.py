"""A worker process that dies, stops or goes away with runs on it, and comes back on the same port."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import WAIT, link_of, until
from fault_proxy import FaultProxy, port_of
from ledger import executions, processes, record, record_and_hold

from wove_ws_sync import ConnectionLost, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

POLICIES = ("cancel", "fail", "requeue", "detach")


@pytest.fixture
def worker() -> Iterator[LoopbackWorker]:
    """A worker of the test's own, to be killed."""
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """Where runs write down that they are executed."""
    folder = tmp_path / "ledger"
    folder.mkdir()
    return folder


def sibling(worker: LoopbackWorker) -> LoopbackWorker:
    """Return a worker service with the secret of *worker*: the two may stand behind one address."""
    assert worker.security is not None
    secret = {"SIBLING_SECRET": worker.security["secret"]}
    return LoopbackWorker(workers=8, security=False, args=["--security", "env:SIBLING_SECRET"], env=secret)


class Held:
    """Runs that hold until the gate is open, which it is at the end at the latest."""

    def __init__(self, pool: WebSocketExecutor, ledger: Path, count: int) -> None:
        self._gate = ledger.parent / "gate"
        self.names = [f"run-{number}" for number in range(count)]
        self.futures: list[Any] = [
            pool.submit(record_and_hold, str(ledger), name, str(self._gate)) for name in self.names
        ]
        self._ledger = ledger

    def __enter__(self) -> Held:
        until(lambda: executions(self._ledger))  # a file alone may be that of a run not yet written down
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.let_go()

    def let_go(self) -> None:
        self._gate.touch()

    def results(self) -> list[str]:
        return [future.result(WAIT) for future in self.futures]


@pytest.mark.parametrize("policy", ["cancel", "fail", "detach"])
def test_f13_a_killed_worker_is_an_answer(worker: LoopbackWorker, ledger: Path, policy: str) -> None:
    """kill -9 with 1,000 runs in flight, back within a second: each ends as soon as the new one answers."""
    with WebSocketExecutor(worker.url, security=worker.security, delivery_orphan_policy=policy) as pool:
        with Held(pool, ledger, 1000) as held:
            worker.kill()
            worker.restart()
            errors = [future.exception(WAIT) for future in held.futures]
        assert all(isinstance(error, ConnectionLost) and error.maybe_executed for error in errors)
        assert link_of(pool).stats()["requeues"] == 0
    assert max(executions(ledger).values()) == 1


def test_f13_a_worker_that_stays_away_is_an_answer_when_the_window_is_over(
    worker: LoopbackWorker, ledger: Path
) -> None:
    """Nobody comes back: ConnectionLost after resume_window, not sooner and not never."""
    pool = WebSocketExecutor(worker.url, security=worker.security, resume_window=0.5)
    with pool, Held(pool, ledger, 100) as held:
        worker.kill()
        assert all(isinstance(future.exception(WAIT), ConnectionLost) for future in held.futures)


def test_f13_requeue_brings_every_result(worker: LoopbackWorker, ledger: Path) -> None:
    """kill -9 with 1,000 runs in flight, back within seconds: 1,000 right results, 2 executions at most."""
    with WebSocketExecutor(worker.url, security=worker.security, delivery_orphan_policy="requeue") as pool:
        with Held(pool, ledger, 1000) as held:
            worker.kill()
            held.let_go()
            worker.restart()
            assert held.results() == held.names
    ran = processes(ledger)
    for run, count in executions(ledger).items():
        assert count == len(ran[run]) <= 2


@pytest.mark.parametrize("policy", POLICIES)
def test_f14_a_cut_connection_costs_nothing(worker: LoopbackWorker, ledger: Path, policy: str) -> None:
    """TCP reset with the worker alive: 1,000 results, each exactly one execution, under every policy."""
    with FaultProxy(worker.url) as proxy:
        url = proxy.url_for(worker.url)
        with WebSocketExecutor(url, security=worker.security, delivery_orphan_policy=policy) as pool:
            with Held(pool, ledger, 1000) as held:
                assert proxy.end_all("rst") == 1
                held.let_go()
                assert held.results() == held.names
            stats = link_of(pool).stats()
            assert (stats["losses"], stats["resumes"], stats["requeues"]) == (1, 1, 0)
    assert set(executions(ledger).values()) == {1} and len(executions(ledger)) == 1000


def test_f15_a_result_that_was_not_acknowledged_is_replayed(worker: LoopbackWorker, ledger: Path) -> None:
    """The result had left the worker and is swallowed on the way: it comes again, and only once."""
    ends: list[str] = []
    with FaultProxy(worker.url) as proxy:
        with WebSocketExecutor(proxy.url_for(worker.url), security=worker.security) as pool:
            with Held(pool, ledger, 1) as held:
                held.futures[0].add_done_callback(lambda future: ends.append(future.result()))
                [passage] = proxy.open_passages()
                before = passage.down.received
                proxy.set(proxy.down, swallow=True)
                held.let_go()
                proxy.wait_for(lambda: passage.down.received > before)
                proxy.heal()
                proxy.end_all("rst")
                assert held.results() == held.names
            assert link_of(pool).stats()["resumed_runs"] == 1
    assert ends == ["run-0"]
    assert executions(ledger) == {"run-0": 1}


def poison(ledger: str, run: str) -> str:
    """Write down the execution and end the worker, as a crash in a C extension does."""
    record(ledger, run)
    os._exit(1)


@pytest.mark.parametrize("position", [0, 37, 99])
def test_f17_a_poison_run_ends_and_the_others_do_not(
    worker: LoopbackWorker, ledger: Path, position: int
) -> None:
    """The worker dies of one run again and again: that run fails after four deliveries, 99 succeed."""
    stop = threading.Event()

    def keep_up() -> None:
        while not stop.wait(0.01):
            if worker.pid is not None and not _alive(worker.pid):
                worker.restart()

    keeper = threading.Thread(target=keep_up, name="keeper")
    with WebSocketExecutor(
        worker.url, security=worker.security, delivery_orphan_policy="requeue", reconnect_max_delay=0.2
    ) as pool:
        tasks = [poison if number == position else record for number in range(100)]
        answers = [() if task is poison else (number,) for number, task in enumerate(tasks)]
        pool.submit(int).result(WAIT)
        keeper.start()
        try:
            futures: list[Any] = [
                pool.submit(task, str(ledger), f"run-{number}", *answer)
                for number, (task, answer) in enumerate(zip(tasks, answers, strict=True))
            ]
            errors = [future.exception(WAIT) for future in futures]
        finally:
            stop.set()
            keeper.join(WAIT)
    assert [number for number, error in enumerate(errors) if error] == [position]
    assert isinstance(errors[position], ConnectionLost) and errors[position].attempt == 4
    assert all(future.result() == number for number, future in enumerate(futures) if number != position)
    assert executions(ledger)[f"run-{position}"] == 4


def _alive(pid: int) -> bool:
    """Tell whether a child of this process runs; a zombie does not."""
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("policy", POLICIES)
def test_f18_sigterm_loses_nothing(worker: LoopbackWorker, ledger: Path, policy: str) -> None:
    """1,000 in flight: what has started or waits there is finished, what comes later goes to the next one."""
    with FaultProxy(worker.url) as proxy, sibling(worker) as following:
        with WebSocketExecutor(
            proxy.url_for(worker.url), security=worker.security, delivery_orphan_policy=policy
        ) as pool:
            following_pid = following.pid
            with Held(pool, ledger, 1000) as held:
                assert worker.pid is not None
                proxy.target_port = port_of(following.url)
                os.kill(worker.pid, signal.SIGTERM)
                until(lambda: link_of(pool).stats()["drains"])
                late = [pool.submit(record, str(ledger), f"late-{number}", number) for number in range(100)]
                held.let_go()
                assert held.results() == held.names
                assert [future.result(WAIT) for future in late] == list(range(100))
            assert link_of(pool).stats()["losses"] == 0
    ran = processes(ledger)
    assert {pid for run, pids in ran.items() if run.startswith("late") for pid in pids} == {following_pid}
    assert set(executions(ledger).values()) == {1} and len(executions(ledger)) == 1100


def test_f18_a_rolling_restart_reaches_no_caller(worker: LoopbackWorker, ledger: Path) -> None:
    """Two workers behind one address are replaced, one after the other, under load: no error at all."""
    stop, counts = threading.Event(), [0, 0, 0, 0]

    def load(place: int) -> None:
        while not stop.is_set():
            name = f"run-{place}-{counts[place]}"
            assert pool.submit(record, str(ledger), name, name).result(WAIT) == name
            counts[place] += 1

    with FaultProxy(worker.url) as proxy, sibling(worker) as second:
        with (
            WebSocketExecutor(
                proxy.url_for(worker.url), security=worker.security, delivery_orphan_policy="requeue"
            ) as pool,
            concurrent.futures.ThreadPoolExecutor(4) as threads,
        ):
            callers = [threads.submit(load, place) for place in range(4)]
            try:
                for stopping, taking_over in ((worker, second), (second, worker), (worker, second)):
                    already = min(counts)
                    until(lambda already=already: min(counts) > already + 20)
                    proxy.target_port = port_of(taking_over.url)
                    stopping.stop(timeout=WAIT)
                    stopping.start()
            finally:
                stop.set()
            for caller in callers:
                caller.result(WAIT)
            stats = link_of(pool).stats()
            assert (stats["drains"], stats["losses"]) == (3, 0)
    assert set(executions(ledger).values()) == {1} and len(executions(ledger)) == sum(counts)


def test_f18_a_second_sigterm_is_cold(worker: LoopbackWorker, ledger: Path) -> None:
    """The runs are lost at once, and their callers hear of it."""
    with WebSocketExecutor(worker.url, security=worker.security, resume_window=0.5) as pool:
        with Held(pool, ledger, 20) as held:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            until(lambda: link_of(pool).stats()["drains"])
            os.kill(worker.pid, signal.SIGTERM)
            assert all(future.exception(WAIT) is not None for future in held.futures)


def test_f46_a_stopped_worker_that_goes_on_has_lost_nothing(worker: LoopbackWorker, ledger: Path) -> None:
    """SIGSTOP for longer than the peer is waited for, then SIGCONT: the same worker, the same runs."""
    options = {"ping_interval": 0.3, "pong_timeout": 0.3, "resume_window": 60.0, "open_timeout": 1.0}
    with WebSocketExecutor(worker.url, security=worker.security, **options) as pool:
        with Held(pool, ledger, 20) as held:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                until(lambda: link_of(pool).stats()["losses"])
            finally:
                os.kill(worker.pid, signal.SIGCONT)
            held.let_go()
            assert held.results() == held.names
    assert set(executions(ledger).values()) == {1}
