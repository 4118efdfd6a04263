"""Messages that no worker should send: at most the run concerned is hurt, and nobody is kept waiting.

The single shapes are tested in ``tests/integration/test_events.py``.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from fault_helpers import MIB, WAIT, link_of, python, resident
from scripted_worker import ScriptedWorker, face_on, pickled, result, task
from ws_peer import BINARY, CONT, TEXT, frame

from wove_ws_sync import WebSocketExecutor

NO_JSON_TEXT: dict[str, bytes] = {
    "malformed": frame(TEXT, b'{"type": "task_result", '),
    "invalid utf-8": frame(TEXT, b'{"type": "\xff\xfe"}'),
    "invalid utf-8 in fragments": frame(TEXT, b'"\xc3', fin=False) + frame(CONT, b'("'),
    "binary": frame(BINARY, b'{"type": "log"}'),
    "5,000 digits": frame(TEXT, b"1" * 5000),
    "100k levels": frame(TEXT, b"[" * 100_000 + b"]" * 100_000),
}


@pytest.mark.parametrize("data", NO_JSON_TEXT.values(), ids=NO_JSON_TEXT)
def test_f19_no_run_is_lost(data: bytes) -> None:
    """The connection is closed with 1007; what had ended stays so, everything else is delivered again."""
    with ScriptedWorker() as worker:
        with WebSocketExecutor(worker.url, delivery_orphan_policy="requeue") as pool:
            futures = [pool.submit(task) for _ in range(100)]
            connection = worker.connection()
            connection.commands(100)
            connection.say_bytes(frame(TEXT, _text(result(futures[0].run_id, 0))) + data)
            assert futures[0].result(WAIT) == 0
            assert connection.ended.wait(WAIT)
            assert connection.close_code == 1007
            again = worker.connection()
            commands = again.commands(99)
            assert [command["run_id"] for command in commands] == [f.run_id for f in futures[1:]]
            again.say(*[result(future.run_id, number) for number, future in enumerate(futures)][1:])
            assert [future.result(WAIT) for future in futures] == list(range(100))
            assert worker.accepted == 2


def _text(event: dict[str, Any]) -> bytes:
    return json.dumps(event).encode()


@pytest.mark.parametrize("kind", ["futures", "sync", "shim"])
def test_f23_the_run_id_alone_counts(kind: str) -> None:
    """Unknown fields and a wrong task_id on every event of a run, the terminal one too, change nothing."""
    with face_on(kind, 100) as (face, connection, ids, _):
        odd = {"task_id": "somebody else's", "unknown": {"a": [1]}, "attempt": "x", "events_seen": None}
        for event in ("task_started", "heartbeat", "log", "task_telepathy"):
            connection.say({"type": event, "run_id": ids[0], **odd})
        connection.say({**result(ids[0], "ended"), **odd})
        connection.say({"type": "task_error", "run_id": ids[1], "error": {"message": "m"}, **odd})
        assert face.outcome(ids[0]) == "ended"
        with pytest.raises(Exception, match=r"^m$"):
            face.outcome(ids[1])
        connection.say([result(run_id, run_id) for run_id in ids[2:]])
        assert [face.outcome(run_id) for run_id in ids[2:]] == ids[2:]
        stats = face.link.stats()
        assert (stats["dropped_type"], stats["dials"]) == (1, 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", ["one by one", "a thousand each"])
@pytest.mark.parametrize(
    "count",
    [100_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.soak])],
    ids=["100k", "1M"],
)
def test_f24_a_storm(count: int, shape: str, record_property: Any) -> None:
    """Events of unknown runs are counted and dropped, logs passed on: memory stays flat, other runs end."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        chatty = pool.submit(task)
        connection = worker.connection()
        rounds = 20
        batch = count // rounds
        log = {"type": "log", "run_id": chatty.run_id, "message": "x" * 50, "level": "DEBUG"}
        stray = {"type": "task_result", "run_id": "unknown", "result_pickle": "garbage" * 5}
        half = [log, stray] * (batch // 2)
        if shape == "one by one":
            data = b"".join(frame(TEXT, _text(event)) for event in half)
        else:
            data = b"".join(
                frame(TEXT, b"[%b]" % b",".join(_text(event) for event in half[start : start + 1000]))
                for start in range(0, batch, 1000)
            )
        memory, took = 0, 0.0
        for number in range(rounds):
            future = pool.submit(task)
            connection.commands(number + 2)
            started = time.monotonic()
            connection.say_bytes(data)
            connection.say(result(future.run_id, number))
            assert future.result(WAIT) == number
            took += time.monotonic() - started
            memory = memory or resident()
        assert resident() - memory < 24 * MIB
        record_property("microseconds_per_event", took / count * 1e6)
        assert took / count < 500e-6  # 10 are promised for a machine with nothing else to do
        assert not chatty.done()
        connection.say(result(chatty.run_id, "end"))
        assert chatty.result(WAIT) == "end"
        stats = link_of(pool).stats()
        assert stats["dropped_unknown_run"] == count // 2
        assert (stats["runs"], stats["dials"]) == (0, 1)


GREEDY = """
    import resource, sys, threading
    from scripted_worker import ScriptedWorker, pickled, result, task
    from wove_ws_sync import PayloadError, WebSocketExecutor

    class Large:
        def __reduce__(self):
            return bytearray, (1 << 30,)

    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        futures = [pool.submit(task) for _ in range(100)]
        connection = worker.connection()
        connection.commands(100)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        connection.say(*[result(future.run_id, Large() if number == 50 else number)
                         for number, future in enumerate(futures)])
        for number, future in enumerate(futures):
            if number != 50:
                assert future.result(30) == number
                continue
            try:
                future.result(30)
            except PayloadError as exc:
                print(exc.payload["kind"], "MemoryError" in str(exc), type(exc.__cause__).__name__)
        late = pool.submit(task)
        connection.commands(101)
        connection.say(result(late.run_id, "late"))
        print(late.result(30), pool._core.session.link.stats()["dials"])
"""


def test_f28_a_value_that_does_not_fit_into_memory() -> None:
    """Under RLIMIT_AS, a gigabyte in one result: an error of that run, and the 99 others have theirs."""
    assert python(GREEDY) == ("PayloadDecodeError True MemoryError\nlate 1\n", "", 0)


class Nap:
    """A value that takes *seconds* to be unpickled."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> Any:
        return time.sleep, (self.seconds,)


def test_f28_two_seconds_of_unpickling() -> None:
    """They pass in the thread that asks: nobody else's result, deadline or heartbeat is late for it."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        slow = pool.submit(task)
        others = [pool.with_options(delivery_timeout=WAIT).submit(task) for _ in range(50)]
        connection = worker.connection()
        connection.commands(51)
        connection.say({**result(slow.run_id), "result_pickle": pickled(Nap(2.0))})
        ended: list[float] = []
        for future in others:
            future.add_done_callback(lambda _: ended.append(time.monotonic()))
        started = time.monotonic()
        threading.Timer(0.2, connection.say, [[result(f.run_id, 1) for f in others]]).start()
        assert slow.result(WAIT) is None
        assert time.monotonic() - started >= 2.0
        assert len(ended) == 50
        assert max(ended) - started < 1.9
        assert [future.result(WAIT) for future in others] == [1] * 50
