"""What every engine of the worker service promises: the same results, errors, logs and cancels."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wove
from dask_cluster import DaskCluster
from engine_tasks import (
    busy,
    ends_behind,
    ends_itself,
    fails,
    forks,
    hold_interpreter,
    hold_until,
    leaves_a_task,
    leaves_a_thread,
    logs_and_returns,
    meet,
    reports_progress,
    returns_twice,
    says_how_far,
    slow_square,
    square,
    square_later,
    unpicklable,
    where,
)
from fault_helpers import WAIT, python, search_path, until
from wove.environment import EnvironmentExecutionError, WebSocketEnvironmentExecutor

from wove_ws_sync import DeliveryCancelled, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker.engines import EngineError, make_engine

ENGINES = ["threads", "processes", "engine_tasks:make_processes", "dask"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskCluster]:
    with DaskCluster(workers=2) as running:
        yield running


@pytest.fixture(scope="module", params=ENGINES)
def worker(request: pytest.FixtureRequest) -> Iterator[LoopbackWorker]:
    engine = request.param
    if engine == "dask":
        engine += f":{request.getfixturevalue('cluster').address}"
    with LoopbackWorker(workers=None if "dask" in engine else 2, args=["--engine", engine]) as running:
        yield running


@pytest.fixture(scope="module")
def processes() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=2, args=["--engine", "processes"]) as running:
        yield running


def pool_of(worker: LoopbackWorker, **options: Any) -> WebSocketExecutor:
    return WebSocketExecutor(worker.url, security=worker.security, **options)


# Every engine


def test_results_in_order(worker: LoopbackWorker) -> None:
    with pool_of(worker) as pool:
        assert list(pool.map(square, range(200))) == [number * number for number in range(200)]


def test_a_coroutine(worker: LoopbackWorker) -> None:
    with pool_of(worker) as pool:
        assert pool.submit(square_later, 7).result(WAIT) == 49


def test_an_exception_is_raised_as_itself_with_the_workers_traceback(worker: LoopbackWorker) -> None:
    with pool_of(worker) as pool:
        error = pool.submit(fails, "what is this").exception(WAIT)
    assert type(error) is LookupError and error.args == ("what is this",)
    assert "in fails" in str(error.__cause__)


def test_a_result_that_cannot_travel_is_the_error_of_one_run(worker: LoopbackWorker) -> None:
    with pool_of(worker) as pool:
        error = pool.submit(unpicklable).exception(WAIT)
        assert isinstance(error, EnvironmentExecutionError) and "cannot be pickled" in str(error)
        assert pool.submit(square, 3).result(WAIT) == 9


def test_payloads_of_mebibytes(worker: LoopbackWorker) -> None:
    payload = os.urandom(6 << 20)
    with pool_of(worker) as pool:
        assert pool.submit(bytes, payload).result(WAIT) == payload


def test_logs_of_a_task_come_to_the_host(worker: LoopbackWorker, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), pool_of(worker) as pool:
        assert pool.submit(logs_and_returns, "hear, hear").result(WAIT) == "hear, hear"
    assert [record.message for record in caplog.records if "hear, hear" in record.getMessage()] != []


def test_the_last_progress_is_there_before_the_result(worker: LoopbackWorker) -> None:
    """With engines that report at the end of a run as well."""
    at_end: list[Any] = []
    with pool_of(worker) as pool:
        future = pool.submit(says_how_far, 1000)
        future.add_done_callback(lambda done: at_end.append(future.progress))
        assert future.result(WAIT) == 1000
        until(lambda: at_end)
    assert at_end == [(1000, 1000, "all")]


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_a_queued_run_is_cancelled_for_good(worker: LoopbackWorker, tmp_path: Path, mode: str) -> None:
    """A run that waits behind others never runs, where the engine can tell; its slot is lost nowhere."""
    gate = tmp_path / "gate"
    with pool_of(worker, delivery_cancel_mode=mode, cancel_ack_timeout=0.5) as pool:
        holding = [pool.submit(hold_until, str(gate)) for _ in range(4)]
        last = pool.submit(Path.touch, tmp_path / "ran")
        assert last.cancel()
        gate.touch()
        assert [future.result(WAIT) for future in holding] == [str(gate)] * 4
        assert pool.submit(square, 3).result(WAIT) == 9
        with pytest.raises(DeliveryCancelled):
            last.result(WAIT)


@pytest.mark.parametrize("coroutine", [leaves_a_thread, leaves_a_task, ends_behind])
def test_what_a_coroutine_leaves_behind_holds_up_nobody(
    worker: LoopbackWorker, tmp_path: Path, coroutine: Any
) -> None:
    """Its result counts, and its slot executes the next one, though ``asyncio.run`` would wait or raise."""
    gate = tmp_path / "gate"
    with pool_of(worker) as pool:
        try:
            for _ in range(4):  # more than there are slots
                assert pool.submit(coroutine, str(gate)).result(WAIT / 2) == str(gate)
            futures = [pool.submit(square, number) for number in range(8)]
            assert [future.result(WAIT / 2) for future in futures] == [n * n for n in range(8)]
        finally:
            gate.touch()


def test_woves_own_executor_is_served(worker: LoopbackWorker) -> None:
    environment = {"executor": "websocket", "executor_config": worker.config}
    wove.config(default_environment="far", environments={"far": environment})
    assert type(wove.environment.coerce_executor("websocket")) is WebSocketEnvironmentExecutor
    with wove.weave() as w:

        @w.do(range(20), workers=8)
        def squares(item: int) -> int:
            return item * item

        @w.do
        async def total(squares: list[int]) -> int:
            return sum(squares)

    assert w.result.total == sum(number * number for number in range(20))


# Processes


@pytest.mark.parametrize(
    ("code", "how"), [(0, "ended itself"), (3, "exit code 3"), (-signal.SIGKILL, "killed by SIGKILL")]
)
def test_a_process_that_dies_is_one_retryable_error(processes: LoopbackWorker, code: int, how: str) -> None:
    """``os._exit`` and the out-of-memory killer end one run, which may be run again; the pool goes on."""
    with pool_of(processes) as pool:
        doomed = pool.submit(ends_itself, code) if code >= 0 else pool.submit(kill_self)
        error = doomed.exception(WAIT)
        assert isinstance(error, EnvironmentExecutionError) and how in str(error)
        assert error.payload["kind"] == "WorkerProcessDied" and error.payload["retryable"] is True
        assert list(pool.map(square, range(20))) == [number * number for number in range(20)]


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_cancelling_an_endless_task_frees_its_slot(
    processes: LoopbackWorker, tmp_path: Path, mode: str
) -> None:
    """Two of two slots compute for ever; cancelled, both processes are gone and both slots free."""
    with pool_of(processes, delivery_cancel_mode=mode) as pool:
        markers = [tmp_path / "one", tmp_path / "two"]
        endless = [pool.submit(busy, str(marker)) for marker in markers]
        until(lambda: all(marker.exists() and marker.read_text("ascii") for marker in markers))
        assert all(future.cancel() for future in endless)
        for future in endless:
            with pytest.raises(DeliveryCancelled) as caught:
                future.result(WAIT)
            assert caught.value.acknowledged is (mode == "require_ack")
        assert pool.submit(square, 3).result(WAIT) == 9
        pids = [int(marker.read_text("ascii")) for marker in markers]
        until(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.parametrize("code", [0, 3])
def test_what_a_task_forks_does_not_keep_its_run_alive(
    processes: LoopbackWorker, tmp_path: Path, code: int
) -> None:
    """The process of the task is gone, and that counts, whoever else has its descriptors."""
    marker = tmp_path / "marker"
    with pool_of(processes) as pool:
        error = pool.submit(forks, str(marker), code).exception(WAIT)
        assert isinstance(error, EnvironmentExecutionError) and error.payload["kind"] == "WorkerProcessDied"
        os.kill(int(marker.read_text("ascii").split()[1]), signal.SIGKILL)


def test_a_cancelled_task_takes_along_what_it_forked(processes: LoopbackWorker, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pool_of(processes, delivery_cancel_mode="require_ack") as pool:
        endless = pool.submit(forks, str(marker), None)
        until(marker.exists)
        assert endless.cancel()
        pids = [int(pid) for pid in marker.read_text("ascii").split()]
        until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_task_that_returns_in_two_processes_has_one_result(processes: LoopbackWorker) -> None:
    with pool_of(processes) as pool:
        assert pool.submit(returns_twice).result(WAIT) > 0
        assert list(pool.map(square, range(20))) == [number * number for number in range(20)]


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_tasks_compute_at_the_same_time(processes: LoopbackWorker, tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    with pool_of(processes) as pool:
        pids = {future.result(WAIT) for future in (pool.submit(meet, one, two), pool.submit(meet, two, one))}
    assert len(pids) == 2 and processes.pid not in pids


def test_a_task_that_holds_the_interpreter_holds_up_nobody(processes: LoopbackWorker, tmp_path: Path) -> None:
    """While it holds its GIL for seconds its own heartbeats and other runs go on."""
    marker = tmp_path / "holding"
    with pool_of(processes, delivery_heartbeat_seconds=1.0) as pool:
        holding = pool.submit(hold_interpreter, str(marker))
        until(marker.exists)
        answers = 0
        while not holding.done():
            assert pool.submit(square, 3).result(WAIT) == 9
            answers += 1
        assert holding.result(WAIT) is True
        assert answers > 3


def test_an_idle_process_that_is_killed_costs_nothing(processes: LoopbackWorker) -> None:
    """Killed while it waits for work: whoever would have had it next is executed elsewhere."""
    with pool_of(processes) as pool:
        for _ in range(3):
            for pid in {pool.submit(where).result(WAIT) for _ in range(8)}:
                os.kill(pid, signal.SIGKILL)
            assert list(pool.map(square, range(50))) == [number * number for number in range(50)]


def test_many_idle_processes_that_are_killed_cost_nothing(tmp_path: Path) -> None:
    """More of them than a job may end before it counts as what ends them."""
    count = 6
    with LoopbackWorker(workers=count, args=["--engine", "processes"]) as worker, pool_of(worker) as pool:
        for turn in range(2):
            begun = [tmp_path / f"{turn}-{number}" for number in range(count)]
            gate = tmp_path / f"gate-{turn}"
            holding = [pool.submit(marks_and_holds, str(marker), str(gate)) for marker in begun]
            for marker in begun:
                until(marker.exists)
            gate.touch()
            for pid in [future.result(WAIT) for future in holding]:
                os.kill(pid, signal.SIGKILL)
            assert [pool.submit(square, number).result(WAIT) for number in range(4)] == [0, 1, 4, 9]


def marks_and_holds(marker: str, gate: str) -> int:
    Path(marker).touch()
    hold_until(gate)
    return os.getpid()


def test_a_burst_of_deaths_and_cancels_loses_no_run(processes: LoopbackWorker) -> None:
    """Every third run kills its process, every fifth is cancelled: each of 60 ends once, and as it should."""
    with pool_of(processes) as pool:
        futures: list[Any] = []
        for number in range(60):
            futures.append(
                pool.submit(ends_itself, number % 2) if number % 3 == 0 else pool.submit(square, number)
            )
        for future in futures[::5]:
            future.cancel()
        for number, future in enumerate(futures):
            if future.cancelled():
                assert number % 5 == 0
            elif number % 3 == 0:
                assert isinstance(future.exception(WAIT), EnvironmentExecutionError)
            else:
                assert future.result(WAIT) == number * number


def test_a_signal_to_the_whole_group_is_for_the_service_alone(tmp_path: Path) -> None:
    """As systemd sends it: SIGTERM to every process. What runs ends in its own time, with its result."""
    gate = tmp_path / "gate"
    with LoopbackWorker(workers=2, args=["--engine", "processes"]) as worker, pool_of(worker) as pool:
        held = pool.submit(hold_until, str(gate))
        until(held.running)
        assert worker.pid is not None
        children = children_of(worker.pid)
        assert len(children) >= 2
        for pid in [*children, worker.pid]:
            os.kill(pid, signal.SIGTERM)
        until(lambda: "Draining" in worker.log)
        gate.touch()
        assert held.result(WAIT) == str(gate)


def test_no_process_outlives_the_service(tmp_path: Path) -> None:
    """kill -9 of the service while a task computes for ever: its processes end with it."""
    marker = tmp_path / "marker"
    with LoopbackWorker(workers=2, args=["--engine", "processes"]) as worker:
        with pool_of(worker, resume_window=0) as pool:
            future = pool.submit(busy, str(marker))
            until(lambda: marker.exists() and marker.read_text("ascii"))
            assert worker.pid is not None
            children = children_of(worker.pid)
            worker.kill()
            until(lambda: not any(is_alive(pid) for pid in children))
            assert future.exception(WAIT) is not None


CLOSES_WHILE_ONE_ARRIVES = """
    import sys, threading
    from wove_ws_sync.worker.process_engine import ProcessEngine

    engine = ProcessEngine(1)
    arrived, welcome = threading.Event(), engine._welcome

    def welcome_late(connection):
        arrived.set()
        engine._closing.wait()
        welcome(connection)

    engine._welcome = welcome_late
    threading.Thread(target=engine.start, daemon=True).start()
    assert arrived.wait(30)
    print(engine.close(30), flush=True)
"""


def test_an_engine_is_closed_while_a_process_arrives() -> None:
    """Nobody accepts any more when close() connects to end that: it must not wait for an answer."""
    out, err, code = python(CLOSES_WHILE_ONE_ARRIVES)
    assert (out.split(), code) == (["True"], 0), err


OUTLIVES_A_BROKEN_POOL = """
    import threading
    from queue import SimpleQueue
    import time
    from wove_ws_sync.worker import process_pools

    process_pools._BROKEN_TIMEOUT = 0.2
    ended, end = threading.Event(), process_pools._end
    process_pools._end = lambda pool: (end(pool), ended.set())

    pools = process_pools.ProcessPools(time.sleep, 1)
    broken = pools._newest
    lost = [pools.employ((1.0,)), pools.employ((1.0,))]
    broken.stop()  # it takes nothing more then, as one that broke; what it was asked for is not done
    print(lost[0].first_of(SimpleQueue(), 30))
    lost[0].end()
    other = pools.employ((1.0,))
    print(pools._used == {broken: 1, pools._newest: 1}, ended.is_set())
    lost[1].end()
    print(ended.wait(30), pools._used == {pools._newest: 1})
    print(other.first_of(SimpleQueue(), 30), other.failure())
    other.end()
    pools.close()
    print(pools.employ((1.0,)))
"""


def test_a_pool_that_broke_is_not_waited_for_and_ends_with_its_last_process() -> None:
    """pebble forgets what it was asked for when a process is killed while it starts."""
    out, err, code = python(OUTLIVES_A_BROKEN_POOL)
    told = ["None", "True False", "True True", "None it ended at once", "None"]
    assert (out.splitlines(), code) == (told, 0), err


STARTS_LATER = """
    import threading
    from engine_tasks import square
    from wove_ws_sync import payloads
    from wove_ws_sync.worker import process_engine
    from wove_ws_sync.worker.commands import RunTask
    from wove_ws_sync.worker.jobs import Job

    process_engine._PAUSE, process_engine._START_TIMEOUT = 0.05, 20.0
    employ, attempts = process_engine.ProcessPools.employ, []

    def fails(pools, arguments):
        attempts.append(arguments)
        if len(attempts) < 3:
            raise OSError(24, "Too many open files")
        if len(attempts) == 3:  # nothing comes of it, though the pool seems to work
            process_engine._START_TIMEOUT = 0.5
            number = -1
        else:
            process_engine._START_TIMEOUT = 20.0
            number = arguments[2]
        return employ(pools, (*arguments[:2], number, *arguments[3:]))

    process_engine.ProcessPools.employ = fails
    engine = process_engine.ProcessEngine(1)
    engine.start()
    ended = threading.Event()
    pickles = payloads.encode_value(square), payloads.encode_value({"number": 3})
    job = Job(
        RunTask("run", "task", *pickles, None, "best_effort"),
        lambda kind, event: kind == "ended" and ended.set(),
        1 << 20,
    )
    engine.submit(job)
    print(ended.wait(30), len(attempts), flush=True)
    engine.close(30)
"""


def test_a_slot_outlives_processes_that_cannot_be_started() -> None:
    """Descriptors are short, or a pool does not give what it was asked for: it tries again."""
    out, err, code = python(STARTS_LATER)
    assert (out.split(), code) == (["True", "4"], 0), err


@pytest.mark.parametrize("where", ["order", "recv_bytes"])
def test_a_slot_that_fails_to_talk_to_its_process_ends_the_run(where: str) -> None:
    """As it does when memory is short: a run that did not begin is begun elsewhere, another one ends."""
    out, err, code = python(FAILS_TO_TALK, where)
    told = {"order": ["started", "ended", "False"], "recv_bytes": ["started", "ended", "True"]}
    assert (out.split(), code) == (told[where], 0), err


FAILS_TO_TALK = """
    import sys, threading
    from multiprocessing.connection import Connection
    from engine_tasks import square
    from wove_ws_sync import payloads
    from wove_ws_sync.worker import process_engine
    from wove_ws_sync.worker.commands import RunTask
    from wove_ws_sync.worker.jobs import Job

    owner, name = {"order": (Job, "order"), "recv_bytes": (Connection, "recv_bytes")}[sys.argv[1]]
    real, failed = getattr(owner, name), []

    def fails_once(*args):
        value = real(*args)
        if not failed and (name == "order" or b"task_result" in value):
            failed.append(True)
            raise MemoryError
        return value

    engine = process_engine.ProcessEngine(1)
    engine.start()
    setattr(owner, name, fails_once)
    ended, last = threading.Event(), []

    def report(kind, event):
        print(kind)
        if kind == "ended":
            last.append(event)
            ended.set()

    pickles = payloads.encode_value(square), payloads.encode_value({"number": 3})
    engine.submit(Job(RunTask("run", "task", *pickles, None, "best_effort"), report, 1 << 20))
    print(ended.wait(30) and b"WorkerProcessDied" in last[0], flush=True)
    engine.close(30)
"""


CANCELS_WHAT_ENDED = """
    import os, sys, time
    from engine_tasks import ends_itself
    from wove_ws_sync import payloads
    from wove_ws_sync.worker import process_engine
    from wove_ws_sync.worker.commands import RunTask
    from wove_ws_sync.worker.jobs import Job

    engine = process_engine.ProcessEngine(1)
    engine.start()
    pid = engine._slots[0].child.pid
    killed = []
    os.killpg = lambda pid, number: killed.append(pid)

    def dismiss(child):
        engine.cancel(job)
        return 0

    process_engine._Child.dismiss = dismiss
    pickles = payloads.encode_value(ends_itself), payloads.encode_value({"code": 0})
    ended = process_engine.threading.Event()
    command = RunTask("run", "task", *pickles, None, "best_effort")
    job = Job(command, lambda kind, event: kind == "ended" and ended.set(), 1 << 20)
    engine.submit(job)
    assert ended.wait(30)
    print(killed, flush=True)
    engine.close(30)
"""


def test_a_process_that_is_gone_is_not_killed() -> None:
    """Its number may be another's by the time its run is cancelled."""
    out, err, code = python(CANCELS_WHAT_ENDED)
    assert (out.split(), code) == (["[]"], 0), err


def children_of(pid: int) -> list[int]:
    """Return the processes below *pid*."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[1])
                if parent == pid:
                    found += [int(entry.name), *children_of(int(entry.name))]
    return found


def test_progress_of_a_process_comes_while_it_runs(processes: LoopbackWorker, tmp_path: Path) -> None:
    """To the future of the run, and to the status page of the service."""
    gate = tmp_path / "gate"
    address = processes.url.replace("ws://", "http://").removesuffix("/wove") + "/status.json"
    with pool_of(processes) as pool:
        future = pool.submit(reports_progress, str(gate))
        until(lambda: future.progress is not None)
        assert future.progress == (3, 4, "nearly")
        with urllib.request.urlopen(address, timeout=WAIT) as answer:
            assert "nearly" in answer.read().decode()
        gate.touch()
        assert future.result(WAIT) != processes.pid


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_what_an_executor_cancels_by_itself_has_an_end(mode: str) -> None:
    """With nobody asking for it, and while a cancel waits for the end."""
    worker = LoopbackWorker(args=["--engine", "engine_tasks:Fickle"])
    with worker, pool_of(worker, delivery_cancel_mode=mode) as pool:
        error = pool.submit(square, 3).exception(WAIT)
        assert isinstance(error, EnvironmentExecutionError) and error.payload["kind"] == "EngineFailed"
        cancelled = pool.submit(square, 4)
        cancelled.cancel()
        with contextlib.suppress(DeliveryCancelled, EnvironmentExecutionError):
            cancelled.result(WAIT)
        until(lambda: pool.link is not None and pool.link.stats()["runs"] == 0)


def test_without_pebble_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pebble", None)
    with pytest.raises(EngineError, match=r'pip install "wove_ws_sync\[processes\]"'):
        make_engine("processes", 1).start()


# Others


def test_the_engine_of_the_documentation() -> None:
    """loky behind the service, found in the working directory as the how-to has it."""
    examples = Path(__file__).parents[2] / "docs" / "examples"
    search_path = os.pathsep.join([*sys.path, str(examples)])
    with LoopbackWorker(args=["--engine", "loky_engine:make"], env={"PYTHONPATH": search_path}) as worker:
        with pool_of(worker) as pool:
            assert list(pool.map(square, range(50))) == [number * number for number in range(50)]
            assert pool.submit(where).result(WAIT) != worker.pid


def test_losing_a_dask_worker_loses_no_run(cluster: DaskCluster) -> None:
    """A mapped weave of 1,000 items on two Dask workers, one of which is killed on the way."""
    import wove_ws_sync

    with LoopbackWorker(args=["--engine", f"dask:{cluster.address}"]) as worker:
        environment = {"executor": "websocket", "executor_config": worker.config}
        wove_ws_sync.config(default_environment="far", environments={"far": environment})
        with pool_of(worker) as pool:
            first = pool.submit(slow_square, 1)
            assert first.result(WAIT) == 1
        killer = cluster.kill_soon(0.5)
        with wove.weave() as w:

            @w.do(range(1000))
            def squares(item: int) -> int:
                return slow_square(item)

        killer.join(WAIT)
        assert cluster.alive == 1
        assert w.result.squares == [number * number for number in range(1000)]
    cluster.restore()


def test_a_dask_scheduler_that_comes_back_is_used_again() -> None:
    """Away for longer than Dask's client is patient: runs are refused, retryably, until it is back."""
    with DaskCluster(workers=1) as own, LoopbackWorker(args=["--engine", f"dask:{own.address}"]) as worker:
        with pool_of(worker) as pool:
            assert pool.submit(square, 3).result(WAIT) == 9
            own.end()

            def is_refused() -> bool:
                error = pool.submit(square, 3).exception(WAIT)
                assert isinstance(error, EnvironmentExecutionError) and error.payload["retryable"] is True
                return "closed" in str(error) or "was lost" in str(error)

            until(is_refused)
            own.begin()
            until(lambda: pool.submit(square, 3).exception(WAIT) is None)


def test_an_executor_that_broke_is_made_anew() -> None:
    """The standard library's pool of processes is of no use after one of them died."""
    with LoopbackWorker(args=["--engine", "engine_tasks:make_processes"]) as worker, pool_of(worker) as pool:
        for _ in range(2):
            error = pool.submit(ends_itself, 3).exception(WAIT)
            assert isinstance(error, EnvironmentExecutionError)
            assert error.payload["kind"] == "EngineFailed" and error.payload["retryable"] is True
            assert list(pool.map(square, range(20))) == [number * number for number in range(20)]


@pytest.mark.parametrize(
    ("engine", "code", "text"),
    [
        ("dask:tcp://127.0.0.1:1", 13, "No Dask scheduler answers at tcp://127.0.0.1:1"),
        ("engine_tasks:make_broken", 13, "cannot be made: OSError: the cluster is away"),
        ("engine_tasks:make_nothing", 13, "not a concurrent.futures.Executor"),
        ("engine_tasks:nothing_there", 2, "nothing called 'nothing_there'"),
        ("no_such_module:make", 2, "No module named 'no_such_module'"),
    ],
)
def test_an_engine_that_cannot_be_had_is_one_clear_line(engine: str, code: int, text: str) -> None:
    command = [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--engine", engine]
    environment = {**os.environ, "PYTHONPATH": search_path()}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert text in last and last.startswith("wove-ws-sync worker: ")
    assert "Traceback" not in done.stderr
