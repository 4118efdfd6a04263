"""The worker service as a host sees it: a raw WebSocket client against a real worker process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import wove
from raw_host import (
    FOREIGN_LIMIT,
    PATIENCE,
    TERMINAL,
    RawHost,
    block_until,
    occupy,
    pickled,
    signed,
    unpickled,
    wait_until,
)
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker import WorkerService
from wove_ws_sync.worker.auth import Authenticator
from wove_ws_sync.worker.nonces import MemoryNonces

# The worker cannot import this module: what tasks use of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=4) as running:
        yield running


@pytest.fixture
def host(worker: LoopbackWorker) -> Iterator[RawHost]:
    with RawHost(worker) as connected:
        yield connected


@pytest.fixture
def own_host(worker: LoopbackWorker) -> Iterator[RawHost]:
    with RawHost(worker, limit=256 * 1024 * 1024) as connected:
        yield connected


class TestRun:
    """What a host hears of a run."""

    def test_a_run_is_started_and_has_its_result(self, host: RawHost) -> None:
        """task_started, then task_result, each one message with the ids of the frame."""
        host.run(lambda a, b: a + b, "run:1", a=1, b=2)
        started, ended = host.wait("run:1")
        assert started == {"type": "task_started", "run_id": "run:1", "task_id": "task"}
        assert unpickled(ended.pop("result_pickle")) == 3
        assert ended == {"type": "task_result", "run_id": "run:1", "task_id": "task"}
        assert all(message.startswith(b"{") for message in host.messages)

    @pytest.mark.parametrize("value", [None, "Grüße \N{SNOWMAN} \U0001f600", b"\x00\xff", {"a": [1, (2,)]}])
    def test_values_travel(self, host: RawHost, value: Any) -> None:
        """An argument comes back as the same result."""
        host.run(lambda value: value, value=value)
        assert host.result() == value

    def test_coroutines_run(self, host: RawHost) -> None:
        """A callable that returns an awaitable is awaited, in a context of its own."""

        async def task(delay: float) -> str:
            import asyncio

            await asyncio.sleep(delay)
            return "awaited"

        host.run(task, delay=0.01)
        events = host.wait()
        assert [event["type"] for event in events] == ["task_started", "task_result"]
        assert unpickled(events[-1]["result_pickle"]) == "awaited"

    def test_more_coroutines_than_threads_run_at_once(self, host: RawHost) -> None:
        """Coroutines do not hold a thread: 50 of them wait for each other on 4 threads."""

        async def task(everyone: int) -> int:
            import asyncio
            import builtins

            shared: Any = builtins.__dict__.setdefault("_wove_test_barrier", {})
            barrier = shared.setdefault("barrier", None) or asyncio.Barrier(everyone)
            shared["barrier"] = barrier
            return int(await barrier.wait())

        for number in range(50):
            host.run(task, f"r{number}", everyone=50)
        seen = set()
        while len(seen) < 50:
            event = host.event()
            if event["type"] in TERMINAL:
                seen.add(unpickled(event["result_pickle"]))
        assert seen == set(range(50))

    def test_context_variables_of_one_task_are_not_seen_by_the_next(self, host: RawHost) -> None:
        """Tasks share threads, not contexts."""

        def task() -> str:
            import contextvars
            import sys

            variable: Any = sys.__dict__.setdefault("_wove_test_var", contextvars.ContextVar("v", default=""))
            before = variable.get()
            variable.set("left over")
            return str(before)

        for number in range(20):
            host.run(task, f"r{number}")
            assert host.result(f"r{number}") == ""

    def test_frames_of_later_versions_are_understood(self, host: RawHost) -> None:
        """Unknown fields are ignored, missing args and delivery are empty."""
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": pickled(lambda: 7)}
        host.send(**frame, attempt=3, deadline_ms=50, new={"x": []})
        assert host.result() == 7

    def test_a_binary_message_with_json_is_a_command(self, host: RawHost) -> None:
        """The kind of the WebSocket message does not matter, its content does."""
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": pickled(lambda: 7)}
        host.socket.send(json.dumps(frame).encode())
        assert host.result() == 7

    def test_events_may_share_a_message_for_hosts_of_this_package(self, own_host: RawHost) -> None:
        """With X-Wove-Sync, many small events need fewer messages than events; never an empty list."""
        for number in range(500):
            own_host.run(lambda: None, f"r{number}")
        ended = 0
        while ended < 500:
            ended += own_host.event()["type"] in TERMINAL
        assert len(own_host.messages) < 1000
        assert not any(message == b"[]" for message in own_host.messages)

    def test_a_live_run_id_runs_once(self, host: RawHost, tmp_path: Path) -> None:
        """A second run_task with the same id is not answered and not executed."""
        ledger, gate = tmp_path / "ledger", tmp_path / "gate"

        def task(ledger: str, gate: str) -> None:
            import pathlib
            import time

            with open(ledger, "a") as file:
                file.write("x")
            while not pathlib.Path(gate).exists():
                time.sleep(0.01)

        host.run(task, ledger=str(ledger), gate=str(gate))
        host.wait(kind="task_started")
        host.run(task, ledger=str(ledger), gate=str(gate))
        host.run(lambda: None, "after")
        host.wait("after")
        gate.touch()
        assert [event["type"] for event in host.wait()] == ["task_result"]
        assert ledger.read_text() == "x"


class TestHeartbeats:
    """Beats come at a third of the asked interval, whatever tasks do."""

    def test_a_task_that_holds_its_thread_does_not_stop_them(self, host: RawHost) -> None:
        """A synchronous 1.2 s task with a 0.6 s heartbeat beats about every 0.2 s."""

        def task() -> None:
            import time

            time.sleep(1.2)

        host.run(task, delivery={"delivery_heartbeat_seconds": 0.6})
        moments = []
        while host.event()["type"] not in TERMINAL:
            moments.append(time.monotonic())
        assert 4 <= len(moments) <= 8
        assert max(b - a for a, b in itertools.pairwise(moments)) < 0.6

    def test_a_queued_run_beats_and_is_started_later(self, worker: LoopbackWorker, tmp_path: Path) -> None:
        """From acceptance on, also while every slot is taken; task_started comes when it begins."""
        with LoopbackWorker(workers=1) as small, RawHost(small) as host:
            host.run(occupy(str(tmp_path / "gate")), "first")
            host.wait("first", "task_started")
            host.run(lambda: 1, "second", delivery={"delivery_heartbeat_seconds": 0.3})
            assert [host.event() for _ in range(3)] == [
                {"type": "heartbeat", "run_id": "second", "task_id": "task"}
            ] * 3
            (tmp_path / "gate").touch()
            kinds = [event["type"] for event in host.wait("second") if event["type"] != "heartbeat"]
            assert kinds == ["task_started", "task_result"]

    def test_a_blocking_coroutine_stops_nobody_else(self, host: RawHost, tmp_path: Path) -> None:
        """While it holds the task loop: its own beats, other hosts' runs and new handshakes go on."""
        gate = str(tmp_path / "gate")

        async def task() -> None:
            block_until(gate)

        host.run(task, "stuck", delivery={"delivery_heartbeat_seconds": 0.3})
        host.wait("stuck", "heartbeat")
        host.run(lambda: "fine", "other")
        assert host.result("other") == "fine"
        host.wait("stuck", "heartbeat")
        (tmp_path / "gate").touch()
        assert host.result("stuck") is None

    def test_32_busy_threads_leave_room_for_heartbeats(self) -> None:
        """Pure Python in every one of 32 threads, started at once: each run is heard while it runs."""

        def task() -> None:
            import time

            end = time.monotonic() + 4
            while time.monotonic() < end:
                pass

        with LoopbackWorker(workers=32) as large, RawHost(large) as host:
            for number in range(32):
                host.run(task, f"r{number}", delivery={"delivery_heartbeat_seconds": 1.0})
            beats: Counter[str] = Counter()
            ended = 0
            while ended < 32:
                event = host.event()
                beats[event["run_id"]] += event["type"] == "heartbeat"
                ended += event["type"] in TERMINAL
        assert all(beats[f"r{number}"] for number in range(32))

    def test_a_task_that_holds_the_interpreter_leaves_room_for_beats(self, host: RawHost) -> None:
        """Pure Python loops in several threads: each run is heard while it runs."""

        def task() -> int:
            import time

            end, count = time.monotonic() + 1.5, 0
            while time.monotonic() < end:
                count += 1
            return count

        for number in range(4):
            host.run(task, f"r{number}", delivery={"delivery_heartbeat_seconds": 1.0})
        beats: Counter[str] = Counter()
        ended = 0
        while ended < 4:
            event = host.event()
            beats[event["run_id"]] += event["type"] == "heartbeat"
            ended += event["type"] in TERMINAL
        assert all(beats[f"r{number}"] for number in range(4))


class TestCancel:
    """The table in wove_ws_sync/worker/runs.py, on real parts."""

    @pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
    def test_a_queued_run_never_runs(self, mode: str, tmp_path: Path) -> None:
        """It is acknowledged at once, while the slot is still taken."""
        with LoopbackWorker(workers=1) as small, RawHost(small) as host:
            host.run(occupy(str(tmp_path / "gate")), "first")
            host.wait("first", "task_started")
            host.run(lambda path: open(path, "w").close(), "second", path=str(tmp_path / "ran"))
            host.cancel("second", delivery_cancel_mode=mode)
            assert [event["type"] for event in host.wait("second")] == ["task_cancelled"]
            (tmp_path / "gate").touch()
            host.wait("first")
            host.run(lambda: None, "third")
            host.wait("third")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
    def test_a_coroutine_is_cancelled_for_real(self, host: RawHost, mode: str, tmp_path: Path) -> None:
        """Its finally blocks have run when task_cancelled comes."""

        async def task(path: str) -> None:
            import asyncio
            import logging
            import pathlib

            try:
                logging.getLogger().info("inside")
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.05)
                pathlib.Path(path).touch()

        host.run(task, path=str(tmp_path / "cleaned"))
        host.wait(kind="log")
        host.cancel(delivery_cancel_mode=mode)
        host.cancel(delivery_cancel_mode=mode)
        assert host.wait()[-1]["type"] == "task_cancelled"
        assert (tmp_path / "cleaned").exists()

    def test_a_coroutine_that_swallows_the_cancellation_has_its_result(self, host: RawHost) -> None:
        """The result wins, as the task did end normally."""

        async def task() -> str:
            import asyncio
            import logging

            try:
                logging.getLogger().info("inside")
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return "survived"
            return "slept"

        host.run(task)
        host.wait(kind="log")
        host.cancel()
        assert host.result() == "survived"

    def test_best_effort_does_not_wait_for_a_synchronous_task(self, host: RawHost, tmp_path: Path) -> None:
        """task_cancelled comes while the task still runs; its result is dropped, the id is free again."""
        host.run(occupy(str(tmp_path / "gate")))
        host.wait(kind="task_started")
        host.cancel(delivery_cancel_mode="best_effort")
        assert [event["type"] for event in host.wait()] == ["task_cancelled"]
        host.cancel()  # unknown by now
        (tmp_path / "gate").touch()
        host.run(lambda: "second life")
        assert host.result() == "second life"

    @pytest.mark.parametrize("by_frame", [True, False])
    def test_require_ack_waits_for_the_end_of_a_synchronous_task(
        self, host: RawHost, tmp_path: Path, by_frame: bool
    ) -> None:
        """Nothing is acknowledged while the task runs; then its result wins."""
        delivery = {} if by_frame else {"delivery_cancel_mode": "require_ack"}
        host.run(occupy(str(tmp_path / "gate")), delivery=delivery)
        host.wait(kind="task_started")
        host.cancel(**({"delivery_cancel_mode": "require_ack"} if by_frame else {}))
        with pytest.raises(TimeoutError):
            host.event(timeout=0.2)
        (tmp_path / "gate").touch()
        assert [event["type"] for event in host.wait()] == ["task_result"]

    def test_a_cancelled_call_that_returns_a_coroutine_does_not_run_it(
        self, host: RawHost, tmp_path: Path
    ) -> None:
        """Between the call and its awaitable, require_ack is acknowledged with task_cancelled."""
        gate, ran = tmp_path / "gate", tmp_path / "ran"

        def task(gate: str, ran: str) -> Any:
            import pathlib

            block_until(gate)

            async def body() -> None:
                pathlib.Path(ran).touch()

            return body()

        host.run(task, gate=str(gate), ran=str(ran))
        host.wait(kind="task_started")
        host.cancel(delivery_cancel_mode="require_ack")
        host.run(lambda: None, "behind")
        host.wait("behind")  # the cancel has been read
        gate.touch()
        assert [event["type"] for event in host.wait()] == ["task_cancelled"]
        assert not ran.exists()

    def test_unknown_runs_are_ignored(self, host: RawHost) -> None:
        """A cancel for a run that never was or has ended is no event and no error."""
        host.cancel("nobody")
        host.run(lambda: 1)
        assert host.result() == 1
        host.cancel()
        host.run(lambda: 2, "next")
        assert host.result("next") == 2
        with pytest.raises(TimeoutError):
            host.event(timeout=0.1)

    def test_shutdown_cancels_the_runs_of_its_connection_only(self, worker: LoopbackWorker) -> None:
        """The other host's run goes on, and so does the connection that sent it."""

        async def task(seconds: float) -> str:
            import asyncio

            await asyncio.sleep(seconds)
            return "done"

        with RawHost(worker) as one, RawHost(worker) as two:
            one.run(task, seconds=60)
            two.run(task, seconds=0.5)
            one.wait(kind="task_started")
            two.wait(kind="task_started")
            one.send(type="shutdown")
            assert one.wait()[-1]["type"] == "task_cancelled"
            assert two.result() == "done"
            one.run(task, "again", seconds=0)
            assert one.result("again") == "done"

    def test_a_host_that_leaves_takes_its_runs_along(self, tmp_path: Path) -> None:
        """Coroutines are cancelled, queued runs never run, the slot of a synchronous one is freed."""

        async def sleeper(path: str) -> None:
            import asyncio
            import pathlib

            pathlib.Path(path + ".up").touch()
            try:
                await asyncio.sleep(60)
            finally:
                pathlib.Path(path).touch()

        with LoopbackWorker(workers=1) as small:
            with RawHost(small) as host:
                host.run(sleeper, "sleeper", path=str(tmp_path / "cancelled"))
                wait_until((tmp_path / "cancelled.up").exists)
                host.run(occupy(str(tmp_path / "gate")), "busy")
                wait_until((tmp_path / "gate.running").exists)
                host.run(lambda path: open(path, "w").close(), "queued", path=str(tmp_path / "ran"))
            wait_until((tmp_path / "cancelled").exists)
            with RawHost(small) as other:
                other.run(lambda: "next", "next")
                (tmp_path / "gate").touch()
                assert other.result("next") == "next"
        assert not (tmp_path / "ran").exists()


class TwoParts(Exception):
    """Pickles, but cannot be built again from its args."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")
        self.one = one


class Retold(Exception):
    """Can be built again from its args, and then says something else."""

    def __init__(self, number: int, unit: str = "s") -> None:
        super().__init__(f"{number} {unit}")


class Unpicklable(OSError):
    """Pickles, but neither its args nor what it is made of without them make it again."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(2, why, path)


class TestFailures:
    """One run's trouble is one run's task_error."""

    def test_an_exception_travels_as_itself_and_as_text(self, host: RawHost) -> None:
        """exception_pickle holds it; error_pickle has the chain without the worker's own frames."""

        def task() -> None:
            try:
                raise KeyError("inner")
            except KeyError as exc:
                raise ValueError("outer") from exc

        host.run(task)
        error = host.error()
        assert repr(unpickled(error["event"]["exception_pickle"])) == "ValueError('outer')"
        assert (error["kind"], error["message"]) == ("ValueError", "outer")
        assert (error["source"], error["retryable"]) == ("task", False)
        assert "KeyError: 'inner'" in error["traceback"] and "direct cause" in error["traceback"]
        assert os.path.join("worker", "jobs.py") not in error["traceback"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("kind", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "BaseException"])
    def test_what_ends_processes_ends_only_the_run(
        self, host: RawHost, kind: str, asynchronous: bool
    ) -> None:
        """It is a task_error without exception_pickle, and the worker serves on."""

        def task(kind: str) -> None:
            import builtins

            raise getattr(builtins, kind)("bye")

        async def coroutine(kind: str) -> None:
            task(kind)

        host.run(coroutine if asynchronous else task, kind=kind)
        error = host.error()
        assert (error["kind"], error["source"]) == (kind, "task")
        assert "exception_pickle" not in error["event"]
        host.run(lambda: 1, "after")
        assert host.result("after") == 1

    def test_a_background_task_that_exits_does_not_end_the_task_loop(self, host: RawHost) -> None:
        """SystemExit out of a task that a coroutine started leaves later coroutines alive."""

        async def task() -> str:
            import asyncio

            async def leave() -> None:
                raise SystemExit(3)

            background = asyncio.get_running_loop().create_task(leave())
            await asyncio.sleep(0.05)
            return type(background.exception()).__name__

        for run_id in ("one", "two"):
            host.run(task, run_id)
            assert host.result(run_id) == "SystemExit"

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_task_that_cancels_itself_is_cancelled(self, host: RawHost, asynchronous: bool) -> None:
        """asyncio.CancelledError is what Wove's own worker reports as task_cancelled, too."""

        def task() -> None:
            raise asyncio.CancelledError

        async def coroutine() -> None:
            raise asyncio.CancelledError

        host.run(coroutine if asynchronous else task)
        assert host.wait()[-1]["type"] == "task_cancelled"

    def test_stop_iteration_is_told_but_not_raised(self, host: RawHost) -> None:
        """It would break the loop of a host on Wove's own executor."""

        def task() -> None:
            raise StopIteration(5)

        host.run(task)
        error = host.error()
        assert error["kind"] == "StopIteration" and "exception_pickle" not in error["event"]

    def test_an_exception_that_does_not_unpickle_is_told_as_text(self, host: RawHost) -> None:
        """exception_pickle is left out, as the host could not read it."""

        def task() -> None:
            raise Unpicklable("here", "gone")

        host.run(task)
        error = host.error()
        assert (error["kind"], error["message"]) == ("Unpicklable", "[Errno 2] gone: 'here'")
        assert "exception_pickle" not in error["event"]

    def test_an_exception_with_an_init_of_its_own_travels_as_itself(self, host: RawHost) -> None:
        """Whatever arguments that wants: text, args and attributes are those it was raised with."""

        def task(kind: type[Exception], args: tuple[Any, ...]) -> None:
            error = kind(*args)
            error.add_note("noted")
            raise error

        for kind, args in ((TwoParts, (1, 2)), (Retold, (3,))):
            made = kind(*args)
            host.run(task, kind=kind, args=args)
            raised = unpickled(host.error()["event"]["exception_pickle"])
            assert type(raised).__name__ == kind.__name__
            assert (str(raised), raised.args) == (str(made), made.args)
            assert vars(raised) == {**vars(made), "__notes__": ["noted"]}

    def test_an_exception_whose_text_fails_is_still_told(self, host: RawHost) -> None:
        """Neither __str__ nor __reduce__ of a task's exception can hurt the worker."""

        def task() -> None:
            class Hostile(Exception):
                def __str__(self) -> str:
                    raise SystemExit

                def __reduce__(self) -> Any:
                    raise SystemExit

            raise Hostile

        host.run(task)
        error = host.error()
        assert error["kind"] == "Hostile" and "str()" in error["message"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_result_that_cannot_be_pickled_says_which_type(self, host: RawHost, asynchronous: bool) -> None:
        """The run's error has source "result" and names the type."""

        def task() -> Any:
            import threading

            return threading.Lock()

        async def coroutine() -> Any:
            return task()

        host.run(coroutine if asynchronous else task)
        error = host.error()
        assert error["source"] == "result"
        assert "_thread.lock" in error["message"] and "must be picklable" in error["message"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("callable_pickle", "!!! no base64"),
            ("callable_pickle", "Zm9v"),
            ("callable_pickle", pickled(len)[:-8]),
            ("callable_pickle", pickled(7)),
            ("callable_pickle", "gASVFwAAAAAAAACMBm5vd2hlcmWUjAV0aGluZ5STlC4="),
            ("args_pickle", "Zm9v"),
            ("args_pickle", pickled([1])),
            ("args_pickle", pickled({1: 2})),
        ],
    )
    def test_a_payload_that_cannot_be_used_is_an_error_of_its_run(
        self, host: RawHost, field: str, value: str
    ) -> None:
        """No base64, no pickle, truncated, absent module, wrong type: kind PayloadDecodeError."""
        frame = {"callable_pickle": pickled(lambda: 1), "args_pickle": pickled({}), field: value}
        host.send(type="run_task", run_id="r", task_id="t", **frame)
        error = host.error()
        assert (error["kind"], error["source"]) == ("PayloadDecodeError", "payload")
        assert "\n" not in error["message"]

    @pytest.mark.parametrize("exit_kind", ["SystemExit", "ValueError"])
    def test_unpickling_that_raises_hurts_its_run_only(self, host: RawHost, exit_kind: str) -> None:
        """Whatever code a payload runs, its exception stays with its run."""
        payload = base64.b64encode(f"cbuiltins\nexec\n(S'raise {exit_kind}(1)'\ntR.".encode()).decode()
        host.send(type="run_task", run_id="r", task_id="t", callable_pickle=payload)
        assert host.error()["kind"] == "PayloadDecodeError"
        host.run(lambda: 1, "after")
        assert host.result("after") == 1

    def test_a_malformed_run_task_is_answered_if_it_names_its_run(self, host: RawHost) -> None:
        """The error names the field; a live run of that id is not hurt by it."""
        host.send(type="run_task", run_id="odd", task_id="t", callable_pickle=None)
        error = host.wait("odd")[-1]["error"]
        assert (error["kind"], error["source"]) == ("MalformedFrame", "payload")
        assert "callable_pickle" in error["message"]

    def test_the_wrong_arguments_are_the_tasks_own_type_error(self, host: RawHost) -> None:
        """A call that does not fit is raised as Python raises it."""
        host.run(lambda: 1, unexpected=True)
        error = host.error()
        assert (error["kind"], error["source"]) == ("TypeError", "task")


class TestSizes:
    """No message is larger than its host accepts; one run fails instead."""

    @pytest.mark.parametrize("limit", [None, 200_000])
    def test_a_result_that_is_too_large_fails_its_run_only(
        self, worker: LoopbackWorker, limit: int | None
    ) -> None:
        """A foreign host accepts 1 MiB - 1, one of ours what its header says; the error has both numbers."""
        most = limit or FOREIGN_LIMIT
        with RawHost(worker, limit=limit, max_size=most) as host:
            overhead = len(json.dumps({"type": "task_result", "run_id": "fits", "task_id": "task"})) + 50
            fits = (most - overhead) // 4 * 3 - 30
            host.run(lambda: None, "small")
            host.run(lambda size: b"x" * size, "large", size=most)
            host.run(lambda size: b"x" * size, "fits", size=fits)
            ended = {}
            while len(ended) < 3:
                event = host.event()
                if event["type"] in TERMINAL:
                    ended[event["run_id"]] = event
            error = unpickled(ended["large"]["error_pickle"])
            assert (error["kind"], error["source"]) == ("ResultTooLarge", "result")
            assert str(most) in error["message"] and "max_message_bytes" in error["message"]
            assert len(unpickled(ended["fits"]["result_pickle"])) == fits
            assert ended["small"]["type"] == "task_result"

    @pytest.mark.parametrize("limit", [None, 5000])
    def test_an_exception_that_is_too_large_is_told_shorter(
        self, worker: LoopbackWorker, limit: int | None
    ) -> None:
        """Its kind survives; what does not fit is left out."""

        def task() -> None:
            raise ValueError("x" * 3_000_000)

        with RawHost(worker, limit=limit, max_size=limit or FOREIGN_LIMIT) as host:
            host.run(task)
            error = host.error()
            assert error["kind"] == "ValueError" and error["message"].startswith("xxx")

    def test_large_values_travel_both_ways(self, own_host: RawHost) -> None:
        """24 MiB to and fro, with heartbeats in between."""
        value = random.Random(5).randbytes(24 * 1024 * 1024)
        own_host.run(lambda value: value, value=value, delivery={"delivery_heartbeat_seconds": 1.0})
        assert own_host.result() == value

    def test_a_message_over_the_workers_limit_closes_that_connection_only(self) -> None:
        """--max-message-bytes is enforced on the frame header: 1009, other hosts unharmed."""
        with LoopbackWorker(max_message_bytes=100_000) as small, RawHost(small) as other:
            with RawHost(small, limit=10_000_000) as host:
                assert host.socket.response is not None
                assert host.socket.response.headers["X-Wove-Max-Message"] == "100000"
                host.run(lambda value: None, value=b"x" * 200_000)
                with pytest.raises(ConnectionClosed) as caught:
                    host.wait()
                assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
            other.run(lambda: 1)
            assert other.result() == 1

    def test_small_events_do_not_wait_behind_more_than_one_large_one(self, own_host: RawHost) -> None:
        """With ten 8 MiB results to send, the result of a no-op comes before most of them."""
        for number in range(10):
            own_host.run(lambda: bytes(8 * 1024 * 1024), f"large{number}")
        order: list[str] = []
        own_host.run(lambda: None, "small")
        while len(order) < 11:
            event = own_host.event()
            if event["type"] in TERMINAL:
                order.append(event["run_id"])
        assert order.index("small") < 10


class TestLogs:
    """Records that a task emits come as log events of its run."""

    def test_sync_and_async_tasks_log(self, host: RawHost) -> None:
        """Fields of the event, in order, before the terminal event."""

        def task() -> None:
            import logging

            logging.getLogger("my.app").warning("half %d%%", 50)

        async def coroutine() -> None:
            import asyncio
            import logging

            await asyncio.sleep(0)
            logging.getLogger("my.app").warning("half %d%%", 50)

        for run_id, function in (("sync", task), ("async", coroutine)):
            host.run(function, run_id)
            started, log, ended = host.wait(run_id)
            assert (started["type"], ended["type"]) == ("task_started", "task_result")
            assert abs(log.pop("created") - time.time()) < 60
            assert log == {
                "type": "log",
                "run_id": run_id,
                "task_id": "task",
                "level": "WARNING",
                "logger": "my.app",
                "message": "half 50%",
            }

    def test_each_record_goes_to_its_own_run(self, host: RawHost) -> None:
        """Interleaved coroutines and threads do not mix their logs."""

        async def task(name: str) -> None:
            import asyncio
            import logging

            for number in range(5):
                logging.getLogger().info("%s %d", name, number)
                await asyncio.sleep(0)

        names = [f"r{number}" for number in range(10)]
        for name in names:
            host.run(task, name, name=name)
        logs: dict[str, list[str]] = {name: [] for name in names}
        ended = 0
        while ended < 10:
            event = host.event()
            ended += event["type"] in TERMINAL
            if event["type"] == "log":
                logs[event["run_id"]].append(event["message"])
        assert logs == {name: [f"{name} {number}" for number in range(5)] for name in names}

    def test_a_record_whose_text_blocks_stops_nobody_else(self, host: RawHost, tmp_path: Path) -> None:
        """Formatting runs user code: no lock is held that the service or other tasks need."""
        gate = str(tmp_path / "gate")

        class Slow:
            def __str__(self) -> str:
                block_until(gate)
                return "at last"

        def task() -> None:
            import logging

            record = logging.LogRecord("slow", logging.INFO, "", 0, "%s", (Slow(),), None)
            for handler in logging.getLogger().handlers:
                if type(handler).__name__ == "TaskLogHandler":
                    handler.handle(record)

        def other() -> str:
            import logging

            logging.getLogger().info("me too")
            return "fine"

        host.run(task, "slow")
        host.wait("slow", "task_started")
        host.run(other, "other", delivery={"delivery_heartbeat_seconds": 1.0})
        assert host.result("other") == "fine"
        Path(gate).touch()
        assert [event.get("message") for event in host.wait("slow")] == ["at last", None]

    def test_odd_records_do_not_hurt(self, host: RawHost) -> None:
        """Texts are bounded, bad formats are told, tracebacks are kept, our own loggers are left out."""

        def task() -> str:
            import logging

            log = logging.getLogger("odd")
            logging.raiseExceptions = False
            log.info("x" * 100_000)
            log.info("%d", "not a number")
            log.info("lone surrogate \ud800")
            logging.getLogger("wove_ws_sync.worker").info("not for hosts")
            logging.getLogger("websockets.server").info("not for hosts")
            log.debug("below the level")
            try:
                raise OSError("planted")
            except OSError:
                log.exception("failed")
            return "fine"

        host.run(task)
        events = host.wait()
        texts = [event["message"] for event in events if event["type"] == "log"]
        assert unpickled(events[-1]["result_pickle"]) == "fine"
        assert [len(texts[0]), texts[2], len(texts)] == [16 * 1024, "lone surrogate \ud800", 4]
        assert "could not be formatted" in texts[1]
        assert "planted" in texts[3] and "Traceback" in texts[3]

    def test_a_flood_for_a_host_that_does_not_read_is_bounded(self, worker: LoopbackWorker) -> None:
        """Records are dropped, not kept; the result still arrives."""

        def task() -> str:
            import logging

            log = logging.getLogger("flood")
            log.propagate = False
            for handler in logging.getLogger().handlers:
                if type(handler).__name__ == "TaskLogHandler":
                    log.addHandler(handler)
            for _ in range(30_000):
                log.warning("y" * 1000)
            log.handlers.clear()
            return "done"

        with RawHost(worker, max_queue=1) as host:
            host.run(task)
            pause = threading.Event()
            pause.wait(2.0)
            events = host.wait()
        assert unpickled(events[-1]["result_pickle"]) == "done"
        assert len(events) < 30_000


class TestHandshake:
    """Who gets in, and that nothing of anybody else is looked at."""

    def refused(self, worker: LoopbackWorker, headers: Any, url: str | None = None) -> int:
        options: Any = {"compression": None, "proxy": None}
        with (
            pytest.raises(InvalidStatus) as caught,
            connect(url or worker.url, additional_headers=headers, **options),
        ):
            pass
        body = caught.value.response.body.decode()
        assert body == {401: "401 Unauthorized\n", 404: "404 Not Found\n"}[caught.value.response.status_code]
        return caught.value.response.status_code

    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"X-Wove-Signature": "v1=" + "0" * 64},
            {"X-Wove-Signature": "v1=é"},
            {"X-Wove-Nonce": "é"},
            {"X-Wove-Key": "other"},
            {"X-Wove-Key": "é"},
            *({"X-Wove-Timestamp": odd} for odd in ("nan", "inf", "-1", "1e9", "9" * 400, "²", "", "x")),
        ],
    )
    def test_wrong_credentials_are_one_401(self, worker: LoopbackWorker, change: dict[str, str]) -> None:
        """Missing, wrong, odd, not ASCII: the same status and the same text, never 500."""
        headers = {**signed(worker), **change} if change else {}
        assert self.refused(worker, headers) == 401

    def test_the_wrong_secret_and_a_wrong_target_are_401(self, worker: LoopbackWorker) -> None:
        """The signature covers the secret, the path and the query."""
        other = wove.NetworkExecutorSecurity.from_config({"secret": "x" * 32})
        headers = other.headers_for(transport="websocket", target="/wove", body=b"")
        assert self.refused(worker, headers) == 401
        assert self.refused(worker, signed(worker, "/wove"), worker.url + "?a=b") == 401

    def test_a_query_is_part_of_the_signed_target(self, worker: LoopbackWorker) -> None:
        """The path decides where a host may connect; what follows "?" is signed as it was sent."""
        headers = signed(worker, "/wove?tenant=1")
        with connect(worker.url + "?tenant=1", additional_headers=headers, proxy=None):
            pass

    def test_a_signed_nan_timestamp_is_refused(self, worker: LoopbackWorker) -> None:
        """A holder of the secret cannot make a signature that never expires."""
        security = wove.NetworkExecutorSecurity.from_config(worker.security)
        headers = signed(worker) | {"X-Wove-Timestamp": "nan", "X-Wove-Nonce": "n"}
        headers["X-Wove-Signature"] = security._signature(
            transport="websocket", target="/wove", body=b"", timestamp="nan", nonce="n"
        )
        assert self.refused(worker, headers) == 401

    def test_f42_a_replayed_handshake_is_refused(self, worker: LoopbackWorker) -> None:
        """The same headers open one connection."""
        headers = signed(worker)
        with RawHost(worker, headers=headers):
            pass
        assert self.refused(worker, headers) == 401

    def test_repeated_security_headers_are_refused(self, worker: LoopbackWorker) -> None:
        """Two signatures are none."""
        headers = signed(worker)
        assert self.refused(worker, [*headers.items(), ("X-Wove-Signature", "v1=0")]) == 401

    def test_one_of_many_racing_replays_gets_in(self) -> None:
        """The memory of nonces is safe under threads and keeps each until its timestamp has expired."""
        secret = {"secret": "s" * 32, "clock_skew_seconds": 30}
        authenticator = Authenticator(secret)
        security = wove.NetworkExecutorSecurity.from_config(secret)
        start = threading.Barrier(8)
        accepted = []

        def replay(headers: dict[str, str]) -> None:
            start.wait(PATIENCE)
            with contextlib.suppress(PermissionError):
                authenticator.verify(Headers(headers), "/wove")
                accepted.append(headers)

        for _ in range(20):
            headers = security.headers_for(transport="websocket", target="/wove", body=b"")
            threads = [threading.Thread(target=replay, args=(headers,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(accepted) == 20 and len({headers["X-Wove-Nonce"] for headers in accepted}) == 20

    def test_nonces_are_forgotten_when_their_timestamp_has_expired(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Until then a replay is refused for its nonce, afterwards for its age; the memory stays small."""
        secret = {"secret": "s" * 32, "clock_skew_seconds": 30}
        authenticator = Authenticator(secret)
        security = wove.NetworkExecutorSecurity.from_config(secret)
        now = 1_000_000.0
        monkeypatch.setattr(time, "time", lambda: now)

        def try_it(headers: dict[str, str]) -> str:
            try:
                authenticator.verify(Headers(headers), "/wove")
            except PermissionError as exc:
                return str(exc)
            return "accepted"

        first = security.headers_for(transport="websocket", target="/wove", body=b"")
        assert try_it(first) == "accepted"
        now += 29
        assert "Replayed" in try_it(first)
        now += 2
        assert "clock differs by 31 s" in try_it(first)
        for _ in range(100):
            now += 1
            headers = security.headers_for(transport="websocket", target="/wove", body=b"")
            assert try_it(headers) == "accepted"
        assert isinstance(authenticator._nonces, MemoryNonces) and len(authenticator._nonces) <= 32

    def test_a_web_page_cannot_use_a_service_without_security(self, worker: LoopbackWorker) -> None:
        """Any page may connect to loopback ports: an Origin that is not of this machine is 403."""
        with LoopbackWorker(security=False) as unprotected:
            for origin in ("https://example.org", "null", "http://[", "file://"):
                options: Any = {"origin": origin, "proxy": None}
                with pytest.raises(InvalidStatus, match="403"), connect(unprotected.url, **options):
                    pass
            with connect(unprotected.url, origin="http://localhost:3000", proxy=None):
                pass
        with connect(worker.url, origin="https://example.org", additional_headers=signed(worker), proxy=None):
            pass

    def test_another_path_is_404(self, worker: LoopbackWorker) -> None:
        """Only --path is served."""
        url = worker.url.removesuffix("/wove") + "/other"
        assert self.refused(worker, signed(worker, "/other"), url) == 404

    def test_the_cause_is_in_the_workers_log_and_no_secret(self, worker: LoopbackWorker) -> None:
        """The log says why; secret and signature are not in it."""
        headers = signed(worker) | {"X-Wove-Key": "other"}
        self.refused(worker, headers)
        wait_until(lambda: "Invalid Wove network executor key" in worker.log)
        assert worker.security is not None and worker.security["secret"] not in worker.log
        assert headers["X-Wove-Signature"] not in worker.log

    def test_nothing_is_unpickled_before_the_handshake_is_accepted(
        self, worker: LoopbackWorker, tmp_path: Path
    ) -> None:
        """Frames that follow a refused request in the same packet are never looked at."""
        marker = tmp_path / "marker"
        payload = base64.b64encode(f"cposix\nmkdir\n(V{marker}\ntR.".encode()).decode()
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": payload}
        data = json.dumps(frame).encode()
        header = b"\x81\xfe" + len(data).to_bytes(2, "big") + bytes(4)  # masked with zeros
        address = worker.url.removeprefix("ws://").partition("/")[0]
        request = (
            f"GET /wove HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
        )
        for headers, status in (("", b"401"), (signed(worker), b"101")):
            lines = "".join(f"{name}: {value}\r\n" for name, value in dict(headers or {}).items())
            host, _, port = address.partition(":")
            with socket.create_connection((host, int(port)), timeout=PATIENCE) as raw:
                raw.sendall((request + lines + "\r\n").encode() + header + data)
                assert raw.recv(4096).split()[1] == status
                if status == b"101":
                    wait_until(marker.exists)
                else:
                    raw.settimeout(1.0)
                    assert not marker.exists()
        assert marker.exists()

    def test_only_a_host_of_this_package_is_answered_in_its_words(self, worker: LoopbackWorker) -> None:
        """X-Wove-Sync is answered with X-Wove-Sync and the worker's limit, a foreign host with neither."""
        for limit, expected in ((None, (None, None)), (1_000_000, ("1", str(256 * 1024 * 1024)))):
            with RawHost(worker, limit=limit) as host:
                assert host.socket.response is not None
                headers = host.socket.response.headers
                assert (headers.get("X-Wove-Sync"), headers.get("X-Wove-Max-Message")) == expected
                assert "Sec-WebSocket-Extensions" not in headers and "Server" not in headers

    def test_bearer_tokens_and_services_in_this_process(self) -> None:
        """WorkerService is a context manager; security has Wove's other forms, too."""

        async def check() -> None:
            security = {"type": "bearer", "token": "t" * 20}
            async with WorkerService(port=0, security=security, path="/") as service:

                def use() -> tuple[int, int]:
                    for wrong in ({}, {"Authorization": "Bearer é"}, {"Authorization": "Bearer"}):
                        with pytest.raises(InvalidStatus), RawHost(service, headers=wrong):
                            pass
                    right = {"Authorization": "Bearer " + "t" * 20}
                    with RawHost(service, headers=right) as host:
                        host.run(os.getpid)
                        return host.result(), os.getpid()

                inside, here = await asyncio.to_thread(use)
                assert inside == here
                assert service.counters["unauthorized"] == 3
                assert "serving" in repr(service)
            assert "stopped" in repr(service)
            assert not any(type(h).__name__ == "TaskLogHandler" for h in logging.getLogger().handlers)

        asyncio.run(check())

    def test_a_service_that_cannot_listen_leaves_no_threads(self) -> None:
        """start() raises OSError for a taken port; a service starts once."""

        async def check(port: int) -> None:
            service = WorkerService(port=port)
            with pytest.raises(OSError, match="in use"):
                await service.start()
            with pytest.raises(RuntimeError, match="starts once"):
                await service.start()
            assert await service.stop()

        with socket.create_server(("127.0.0.1", 0)) as taken:
            asyncio.run(check(taken.getsockname()[1]))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("wove-ws-task")]

    def test_tls_needs_the_right_authority(self) -> None:
        """LoopbackWorker(tls=True) is trusted by its ca_file and by nothing else."""
        with LoopbackWorker(tls=True) as secure:
            assert secure.url.startswith("wss://") and secure.ca_file is not None
            context = ssl.create_default_context(cafile=secure.ca_file)
            with RawHost(secure, ssl=context) as host:
                host.run(lambda: "sealed")
                assert host.result() == "sealed"
            with pytest.raises(ssl.SSLCertVerificationError):
                RawHost(secure, ssl=ssl.create_default_context())


class TestIsolation:
    """A host that misbehaves hurts nobody else."""

    @pytest.mark.parametrize(
        "message", ["{", "", "\N{SNOWMAN}", b"\xff\xfe\x00", b"", "[" * 50_000, "1" * 5000, "run_task"]
    )
    def test_what_is_not_json_closes_with_1007(self, worker: LoopbackWorker, message: str | bytes) -> None:
        """The connection that sent it, as it may have been any command."""
        with RawHost(worker) as host:
            host.socket.send(message)
            with pytest.raises(ConnectionClosed) as caught:
                host.event()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1007

    def test_text_that_is_not_utf8_closes_with_1007(self, worker: LoopbackWorker) -> None:
        """Also when the WebSocket frame claims to be text."""
        with RawHost(worker) as host:
            host.socket.send(b'{"type": "\xff"}', text=True)
            with pytest.raises(ConnectionClosed) as caught:
                host.event()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1007

    def test_json_of_other_shapes_is_ignored(self, host: RawHost) -> None:
        """null, 42, lists, unknown types and commands without a run_id leave the connection in use."""
        for message in ("null", "42", "[]", "NaN", '{"events": []}', '{"type": 5}', '{"type": "new"}'):
            host.socket.send(message)
        for kind in ("run_task", "cancel_task"):
            host.send(type=kind)
            host.send(type=kind, run_id=["r"])
        host.run(lambda: 1)
        assert [event["type"] for event in host.wait()] == ["task_started", "task_result"]

    def test_garbage_of_all_kinds_hurts_nobody_else(self, worker: LoopbackWorker) -> None:
        """100 runs of one host end well while others send garbage, half messages and half handshakes."""
        rng = random.Random(20)
        address, _, _ = worker.url.removeprefix("ws://").partition("/")
        where = (address.partition(":")[0], int(address.partition(":")[2]))

        async def task(number: int) -> int:
            import asyncio

            await asyncio.sleep(1.0)
            return number

        def vandal(kind: int) -> None:
            with socket.create_connection(where, timeout=PATIENCE) as raw:
                if kind == 0:
                    raw.sendall(rng.randbytes(2000))
                elif kind == 1:
                    raw.sendall(b"GET /wove HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 20_000)
                else:
                    raw.sendall(b"GET /wove HT")

        with RawHost(worker) as host:
            for number in range(100):
                host.run(task, f"r{number}", number=number, delivery={"delivery_heartbeat_seconds": 1.0})
            for round_number in range(30):
                vandal(round_number % 3)
                with RawHost(worker) as other:
                    try:
                        for _ in range(rng.randrange(5)):
                            other.socket.send(rng.randbytes(rng.randrange(200)), text=bool(rng.randrange(2)))
                        other.run(task, "r1", number=-1)
                        other.socket.socket.shutdown(socket.SHUT_RDWR)
                    except (ConnectionClosed, OSError):
                        pass
            results = {}
            while len(results) < 100:
                event = host.event()
                if event["type"] in TERMINAL:
                    results[event["run_id"]] = unpickled(event["result_pickle"])
            assert results == {f"r{number}": number for number in range(100)}
            assert worker.pid is not None

    def test_two_hosts_have_their_own_run_ids(self, worker: LoopbackWorker, tmp_path: Path) -> None:
        """The same run_id on two connections is two runs; one host cannot cancel the other's."""
        with RawHost(worker) as one, RawHost(worker) as two:
            one.run(occupy(str(tmp_path / "gate")))
            one.wait(kind="task_started")
            two.cancel()
            two.run(lambda: "two")
            assert two.result() == "two"
            (tmp_path / "gate").touch()
            assert one.wait()[-1]["type"] == "task_result"
