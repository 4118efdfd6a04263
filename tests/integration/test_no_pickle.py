"""No pickle in either direction: ``result_format="json"`` on the host, ``--registry`` on the worker."""

from __future__ import annotations

import functools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import named_tasks
import pytest
from dask_cluster import DaskCluster
from fault_helpers import WAIT, python, search_path, until
from raw_host import RawHost, plain_error
from scripted_worker import FACES, PATIENCE, SONGS, Canary, Face, ScriptedWorker, pickled
from service_thread import ServiceThread
from wove import weave
from wove.environment import EnvironmentExecutionError

import wove_ws_sync
from wove_ws_sync import HandshakeRejected, PayloadError, WebSocketExecutor, named
from wove_ws_sync.testing import LoopbackWorker

ENGINES = ["threads", "processes", "engine_tasks:make_processes", "dask"]
EVERYTHING = "resume,ack,drain,progress,json"


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskCluster]:
    with DaskCluster(workers=2) as running:
        yield running


@pytest.fixture(scope="module", params=ENGINES)
def worker(request: pytest.FixtureRequest) -> Iterator[LoopbackWorker]:
    """Give a worker service with a registry, on each engine."""
    engine = request.param
    if engine == "dask":
        engine += f":{request.getfixturevalue('cluster').address}"
    args = ["--engine", engine, "--registry", "named_tasks"]
    with LoopbackWorker(workers=None if "dask" in engine else 2, args=args) as running:
        yield running


@pytest.fixture(scope="module")
def threads() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=4, args=["--registry", "named_tasks"]) as running:
        yield running


@pytest.fixture(scope="module")
def open_worker() -> Iterator[LoopbackWorker]:
    """Give a worker service without a registry."""
    with LoopbackWorker(workers=2) as running:
        yield running


def pool_of(worker: LoopbackWorker, **options: Any) -> WebSocketExecutor:
    return WebSocketExecutor(worker.url, security=worker.security, result_format="json", **options)


def kind_of(error: BaseException | None) -> Any:
    assert isinstance(error, EnvironmentExecutionError), repr(error)
    return error.payload["kind"]


class Trace:
    """A value whose pickle leaves a directory when it is loaded, in whatever process."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


# The worker unpickles nothing


@pytest.mark.parametrize("fields", ["callable", "args", "both", "beside a name", "args beside a name"])
def test_a_registry_worker_loads_no_pickle_of_a_host(
    worker: LoopbackWorker, tmp_path: Path, fields: str
) -> None:
    """Whichever field it is in and whatever executes the tasks; other runs go on."""
    trace = tmp_path / "loaded"
    canary = pickled(Trace(trace))
    frame: dict[str, Any] = {
        "callable": {"callable_pickle": canary},
        "args": {"callable_pickle": pickled(named_tasks.add), "args_pickle": canary},
        "both": {"callable_pickle": canary, "args_pickle": canary},
        "beside a name": {"callable": "add", "callable_pickle": canary, "args": {"a": 1}},
        "args beside a name": {"callable": "add", "args_pickle": canary, "args": {"a": 1}},
    }[fields]
    with RawHost(worker) as host:
        host.send(type="run_task", run_id="bad", task_id="t", **frame)
        error = host.wait("bad")[-1]["error"]
        assert error["kind"] == ("MalformedFrame" if fields == "args beside a name" else "PickleRefused")
        assert error["retryable"] is False
        host.send(type="run_task", run_id="r", task_id="t", callable="add", positional=[1], args={"b": 2})
        assert host.wait("r")[-1] == {"type": "task_result", "run_id": "r", "task_id": "t", "result": 3}
    assert not trace.exists()


def test_the_canary_sings_without_a_registry(open_worker: LoopbackWorker, tmp_path: Path) -> None:
    """Or the tests above could not fail."""
    with RawHost(open_worker) as host:
        host.send(
            type="run_task", run_id="r", task_id="t", callable_pickle=pickled(Trace(tmp_path / "loaded"))
        )
        host.wait("r")
    assert (tmp_path / "loaded").is_dir()


def test_the_service_loads_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a host that has pickles, and with one that has none."""
    loaded: list[Any] = []
    plain = pickle.loads
    monkeypatch.setattr(
        pickle, "loads", lambda *args, **kwargs: (loaded.append(args), plain(*args, **kwargs))[1]
    )
    SONGS.clear()
    with ServiceThread(registry=["named_tasks"]) as running, RawHost(running) as host:
        host.run(Canary("sang"), "bad")
        assert plain_error(host.wait("bad")[-1], "PickleRefused")["started"] is False
        host.send(type="run_task", run_id="r", task_id="t", callable="boom", args={"text": "x"})
        error = host.wait("r")[-1]
        assert error["error"]["kind"] == "LookupError" and set(error) == {
            "type",
            "run_id",
            "task_id",
            "error",
        }
        assert running.service.counters["refused_pickle"] == 1
    assert (loaded, SONGS) == ([], [])


def test_only_registered_names_run(worker: LoopbackWorker, tmp_path: Path) -> None:
    """A function of the same module, a method of a listed class, the standard library: none of them."""
    trace = str(tmp_path / "made")
    with pool_of(worker) as pool:
        for task in (
            named_tasks.unlisted,
            os.mkdir,
            named("unlisted"),
            named("os:mkdir"),
            named("posix:mkdir"),
        ):
            error = pool.submit(task, trace).exception(WAIT)
            assert kind_of(error) == "UnknownTask" and "no task" in str(error)
        assert kind_of(pool.submit(named_tasks.Box.double, 4).exception(WAIT)) == "UnknownTask"
        assert kind_of(pool.submit(named("eval"), "1").exception(WAIT)) == "UnknownTask"
        assert pool.submit(named_tasks.add, 1).result(WAIT) == 11
    assert not os.path.exists(trace)


# What works by name, on every engine


def test_results_arguments_and_coroutines(worker: LoopbackWorker) -> None:
    value = {"a": [1, -2.5, None, True, "grüße 🐍"], "": {"b": []}, "big": 2**63, "zero": -0.0}
    with pool_of(worker) as pool:
        assert pool.submit(named_tasks.echo, 1, value, x=value, positional=[2], args={}).result(WAIT) == [
            [1, value],
            {"x": value, "positional": [2], "args": {}},
        ]
        assert pool.submit(functools.partial(named_tasks.add, b=5), 1).result(WAIT) == 6
        assert list(pool.map(named_tasks.add, range(50), range(50))) == [2 * n for n in range(50)]
        assert pool.submit(named_tasks.later, "late").result(WAIT) == "late"
        assert pool.submit(named("add"), 4, b=4).result(WAIT) == 8
        assert pool.submit(named("named_tasks:later"), value=None).result(WAIT) is None


def test_an_exception_is_its_text_and_its_traceback(worker: LoopbackWorker) -> None:
    with pool_of(worker) as pool:
        error = pool.submit(named_tasks.boom, "what is this").exception(WAIT)
        assert kind_of(error) == "LookupError" and str(error) == "what is this"
        assert isinstance(error, EnvironmentExecutionError) and error.payload["source"] == "task"
        assert "in boom" in str(error.__cause__) and error.payload["retryable"] is False
        wrong = pool.submit(named_tasks.add, 1, 2, 3).exception(WAIT)
        assert kind_of(wrong) == "TypeError" and "add() takes" in str(wrong)
        wrong = pool.submit(named_tasks.add, 1, nothing=3).exception(WAIT)
        assert kind_of(wrong) == "TypeError" and "'nothing'" in str(wrong)


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        (named_tasks.now, (), "the result is a datetime"),
        (named_tasks.loose, ("tuple",), "the result is a tuple"),
        (named_tasks.loose, ("key",), "the result has a key of the type int"),
        (named_tasks.loose, ("nan",), "the result is nan"),
        (named_tasks.loose, ("bytes",), "the result is a bytes"),
        (named_tasks.Box, (), "the result is a Box"),
    ],
)
def test_a_result_that_json_does_not_carry_is_the_error_of_its_run(
    worker: LoopbackWorker, task: Any, arguments: tuple[Any, ...], said: str
) -> None:
    with pool_of(worker) as pool:
        error = pool.submit(task, *arguments).exception(WAIT)
        assert kind_of(error) == "ResultNotJSON" and said in str(error)
        assert pool.submit(named_tasks.add, 1).result(WAIT) == 11


def test_progress_and_logs(worker: LoopbackWorker) -> None:
    events: list[dict[str, Any]] = []
    with pool_of(worker, on_event=events.append) as pool:
        future = pool.submit(named_tasks.count, 5)
        assert future.result(WAIT) == 5
    assert future.progress == (5, 5, "all")
    assert "counted to 5" in [event["message"] for event in events if event["type"] == "log"]


def test_large_arguments_and_results(worker: LoopbackWorker) -> None:
    text = "x" * (6 << 20)
    with pool_of(worker) as pool:
        assert pool.submit(named_tasks.later, text).result(WAIT) == text


@pytest.mark.parametrize("depth", [90, 400, 900])
def test_what_nests_deep_hurts_its_run_at_most(worker: LoopbackWorker, depth: int) -> None:
    """A host of another make may send anything that a parser takes; the engine has it as text."""
    with RawHost(worker) as host:
        value = "[" * depth + "]" * depth
        head = '{"type":"run_task","run_id":"r","task_id":"t","callable":"depth_of","args":{"value":'
        host.socket.send(head + value + "}}")
        end = host.wait("r")[-1]
        assert end.get("result") == depth or end["error"]["kind"] in ("MalformedFrame", "PayloadDecodeError")
        if depth == 90:
            assert end["result"] == 90
        host.send(type="run_task", run_id="after", task_id="t", callable="pid")
        assert host.wait("after")[-1]["type"] == "task_result"


def test_a_queued_run_is_cancelled(worker: LoopbackWorker, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with pool_of(worker) as pool:
        running = pool.submit(named_tasks.hold, str(gate))
        until(Path(f"{gate}.running").exists)
        future = pool.submit(named_tasks.hold, str(gate))
        assert future.cancel() and future.cancelled()
        gate.touch()
        assert running.result(WAIT) == str(gate)


def test_runs_with_one_key_share_an_execution(worker: LoopbackWorker, tmp_path: Path) -> None:
    """With heartbeats meanwhile."""
    gate, note = tmp_path / "gate", tmp_path / "note"
    events: list[dict[str, Any]] = []
    options = {"delivery_idempotency_key": f"work {tmp_path}", "delivery_heartbeat_seconds": 3.0}
    with pool_of(worker, on_event=events.append, **options) as pool:
        futures = [pool.submit(named_tasks.hold, str(gate), str(note)) for _ in range(3)]
        until(lambda: sum(event["type"] == "heartbeat" for event in events) >= 3)
        gate.touch()
        assert [future.result(WAIT) for future in futures] == [str(gate)] * 3
        assert pool.submit(named_tasks.hold, str(gate), str(note)).result(WAIT) == str(gate)
    assert note.read_text("ascii") == "ran\n"


def test_a_pickled_result_is_not_given_out_for_a_key_to_a_host_without_pickles(
    open_worker: LoopbackWorker, tmp_path: Path
) -> None:
    """Hosts of both kinds may use one key."""
    options: dict[str, Any] = {"delivery_idempotency_key": str(tmp_path)}
    with (
        pool_of(open_worker, **options) as plain,
        WebSocketExecutor(open_worker.url, security=open_worker.security, **options) as pickling,
    ):
        for pool in (pickling, plain, pickling, plain):
            assert pool.submit(named_tasks.add, 1, 2).result(WAIT) == 3


def test_a_run_outlives_its_host_and_its_connection(threads: LoopbackWorker, tmp_path: Path) -> None:
    """Detached and attached to, lost and resumed: the end is plain JSON each time."""
    gate = tmp_path / "gate"
    with pool_of(threads, delivery_orphan_policy="detach") as first:
        future = first.submit(named_tasks.hold, str(gate))
        until(Path(f"{gate}.running").exists)
        first.shutdown(wait=False)
        first._core.close()
    with pool_of(threads) as other:
        again = other.attach(future.run_id)
        gate.touch()
        assert again.result(WAIT) == str(gate)
    call = {
        "type": "run_task",
        "run_id": "r",
        "task_id": "t",
        "callable": "hold",
        "args": {"gate": f"{gate}2"},
    }
    with RawHost(threads, extensions=EVERYTHING, name="a" * 32) as host:
        assert host.features == EVERYTHING.split(",")
        host.send(**call)
        host.wait(kind="task_started")
        host.cut()
    Path(f"{gate}2").touch()
    with RawHost(threads, extensions=EVERYTHING, name="a" * 32) as host:
        assert set(host.resume("r")) <= {"alive", "finished"}
        assert host.wait("r")[-1]["result"] == f"{gate}2"


def test_a_running_task_confirms_a_cancel(threads: LoopbackWorker, tmp_path: Path) -> None:
    with pool_of(threads, delivery_cancel_mode="require_ack") as pool:
        future = pool.submit(named_tasks.stops, str(tmp_path / "gate"))
        until((tmp_path / "gate.running").exists)
        assert future.cancel() and future._acknowledged


def test_a_result_that_is_too_large_for_a_host(threads: LoopbackWorker) -> None:
    with RawHost(threads, limit=4096) as host:
        host.send(type="run_task", run_id="r", task_id="t", callable="later", args={"value": "x" * 5000})
        assert host.wait("r")[-1]["error"]["kind"] == "ResultTooLarge"
        host.send(type="run_task", run_id="e", task_id="t", callable="boom", args={"text": "x" * 5000})
        error = host.wait("e")[-1]["error"]
        assert (error["kind"], error["message"]) == ("LookupError", "x" * 512)


def test_a_worker_without_a_registry_imports_what_is_named(open_worker: LoopbackWorker) -> None:
    """A host may send it any pickle as well."""
    with pool_of(open_worker) as pool:
        assert pool.submit(math.hypot, 3, 4).result(WAIT) == 5.0
        assert pool.submit(named_tasks.Box.double, 4).result(WAIT) == 8
        assert pool.submit(named_tasks.Box.name).result(WAIT) == "Box"
        for name in ("add", "nowhere:f", "math:nothing", "math:pi"):
            error = pool.submit(named(name)).exception(WAIT)
            assert kind_of(error) == "UnknownTask" and repr(name) in str(error)


# The host unpickles nothing


@pytest.fixture(params=FACES)
def face(request: pytest.FixtureRequest) -> Iterator[tuple[Face, ScriptedWorker]]:
    with ScriptedWorker(features="json") as scripted:
        made = FACES[request.param](scripted.url, result_format="json")
        try:
            yield made, scripted
        finally:
            made.close()


@pytest.mark.parametrize("field", ["result_pickle", "exception_pickle", "error_pickle", "callable_pickle"])
def test_a_host_loads_no_pickle_of_a_worker(face: tuple[Face, ScriptedWorker], field: str) -> None:
    """It ends the run that it is of, which says what to do, and no other."""
    made, scripted = face
    SONGS.clear()
    bad, good = made.submit(), made.submit()
    connection = scripted.connection()
    sent = connection.commands(2)
    assert [command["callable"] for command in sent] == ["scripted_worker:task"] * 2
    assert not [key for command in sent for key in command if key.endswith("_pickle")]
    canary = pickled(Canary("sang"))
    connection.say({"type": "log", "run_id": bad, "task_id": "t", "message": "x", field: canary})
    kind = "task_error" if field[0] == "e" else "task_result"
    connection.say({"type": kind, "run_id": bad, "task_id": "t", field: canary, "result": 1})
    connection.say({"type": "task_result", "run_id": good, "task_id": "t", "result": {"a": [1]}})
    with pytest.raises(PayloadError, match=rf"{field}.*takes none") as caught:
        made.outcome(bad)
    assert caught.value.payload["kind"] == "PickleRefused"
    assert made.outcome(good) == {"a": [1]}
    assert SONGS == []
    assert made.link.stats()["decode_failures"] == 1


@pytest.mark.parametrize("kind", FACES)
def test_the_canary_sings_for_a_host_with_pickles(kind: str) -> None:
    """Or the test above could not fail."""
    with ScriptedWorker(features="json") as scripted:
        made = FACES[kind](scripted.url)
        try:
            SONGS.clear()
            run_id = made.submit()
            connection = scripted.connection()
            connection.commands(1)
            canary = pickled(Canary("sang"))
            connection.say({"type": "task_result", "run_id": run_id, "task_id": "t", "result_pickle": canary})
            assert made.outcome(run_id) == "sang" and [tag for tag, _ in SONGS] == ["sang"]
        finally:
            made.close()


PROGRAM = """
import json, pickle, sys
counts = {"loads": 0, "dumps": 0, "find_class": 0}

def counted(name):
    plain = getattr(pickle, name)
    def call(*args, **kwargs):
        counts[name] += 1
        return plain(*args, **kwargs)
    setattr(pickle, name, call)

import named_tasks
from wove_ws_sync import WebSocketExecutor
counted("loads"), counted("dumps")
sys.addaudithook(lambda event, _: event == "pickle.find_class" and counts.update(find_class=1))
config = json.loads(sys.argv[1])
with WebSocketExecutor(**config) as pool:
    assert pool.submit(named_tasks.add, 1, 2).result(30) == 3
    assert pool.submit(named_tasks.boom, "x").exception(30) is not None
    assert pool.submit(named_tasks.now).exception(30) is not None or config.get("result_format") != "json"
assert ("cloudpickle" in sys.modules) == (config.get("result_format") != "json")
print(json.dumps(counts))
"""


@pytest.mark.parametrize("result_format", ["json", "pickle"])
def test_a_host_process_pickles_nothing_either(open_worker: LoopbackWorker, result_format: str) -> None:
    """Counted in a process of its own; one with pickles shows that the count counts."""
    config = json.dumps({**open_worker.config, "result_format": result_format})
    output, errors, code = python(PROGRAM, config)
    assert code == 0, errors
    counts = json.loads(output)
    assert all(not count for count in counts.values()) == (result_format == "json"), counts


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        (lambda: 1, (), "it is a lambda"),
        (named_tasks.add, ((1,),), "positional argument 0 is a tuple"),
        (named_tasks.add, (math.nan,), "positional argument 0 is nan"),
        (named_tasks.echo, ({1: 2},), "has a key of the type int"),
    ],
)
def test_what_cannot_travel_is_one_clear_error_of_that_run(
    threads: LoopbackWorker, task: Any, arguments: tuple[Any, ...], said: str
) -> None:
    """Raised by the future, as what cannot be pickled is; others go on."""
    with pool_of(threads) as pool:
        error = pool.submit(task, *arguments).exception(WAIT)
        assert isinstance(error, TypeError | ValueError) and said in str(error)
        assert pool.submit(named_tasks.add, 1).result(WAIT) == 11


# A worker that does not know of it


def of_futures(config: dict[str, Any]) -> list[Any]:
    with WebSocketExecutor(**config, delivery_timeout=PATIENCE) as pool:
        return [pool.submit(named_tasks.add, 1).exception(WAIT) for _ in range(20)]


def of_start(config: dict[str, Any]) -> list[Any]:
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    with pytest.raises(HandshakeRejected) as caught:
        executor.start(environment_name="e", environment_config=config, run_config={})
    return [caught.value]


def of_weave(config: dict[str, Any]) -> list[Any]:
    environments = {"plain": {"executor": "websocket", "executor_config": config}}
    wove_ws_sync.config(environments=environments, default_environment="plain")
    with pytest.raises(HandshakeRejected) as caught, weave() as w:
        w.do(named_tasks.pid)
    return [caught.value]


DIALS = {"futures": of_futures, "sync": of_start, "weave": of_weave}


@pytest.mark.parametrize("options", [{}, {"foreign": True}, {"features": "resume,ack,drain,progress"}])
@pytest.mark.parametrize("kind", DIALS)
def test_a_worker_with_pickles_only_fails_every_run_at_once(kind: str, options: dict[str, Any]) -> None:
    """One clear error, no task sent, no dial after dial."""
    with ScriptedWorker(**options) as scripted:
        for error in DIALS[kind]({"url": scripted.url, "result_format": "json"}):
            assert isinstance(error, HandshakeRejected) and error.status == 101
            assert "extension json" in str(error) and "leave result_format out" in str(error)
        assert scripted.accepted == 1, "the answer stands for a while"
        connection = scripted.connection()
        assert connection.ended.wait(PATIENCE)
        assert connection._commands == []


def test_hosts_of_both_kinds_in_one_process(open_worker: LoopbackWorker) -> None:
    """They have a link each."""
    with (
        pool_of(open_worker) as plain,
        WebSocketExecutor(open_worker.url, security=open_worker.security) as pickling,
    ):
        assert plain.submit(named_tasks.add, 1, 2).result(WAIT) == 3
        assert pickling.submit(lambda: {1: (2,)}).result(WAIT) == {1: (2,)}
        assert plain.link is not pickling.link


# Weaves


@pytest.fixture
def environment(threads: LoopbackWorker) -> str:
    config = {**threads.config, "result_format": "json"}
    wove_ws_sync.config(environments={"plain": {"executor": "websocket", "executor_config": config}})
    return "plain"


def test_a_weave_of_functions_of_a_module(environment: str) -> None:
    """Mapped, with results of other tasks as arguments, and by a name alone."""
    with weave() as w:

        @w.do
        def a() -> int:
            return 1

        @w.do
        def b() -> int:
            return 2

        w.do(environment=environment)(named_tasks.add)
        w.do(environment=environment)(named("named_tasks:pid"))
        w.do(environment=environment)(named("echo", "a", "b"))
        w.do(["x", ["y"]], environment=environment)(named("later", "value"))

        @w.do
        def total(add: int) -> int:
            return add + 1

    assert (w.result.add, w.result.total, w.result.echo) == (3, 4, [[], {"a": 1, "b": 2}])
    assert w.result.later == ["x", ["y"]] and w.result.pid != os.getpid()


def test_a_task_defined_in_the_weave_has_no_name(environment: str) -> None:
    """The usual way to write one: the error says what to do instead."""
    with weave() as w:

        @w.do(environment=environment)
        def task() -> int:
            return 1

        w.do(environment=environment)(named_tasks.pid)

    with pytest.raises(TypeError, match=r"defined inside a function.*pass a function of a module"):
        _ = w.result.task


def test_an_argument_of_a_weave_that_json_does_not_carry(environment: str) -> None:
    """The result of another task, say; and what the task raises, with the worker's traceback as a note."""
    with weave() as w:

        @w.do
        def value() -> Any:
            return {1}

        w.do(environment=environment)(named_tasks.later)

    with pytest.raises(TypeError, match="argument 'value' is a set, which JSON cannot carry; make it a list"):
        _ = w.result.later
    with weave() as w:

        @w.do
        def text() -> str:
            return "no such thing"

        w.do(environment=environment)(named_tasks.boom)

    with pytest.raises(EnvironmentExecutionError, match="no such thing") as caught:
        _ = w.result.boom
    assert caught.value.payload["kind"] == "LookupError"
    assert "in boom" in "".join(caught.value.__notes__)


# The command line


@pytest.mark.parametrize(
    ("module", "said"),
    [("nowhere_at_all", "cannot be imported"), ("raw_host", "has no __all__")],
)
def test_a_registry_that_is_none_is_a_usage_error(module: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--registry", module],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": search_path()},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"The registry {module!r}" in done.stderr and said in done.stderr


def test_check_says_that_a_worker_takes_no_pickles(threads: LoopbackWorker) -> None:
    """And that it has answered; the exit code is that of success."""
    environ = {**os.environ, "SECRET": (threads.security or {})["secret"]}
    done = subprocess.run(
        [sys.executable, "-m", "wove_ws_sync", "check", threads.url, "--security", "env:SECRET", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environ,
    )
    report = json.loads(done.stdout)
    steps = {step["name"]: step for step in report["steps"]}
    assert (done.returncode, report["ok"]) == (0, True), done.stdout
    assert steps["run"]["status"] == "skip" and "calls by name" in steps["run"]["detail"]
    assert "json" in steps["extensions"]["facts"]["features"]
