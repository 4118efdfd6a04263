"""Parts of the engines at moments that no task brings about at will."""

from __future__ import annotations

import asyncio
import contextlib
import json
from concurrent.futures import Executor, Future
from multiprocessing import Pipe
from typing import Any

import pytest

from wove_ws_sync import payloads
from wove_ws_sync.worker import jobs, surroundings
from wove_ws_sync.worker.commands import RunTask
from wove_ws_sync.worker.future_engine import FutureEngine
from wove_ws_sync.worker.jobs import Job
from wove_ws_sync.worker.process_child import reporter
from wove_ws_sync.worker.runs import Stopped

WAIT = 60.0


def test_a_log_that_comes_after_the_end_of_its_run_is_not_sent() -> None:
    """By then the connection of the process is used for a run that may be of another host."""
    ours, theirs = Pipe()
    with ours, theirs:
        earlier, later = reporter(theirs), reporter(theirs)
        earlier("ended", b"1")
        earlier("log", b"of a thread that outlives its task")
        later("started", b"2")
        assert [ours.recv_bytes() for _ in range(4)] == [b"ended", b"1", b"started", b"2"]
        assert not ours.poll()


def test_a_forked_process_logs_to_nobody_and_ends_nothing() -> None:
    ours, theirs = Pipe()
    with ours:
        report = reporter(theirs)
        theirs.close()  # as the fork does
        report("log", b"a word")
        with pytest.raises(OSError, match="no connection"):
            report("ended", b"")
        with pytest.raises(EOFError):
            ours.recv_bytes()


class Keeps(Executor):
    """Has what it is given, and never executes it."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given.append(args)
        return Future()


def test_a_job_that_an_executor_has_keeps_no_payload() -> None:
    executor = Keeps()
    engine = FutureEngine(lambda: executor, name="keeps")
    engine.start()
    command = RunTask("run", "task", "callable", "args", None, "best_effort")
    job = Job(command, lambda kind, event: None, 1 << 20)
    engine.submit(job)
    assert executor.given[0][0].args_pickle == "args"
    assert job.order()[0].args_pickle is None
    assert engine.cancel(job) is Stopped.WITHDRAWN
    assert engine.close(WAIT)


def a_job(function: Any, reports: list[tuple[str, Any]]) -> Job:
    """Return a job of *function* whose reports, decoded, come to *reports*."""
    pickles = payloads.encode_value(function).decode(), payloads.encode_value({}).decode()
    return Job(
        RunTask("run", "task", *pickles, None, "best_effort"),
        lambda kind, event: reports.append((kind, json.loads(event))),
        1 << 20,
    )


def drive(job: Job, awaitable: Any, context: Any) -> None:
    asyncio.run(job.drive(awaitable))


def short_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError


async def gives_one() -> int:
    return 1


@pytest.mark.parametrize("task", [int, gives_one], ids=["call", "coroutine"])
def test_a_result_whose_message_finds_no_memory_is_an_error(
    monkeypatch: pytest.MonkeyPatch, task: Any
) -> None:
    reports: list[tuple[str, Any]] = []
    job = a_job(task, reports)

    def encode(frame: dict[str, Any]) -> bytes:
        return short_of_memory() if frame["type"] == "task_result" else json.dumps(frame).encode()

    monkeypatch.setattr(jobs, "encode", encode)
    job.run(drive)
    assert [kind for kind, _ in reports] == ["started", "ended"]
    assert reports[-1][1]["type"] == "task_error" and job.done


@pytest.mark.parametrize("task", [int, gives_one], ids=["call", "coroutine"])
def test_a_run_ends_although_its_end_cannot_be_reported(monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
    """Or its host would hear heartbeats for ever."""
    reports: list[tuple[str, Any]] = []
    job = a_job(task, reports)
    monkeypatch.setattr(payloads, "encode_value", short_of_memory)
    monkeypatch.setattr(jobs, "plain_error", short_of_memory)
    job.run(drive)
    assert [kind for kind, _ in reports] == ["started", "ended"]
    error = reports[-1][1]["error"]
    assert (error["kind"], error["retryable"]) == ("ReportFailed", True)
    assert "MemoryError" in error["message"] and "--workers" in error["message"]


def test_a_coroutine_that_no_loop_adopts_ends() -> None:
    """As when there are no descriptors left for a loop."""
    reports: list[tuple[str, Any]] = []

    def adopt(job: Job, awaitable: Any, context: Any) -> None:
        awaitable.close()
        raise OSError(24, "Too many open files")

    a_job(gives_one, reports).run(adopt)
    assert [kind for kind, _ in reports] == ["started", "ended"]
    assert "Too many open files" in reports[-1][1]["error"]["message"]


def test_what_is_around_a_task_cannot_swallow_that_its_end_was_not_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: list[tuple[str, Any]] = []
    job = a_job(int, reports)
    monkeypatch.setattr(surroundings, "_current", lambda: lambda: contextlib.suppress(BaseException))
    monkeypatch.setattr(payloads, "encode_value", short_of_memory)
    monkeypatch.setattr(jobs, "plain_error", short_of_memory)
    job.run(drive)
    assert reports[-1][0] == "ended" and reports[-1][1]["error"]["kind"] == "ReportFailed"
