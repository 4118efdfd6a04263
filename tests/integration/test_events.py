"""What a worker may say, and what it must not break: every face against a scripted worker.

A hundred runs are in flight in most tests; at most the one concerned is hurt.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import dataclasses
import json
import logging
import math
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scripted_worker import (
    SONGS,
    Canary,
    Connection,
    Face,
    FuturesFace,
    ScriptedWorker,
    face_on,
    pickled,
    result,
)
from wove import weave
from wove.environment import EnvironmentExecutionError
from ws_peer import BINARY, CONT, TEXT, frame

import wove_ws_sync
from wove_ws_sync import ConnectionLost, DeliveryCancelled, PayloadError, WebSocketExecutor
from wove_ws_sync.testing import close_links

WAIT = 30.0
RUNS = 100
CANCELLED = (concurrent.futures.CancelledError, asyncio.CancelledError)

every_face = pytest.mark.parametrize("kind", ["futures", "sync", "shim"])


@pytest.fixture(autouse=True)
def silence() -> None:
    """Forget what other tests' canaries sang."""
    SONGS.clear()


def expect(face: Face, ids: list[str]) -> None:
    """Every run of *ids* ended with its own id as the result."""
    assert [face.outcome(run_id) for run_id in ids] == ids


def finish(face: Face, connection: Connection, ids: list[str]) -> None:
    """Let every run of *ids* succeed, and see that it does, on the first connection."""
    connection.say([result(run_id, run_id) for run_id in ids])
    expect(face, ids)
    assert face.link.stats()["dials"] == 1


@every_face
@pytest.mark.parametrize(
    "wrap",
    [
        lambda events: events,
        lambda events: [events],
        lambda events: [{"events": events}],
        lambda events: [{"events": events[:50], "more": 1}, *events[50:]],
    ],
    ids=["single", "list", "events", "mixed"],
)
def test_the_three_message_shapes(kind: str, wrap: Callable[[list[Any]], list[Any]]) -> None:
    """One event, a list of them, or {"events": [...]}: all the same."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        connection.say(*wrap([result(run_id, run_id) for run_id in ids]))
        expect(face, ids)


ODD: list[Any] = [
    None,
    42,
    -0.5,
    True,
    "text",
    [],
    {},
    [[]],
    [None, 42, "text", [], {}],
    {"events": []},
    {"events": {}},
    {"events": None},
    {"events": [None, {"events": []}]},
    {"type": "task_result"},
    {"type": "task_result", "run_id": None},
    {"type": "task_result", "run_id": 7},
    {"type": "task_result", "run_id": ""},
    {"type": "task_result", "run_id": ["{id}"]},
    {"type": "task_result", "run_id": {"a": 1}},
    {"type": ["task_result"], "run_id": "{id}"},
    {"type": None, "run_id": "{id}"},
    {"run_id": "{id}", "result": 1},
    {"type": "task_progress", "run_id": "{id}", "percent": 3},
    {"type": "TASK_RESULT", "run_id": "{id}"},
    {"type": "run_task", "run_id": "{id}"},
    {"type": "cancel_task", "run_id": "{id}"},
    {"type": "shutdown"},
    {"type": "task_result", "run_id": "unknown", "result_pickle": pickled(1)},
    {"type": "task_result", "run_id": "{id} ", "result_pickle": "garbage"},
    {"type": "task_error", "run_id": "unknown", "exception_pickle": "garbage"},
    {"type": "task_cancelled", "run_id": "unknown"},
    {"type": "heartbeat", "run_id": "unknown"},
    {"type": "task_started", "run_id": "{id}", "task_id": ["wrong"], "started": {"a": [1]}},
    {"type": "heartbeat", "run_id": "{id}", "task_id": "wrong", "unknown_field": {"a": [1]}},
    {"type": "log", "run_id": "{id}"},
    {"type": "log", "run_id": "{id}", "level": ["?"], "message": {"a": 1}, "logger": 5},
    {"type": "log", "run_id": "{id}", "level": "%s %d", "message": "%s %d", "logger": "%s"},
]


@every_face
def test_f20_f23_odd_json_hurts_nobody(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Valid JSON of the wrong shape, unknown types, runs and fields: ignored and counted, never a wedge."""
    caplog.set_level(logging.DEBUG, "wove_ws_sync")
    with face_on(kind, RUNS) as (face, connection, ids, _):
        for item in ODD:
            connection.say(json.dumps(item).replace("{id}", ids[0]).encode())
        finish(face, connection, ids)
        stats = face.link.stats()
        assert stats["runs"] == 0
        assert stats["dropped_shape"] == 13
        assert stats["dropped_type"] == 11
        assert stats["dropped_run_id"] == 6
        assert stats["dropped_unknown_run"] == 5


def truncated(value: Any) -> str:
    data = base64.b64decode(pickled(value))
    return base64.b64encode(data[: len(data) // 2]).decode()


def absent_module() -> str:
    data = pickle.dumps(json.JSONDecoder, protocol=0).replace(b"json.decoder", b"no_such_module")
    return base64.b64encode(data).decode()


def absent_name() -> str:
    data = pickle.dumps(json.JSONDecoder, protocol=0).replace(b"JSONDecoder", b"NoSuchName")
    return base64.b64encode(data).decode()


class Leaving:
    """A pickle that raises *error* when it is loaded."""

    def __init__(self, error: str) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return exec, (f"raise {self.error}",)


UNDECODABLE: dict[str, Any] = {
    "truncated": truncated(list(range(100))),
    "garbage": base64.b64encode(os.urandom(64)).decode(),
    "absent module": absent_module(),
    "absent name": absent_name(),
    "null": None,
    "number": 7,
    "list": ["a"],
    "object": {"a": 1},
    "empty": "",
    "not base64": "*** no base64 ***",
    "bad padding": "abc",
    "non-ascii": "grüße 🐍",
    "lone surrogate": "\ud800",
    "raises": pickled(Leaving("LookupError('no')")),
    "exits": pickled(Leaving("SystemExit(3)")),
    "stops a generator": pickled(Leaving("GeneratorExit")),
    "stops an iteration": pickled(Leaving("StopIteration")),
    "cancels": pickled(Leaving("__import__('asyncio').CancelledError")),
}


@every_face
@pytest.mark.parametrize("field", ["result", "exception", "error"])
@pytest.mark.parametrize("payload", UNDECODABLE.values(), ids=UNDECODABLE)
def test_f21_what_cannot_be_unpickled_hurts_its_own_run(kind: str, field: str, payload: Any) -> None:
    """One PayloadError, which is Wove's EnvironmentExecutionError; 99 runs succeed."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        victim, *others = ids
        event = "task_result" if field == "result" else "task_error"
        connection.say({"type": event, "run_id": victim, f"{field}_pickle": payload})
        with pytest.raises(PayloadError) as caught:
            face.outcome(victim)
        assert isinstance(caught.value, EnvironmentExecutionError)
        assert caught.value.payload["kind"] == "PayloadDecodeError"
        assert "could not be unpickled" in str(caught.value)
        finish(face, connection, others)


@every_face
def test_what_is_said_beside_an_exception_that_cannot_be_unpickled_is_told(kind: str) -> None:
    with face_on(kind, 1) as (face, connection, (run_id,), _):
        error = {"kind": "Odd", "message": "the disk is full"}
        connection.say({"type": "task_error", "run_id": run_id, "error": error, "exception_pickle": "gA=="})
        with pytest.raises(PayloadError) as caught:
            face.outcome(run_id)
        assert any("the disk is full" in note for note in caught.value.__notes__)


class Undecided:
    """Has no truth value, as an array of several numbers has none."""

    def __bool__(self) -> bool:
        raise ValueError("is it true?")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None  # type: ignore[assignment]


@every_face
@pytest.mark.parametrize("error", [Undecided(), {"message": Undecided(), "traceback": Undecided()}])
@pytest.mark.parametrize("exception", ["gA==", pickled(ValueError("no"))])
def test_what_a_peer_says_may_have_no_truth_value(kind: str, error: Any, exception: Any) -> None:
    with face_on(kind, 1) as (face, connection, (run_id,), _):
        event = {"type": "task_error", "run_id": run_id, "error_pickle": pickled(error)}
        connection.say({**event, "exception_pickle": exception})
        with pytest.raises(ValueError if exception != "gA==" else PayloadError):
            face.outcome(run_id)


@every_face
def test_base64_may_have_line_breaks(kind: str) -> None:
    """As ``base64.encodebytes`` and MIME make them: Wove's own executor takes such worker services."""
    with face_on(kind, 1) as (face, connection, (run_id,), _):
        lines = base64.encodebytes(pickle.dumps("x" * 100)).decode()
        connection.say({"type": "task_result", "run_id": run_id, "result_pickle": lines})
        assert lines.count("\n") > 1
        assert face.outcome(run_id) == "x" * 100


@every_face
@pytest.mark.parametrize(
    "raised",
    [
        StopIteration("stop"),
        SystemExit("exit"),
        KeyboardInterrupt("interrupt"),
        GeneratorExit("generator"),
        asyncio.CancelledError("cancelled"),
        BaseException("base"),
        ValueError,
        StopIteration,
        "no exception",
        42,
        None,
    ],
    ids=repr,
)
def test_f22_what_must_not_be_raised_comes_wrapped(kind: str, raised: Any) -> None:
    """StopIteration, SystemExit and whatever is no exception arrive as EnvironmentExecutionError."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        victim, *others = ids
        connection.say({"type": "task_error", "run_id": victim, "exception_pickle": pickled(raised)})
        with pytest.raises(EnvironmentExecutionError) as caught:
            face.outcome(victim)
        if isinstance(raised, BaseException):
            assert str(caught.value) == str(raised)
        finish(face, connection, others)


@every_face
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"error": {"message": "m", "kind": "k"}}, "m"),
        ({"error": {"message": "", "kind": "KeyboardInterrupt"}}, "KeyboardInterrupt"),
        ({"error": {}}, "Task execution failed."),
        ({"error": "oops"}, "oops"),
        ({"error": ["a"]}, "['a']"),
        ({"error": None}, "Task execution failed."),
        ({"error": {"message": None, "traceback": 7}}, "None"),
        ({}, "Task execution failed."),
        ({"exception": "text", "error": {"message": "m"}}, "m"),
        ({"error_pickle": pickled({"message": "pickled"})}, "pickled"),
        ({"exception_pickle": pickled(ValueError("v")), "error": {"message": "m", "traceback": "in f"}}, "v"),
    ],
)
def test_errors_in_every_form(kind: str, fields: dict[str, Any], text: str) -> None:
    """Plain JSON errors and pickled ones; Wove's text where there is nothing to say."""
    with face_on(kind, 2) as (face, connection, ids, _):
        connection.say({"type": "task_error", "run_id": ids[0], **fields})
        with pytest.raises((EnvironmentExecutionError, ValueError)) as caught:
            face.outcome(ids[0])
        assert str(caught.value) == text
        finish(face, connection, ids[1:])


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An exception that refuses to be changed."""

    number: int

    def __reduce__(self) -> Any:
        return Frozen, (self.number,)


class Mute(Exception):
    """An exception that cannot be printed."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class MuteExit(SystemExit):
    """One that also must not be raised."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@every_face
@pytest.mark.parametrize("raised", [Frozen(3), Mute(), MuteExit(), ExceptionGroup("g", [KeyError("k")])])
def test_exceptions_of_difficult_classes(kind: str, raised: BaseException) -> None:
    """They arrive as themselves if they may be raised, with the worker's traceback as the cause."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        error = {"message": "m", "kind": "k", "traceback": "in a task"}
        for run_id in ids[:2]:
            connection.say({"type": "task_error", "run_id": run_id, "exception_pickle": pickled(raised)})
        event = {"type": "task_error", "run_id": ids[2], "exception_pickle": pickled(raised)}
        connection.say({**event, "error": error})
        wanted = type(raised) if isinstance(raised, Exception) else EnvironmentExecutionError
        for run_id in ids[:3]:
            with pytest.raises(wanted) as caught:
                face.outcome(run_id)
        assert "in a task" in str(caught.value.__cause__)
        finish(face, connection, ids[3:])


@every_face
def test_f19_results_as_plain_json(kind: str) -> None:
    """A plain result is taken as it is, NaN and lone surrogates too; none at all is None."""
    values: list[Any] = [0, None, "ü\ud800", {"a": [1.5]}, [], False]
    with face_on(kind, len(values) + 2) as (face, connection, ids, _):
        for run_id, value in zip(ids, values, strict=False):
            connection.say({"type": "task_result", "run_id": run_id, "result": value})
        connection.say({"type": "task_result", "run_id": ids[-2]})
        connection.say(b'{"type": "task_result", "run_id": "%s", "result": NaN}' % ids[-1].encode())
        assert [face.outcome(run_id) for run_id in ids[:-1]] == [*values, None]
        assert math.isnan(face.outcome(ids[-1]))


@every_face
def test_f25_the_first_terminal_event_wins(kind: str) -> None:
    """Duplicates and contradictions are counted and dropped, and never unpickled."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        late = [
            {"type": "task_result", "run_id": ids[0], "result_pickle": pickled(Canary("late"))},
            {"type": "task_error", "run_id": ids[0], "exception_pickle": pickled(Canary("late"))},
            {"type": "task_cancelled", "run_id": ids[0]},
            {"type": "task_started", "run_id": ids[0]},
            {"type": "heartbeat", "run_id": ids[0]},
        ]
        connection.say([result(ids[0], ids[0]), *late], *late)
        finish(face, connection, ids[1:])
        assert face.outcome(ids[0]) == ids[0]
        assert face.link.stats()["dropped_unknown_run"] == 2 * len(late)
        assert SONGS == []


@every_face
def test_f26_a_cancellation_that_nobody_asked_for(kind: str) -> None:
    """It cancels the run, and no cancel_task is echoed."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        connection.say({"type": "task_cancelled", "run_id": ids[0]})
        with pytest.raises(CANCELLED) as caught:
            face.outcome(ids[0])
        if kind == "futures":
            assert isinstance(caught.value, DeliveryCancelled) and caught.value.acknowledged
        finish(face, connection, ids[1:])
        face.submit()
        connection.commands(RUNS + 1)
        assert connection.commands(0, "cancel_task") == []


MALFORMED: dict[str, bytes] = {
    "no json": frame(TEXT, b"{"),
    "empty": frame(TEXT, b""),
    "two values": frame(TEXT, b"{} {}"),
    "invalid utf-8": frame(TEXT, b'"\xff"'),
    "truncated utf-8": frame(TEXT, '"ü'.encode()[:-1]),
    "surrogate utf-8": frame(TEXT, b'"\xed\xa0\x80"'),
    "long integer": frame(TEXT, b"1" * 5000),
    "deep nesting": frame(TEXT, b"[" * 100_000),
    "binary": frame(BINARY, b"{}"),
    "empty binary": frame(BINARY, b""),
    "invalid utf-8 in fragments": frame(TEXT, b'"\xc3', fin=False) + frame(CONT, b'x"'),
}


@every_face
@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_f19_what_is_no_json_text_ends_the_connection(kind: str, data: bytes) -> None:
    """It may have been a terminal event: 1007, ConnectionLost for every run, and the next use dials again."""
    with face_on(kind, RUNS) as (face, connection, ids, worker):
        connection.say(result(ids[0], ids[0]))
        connection.say_bytes(data)
        assert face.outcome(ids[0]) == ids[0]
        for run_id in ids[1:]:
            with pytest.raises(ConnectionLost) as caught:
                face.outcome(run_id)
            assert caught.value.close_code == 1007
            assert caught.value.run_id == run_id and caught.value.maybe_executed
        assert connection.ended.wait(WAIT)
        assert connection.close_code == 1007
        again = face.submit()
        worker.connection().say(result(again, "again"))
        assert face.outcome(again) == "again"
        assert face.link.stats()["dials"] == 2


def _with_canary(kind: str, run_id: str, tag: str) -> dict[str, Any]:
    canary = pickled(Canary(tag))
    fields = {f"{name}_pickle": canary for name in ("result", "exception", "error", "callable", "args")}
    return {"type": kind, "run_id": run_id, **fields}


@every_face
def test_no_pickle_is_loaded_unless_it_ends_a_pending_run(kind: str) -> None:
    """Not of a heartbeat, log or unknown run, not unasked, not of a run that has ended or was cancelled."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        for run_id in (ids[0], "unknown", ""):
            for event in ("task_started", "heartbeat", "log", "task_progress", "run_task"):
                connection.say(_with_canary(event, run_id, event))
        for event in ("task_result", "task_error", "task_cancelled"):
            connection.say([_with_canary(event, "unknown", event)])
        connection.say(_with_canary("task_cancelled", ids[1], "cancelled"))
        finish(face, connection, [ids[0], *ids[2:]])
        connection.say(_with_canary("task_result", ids[0], "ended"))
        last = face.submit()
        finish(face, connection, [last])
        with pytest.raises(CANCELLED):
            face.outcome(ids[1])
        assert SONGS == []


def test_unsolicited_pickles_right_after_the_handshake_are_not_loaded() -> None:
    """Before any run was sent, with the events in the packet of the 101."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        first = pool.submit(len, ())
        connection = worker.connection()
        for event in ("task_result", "task_error", "log"):
            connection.say(_with_canary(event, "unknown", event))
        connection.say(result(first.run_id, 1))
        assert first.result(WAIT) == 1
        assert SONGS == []


@pytest.mark.parametrize("event", ["task_result", "task_error"])
def test_a_future_is_unpickled_once_in_the_thread_that_asks(event: str) -> None:
    """wait(), done() and the end of the run do not load it; the first result() does, later ones do not."""
    field = "result_pickle" if event == "task_result" else "exception_pickle"
    with face_on("futures", 2) as (face, connection, ids, _):
        assert isinstance(face, FuturesFace)
        future, unasked = (face.futures[run_id] for run_id in ids)
        for run_id in ids:
            connection.say({"type": event, "run_id": run_id, field: pickled(Canary(run_id))})
        done, _ = concurrent.futures.wait([future, unasked], WAIT)
        assert len(done) == 2 and future.done() and not future.cancelled() and "done" in repr(future)
        assert future.cancel() is False
        assert SONGS == []
        asked: list[Any] = []
        threads = [threading.Thread(target=lambda: asked.append(_ask(future))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        _ask(future)
        [(tag, where)] = SONGS
        assert tag == ids[0] and where in {thread.ident for thread in threads}
        assert len(asked) == 4


def _ask(future: Any) -> Any:
    try:
        return future.result(WAIT)
    except EnvironmentExecutionError as exc:
        return exc


def test_a_result_of_the_executors_is_unpickled_where_it_is_received() -> None:
    """In the thread that calls recv(), in the loop's thread for the shim."""
    with face_on("sync", 1) as (face, connection, ids, _):
        connection.say(_with_canary("task_result", ids[0], "sync"))
        assert face.outcome(ids[0]) == "sync"
    with face_on("shim", 1) as (face, connection, ids, _):
        connection.say(_with_canary("task_error", ids[0], "shim"))
        with pytest.raises(EnvironmentExecutionError):
            face.outcome(ids[0])
        loop_thread = face.thread.ident  # type: ignore[attr-defined]
    assert SONGS[0] == ("sync", threading.get_ident())
    assert set(SONGS[1:]) == {("shim", loop_thread)}


_GATE = threading.Event()


def _wait_at_the_gate() -> str:
    assert _GATE.wait(WAIT)
    return "through"


class Slow:
    """A value that takes its time to be unpickled."""

    def __reduce__(self) -> Any:
        return _wait_at_the_gate, ()


def test_f28_a_slow_unpickling_hurts_only_who_asked() -> None:
    """Other runs of the link end meanwhile, and a second asker of the same run keeps its own timeout."""
    _GATE.clear()
    with face_on("futures", RUNS) as (face, connection, ids, _):
        assert isinstance(face, FuturesFace)
        slow = face.futures[ids[0]]
        connection.say(result(ids[0], Slow()))
        answers: list[Any] = []
        asker = threading.Thread(target=lambda: answers.append(slow.result(WAIT)))
        asker.start()
        try:
            finish(face, connection, ids[1:])
            with pytest.raises(TimeoutError):
                slow.result(0.05)
        finally:
            _GATE.set()
            asker.join(WAIT)
        assert answers == ["through"]
        assert slow.result() == "through"


@every_face
def test_f24_a_storm_of_events_for_unknown_runs(kind: str) -> None:
    """Fifty thousand are counted and dropped; nothing is kept of them."""
    with face_on(kind, RUNS) as (face, connection, ids, _):
        for number in range(50):
            log = {"type": "log", "message": "x" * 50}
            connection.say([{**log, "run_id": f"u{number}-{i}"} for i in range(1000)])
        finish(face, connection, ids)
        stats = face.link.stats()
        assert stats["dropped_unknown_run"] == 50_000
        assert stats["runs"] == 0


def _weave_of_ten() -> Any:
    with weave() as w:

        @w.do(range(10), environment="socket_workers")
        def one(item: int) -> None:
            pass

    return w.result


def _error_of(weave_result: Any) -> Exception | None:
    try:
        assert len(set(weave_result.result(WAIT).one)) == 10
    except EnvironmentExecutionError as exc:
        return exc
    return None


def test_a_spoilt_task_hurts_its_own_weave() -> None:
    """Ten weaves with ten runs each, one run of one of them spoilt: nine have all their results."""
    with ScriptedWorker() as worker, concurrent.futures.ThreadPoolExecutor(10) as threads:
        wove_ws_sync.config(
            environments={"socket_workers": {"executor": "websocket", "executor_config": {"url": worker.url}}}
        )
        weaves = [threads.submit(_weave_of_ten) for _ in range(10)]
        connection = worker.connection()
        spoilt = ""
        for command in connection.commands(RUNS):
            run_id = command["run_id"]
            connection.say([], None, {"type": "heartbeat", "run_id": run_id, "exception": "odd"})
            connection.say(_with_canary("log", run_id, "log"))
            if not spoilt:
                spoilt = run_id
                connection.say({"type": "task_error", "run_id": run_id, "exception_pickle": "garbage"})
            else:
                connection.say(result(run_id, run_id))
        errors = [error for future in weaves if (error := _error_of(future))]
        assert len(errors) == 1 and isinstance(errors[0], EnvironmentExecutionError)
        assert worker.accepted == 1
        assert SONGS == []
        close_links()


class Shouting(logging.Handler):
    """A handler that raises, as one on a full disk may."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


@every_face
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
def test_f38_a_failing_log_handler_hurts_nobody(
    kind: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are lost; the runs are not, nor is the end of the connection."""
    logger = logging.getLogger("wove_ws_sync")
    handler = Shouting()
    monkeypatch.setattr(logger, "level", level)
    logging.getLogger("wove_ws_sync.host").manager._clear_cache()  # type: ignore[attr-defined]
    logger.addHandler(handler)
    try:
        with face_on(kind, RUNS) as (face, connection, ids, _):
            connection.say({"type": "log", "run_id": ids[0], "level": "ERROR", "message": "from the task"})
            finish(face, connection, ids)
            lost = face.submit()
            connection.commands(RUNS + 1)
            connection.say_bytes(frame(TEXT, b"{"))
            with pytest.raises(ConnectionLost):
                face.outcome(lost)
            close_links()
    finally:
        logger.removeHandler(handler)
        logging.getLogger("wove_ws_sync.host").manager._clear_cache()  # type: ignore[attr-defined]


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
def test_a_failing_callback_hurts_nobody(raised: type[BaseException]) -> None:
    """Whatever a done-callback raises, the reader goes on."""

    def fail(future: Any) -> None:
        raise raised("from a callback")

    with face_on("futures", RUNS) as (face, connection, ids, _):
        assert isinstance(face, FuturesFace)
        face.futures[ids[0]].add_done_callback(fail)
        finish(face, connection, ids)
