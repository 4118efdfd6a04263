"""Our worker serves hosts that run on Wove's own websocket executor, unchanged from PyPI."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import cloudpickle
import pytest
import wove
from websockets.exceptions import ConnectionClosed, InvalidStatus
from wove.environment import EnvironmentExecutionError, WebSocketEnvironmentExecutor

from wove_ws_sync.testing import LoopbackWorker

# The worker cannot import this module: what tasks use of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(worker: LoopbackWorker) -> None:
    """Send every task to the worker through Wove's own executor."""
    configure(worker.config)
    executor = wove.environment.coerce_executor("websocket")
    assert type(executor) is WebSocketEnvironmentExecutor


def configure(config: dict[str, Any], **settings: Any) -> None:
    environment = {"executor": "websocket", "executor_config": config, **settings}
    wove.config(default_environment="far", environments={"far": environment})


def single(function: Any, **options: Any) -> Any:
    """Return what one task of a weave returns, or raise what it raises."""
    with wove.weave() as w:
        w.do(**options)(renamed(function)) if options else w.do(renamed(function))
    return w.result.only


def renamed(function: Any) -> Any:
    function.__name__ = "only"
    return function


@contextlib.asynccontextmanager
async def executor(worker: LoopbackWorker) -> AsyncIterator[WebSocketEnvironmentExecutor]:
    """Give Wove's own executor, started, without the weave around it."""
    wire = WebSocketEnvironmentExecutor()
    await wire.start(environment_name="far", environment_config=worker.config, run_config={})
    try:
        yield wire
    finally:
        await wire.stop()


def run_task(function: Any, run_id: str, **args: Any) -> dict[str, Any]:
    return {"type": "run_task", "run_id": run_id, "task_id": "t", "callable": function, "args": args}


class Custom(ValueError):
    """A task's own exception type."""


class TestTasks:
    """Everything a weave can send."""

    def test_a_graph_with_mapped_and_async_tasks(self) -> None:
        """Mapped, dependent, synchronous and asynchronous tasks, 200 at once."""
        with wove.weave() as w:

            @w.do
            def numbers() -> list[int]:
                return list(range(200))

            @w.do("numbers")
            def squares(item: int) -> int:
                return item * item

            @w.do("numbers")
            async def cubes(item: int) -> int:
                import asyncio

                await asyncio.sleep(0.001)
                return item**3

            @w.do
            def total(squares: list[int], cubes: list[int]) -> int:
                return sum(squares) + sum(cubes)

        assert w.result.total == sum(n * n + n**3 for n in range(200))

    @pytest.mark.parametrize(
        "value", [None, "Grüße \N{SNOWMAN}\U0001f600\x00", b"\xff", {"k": (1, [2])}, 10**50]
    )
    def test_values(self, value: Any) -> None:
        """None, unicode, bytes, containers, large numbers come back equal."""
        assert single(lambda: value) == value

    def test_nan(self) -> None:
        """NaN comes back as NaN."""
        assert math.isnan(single(lambda: float("nan")))

    def test_lambdas_closures_and_callable_objects(self) -> None:
        """What only this process can name travels by value."""
        factor = 6
        local = Custom("in a closure")
        assert single(lambda: factor * 7) == 42
        assert repr(single(lambda: local)) == "Custom('in a closure')"

    def test_a_synchronous_task_longer_than_its_heartbeat(self) -> None:
        """3 s in a thread with a 1 s heartbeat: Wove gives up exactly at 1 s, we beat at a third."""

        def slow() -> str:
            import time

            time.sleep(3)
            return "slept"

        assert single(slow, delivery_heartbeat_seconds=1.0) == "slept"

    def test_many_long_tasks_with_heartbeats_in_few_slots(self) -> None:
        """Queued runs beat as well: 24 tasks of half a second in 8 threads, heartbeat 0.9 s."""

        def slow(item: int) -> int:
            import time

            time.sleep(0.5)
            return item

        with wove.weave() as w:
            w.do(list(range(24)), delivery_heartbeat_seconds=0.9)(slow)
        assert w.result.slow == list(range(24))

    def test_many_weaves_in_threads(self) -> None:
        """16 threads with weaves of their own, a connection each."""
        failures: list[BaseException] = []

        def use(number: int) -> None:
            try:
                for _ in range(4):
                    assert single(lambda: number) == number
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == [] and not any(thread.is_alive() for thread in threads)


class TestFailures:
    """One task's failure is its own."""

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_exceptions_are_raised_as_themselves(self, asynchronous: bool) -> None:
        """Type, args and attributes survive."""

        def fail() -> None:
            error = Custom("wrong", 7)
            error.extra = "kept"  # type: ignore[attr-defined]
            raise error

        async def fail_later() -> None:
            fail()

        with pytest.raises(ValueError, match="wrong") as caught:
            single(fail_later if asynchronous else fail)
        assert type(caught.value).__name__ == "Custom"
        assert (caught.value.args, caught.value.extra) == (("wrong", 7), "kept")  # type: ignore[attr-defined]

    @pytest.mark.parametrize("kind", ["SystemExit", "StopIteration"])
    def test_what_would_break_the_host_is_told_as_an_error(self, kind: str) -> None:
        """The host raises EnvironmentExecutionError with the worker's traceback, and lives."""

        def fail() -> None:
            import builtins

            raise getattr(builtins, kind)("no")

        with pytest.raises(EnvironmentExecutionError) as caught:
            single(fail)
        payload = caught.value.payload
        assert (payload["kind"], payload["source"], payload["adapter"]) == (kind, "task", "websocket")
        assert kind in payload["traceback"]

    def test_one_failure_of_many(self, worker: LoopbackWorker) -> None:
        """A result over 1 MiB, an unpicklable one and an exception fail; 50 others on the wire arrive."""

        def task(number: int) -> Any:
            import threading

            if number == 10:
                return b"x" * 1_500_000
            if number == 20:
                return threading.Lock()
            if number == 30:
                raise Custom("thirty")
            return number

        async def exchange() -> dict[str, Any]:
            async with executor(worker) as wire:
                for number in range(53):
                    await wire.send(run_task(task, f"r{number}", number=number))
                ended: dict[str, Any] = {}
                while len(ended) < 53:
                    event = await wire.recv()
                    if event["type"] in ("task_result", "task_error"):
                        ended[event["run_id"]] = event
            return ended

        ended = asyncio.run(asyncio.wait_for(exchange(), 60))
        large, unpicklable, raised = (ended.pop(f"r{number}") for number in (10, 20, 30))
        assert {run_id: event["result"] for run_id, event in ended.items()} == {
            f"r{number}": number for number in range(53) if number not in (10, 20, 30)
        }
        assert large["error"]["kind"] == "ResultTooLarge" and "1048575" in large["error"]["message"]
        assert unpicklable["error"]["source"] == "result"
        assert type(raised["exception"]).__name__ == "Custom"

    def test_timeouts_cancel_the_run(self) -> None:
        """Wove's delivery_timeout reaches the coroutine as a cancellation; the connection lives on."""

        async def hang() -> None:
            import asyncio

            await asyncio.sleep(60)

        with pytest.raises(wove.DeliveryTimeoutError):
            single(hang, delivery_timeout=0.3)
        assert single(lambda: "next") == "next"

    def test_an_argument_over_the_workers_limit_ends_that_connection_only(self) -> None:
        """1009 for the connection that sent it; the next weave dials again and works."""

        async def exchange() -> None:
            async with executor(small) as wire:
                await wire.send(run_task(len, "r", obj=b"x" * 200_000))
                await wire.recv()

        with LoopbackWorker(max_message_bytes=100_000) as small:
            with pytest.raises(ConnectionClosed, match="1009"):
                asyncio.run(asyncio.wait_for(exchange(), 60))
            configure(small.config)
            assert single(lambda: "next") == "next"


class TestSecurity:
    """Wove's signed handshake decides who gets in."""

    def test_a_wrong_secret_is_401(self, worker: LoopbackWorker) -> None:
        """start() of Wove's executor raises what websockets raises for HTTP 401."""
        configure({**worker.config, "security": {"type": "signed", "secret": "wrong" * 8}})
        with pytest.raises(InvalidStatus, match="401"):
            single(lambda: 1)

    def test_no_credentials_are_401(self, worker: LoopbackWorker) -> None:
        """The same for a host without security."""
        configure({**worker.config, "security": "none"})
        with pytest.raises(InvalidStatus, match="401"):
            single(lambda: 1)

    def test_a_secret_from_the_environment(
        self, worker: LoopbackWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """security="env:VARIABLE", as on the seed page."""
        assert worker.security is not None
        monkeypatch.setenv("WOVE_WORKER_SECRET", worker.security["secret"])
        configure({**worker.config, "security": "env:WOVE_WORKER_SECRET"})
        assert single(lambda: "in") == "in"
