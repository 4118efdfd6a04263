"""What a task says of itself: checked, paced, and silent when nobody is to hear it."""

from __future__ import annotations

import contextvars
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from fractions import Fraction
from typing import Any

import pytest
from fault_helpers import until
from hypothesis import given
from hypothesis import strategies as st

from wove_ws_sync import Progress, current_run, payloads
from wove_ws_sync._progress import checked, read
from wove_ws_sync.frames import decode, encode
from wove_ws_sync.worker import logs
from wove_ws_sync.worker.commands import RunTask
from wove_ws_sync.worker.jobs import Job
from wove_ws_sync.worker.pacing import Bucket, Pacer
from wove_ws_sync.worker.voice import LOG_BURST


class Recorder:
    """Take what a job reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, event: bytes) -> None:
        self.reports.append((kind, json.loads(event) if event else {}))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for each, event in list(self.reports) if each == kind]


def job_of(function: Callable[[], Any], report: Recorder) -> Job:
    """Return a job that executes *function*."""
    pickled = payloads.encode_value(function).decode()
    return Job(RunTask("r", "task", pickled, None, None, "best_effort"), report, 1 << 20)


class GivenJob(Job):
    """Execute a function that shares this process's objects, where another would be unpickled."""

    def __init__(self, function: Callable[[], Any], report: Recorder) -> None:
        super().__init__(RunTask("r", "task", "", None, None, "best_effort"), report, 1 << 20)
        self._function = function

    def _unpickle(self) -> tuple[Any, dict[str, Any]]:
        return self._function, {}

    def execute(self) -> None:
        """Execute it in this thread."""
        self.run(lambda *_: pytest.fail("this is no coroutine"))


def execute(function: Callable[[], Any]) -> Recorder:
    """Execute *function* as a task in this thread; return what it reported."""
    report = Recorder()
    job_of(function, report).run(lambda *_: pytest.fail("this is no coroutine"))
    return report


def test_outside_of_a_run() -> None:
    """A clear error, or the default."""
    with pytest.raises(RuntimeError, match="outside of a run"):
        current_run()
    assert current_run(None) is None
    assert current_run(7) == 7


def test_inside_of_a_run() -> None:
    """In the task, and in a thread with a copy of its context; not in another thread, nor afterwards."""

    def task() -> list[Any]:
        found: list[Any] = [current_run().run_id, current_run().task_id]
        for target in (contextvars.copy_context().run, lambda fn: fn()):
            thread = threading.Thread(target=target, args=(lambda: found.append(current_run(None)),))
            thread.start()
            thread.join()
        return [*found[:2], found[2] is current_run(), found[3]]

    [ended] = execute(task).of("ended")
    assert payloads.decode_value(ended["result_pickle"]) == ["r", "task", True, None]
    assert current_run(None) is None


@pytest.mark.parametrize("wrong", ["1", True, None, 1j, [1]])
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="done must be a number"):
        checked(wrong, None, "")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 10**400])
def test_what_is_not_finite_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="total must be finite"):
        checked(1, wrong, "")


def test_what_is_accepted() -> None:
    """Other kinds of numbers become plain ones, a long message is cut, the message is a string."""
    assert checked(Fraction(1, 2), 2, "m") == (0.5, 2, "m")
    assert len(checked(1, None, "x" * 1000).message) == 256
    with pytest.raises(TypeError, match="message"):
        checked(1, None, None)
    assert [Progress(*pair).fraction for pair in ((1, 4), (5, 4), (-1, 4), (1, None), (1, 0))] == [
        0.25,
        1.0,
        0.0,
        0.0,
        0.0,
    ]


json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(done=json_values, total=json_values, message=json_values)
def test_whatever_a_peer_sends_is_a_report_or_ignored(done: Any, total: Any, message: Any) -> None:
    """What gets through has finite numbers and a bounded text; the rest is an odd shape."""
    event = {"type": "progress", "run_id": "r", "done": done, "total": total, "message": message}
    decoded = decode(encode(event))
    if decoded.events:
        progress = read(decoded.events[0])
        assert progress is not None
        assert all(math.isfinite(value) for value in progress[:2] if value is not None)
        assert len(progress.message) <= 256
    else:
        assert decoded.ignored == ("shape",)


def test_a_flood_of_progress_is_few_reports() -> None:
    """100,000 reports of a task become at most ten a second, and the last one comes before the end."""

    def task() -> None:
        for number in range(100_000):
            current_run().progress(number + 1, 100_000, "going")

    report = execute(task)
    told = report.of("progress")
    assert told[-1] == {
        "type": "progress",
        "run_id": "r",
        "task_id": "task",
        "done": 100_000,
        "total": 100_000,
        "message": "going",
    }
    assert [event["done"] for event in told] == sorted(event["done"] for event in told)
    assert 2 <= len(told) < 1000  # a hundred seconds' worth
    assert [kind for kind, _ in report.reports][-2:] == ["progress", "ended"]


def test_a_report_that_had_to_wait_is_told_without_another() -> None:
    """The last of many quick reports arrives while the task goes on."""
    report = Recorder()

    def task() -> None:
        for number in range(3):
            current_run().progress(number)
        until(lambda: [event["done"] for event in report.of("progress")] == [0, 2])

    GivenJob(task, report).execute()
    assert [event["type"] for event in report.of("ended")] == ["task_result"]


def test_nothing_is_said_after_the_end_or_by_a_forked_child() -> None:
    """A thread that outlives its task is silent, and so is a child of it."""
    kept: list[Any] = []
    report = Recorder()
    GivenJob(lambda: kept.append(current_run()), report).execute()
    count = len(report.reports)
    kept[0].progress(1)
    kept[0].heartbeat()
    assert len(report.reports) == count

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                before = len(child_report.reports)
                current_run().progress(1)
                current_run().heartbeat()
                os._exit(len(child_report.reports) - before)
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    child_report = Recorder()
    GivenJob(fork, child_report).execute()
    assert payloads.decode_value(child_report.of("ended")[0]["result_pickle"]) == 0


def test_many_heartbeats_are_one() -> None:
    def task() -> None:
        for _ in range(1000):
            current_run().heartbeat()

    beats = execute(task).of("heartbeat")
    assert 1 <= len(beats) < 1000
    assert beats[0] == {"type": "heartbeat", "run_id": "r", "task_id": "task"}


@pytest.mark.parametrize("requested", [True, False])
def test_a_cancelled_error_confirms_a_cancel_and_is_an_error_otherwise(requested: bool) -> None:
    """concurrent.futures.CancelledError is a plain exception of a task that nobody cancelled."""
    report = Recorder()

    def task() -> None:
        job.cancel_requested = requested
        assert current_run().cancelled() is requested
        raise CancelledError

    job = GivenJob(task, report)
    job.execute()
    [ended] = report.of("ended")
    assert ended["type"] == ("task_cancelled" if requested else "task_error")


@pytest.fixture
def handle() -> Iterator[Callable[[Any], bool]]:
    """Give what hands the text of a record to the handler of the worker service, and to no other."""
    logs.install()
    handler = next(each for each in logging.getLogger().handlers if type(each) is logs.TaskLogHandler)
    yield lambda text: handler.handle(logging.LogRecord("chatty", logging.INFO, "", 0, "%s", (text,), None))
    logs.uninstall()


def test_a_flood_of_logs_is_limited_and_told_once(handle: Callable[[Any], bool]) -> None:
    """What is sent and what the one summary counts make up what was logged; nothing else is formatted."""
    formatted = 0

    class Counted:
        def __str__(self) -> str:
            nonlocal formatted
            formatted += 1
            return "text"

    def task() -> None:
        for _ in range(20_000):
            handle(Counted())

    report = Recorder()
    GivenJob(task, report).execute()
    *sent, summary = report.of("log")
    assert {event["logger"] for event in sent} == {"chatty"}
    assert LOG_BURST <= len(sent) < 20_000
    assert (summary["logger"], summary["level"]) == ("wove_ws_sync.task", "WARNING")
    assert int(summary["message"].split()[0]) + len(sent) == 20_000
    assert formatted == len(sent)


def test_a_record_made_while_one_is_handled_is_not_sent(handle: Callable[[Any], bool]) -> None:
    """Nor are records of this package and its WebSocket libraries."""

    class Loud:
        def __str__(self) -> str:
            logging.getLogger("chatty").error("inner")
            return "outer"

    def task() -> None:
        for name in ("wove_ws_sync.task", "wove_ws_sync.host", "websockets.client", "websocket"):
            logging.getLogger(name).error("round and round")
        handle(Loud())
        logging.getLogger("chatty").error("after")

    report = Recorder()
    GivenJob(task, report).execute()
    assert [event["message"] for event in report.of("log")] == ["outer", "after"]


def test_a_bucket_fills_again() -> None:
    bucket = Bucket(2, 8.0)
    assert [bucket.take(100.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(100.125) for _ in range(2)] == [True, False]
    assert [bucket.take(1000.0) for _ in range(3)] == [True, True, False]
    assert not bucket.take(0.0)  # a clock that goes back brings nothing


def test_a_pacer_goes_on_after_an_error_and_starts_again() -> None:
    """Its thread ends when nothing waits, and what comes then has a new one."""
    pacer, done = Pacer(), threading.Event()
    assert pacer.add(0.0, lambda: 1 // 0)
    assert pacer.add(0.0, done.set)
    assert done.wait(30.0)
    until(lambda: pacer._thread is None)
    done.clear()
    assert pacer.add(0.0, done.set)
    assert done.wait(30.0)
