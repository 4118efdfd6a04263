"""Weaves through our shim: on our worker, and on Wove's own worker behind a plain bridge."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import wove
from scripted_worker import ScriptedWorker, result, run_frame
from wove import weave

import wove_ws_sync
from wove_ws_sync.session import Session, links
from wove_ws_sync.testing import LoopbackWorker

BRIDGE = Path(__file__).with_name("stdio_bridge.py")


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """Our worker, one process for the module."""
    with LoopbackWorker(workers=16) as running:
        yield running


@pytest.fixture(scope="module")
def bridge() -> Iterator[str]:
    """Wove's own ``python -m wove.stdio_worker`` behind a WebSocket that only copies lines."""
    process = subprocess.Popen([sys.executable, str(BRIDGE)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(params=["ours", "upstream"])
def target(request: pytest.FixtureRequest, worker: LoopbackWorker, bridge: str) -> dict[str, Any]:
    """The executor_config of either worker."""
    return {"url": worker.url, "security": worker.security} if request.param == "ours" else {"url": bridge}


def configure(config: dict[str, Any], **environment: Any) -> None:
    wove_ws_sync.config(
        environments={"socket_workers": {"executor": "websocket", "executor_config": config, **environment}}
    )


def test_tasks_of_every_kind(target: dict[str, Any]) -> None:
    """Mapped and async tasks, lambdas, closures, None, NaN and unicode."""
    configure(target)
    offset = 10
    with weave() as w:

        @w.do(environment="socket_workers")
        def base() -> int:
            return 1

        @w.do([1, 2, 3], environment="socket_workers")
        def shifted(item: int, base: int) -> int:
            return item + base + offset

        @w.do(environment="socket_workers")
        async def doubled(base: int) -> int:
            await asyncio.sleep(0)
            return base * 2

        w.do(environment="socket_workers")(_named(lambda: "grüße 🐍", "text"))
        w.do(environment="socket_workers")(_named(lambda: None, "nothing"))
        w.do(environment="socket_workers")(_named(lambda: float("nan"), "odd"))

    assert w.result.shifted == [12, 13, 14]
    assert w.result.doubled == 2
    assert w.result.text == "grüße 🐍"
    assert w.result.nothing is None
    assert math.isnan(w.result.odd)


def _named(function: Any, name: str) -> Any:
    function.__name__ = name
    return function


def test_exceptions_arrive_as_themselves(target: dict[str, Any]) -> None:
    """With the worker's traceback as a note, as Wove drops an exception's cause."""
    configure(target)

    with weave() as w:

        @w.do(environment="socket_workers")
        def fails() -> None:
            raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing") as caught:
        _ = w.result.fails
    assert "in fails" in "".join(caught.value.__notes__)


def test_heartbeats_carry_a_long_task(target: dict[str, Any]) -> None:
    """An async task three times as long as the heartbeat deadline ends well on either worker."""
    configure(target, delivery_heartbeat_seconds=0.5)
    with weave(environment="socket_workers") as w:

        @w.do(environment="socket_workers", delivery_heartbeat_seconds=0.5)
        async def long() -> str:
            await asyncio.sleep(1.5)
            return "done"

    assert w.result.long == "done"


def test_a_sync_task_outlives_its_heartbeat_on_our_worker(worker: LoopbackWorker) -> None:
    """It holds its thread for three seconds; the heartbeats come all the same."""
    configure({"url": worker.url, "security": worker.security})
    with weave() as w:

        @w.do(environment="socket_workers", delivery_heartbeat_seconds=1.0)
        def long() -> str:
            time.sleep(3.0)
            return "done"

    assert w.result.long == "done"


def test_a_task_behind_a_full_slot_keeps_its_heartbeat(worker: LoopbackWorker) -> None:
    """Wove starts its heartbeat clock before the slot is free; the shim makes up for it."""
    configure({"url": worker.url, "security": worker.security}, delivery_max_in_flight=1)
    with weave(environment="socket_workers") as w:

        @w.do(
            [1, 2, 3], environment="socket_workers", delivery_heartbeat_seconds=0.4, delivery_max_in_flight=1
        )
        async def one_by_one(item: int) -> int:
            await asyncio.sleep(0.6)
            return item

    assert w.result.one_by_one == [1, 2, 3]


def test_delivery_timeout_is_woves_error(worker: LoopbackWorker) -> None:
    """Not a TimeoutError, which Wove would take for the task's own timeout."""
    configure({"url": worker.url, "security": worker.security})
    with weave() as w:

        @w.do(environment="socket_workers", delivery_timeout=0.2)
        async def slow() -> None:
            await asyncio.sleep(30)

    with pytest.raises(wove.DeliveryTimeoutError, match="Delivery timeout exceeded for task 'slow'"):
        _ = w.result.slow


def run_weave(number: int, executor: Any = "websocket") -> list[int]:
    with weave() as w:

        @w.do(range(4), environment="socket_workers")
        def multiply(item: int) -> int:
            return item * number

        @w.do(environment="socket_workers")
        def total(multiply: list[int]) -> int:
            return sum(multiply)

    assert w.result.total == 6 * number
    return list(w.result.multiply)


@pytest.mark.parametrize("shared_instance", [False, True])
def test_sixteen_threads_sixteen_weaves_one_connection(worker: LoopbackWorker, shared_instance: bool) -> None:
    """By name or with one executor instance for all: right results over a single connection."""
    configure({"url": worker.url, "security": worker.security, "max_message_bytes": 10_000_000})
    if shared_instance:
        executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
        wove_ws_sync.config(environments={"socket_workers": {"executor": executor}})
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(run_weave, [n for n in range(16) for _ in range(16)]))
    assert results == [[0, n, 2 * n, 3 * n] for n in range(16) for _ in range(16)]
    [link] = [link for link in links() if link.options.max_message_bytes == 10_000_000]
    assert link.stats()["dials"] == 1


@pytest.mark.parametrize("shared_instance", [False, True])
def test_sixteen_weaves_in_one_loop(worker: LoopbackWorker, shared_instance: bool) -> None:
    """Concurrent weaves of one event loop do not hear each other's events."""
    configure({"url": worker.url, "security": worker.security, "max_message_bytes": 20_000_000})
    if shared_instance:
        executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
        wove_ws_sync.config(environments={"socket_workers": {"executor": executor}})

    async def one(number: int) -> list[int]:
        async with weave() as w:

            @w.do(range(4), environment="socket_workers")
            def multiply(item: int) -> int:
                return item * number

        return list(w.result.multiply)

    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(one(number) for number in range(16)))

    assert asyncio.run(all_of_them()) == [[0, n, 2 * n, 3 * n] for n in range(16)]
    [link] = [link for link in links() if link.options.max_message_bytes == 20_000_000]
    assert link.stats()["dials"] == 1


def test_two_environments_may_share_an_instance(worker: LoopbackWorker) -> None:
    """With equal settings; with different ones a clear error says what to do."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    config = {"url": worker.url, "security": worker.security}
    definitions = {name: {"executor": executor, "executor_config": config} for name in ("one", "two")}
    wove_ws_sync.config(environments=definitions)

    def both() -> tuple[str, str]:
        with weave() as w:
            w.do(environment="one")(_named(lambda: "1", "first"))
            w.do(environment="two")(_named(lambda: "2", "second"))
        return w.result.first, w.result.second

    assert both() == ("1", "2")
    wove_ws_sync.config(environments={"two": {"executor_config": {**config, "open_timeout": 3.0}}})
    with pytest.raises(RuntimeError, match="give each environment its own instance"):
        both()


def test_an_instance_is_its_own_copy() -> None:
    """Wove deep-copies its configuration."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    assert copy.deepcopy({"executor": executor})["executor"] is executor


def test_install_and_uninstall(worker: LoopbackWorker) -> None:
    """install() twice is once; uninstall() gives Wove's own executor back."""
    from wove import environment

    wove_ws_sync.install()
    wove_ws_sync.install()
    assert isinstance(
        environment.build_executor_from_name("websocket"), wove_ws_sync.AsyncWebSocketEnvironmentExecutor
    )
    assert isinstance(environment.build_executor_from_name("local"), environment.LocalEnvironmentExecutor)
    wove_ws_sync.uninstall()
    wove_ws_sync.uninstall()
    assert isinstance(environment.build_executor_from_name("websocket"), wove.WebSocketEnvironmentExecutor)


def test_cancelled_weave_tells_the_worker(worker: LoopbackWorker) -> None:
    """Cancelling the weave's task cancels its runs there; the link and others go on."""
    configure({"url": worker.url, "security": worker.security})

    async def cancelled() -> None:
        async def long_weave() -> None:
            async with weave() as w:

                @w.do(environment="socket_workers")
                async def forever() -> None:
                    await asyncio.sleep(60)

        task = asyncio.create_task(long_weave())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert run_weave(3) == [0, 3, 6, 9]
    [link] = [link for link in links() if link.options.url == worker.url][:1]
    assert link.stats()["runs"] == 0


def test_a_worker_that_refuses_says_so(worker: LoopbackWorker) -> None:
    """A wrong secret raises out of the weave, and nothing is retried behind its back."""
    configure({"url": worker.url, "security": {"type": "signed", "secret": "wrong-wrong-wrong-wrong"}})
    with pytest.raises(wove_ws_sync.AuthenticationRejected) as caught:
        run_weave(1)
    assert caught.value.status == 401


def test_the_sync_executor_end_to_end(target: dict[str, Any]) -> None:
    """start, send, recv, stop with Wove's own frames, from a plain thread."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    with pytest.raises(RuntimeError, match="websocket executor is not started"):
        executor.send({"type": "shutdown"})
    executor.start(environment_name="e", environment_config=target, run_config={})
    try:
        with pytest.raises(ValueError, match="Unsupported frame type: dance"):
            executor.send({"type": "dance"})
        for timeout in (0.05, 0, -1.0):
            with pytest.raises(TimeoutError):
                executor.recv(timeout=timeout)
        frame = {
            "type": "run_task",
            "run_id": "r1",
            "task_id": "add",
            "callable": lambda a, b: a + b,
            "args": {"a": 1, "b": 2},
        }
        executor.send(frame)
        events = [executor.recv(timeout=math.inf)]
        while events[-1]["type"] != "task_result":
            events.append(executor.recv(timeout=30))
        assert events[0]["type"] == "task_started"
        assert events[-1]["result"] == 3 and events[-1]["run_id"] == "r1"
        woken: list[BaseException] = []

        def wait() -> None:
            try:
                executor.recv()
            except RuntimeError as exc:  # ExecutorClosed, or not started if it comes late
                woken.append(exc)

        waiter = threading.Thread(target=wait)
        waiter.start()
    finally:
        executor.stop()
        executor.stop()
    waiter.join(10)
    assert woken


def test_the_sync_executor_takes_a_run_id_again(worker: LoopbackWorker) -> None:
    """A run has its own result, not that of an earlier one of the same name, in this session or another."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    results = []
    for number in range(4):
        if number % 2 == 0:
            executor.stop()
            executor.start(environment_name="e", environment_config=worker.config, run_config={})
        args = {"a": number}
        frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable": lambda a: a, "args": args}
        executor.send(frame)
        while (event := executor.recv(timeout=30))["type"] != "task_result":
            pass
        results.append(event["result"])
    executor.stop()
    assert results == [0, 1, 2, 3]


@pytest.mark.parametrize("way", ["cancel", "deadline", "stop"])
def test_the_sync_executor_takes_no_old_end_for_a_new_one(worker: LoopbackWorker, way: str) -> None:
    """A run_id is refused until the worker has done with a run that was given up, and new after that."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()

    def start() -> None:
        executor.start(environment_name="e", environment_config=worker.config, run_config=None)

    async def long() -> None:
        await asyncio.sleep(60)

    start()
    frame = {"type": "run_task", "run_id": way, "task_id": "t", "args": {}}
    delivery = {"delivery_timeout": 0.5} if way == "deadline" else {}
    executor.send({**frame, "callable": long, "delivery": delivery})
    assert executor.recv(timeout=30)["type"] == "task_started"
    if way == "stop":
        executor.stop()
        start()
    elif way == "cancel":
        executor.send({"type": "cancel_task", "run_id": way})
    if way != "stop":
        assert executor.recv(timeout=30)["type"] == ("task_error" if way == "deadline" else "task_cancelled")
    end = time.monotonic() + 30
    while True:
        try:
            executor.send({**frame, "callable": lambda: 2})
            break
        except ValueError:
            assert time.monotonic() < end
    while (event := executor.recv(timeout=30))["type"] == "task_started":
        pass
    executor.stop()
    assert event.get("result") == 2


def test_run_config_may_be_left_out(worker: LoopbackWorker) -> None:
    """None is as good as no defaults, for both executors."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    executor.start(environment_name="e", environment_config=worker.config, run_config=None)
    executor.stop()

    async def start() -> None:
        executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
        await executor.start(environment_name="e", environment_config=worker.config)
        await executor.stop()

    asyncio.run(start())


def test_an_executor_that_was_not_made_whole_has_a_repr() -> None:
    """Debuggers and reports of errors ask for it."""
    assert "not started" in repr(object.__new__(wove_ws_sync.SyncWebSocketEnvironmentExecutor))


def test_config_has_the_signature_of_woves() -> None:
    """Editors and help() show the same keywords."""
    assert inspect.signature(wove_ws_sync.config) == inspect.signature(wove.config)


def test_install_bears_whoever_wraps_woves_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tool that wrapped ours calls it for ever, also after uninstall() and another install()."""
    environment = wove.environment
    monkeypatch.setattr(environment, "build_executor_from_name", environment.build_executor_from_name)
    wove_ws_sync.install()
    wrapped = environment.build_executor_from_name

    calls: list[str] = []

    def wrapper(name: str) -> Any:
        calls.append(name)
        return wrapped(name)

    monkeypatch.setattr(environment, "build_executor_from_name", wrapper)
    for _ in range(2):
        assert type(environment.build_executor_from_name("local")) is environment.LocalEnvironmentExecutor
        ours = environment.build_executor_from_name("websocket")
        assert isinstance(ours, wove_ws_sync.AsyncWebSocketEnvironmentExecutor)
        wove_ws_sync.uninstall()
        assert type(environment.build_executor_from_name("local")) is environment.LocalEnvironmentExecutor
        woves = environment.build_executor_from_name("websocket")
        assert isinstance(woves, environment.WebSocketEnvironmentExecutor)
        wove_ws_sync.install()
    assert len(calls) == 7  # once for each call that came as far; ours had taken one of them


def test_a_second_stop_ends_no_other_weave(worker: LoopbackWorker) -> None:
    """Nor does one behind a start() that failed, though both share an instance and a loop."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    config = {"url": worker.url, "security": worker.security}

    async def started(**settings: Any) -> None:
        await executor.start(environment_name="e", environment_config={**config, **settings})

    async def twice() -> None:
        await started()
        await executor.stop()
        await executor.stop()

    async def never() -> None:
        with pytest.raises(OSError):
            await started(url="ws://127.0.0.1:9/wove")
        await executor.stop()

    async def main() -> str:
        await started()
        frame = {
            "type": "run_task",
            "run_id": "r",
            "task_id": "t",
            "callable": asyncio.sleep,
            "args": {"delay": 0.5},
        }
        await executor.send(frame)
        for other in (twice, never):
            await asyncio.create_task(other())
        while (event := await executor.recv())["type"] not in ("task_result", "task_error", "task_cancelled"):
            pass
        await executor.stop()
        return str(event["type"])

    assert asyncio.run(main()) == "task_result"


@pytest.mark.parametrize("where", ["one task", "one loop each"])
def test_a_weave_that_fails_as_it_starts_leaves_nothing_to_the_next(
    worker: LoopbackWorker, where: str
) -> None:
    """Wove never stops the environments that were started: the next weave on the instance does."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    config = {"url": worker.url, "security": worker.security}
    run_configs = [{"max_workers": 1}, {"max_workers": 1}]

    async def fail() -> None:
        await executor.start(environment_name="a", environment_config=config, run_config=run_configs[0])

    async def succeed() -> None:
        for name in ("a", "b"):
            await executor.start(environment_name=name, environment_config=config, run_config=run_configs[1])
        [group] = executor._groups
        assert (group.starts, len(group.inboxes)) == (2, 2)
        for _ in range(2):
            await executor.stop()

    async def both() -> None:
        await fail()
        await succeed()

    if where == "one task":
        asyncio.run(both())
    else:
        asyncio.run(fail())
        asyncio.run(succeed())
    assert executor._groups == []


def test_the_shortest_heartbeat_sets_the_pace(worker: LoopbackWorker) -> None:
    """A run with a long interval that comes first does not keep Wove waiting for those of another."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()

    async def main() -> None:
        config = {"url": worker.url, "security": worker.security}
        await executor.start(environment_name="e", environment_config=config)
        [group] = executor._groups
        group.keep_beating("slow", 3600.0)
        group.keep_beating("fast", 0.3)
        beats = 0
        while beats < 5:
            beats += (await executor.recv())["run_id"] == "fast"
        await executor.stop()

    asyncio.run(asyncio.wait_for(main(), 30.0))


def test_a_send_that_is_cancelled_leaves_no_run() -> None:
    """Wove cancels nothing whose send() has not returned: it goes out to be cancelled, and not to run on."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    delivery = {"delivery_orphan_policy": "requeue"}

    async def main(worker: ScriptedWorker) -> None:
        config = {"url": worker.url, "send_buffer_bytes": 3_000_000}
        await executor.start(environment_name="e", environment_config=config)
        big = {"values": b"x" * 1_500_000}
        await executor.send(run_frame("first", args=big, delivery=delivery))
        sending = asyncio.create_task(executor.send(run_frame("second", args=big, delivery=delivery)))
        link = executor._groups[0].session.link
        while not link.stats()["waits_for_room"]:
            await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        connection = worker.connection()
        await asyncio.to_thread(connection.commands, 1)
        connection.say(result("first"))
        [cancel] = await asyncio.to_thread(connection.commands, 1, "cancel_task")
        assert cancel["run_id"] == "second"
        await executor.stop()

    with ScriptedWorker() as worker:
        asyncio.run(main(worker))


def test_what_is_sent_while_it_is_stopped_is_not_sent() -> None:
    """stop() ends what a send() in another thread has under way, wherever that is."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()

    class Stopping:
        """Stops the executor as it is pickled."""

        def __reduce__(self) -> Any:
            executor.stop()
            return int, ()

    with ScriptedWorker() as worker:
        config = {"url": worker.url}
        executor.start(environment_name="e", environment_config=config)
        with pytest.raises(wove_ws_sync.ExecutorClosed, match="stopped while it sent"):
            executor.send(run_frame("r", args={"value": Stopping()}))
        executor.start(environment_name="e", environment_config=config)
        executor.send(run_frame("next"))
        [command] = worker.connection().commands(1)
        assert command["run_id"] == "next"
        executor.stop()


def test_an_end_that_is_brought_twice_is_received_once() -> None:
    """The link brings it again if an exception struck before it knew that the queue has it."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    with ScriptedWorker() as worker:
        executor.start(environment_name="e", environment_config={"url": worker.url})
        executor.send(run_frame("r"))
        connection = worker.connection()
        connection.commands(1)
        assert executor.link is not None
        run = executor.link.find("r")
        assert run is not None
        sink = run.sink

        def twice(event: dict[str, Any]) -> None:
            sink(event)
            sink(event)

        run.sink = twice
        connection.say({"type": "heartbeat", "run_id": "r"}, result("r", 6))
        assert [executor.recv(30.0)["type"] for _ in range(3)] == ["heartbeat", "heartbeat", "task_result"]
        with pytest.raises(TimeoutError):
            executor.recv(0.1)
        executor.stop()


def test_a_stop_that_is_interrupted_wakes_receivers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C out of stop() must not leave a thread in recv() for ever."""
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    with ScriptedWorker() as worker, ThreadPoolExecutor(1) as threads:
        executor.start(environment_name="e", environment_config={"url": worker.url})
        receiving = threads.submit(executor.recv)
        close = Session.close

        def struck(session: Session) -> None:
            close(session)
            raise KeyboardInterrupt

        monkeypatch.setattr(Session, "close", struck)
        with pytest.raises(KeyboardInterrupt):
            executor.stop()
        with pytest.raises(wove_ws_sync.ExecutorClosed):
            receiving.result(30.0)


def five() -> int:
    return 5


def test_a_task_may_weave_and_merge_on_the_same_instance(worker: LoopbackWorker) -> None:
    """A weave inside a task of another, and environments that a task starts, end with their own weave."""
    executor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    config = {"url": worker.url, "security": worker.security}
    environment = {"executor": executor, "executor_config": config}
    local = {"executor": "local"}
    environments = {"local": local, "far": environment, "farther": dict(environment)}
    wove.config(default_environment="local", environments=environments)

    async def main() -> int:
        async with weave() as outer:

            @outer.do(environment="far")
            def first() -> int:
                return 1

            @outer.do
            async def second(first: int) -> int:
                async with weave() as inner:

                    @inner.do(environment="far")
                    def only() -> int:
                        return 40

                near = await wove.merge(five, environment="far")
                return int(inner.result.only + near + await wove.merge(five, environment="farther") + first)

        return int(outer.result.second)

    assert asyncio.run(asyncio.wait_for(main(), 30.0)) == 51
    assert executor._groups == []
