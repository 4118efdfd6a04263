"""Runs with the same ``delivery_idempotency_key``: how often they are executed, and what each is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from fault_helpers import MIB, WAIT, python, until
from ledger import executions, record, record_and_hold
from raw_host import RawHost, unpickled, wait_until
from service_thread import ServiceThread

from wove_ws_sync import DeliveryCancelled, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

EVERYTHING = "resume,ack,drain"
KEY = {"delivery_idempotency_key": "work"}


@pytest.fixture(scope="module", params=["threads", "processes"])
def worker(request: pytest.FixtureRequest) -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=4, args=["--engine", request.param]) as running:
        yield running


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    folder = tmp_path / "ledger"
    folder.mkdir()
    return folder


def record_and_fail(folder: str, run: str) -> None:
    """Runs in the worker."""
    record(folder, run)
    raise ValueError(run)


def record_and_produce(folder: str, run: str, size: int) -> bytes:
    """Runs in the worker."""
    record(folder, run)
    return b"x" * size


def record_and_await(folder: str, run: str, gate: str) -> Any:
    """Hold as a call, then return an awaitable. Runs in the worker."""

    async def rest() -> str:
        return run

    record_and_hold(folder, run, gate)
    return rest()


async def record_and_swallow(folder: str, run: str) -> str:
    """Return a result whatever happens; wait for a cancellation the first time. Runs in the worker."""
    import asyncio
    import contextlib
    import pathlib

    record(folder, run)
    with contextlib.suppress(asyncio.CancelledError):
        if len(pathlib.Path(folder, run).read_text().splitlines()) == 1:
            await asyncio.sleep(600)
    return run


async def record_and_sleep(folder: str, run: str) -> None:
    """Runs in the worker."""
    import asyncio

    record(folder, run)
    await asyncio.sleep(600)


def keyed(name: str, **settings: Any) -> dict[str, Any]:
    return {"delivery_idempotency_key": name, **settings}


def hold(host: RawHost, run_id: str, ledger: Path, gate: Path, key: str, **settings: Any) -> None:
    host.run(
        record_and_hold,
        run_id,
        folder=str(ledger),
        run=key,
        gate=str(gate),
        delivery=keyed(key, **settings),
    )


class TestOneExecution:
    """The second run gets the outcome of the first one."""

    @pytest.mark.parametrize("extensions", ["", EVERYTHING])
    def test_while_the_first_one_runs(
        self, worker: LoopbackWorker, ledger: Path, tmp_path: Path, extensions: str
    ) -> None:
        """Each has its own events, heartbeats among them, and one end."""
        gate, key = tmp_path / "gate", f"while{extensions}"
        said = {"extensions": extensions, "name": "d" * 32} if extensions else {}
        with RawHost(worker, **said) as host, RawHost(worker) as other:
            hold(host, "first", ledger, gate, key)
            host.wait("first", "task_started")
            hold(host, "second", ledger, gate, key, delivery_heartbeat_seconds=0.3)
            hold(other, "first", ledger, gate, key)
            kinds = [event["type"] for event in host.wait("second", "heartbeat")]
            assert kinds == ["task_started", "heartbeat"]
            assert other.wait("first", "task_started")
            gate.touch()
            assert other.result("first") == key
            ends = {}
            while len(ends) < 2:
                event = host.event()
                if event["type"] == "task_result":
                    assert event["run_id"] not in ends
                    ends[event["run_id"]] = unpickled(event["result_pickle"])
            assert ends == {"first": key, "second": key}
            if extensions:
                host.ack("first", "second")
            assert host.is_quiet()
        assert executions(ledger) == {key: 1}

    def test_after_the_first_one(self, worker: LoopbackWorker, ledger: Path) -> None:
        """Its result is given out again, whatever its size, to every host with the same secret."""
        for size in (1, 100_000, 3 * MIB):
            key = f"after{size}"
            args = {"folder": str(ledger), "run": key, "size": size, "delivery": keyed(key)}
            with RawHost(worker, limit=64 * MIB) as host, RawHost(worker, limit=64 * MIB) as other:
                host.run(record_and_produce, "first", **args)
                assert host.result("first") == b"x" * size
                host.run(record_and_produce, "second", **args)
                assert host.result("second") == b"x" * size
                other.run(record_and_produce, "first", **args)
                assert other.result("first") == b"x" * size
            assert executions(ledger)[key] == 1

    def test_a_host_that_takes_less(self, worker: LoopbackWorker, ledger: Path) -> None:
        """A kept result that is too large for it is one error of that run."""
        args = {"folder": str(ledger), "run": "less", "size": 3 * MIB, "delivery": keyed("less")}
        with RawHost(worker, limit=64 * MIB) as host, RawHost(worker) as small:
            host.run(record_and_produce, "first", **args)
            assert len(host.result("first")) == 3 * MIB
            small.run(record_and_produce, "first", **args)
            assert small.wait("first")[-1]["error"]["kind"] == "ResultTooLarge"
            assert small.is_quiet()

    def test_two_host_processes(self, worker: LoopbackWorker, ledger: Path, tmp_path: Path) -> None:
        """The executors of this package; the key is made of the arguments."""
        gate = tmp_path / "gate"
        code = """
            import json, os, sys
            from ledger import record_and_hold
            from wove_ws_sync import WebSocketExecutor
            url, folder, gate = sys.argv[1:]
            security = json.loads(os.environ["DEDUPE_SECURITY"])
            with WebSocketExecutor(url, security=security, delivery_idempotency_key="{run}") as pool:
                future = pool.submit(record_and_hold, folder=folder, run="order", gate=gate)
                while not future.running():
                    pass
                open(gate, "w").close()
                print(future.result(60))
        """
        with WebSocketExecutor(
            worker.url, security=worker.security, delivery_idempotency_key="{run}"
        ) as pool:
            first = pool.submit(record_and_hold, folder=str(ledger), run="order", gate=str(gate))
            until(first.running)
            other = pool.submit(record_and_hold, folder=str(ledger), run="other", gate=str(gate))
            secret = {"DEDUPE_SECURITY": json.dumps(worker.security)}
            out, err, exit_code = python(code, worker.url, str(ledger), str(gate), env=secret)
            assert (out.strip(), exit_code) == ("order", 0), err
            assert (first.result(WAIT), other.result(WAIT)) == ("order", "other")
        assert executions(ledger) == {"order": 1, "other": 1}


class TestWhatIsNotKept:
    """After an error or a cancellation a retry executes again."""

    def test_an_error(self, worker: LoopbackWorker, ledger: Path) -> None:
        """It is not given out again."""
        args = {"folder": str(ledger), "run": "fails", "delivery": keyed("fails")}
        with RawHost(worker) as host:
            for run_id in ("first", "second"):
                host.run(record_and_fail, run_id, **args)
                assert host.error(run_id)["kind"] == "ValueError"
        assert executions(ledger) == {"fails": 2}

    def test_the_window(self, ledger: Path) -> None:
        """--dedupe-window 0: a run that comes after the end is executed."""
        args = {"folder": str(ledger), "run": "r", "delivery": keyed("r")}
        with (
            LoopbackWorker(workers=1, args=["--dedupe-window", "0"]) as worker,
            RawHost(worker) as host,
        ):
            for run_id in ("first", "second"):
                host.run(record, run_id, **args)
                assert host.result(run_id) is None
        assert executions(ledger) == {"r": 2}

    def test_the_same_run_again(self, worker: LoopbackWorker, ledger: Path, tmp_path: Path) -> None:
        """It is known by its run_id first: it is no second one that follows itself."""
        gate = tmp_path / "gate"
        with RawHost(worker, extensions=EVERYTHING, name="e" * 32) as host:
            hold(host, "r", ledger, gate, "same")
            host.wait("r", "task_started")
            hold(host, "r", ledger, gate, "same")
            gate.touch()
            assert host.result("r") == "same"
            host.ack("r")
            assert host.is_quiet()
        assert executions(ledger) == {"same": 1}


class TestCancel:
    """Of runs that share an execution."""

    @pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
    @pytest.mark.parametrize("which", ["first", "second"])
    def test_one_of_two(
        self, worker: LoopbackWorker, ledger: Path, tmp_path: Path, mode: str, which: str
    ) -> None:
        """It ends, and the execution goes on for the other, be it the one that began it or not."""
        gate, key = tmp_path / "gate", f"one of two {mode} {which}".replace(" ", "-")
        rest = {"first": "second", "second": "first"}[which]
        with RawHost(worker) as host:
            hold(host, "first", ledger, gate, key, delivery_cancel_mode=mode)
            host.wait("first", "task_started")
            hold(host, "second", ledger, gate, key, delivery_cancel_mode=mode)
            host.wait("second", "task_started")
            host.cancel(which)
            assert host.wait(which)[-1]["type"] == "task_cancelled"
            gate.touch()
            assert host.result(rest) == key
            assert host.is_quiet()
        assert executions(ledger) == {key: 1}

    def test_the_last_of_them(self, worker: LoopbackWorker, ledger: Path) -> None:
        """It stops the execution; a run that comes then begins anew."""
        key = "last"
        args = {"folder": str(ledger), "run": key, "delivery": keyed(key)}
        with RawHost(worker) as host:
            for run_id in ("first", "second"):
                host.run(record_and_sleep, run_id, **args)
                host.wait(run_id, "task_started")
            wait_until(lambda: executions(ledger)[key] == 1)
            host.cancel("first")
            host.cancel("second")
            assert [host.wait(run_id)[-1]["type"] for run_id in ("first", "second")] == ["task_cancelled"] * 2
            host.run(record, "third", answer=3, **args)
            assert host.result("third") == 3
            assert host.is_quiet()
        assert executions(ledger) == {key: 2}

    def test_a_queued_one_is_withdrawn_by_the_last_cancel_only(self, ledger: Path, tmp_path: Path) -> None:
        """The execution keeps its place in the queue for whoever is left."""
        gate = tmp_path / "gate"
        with LoopbackWorker(workers=1) as worker, RawHost(worker) as host:
            host.run(record_and_hold, "busy", folder=str(ledger), run="busy", gate=str(gate))
            host.wait("busy", "task_started")
            for key in ("a", "b"):
                args = {"folder": str(ledger), "run": key, "answer": key, "delivery": keyed(key)}
                host.run(record, f"{key}1", **args)
                host.run(record, f"{key}2", **args)
            for run_id in ("a1", "b1", "b2"):
                host.cancel(run_id)
                assert host.wait(run_id)[-1]["type"] == "task_cancelled"
            gate.touch()
            assert host.result("a2") == "a"
            assert host.is_quiet()
        assert executions(ledger) == {"busy": 1, "a": 1}

    def test_one_that_stopped_nothing_is_not_passed_on(self, ledger: Path, tmp_path: Path) -> None:
        """A call goes on and then returns an awaitable: that is driven for a run that came later."""
        gate = tmp_path / "gate"
        args = {"folder": str(ledger), "run": "late", "gate": str(gate)}
        delivery = keyed("late", delivery_cancel_mode="require_ack")
        with ServiceThread() as service, RawHost(service, headers={}) as host:
            host.run(record_and_await, "first", delivery=delivery, **args)
            host.wait("first", "task_started")
            wait_until(lambda: executions(ledger)["late"] == 1)
            host.cancel("first")
            host.run(record_and_await, "second", delivery=delivery, **args)
            host.wait("second", "task_started")
            gate.touch()
            ends = [host.event() for _ in range(2)]
            assert {event["run_id"]: event["type"] for event in ends} == dict.fromkeys(
                ("first", "second"), "task_result"
            )
        assert executions(ledger) == {"late": 1}

    def test_one_that_was_swallowed_leaves_a_result(self, ledger: Path) -> None:
        """The host has it, so the work is done, and a retry gets it."""
        args = {"folder": str(ledger), "run": "done", "delivery": keyed("done")}
        with ServiceThread() as service, RawHost(service, headers={}) as host:
            host.run(record_and_swallow, "first", **args)
            host.wait("first", "task_started")
            wait_until(lambda: executions(ledger)["done"] == 1)
            host.cancel("first")
            assert host.result("first") == "done"
            host.run(record_and_swallow, "second", **args)
            assert host.result("second") == "done"
        assert executions(ledger) == {"done": 1}

    def test_a_host_that_is_gone(self, worker: LoopbackWorker, ledger: Path, tmp_path: Path) -> None:
        """Its run ends with it; what the run began goes on for another host."""
        gate = tmp_path / "gate"
        gone = worker.log.count("is gone")
        with RawHost(worker) as other:
            with RawHost(worker) as host:
                hold(host, "first", ledger, gate, "gone")
                host.wait("first", "task_started")
                hold(other, "second", ledger, gate, "gone")
                other.wait("second", "task_started")
            wait_until(lambda: worker.log.count("is gone") > gone)
            gate.touch()
            assert other.result("second") == "gone"
        assert executions(ledger) == {"gone": 1}

    def test_by_our_executor(self, worker: LoopbackWorker, ledger: Path, tmp_path: Path) -> None:
        """One future is cancelled, the other one has the result."""
        gate = tmp_path / "gate"
        with WebSocketExecutor(
            worker.url,
            security=worker.security,
            delivery_cancel_mode="require_ack",
            delivery_idempotency_key="x",
        ) as pool:
            first, second = (pool.submit(record_and_hold, str(ledger), "ours", str(gate)) for _ in range(2))
            until(lambda: first.running() and second.running())
            assert first.cancel()
            with pytest.raises(DeliveryCancelled):
                first.result(WAIT)
            gate.touch()
            assert second.result(WAIT) == "ours"
            assert pool.submit(record_and_hold, str(ledger), "ours", str(gate)).result(WAIT) == "ours"
        assert executions(ledger) == {"ours": 1}


@pytest.mark.parametrize("begun", [True, False])
def test_a_drain_hands_each_of_them_back_as_what_it_is(ledger: Path, tmp_path: Path, begun: bool) -> None:
    """``started`` is that of the execution, for those too that only followed."""
    gate = tmp_path / "gate"
    with ServiceThread(workers=1) as service, RawHost(service, headers={}) as host:
        if not begun:
            host.run(record_and_hold, "busy", folder=str(ledger), run="busy", gate=str(gate))
            host.wait("busy", "task_started")
        for run_id in ("first", "second"):
            hold(host, run_id, ledger, gate, "work")
            if begun:
                host.wait(run_id, "task_started")
        if not begun:
            hold(host, "third", ledger, gate, "other work")
            host.cancel("third")
            host.wait("third")
        drained = service.drain(0.1)
        errors = {}
        while len(errors) < 2:
            event = host.event()
            if event["type"] == "task_error" and event["run_id"] != "busy":
                errors[event["run_id"]] = event["error"]
        assert {error["kind"] for error in errors.values()} == {"WorkerStopping"}
        assert [errors[run_id]["started"] for run_id in ("first", "second")] == [begun, begun]
        gate.touch()
        drained.result(WAIT)
