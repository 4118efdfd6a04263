"""Spans and metrics of runs on both ends, with the real SDK, and nothing of it unless it was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import otel_tasks
import pytest
import wove
from fault_helpers import WAIT, python, until
from opentelemetry import baggage, context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from scripted_worker import FuturesFace, ScriptedWorker, result

import wove_ws_sync
from wove_ws_sync import DeliveryCancelled, WebSocketExecutor, _telemetry, otel
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker import commands

ENGINES = ["threads", "processes", "engine_tasks:make_processes"]


class Telemetry:
    """What the host's SDK has in memory."""

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider([self._reader])

    def span(self, name: str) -> ReadableSpan:
        """Return the one span of that name."""
        [found] = [span for span in self._spans.get_finished_spans() if span.name == name]
        return found

    def points(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        return [] if data is None else _points(json.loads(data.to_json()), name)


def _points(data: Any, name: str) -> list[Any]:
    return [
        point
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        if metric["name"] == name
        for point in metric["data"]["data_points"]
    ]


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    otel.instrument(tracer_provider=made.tracers, meter_provider=made.meters)
    yield made
    otel.uninstrument()
    made.tracers.shutdown()
    made.meters.shutdown()


class Far:
    """A worker service and the folder to which its processes write."""

    def __init__(self, worker: LoopbackWorker, folder: Path, engine: str) -> None:
        self.worker = worker
        self.engine = engine
        self.folder = folder

    def pool(self, **settings: Any) -> WebSocketExecutor:
        return WebSocketExecutor(**self.worker.config, **settings)

    def spans(self) -> list[Any]:
        files = sorted(self.folder.glob("spans-*.json"))
        return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]

    def span(self, name: str, trace_id: int) -> Any:
        """Return the span of that name in the trace, once it is there."""
        wanted = f"0x{trace_id:032x}"

        def found() -> list[Any]:
            return [s for s in self.spans() if s["name"] == name and s["context"]["trace_id"] == wanted]

        until(found)
        [span] = found()
        return span


@pytest.fixture(scope="module", params=ENGINES)
def far(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    folder = tmp_path_factory.mktemp("otel")
    args = ["--engine", request.param, "--otel", "otel_tasks:configure"]
    env = {otel_tasks.folder_variable: str(folder)}
    with LoopbackWorker(workers=2, args=args, env=env) as worker:
        yield Far(worker, folder, request.param)


def _id(span: ReadableSpan) -> tuple[int, str]:
    assert span.context is not None
    return span.context.trace_id, f"0x{span.context.span_id:016x}"


@pytest.mark.parametrize("task", [otel_tasks.inner, otel_tasks.inner_later])
def test_one_trace_from_the_caller_into_the_task(far: Far, telemetry: Telemetry, task: Any) -> None:
    """caller → send → process → what the task does: one trace, with baggage, whatever the engine."""
    name = task.__name__
    token = context.attach(baggage.set_baggage("customer", "42"))
    try:
        with far.pool() as pool, telemetry.tracers.get_tracer("test").start_as_current_span("caller"):
            future = pool.submit(task, 7)
            assert future.result(WAIT) == (49, "42")
    finally:
        context.detach(token)
    caller, send = telemetry.span("caller"), telemetry.span(f"send {name}")
    assert caller.context is not None and send.parent is not None
    assert send.kind is SpanKind.PRODUCER and send.parent.span_id == caller.context.span_id
    assert send.attributes is not None and send.status.status_code is StatusCode.UNSET
    assert dict(send.attributes) == {
        "messaging.system": "wove_ws",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": name,
        "messaging.message.id": future.run_id,
        "server.address": "127.0.0.1",
        "server.port": int(far.worker.url.split(":")[2].partition("/")[0]),
        "wove_ws.outcome": "result",
    }
    trace_id, send_id = _id(send)
    process = far.span(f"process {name}", trace_id)
    assert process["kind"] == "SpanKind.CONSUMER" and process["parent_id"] == send_id
    assert [link["context"]["span_id"] for link in process["links"]] == [send_id]
    assert process["attributes"] == {
        "messaging.system": "wove_ws",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": name,
        "messaging.message.id": future.run_id,
        "wove_ws.outcome": "result",
    }
    assert far.span("inner", trace_id)["parent_id"] == process["context"]["span_id"]


def test_an_error_is_told_on_both_ends(far: Far, telemetry: Telemetry) -> None:
    """The worker knows what was raised; the host does not unpickle it to tell."""
    with far.pool() as pool:
        assert isinstance(pool.submit(otel_tasks.fail, "nothing here").exception(WAIT), LookupError)
    send = telemetry.span("send fail")
    assert send.attributes is not None and send.status.status_code is StatusCode.ERROR
    assert send.attributes["error.type"] == "_OTHER" and send.attributes["wove_ws.outcome"] == "error"
    process = far.span("process fail", _id(send)[0])
    assert process["status"]["status_code"] == "ERROR"
    assert process["attributes"]["error.type"] == "LookupError"
    [event] = process["events"]
    assert event["attributes"]["exception.message"] == "nothing here"


def test_a_cancelled_run_has_no_error(far: Far, telemetry: Telemetry, tmp_path: Path) -> None:
    """It ends as cancelled, and on the worker too where the task had the time to hear of it."""
    if ":" in far.engine:
        pytest.skip("this engine cannot stop what runs")
    with far.pool() as pool:
        future = pool.submit(otel_tasks.hold, str(tmp_path / "there"))
        until((tmp_path / "there").exists)
        assert future.cancel()
    send = telemetry.span("send hold")
    assert send.attributes is not None and send.attributes["wove_ws.outcome"] == "cancelled"
    assert send.status.status_code is StatusCode.UNSET
    if far.engine == "threads":  # the other one kills the process, and its span with it
        process = far.span("process hold", _id(send)[0])
        assert process["attributes"]["wove_ws.outcome"] == "cancelled"
        assert process["status"]["status_code"] == "UNSET"


def test_the_metrics_of_both_ends(telemetry: Telemetry, tmp_path: Path) -> None:
    """Runs are counted by outcome, timed, and none is active when all have ended."""
    env = {otel_tasks.folder_variable: str(tmp_path)}
    with LoopbackWorker(workers=2, args=["--otel", "otel_tasks:configure"], env=env) as worker:
        with WebSocketExecutor(**worker.config) as pool:
            for future in [pool.submit(otel_tasks.measured) for _ in range(5)]:
                future.result(WAIT)
            assert pool.submit(otel_tasks.fail, "once").exception(WAIT) is not None
        worker.stop()
    sent = telemetry.points("messaging.client.sent.messages")
    assert {(p["attributes"]["messaging.destination.name"], p["attributes"]["wove_ws.outcome"]): p["value"]
        for p in sent} == {("measured", "result"): 5, ("fail", "error"): 1}  # fmt: skip
    times = telemetry.points("messaging.client.operation.duration")
    assert sorted(point["count"] for point in times) == [1, 5] and all(point["sum"] > 0 for point in times)
    assert [point["value"] for point in telemetry.points("wove_ws.client.active_runs")] == [0, 0]
    [file] = tmp_path.glob("metrics-*.json")
    far = json.loads(file.read_text("utf-8").splitlines()[-1])
    assert sorted(p["value"] for p in _points(far, "messaging.client.consumed.messages")) == [1, 5]
    assert sorted(p["count"] for p in _points(far, "messaging.process.duration")) == [1, 5]
    assert [p["value"] for p in _points(far, "wove_ws.worker.active_runs")] == [0, 0]
    [failed] = [p for p in _points(far, "messaging.process.duration") if "error.type" in p["attributes"]]
    assert failed["attributes"]["error.type"] == "LookupError"


def test_a_weave_is_traced_with_its_environment(telemetry: Telemetry) -> None:
    """Tasks of a weave are children of the span that the weave runs in."""
    with LoopbackWorker(workers=2) as worker:
        environment = {"executor": "websocket", "executor_config": worker.config}
        wove_ws_sync.config(default_environment="far", environments={"far": environment})
        with telemetry.tracers.get_tracer("test").start_as_current_span("view"), wove.weave() as w:

            @w.do
            def doubled() -> int:
                return 21 * 2

        assert w.result.doubled == 42
    view, send = telemetry.span("view"), telemetry.span("send doubled")
    assert view.context is not None and send.parent is not None and send.attributes is not None
    assert send.parent.span_id == view.context.span_id
    assert send.attributes["wove_ws.environment"] == "far"


def test_what_cannot_be_sent_ends_its_span(telemetry: Telemetry) -> None:
    """A message beyond the limit never leaves, and is no run under way."""
    with LoopbackWorker(workers=1) as worker, WebSocketExecutor(
        **worker.config, max_message_bytes=10_000
    ) as pool:  # fmt: skip
        assert isinstance(pool.submit(len, b"x" * 20_000).exception(WAIT), ValueError)
    send = telemetry.span("send len")
    assert send.attributes is not None and send.attributes["error.type"] == "ValueError"
    assert [point["value"] for point in telemetry.points("wove_ws.client.active_runs")] == [0]


@pytest.mark.parametrize("asked_for", [False, True])
def test_the_context_is_one_field_of_the_frame(asked_for: bool, telemetry: Telemetry) -> None:
    """W3C's traceparent, in a field that a foreign worker does not know; without telemetry there is none."""
    if not asked_for:
        otel.uninstrument()
    with ScriptedWorker(foreign=True) as worker:
        face = FuturesFace(worker.url)
        run_id = face.submit()
        connection = worker.connection()
        [command] = connection.commands(1)
        connection.say(result(run_id, "fine"))
        assert face.outcome(run_id) == "fine"
        face.close()
    if asked_for:
        trace_id, span_id = _id(telemetry.span("send task"))
        assert list(command["trace"]) == ["traceparent"]
        assert command["trace"]["traceparent"][:-2] == f"00-{trace_id:032x}-{span_id[2:]}-"  # and its flags
    else:
        assert "trace" not in command


def test_without_an_sdk_nothing_is_sent(telemetry: Telemetry) -> None:
    """The API alone makes spans that are none: the command is the one that was given."""
    otel.uninstrument()
    otel.instrument()
    assert _telemetry.host is not None
    command = {"type": "run_task", "run_id": "task:1", "task_id": "task"}
    with _telemetry.host.sending(command, lambda event: None, "", ("127.0.0.1", 1)) as (sent, _):
        assert sent is command


def test_the_end_of_a_run_comes_though_telemetry_fails(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("wove_ws_sync._otel.end", fail)
    with LoopbackWorker(workers=1) as worker, WebSocketExecutor(**worker.config) as pool:
        assert pool.submit(len, "four").result(WAIT) == 4
    assert "telemetry failed" in caplog.text


def test_a_run_that_is_cancelled_before_it_began_has_ended_for_the_host(telemetry: Telemetry) -> None:
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        future = pool.submit(len, "four")
        worker.connection().commands(1)
        assert future.cancel()
        with pytest.raises(DeliveryCancelled):
            future.result(WAIT)
    send = telemetry.span("send len")
    assert send.attributes is not None and send.attributes["wove_ws.outcome"] == "cancelled"


@pytest.mark.parametrize(
    "odd",
    [None, 1, "00-1-2-01", [], {"traceparent": 1}, {"a": "x" * 20_000}, {str(n): "" for n in range(17)}],
)
def test_an_odd_context_fails_no_run(odd: Any) -> None:
    """What no propagator could have written is left out."""
    frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": "eA==", "trace": odd}
    command = commands.read(json.dumps(frame))
    assert isinstance(command, commands.RunTask) and command.trace == ()


def test_a_set_up_that_cannot_be_had_is_said_at_the_start() -> None:
    """The one line names the set-up, or what to install; a service without it does not need the package."""
    command = [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--otel"]
    for setup, code, said in [
        ("yes", 2, "neither 'env' nor module:function"),
        ("no_such_module:configure", 2, "cannot be imported"),
        ("json:configure", 2, "has nothing called 'configure'"),
    ]:
        done = subprocess.run(
            [*command, setup],
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert (done.returncode, done.stdout) == (code, "") and said in done.stderr, done.stderr


def test_a_missing_package_is_named_with_its_install_line() -> None:
    code = """
        import sys
        sys.modules["opentelemetry"] = None
        from wove_ws_sync.cli import main
        try:
            import wove_ws_sync.otel
        except ModuleNotFoundError as exc:
            print(exc)
        sys.exit(main(["worker", "--port", "0", "--otel", "env"]))
    """
    output, errors, exit_code = python(code)
    assert output == 'OpenTelemetry needs the package opentelemetry-api: pip install "wove_ws_sync[otel]"\n'
    assert exit_code == 1 and 'pip install "wove_ws_sync[otel]"' in errors


def test_env_configures_the_sdk_by_its_variables() -> None:
    code = """
        from opentelemetry import trace
        from wove_ws_sync.worker import telemetry
        telemetry.prepare("env")
        telemetry.prepare("env")
        print(type(trace.get_tracer_provider()).__module__)
        with trace.get_tracer("test").start_as_current_span("seen"):
            pass
    """
    output, errors, exit_code = python(
        code,
        env={
            "OTEL_TRACES_EXPORTER": "console",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        },
    )
    assert exit_code == 0, errors
    assert output.startswith("opentelemetry.sdk.trace\n") and '"name": "seen"' in output


def test_the_command_of_opentelemetry_instruments_both_ends() -> None:
    """Under ``opentelemetry-instrument`` no line of code is needed, for a worker service neither."""
    code = """
        import asyncio
        from wove_ws_sync import WebSocketExecutor
        from wove_ws_sync.worker import WorkerService

        async def main():
            async with WorkerService(port=0, workers=1) as service:
                with WebSocketExecutor(service.url) as pool:
                    print(await asyncio.wrap_future(pool.submit(len, "four")))

        asyncio.run(main())
    """
    variables = {
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    command = str(Path(sys.executable).with_name("opentelemetry-instrument"))
    output, errors, exit_code = python(code, env=variables, prefix=[command])
    assert exit_code == 0, errors
    assert output.startswith("4\n") and '"name": "send len"' in output and '"name": "process len"' in output
