"""Parts of the engines at moments that no task brings about at will."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from multiprocessing import Pipe
from typing import Any

import pytest

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
