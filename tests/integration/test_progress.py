"""Progress, logs and context variables between a real worker service and every face of the host."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import wove
from fault_helpers import link_of, until
from fault_proxy import FaultProxy
from raw_host import RawHost
from scripted_worker import FuturesFace, ScriptedWorker, face_on, result, run_frame

import wove_ws_sync
from wove_ws_sync import DeliveryCancelled, Progress, RunFuture, WebSocketExecutor, current_run
from wove_ws_sync.progress import track
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker.service import WorkerService

# The worker cannot import this module: what tasks use of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WAIT = 60.0


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module with a context variable, which the worker has too."""
    folder = tmp_path_factory.mktemp("modules")
    text = "from contextvars import ContextVar\nrequest_id = ContextVar('request_id')\n"
    (folder / "carried_by_runs.py").write_text(text, encoding="utf-8")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("carried_by_runs")
    sys.path.remove(str(folder))
    del sys.modules["carried_by_runs"]


@pytest.fixture(scope="module")
def worker(carried: Any) -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.fixture
def pool(worker: LoopbackWorker) -> Iterator[WebSocketExecutor]:
    with WebSocketExecutor(worker.url, security=worker.security) as executor:
        yield executor


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that tasks wait for; it is there at the end of the test at the latest."""
    path = tmp_path / "gate"
    yield path
    path.touch()


@contextlib.contextmanager
def opening(gate: Path) -> Iterator[None]:
    """Let tasks go on at the end, also of a test that fails: its executor waits for them."""
    try:
        yield
    finally:
        gate.touch()


def wait_for(path: str) -> None:
    """Wait in the worker until the file is there."""
    pause = threading.Event()
    while not os.path.exists(path):
        pause.wait(0.01)


def half(path: str) -> str:
    """Report half of the work, then wait."""
    current_run().progress(5, 10, "half")
    wait_for(path)
    return "whole"


def flood(count: int) -> str:
    run = current_run()
    for number in range(count):
        run.progress(number + 1, count)
    return run.run_id


def test_progress_reaches_the_future(pool: WebSocketExecutor, gate: Path) -> None:
    """As a property and by callbacks, one of which raises; it stays when the run has ended."""
    told: list[Any] = []
    reported = threading.Event()
    open_ = pool.submit(wait_for, str(gate))  # so that the callbacks below are there in time
    assert open_.progress is None

    def task(path: str) -> str:
        wait_for(path + ".begin")
        return half(path)

    future = pool.submit(task, str(gate))
    future.add_progress_callback(lambda each: 1 // 0)
    future.add_progress_callback(lambda each: (told.append((each, each.progress)), reported.set()))
    Path(f"{gate}.begin").touch()
    assert reported.wait(WAIT)
    assert told == [(future, Progress(5, 10, "half"))]
    assert future.progress == (5, 10, "half") and not future.done()
    gate.touch()
    assert future.result(WAIT) == "whole"
    assert future.progress == (5, 10, "half")


def test_a_flood_arrives_as_few_events_and_the_last_one_does(worker: LoopbackWorker) -> None:
    """100,000 reports; a hundred runs at once; the ids are those of the futures."""
    events: list[dict[str, Any]] = []
    with WebSocketExecutor(worker.url, security=worker.security, on_event=events.append) as pool:
        future = pool.submit(flood, 100_000)
        assert future.result(WAIT) == future.run_id
        assert future.progress == (100_000, 100_000, "")
        reports = [event["done"] for event in events if event["type"] == "progress"]
        assert reports == sorted(reports) and len(reports) < 1000
        many = [pool.submit(flood, 1000) for _ in range(100)]
        assert [each.result(WAIT) for each in many] == [each.run_id for each in many]
        assert {each.progress for each in many} == {Progress(1000, 1000, "")}


def test_coroutines_and_threads_of_theirs_report(pool: WebSocketExecutor) -> None:
    async def task() -> None:
        await asyncio.sleep(0)
        await asyncio.to_thread(current_run().progress, 1, 2, "in a thread")

    future = pool.submit(task)
    assert future.result(WAIT) is None  # type: ignore[func-returns-value]
    assert future.progress == (1, 2, "in a thread")


def test_an_end_is_told_to_the_callback_once(worker: LoopbackWorker) -> None:
    """Also if that raises SystemExit in a thread that cancels, out of which it comes."""
    events: list[str] = []

    def take(event: dict[str, Any]) -> None:
        events.append(event["type"])
        if event["type"] == "task_cancelled":
            raise SystemExit

    mode = {"delivery_cancel_mode": "best_effort"}
    with WebSocketExecutor(worker.url, security=worker.security, on_event=take, **mode) as pool:
        future = pool.submit(asyncio.sleep, 60.0)
        until(future.running)
        with pytest.raises(SystemExit):
            future.cancel()
        assert future.cancelled()
    assert events == ["task_started", "task_cancelled"]


@pytest.mark.parametrize("raised", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_events_go_to_the_callback_without_pickles(
    worker: LoopbackWorker, raised: type[BaseException]
) -> None:
    """In order, the end included, before the future knows; what it raises hurts nobody."""

    def task() -> str:
        logging.getLogger("my.app").warning("look")
        current_run().progress(1, 2)
        return "done"

    events: list[dict[str, Any]] = []

    def take(event: dict[str, Any]) -> None:
        events.append(event)
        raise raised("from a callback")

    with WebSocketExecutor(worker.url, security=worker.security, on_event=take) as pool:
        future = pool.submit(task)
        assert future.result(WAIT) == "done"
    assert [event["type"] for event in events] == ["task_started", "log", "progress", "task_result"]
    assert {event["run_id"] for event in events} == {future.run_id}
    assert not any(key.endswith("_pickle") for event in events for key in event)
    with pytest.raises(TypeError, match="on_event"):
        WebSocketExecutor(worker.url, on_event=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("extensions", ["", "resume,ack,drain"])
def test_a_host_that_did_not_ask_hears_nothing_of_it(worker: LoopbackWorker, extensions: str) -> None:
    """Wove's own, and ours of an earlier version: the six types and no others."""

    def task() -> str:
        for number in range(1000):
            current_run().progress(number)
        current_run().heartbeat()
        return "done"

    with RawHost(worker, extensions=extensions, name="a" * 32) as host:
        host.run(task)
        kinds = {event["type"] for event in host.wait()}
        assert kinds <= {"task_started", "heartbeat", "task_result"} and "task_result" in kinds
    with RawHost(worker, extensions="progress") as host:
        assert host.features == ["progress"]
        host.run(task)
        assert [event["done"] for event in host.wait() if event["type"] == "progress"][-1] == 999


def test_a_weave_on_either_executor_does_not_mind(worker: LoopbackWorker) -> None:
    """Wove's receiver raises for types that it does not know."""

    def progressing() -> str:
        for number in range(10):
            current_run().progress(number, 10)
        return "woven"

    for install in (wove_ws_sync.install, wove_ws_sync.uninstall):
        install()
        environment = {"executor": "websocket", "executor_config": worker.config}
        wove.config(default_environment="far", environments={"far": environment})
        with wove.weave() as w:
            w.do(progressing)
        assert w.result.progressing == "woven"


@pytest.mark.parametrize("wanted", [True, False])
def test_recv_gives_progress_to_who_asked(worker: LoopbackWorker, wanted: bool) -> None:
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor(progress=wanted)
    executor.start(environment_name="far", environment_config=worker.config, run_config={})
    try:
        executor.send(run_frame("r1", callable=flood, args={"count": 10}))
        kinds: list[str] = []
        while "task_result" not in kinds:
            event = executor.recv(WAIT)
            kinds.append(event["type"])
            if event["type"] == "progress":
                assert set(event) == {"type", "run_id", "task_id", "done", "total", "message"}
        assert ("progress" in kinds) is wanted
    finally:
        executor.stop()


def test_odd_progress_of_a_peer_hurts_nobody() -> None:
    """Wrong shapes are counted, and all of it is an unknown type where it was not agreed upon."""
    report = {"type": "progress", "run_id": "unknown", "done": 1, "total": None, "message": ""}
    with face_on("futures", 2) as (face, connection, ids, _):
        connection.say({**report, "run_id": ids[0]})
        connection.say([result(run_id, run_id) for run_id in ids])
        assert [face.outcome(run_id) for run_id in ids] == ids
        assert isinstance(face, FuturesFace)
        assert face.futures[ids[0]].progress is None
        assert face.link.stats()["dropped_type"] == 1


def test_progress_after_a_reconnect_is_what_it_was_and_goes_on(worker: LoopbackWorker, gate: Path) -> None:
    """What is reported while the host is away is known when it is back."""

    def task(path: str) -> str:
        current_run().progress(1, 3)
        wait_for(path + ".away")
        current_run().progress(2, 3)
        Path(path + ".reported").touch()
        wait_for(path)
        current_run().progress(3, 3)
        return "done"

    with FaultProxy(worker.url) as proxy:
        url = proxy.url_for(worker.url)
        executor = WebSocketExecutor(url, security=worker.security, resume_window=60.0)
        with executor as pool, opening(gate):
            future = pool.submit(task, str(gate))
            until(lambda: future.progress == (1, 3, ""))
            proxy.pause()
            proxy.end_all()
            until(lambda: link_of(pool).stats()["losses"] == 1)
            Path(f"{gate}.away").touch()
            until(Path(f"{gate}.reported").exists)
            assert future.progress == (1, 3, "")
            proxy.resume()
            until(lambda: future.progress == (2, 3, ""))
            gate.touch()
            assert future.result(WAIT) == "done"
            assert future.progress == (3, 3, "")
            assert link_of(pool).stats()["resumed_runs"] == 1


def test_a_run_that_is_delivered_again_begins_with_none(gate: Path, tmp_path: Path) -> None:
    """Progress of an execution that died with its worker is not that of the next one."""

    def task(path: str) -> str:
        if not os.path.exists(path + ".second"):
            current_run().progress(9, 10, "first")
        wait_for(path)
        return "done"

    events: list[dict[str, Any]] = []
    with LoopbackWorker() as dying:
        executor = WebSocketExecutor(
            dying.url,
            security=dying.security,
            delivery_orphan_policy="requeue",
            on_event=events.append,
        )
        with executor as pool, opening(gate):
            future = pool.submit(task, str(gate))
            until(lambda: future.progress == (9, 10, "first"))
            Path(f"{gate}.second").touch()
            dying.kill()
            dying.restart()
            until(lambda: any(event.get("attempt") == 2 for event in events))
            at_its_start = future.progress
            gate.touch()
            assert future.result(WAIT) == "done"
            assert at_its_start is None and future.progress is None


@pytest.mark.parametrize("mode", ["best_effort", "require_ack"])
def test_a_synchronous_task_sees_its_cancellation(pool: WebSocketExecutor, gate: Path, mode: str) -> None:
    """It ends by itself; its CancelledError is the acknowledgement that was asked for."""

    def task(path: str) -> None:
        run, pause = current_run(), threading.Event()
        run.progress(0)
        while not run.cancelled():
            pause.wait(0.01)
        Path(path).touch()
        raise concurrent.futures.CancelledError

    future = pool.with_options(delivery_cancel_mode=mode).submit(task, str(gate))
    until(lambda: future.progress is not None)
    assert future.cancel() is True
    until(gate.exists)
    with pytest.raises(DeliveryCancelled) as caught:
        future.result(WAIT)
    assert caught.value.acknowledged is (mode == "require_ack")


class Collector(logging.Handler):
    """Keep the records, and log in turn, as a handler that sends them by HTTP does."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        logging.getLogger("of.the.handler").warning("one more")


@contextlib.contextmanager
def collected() -> Iterator[list[logging.LogRecord]]:
    handler, logger = Collector(), logging.getLogger("wove_ws_sync.task")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_logs_arrive_with_what_is_to_be_known_of_them(pool: WebSocketExecutor) -> None:
    """Unknown levels are INFO on the record and themselves in the attribute; DEBUG is filtered there."""

    def task() -> None:
        logging.addLevelName(25, "NOTICE")
        logging.getLogger("my.app").log(25, "noticed %d", 1)
        logging.getLogger("my.app").error("failed")
        logging.getLogger("my.app").debug("not at this level")

    with collected() as records:
        future = pool.submit(task)
        future.result(WAIT)  # type: ignore[func-returns-value]
    attributes = ("msg", "levelname", "task_level", "task_logger", "run_id", "task_id", "action")
    assert [[getattr(record, name, None) for name in attributes[1:]] for record in records] == [
        ["INFO", "NOTICE", "my.app", future.run_id, "task", "log"],
        ["ERROR", "ERROR", "my.app", future.run_id, "task", "log"],
    ]
    assert [record.getMessage() for record in records] == ["noticed 1", "failed"]
    assert all(abs(record.created - vars(record)["task_created"]) < 3600 for record in records)


def test_a_flood_of_logs_is_limited_and_counted(pool: WebSocketExecutor) -> None:
    def task() -> None:
        for _ in range(20_000):
            logging.getLogger("my.app").info("flood")

    with collected() as records:
        pool.submit(task).result(WAIT)  # type: ignore[func-returns-value]
    *sent, summary = records
    assert vars(summary)["task_logger"] == "wove_ws_sync.task"
    assert int(summary.getMessage().split()[0]) + len(sent) == 20_000
    assert 500 <= len(sent) < 20_000


def test_a_worker_service_in_the_hosts_own_process_does_not_loop() -> None:
    """A record of a task comes to the host once, though the host's handler logs in the same process."""
    ready, stop = threading.Event(), asyncio.Event()
    urls: list[str] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with WorkerService(port=0) as service:
            urls.append(service.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(WAIT)

        def task() -> None:
            logging.getLogger("my.app").warning("once")

        def nested(url: str) -> None:
            # The host is inside of a task here: what it logs belongs to that task's context.
            with WebSocketExecutor(url) as inner:
                inner.submit(task).result(WAIT)  # type: ignore[func-returns-value]

        with collected() as records, WebSocketExecutor(urls[0]) as pool:
            pool.submit(task).result(WAIT)  # type: ignore[func-returns-value]
            pool.submit(nested, urls[0]).result(WAIT)  # type: ignore[func-returns-value]
            wove_ws_sync.testing.close_links()
        assert [record.getMessage() for record in records] == ["once", "once"]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT)
        loop.close()


def request_id() -> str:
    import carried_by_runs

    return str(carried_by_runs.request_id.get("nothing"))


async def request_id_later() -> str:
    await asyncio.sleep(0)
    return request_id()


def test_context_variables_travel(worker: LoopbackWorker, carried: Any) -> None:
    """With submit(), map() and to coroutines, as they are at that moment; another run has its own."""
    names = ["carried_by_runs:request_id"]
    with WebSocketExecutor(worker.url, security=worker.security, context_vars=names) as pool:
        assert pool.submit(request_id).result(WAIT) == "nothing"
        token = carried.request_id.set("r-1")
        try:
            future = pool.submit(request_id)
            later = pool.submit(request_id_later)
            several = pool.map(lambda _: request_id(), range(3))
        finally:
            carried.request_id.reset(token)
        assert future.run_id.startswith("request_id:")
        assert [future.result(WAIT), later.result(WAIT), *several] == ["r-1"] * 5
        assert pool.submit(request_id).result(WAIT) == "nothing"


def test_context_variables_travel_with_weaves_and_frames(worker: LoopbackWorker, carried: Any) -> None:
    """By the key of ``executor_config``."""
    config = {**worker.config, "context_vars": ["carried_by_runs:request_id"]}
    token = carried.request_id.set("r-2")
    try:
        wove_ws_sync.config(
            default_environment="far",
            environments={"far": {"executor": "websocket", "executor_config": config}},
        )
        with wove.weave() as w:
            w.do(request_id)
            w.do(request_id_later)
        assert (w.result.request_id, w.result.request_id_later) == ("r-2", "r-2")
        executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
        executor.start(environment_name="far", environment_config=config, run_config={})
        try:
            executor.send(run_frame("r1", callable=request_id))
            while (event := executor.recv(WAIT))["type"] != "task_result":
                pass
            assert event["result"] == "r-2"
        finally:
            executor.stop()
    finally:
        carried.request_id.reset(token)


def test_a_variable_that_the_worker_does_not_have_is_one_error(
    worker: LoopbackWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from contextvars import ContextVar\nvariable = ContextVar('variable')\n"
    (tmp_path / "only_here.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module: Any = importlib.import_module("only_here")
    names = ["only_here:variable"]
    with WebSocketExecutor(worker.url, security=worker.security, context_vars=names) as pool:
        assert pool.submit(len, "abc").result(WAIT) == 3  # it is not set, so it does not travel
        token = module.variable.set(1)
        try:
            future = pool.submit(len, "abc")
        finally:
            module.variable.reset(token)
        with pytest.raises(RuntimeError, match=r"'only_here:variable'.*the worker does not have it"):
            future.result(WAIT)


class Terminal(io.StringIO):
    """Text that takes itself for a terminal, or nothing would be drawn on it before the end."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_a_bar_follows_runs_and_the_progress_inside(
    pool: WebSocketExecutor, gate: Path, bar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two has ended and the other is half done: it says so while it waits; then it is full."""
    monkeypatch.setenv("TERM", "xterm")
    output = Terminal()
    waiting = pool.submit(half, str(gate))
    short = pool.submit(abs, -1)

    def open_gate() -> None:
        until(lambda: "1.5/2" in output.getvalue() and "half" in output.getvalue())
        gate.touch()

    opener = threading.Thread(target=open_gate)
    opener.start()
    ended = list(track([waiting, short], description="[runs]", bar=bar, file=output))
    opener.join(WAIT)
    assert ended == [short, waiting]
    last = output.getvalue().rpartition("1.5/2")[2]
    assert "[runs]" in last and ("2/2" in last or "2.0/2" in last)


def test_a_bar_takes_any_future_each_once() -> None:
    with concurrent.futures.ThreadPoolExecutor() as threads:
        futures = [threads.submit(abs, number) for number in range(3)]
        assert set(track([*futures, futures[0]], file=io.StringIO())) == set(futures)
    assert list(track([], file=io.StringIO())) == []


def test_a_bar_that_is_left_keeps_nothing(pool: WebSocketExecutor, gate: Path) -> None:
    """Reports that come later are not collected for nobody."""
    waiting: RunFuture[Any] = pool.submit(half, str(gate))
    short: RunFuture[Any] = pool.submit(abs, -1)
    futures: Any = track([waiting, short], file=io.StringIO())
    assert next(futures) is short
    news = futures.gi_frame.f_locals["news"]
    futures.close()
    gate.touch()
    waiting.result(WAIT)
    assert news._queue.empty()


def test_a_missing_library_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is waited for."""
    find: Callable[[str], Any] = importlib.util.find_spec
    hidden = {"tqdm"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    assert list(track([], file=io.StringIO())) == []  # rich is there
    with pytest.raises(ModuleNotFoundError, match=r'pip install "wove_ws_sync\[progress\]"'):
        track([], bar="tqdm")
    hidden.add("rich")
    with pytest.raises(ModuleNotFoundError, match="tqdm or rich"):
        track([])
    with pytest.raises(ValueError, match="'tqdm', 'rich'"):
        track([], bar="curses")


def test_scripted_workers_need_no_progress() -> None:
    """A worker service of another make: the property stays None."""
    with ScriptedWorker(foreign=True) as foreign, WebSocketExecutor(foreign.url) as pool:
        future = pool.submit(abs, 1)
        connection = foreign.connection()
        connection.commands(1)
        connection.say(result(future.run_id, 1))
        assert future.result(WAIT) == 1 and future.progress is None
