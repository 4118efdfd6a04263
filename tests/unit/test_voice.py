"""What a task says ends with its run, whoever says it: other threads, finalizers, forked children."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import threading
from typing import Any

import pytest
from fault_helpers import WAIT

from wove_ws_sync import current, current_run, payloads
from wove_ws_sync.worker import apart
from wove_ws_sync.worker.apart import perform
from wove_ws_sync.worker.commands import RunTask
from wove_ws_sync.worker.process_child import reporter
from wove_ws_sync.worker.voice import Voice


class Run:
    """A run whose reports are kept; *hold* is called in the middle of each."""

    def __init__(self, hold: Any = None) -> None:
        self.done = self.abandoned = self.cancel_requested = False
        self.reports: list[tuple[str, dict[str, Any]]] = []
        self.voice = Voice(self, "r", "t", self.take)
        self.current = current.CurrentRun("r", "t", self.voice)
        self._hold = hold

    def take(self, kind: str, event: bytes) -> None:
        if self._hold is not None:
            self._hold(kind)
        self.reports.append((kind, json.loads(event)))

    def end(self) -> None:
        """Do what a Job does."""
        self.voice.close()
        self.done = True
        self.take("ended", b"{}")

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.reports]


def command(function: Any) -> RunTask:
    return RunTask("r", "t", payloads.encode_value(function).decode(), None, None, "best_effort", "cancel")


@pytest.mark.parametrize("kind", ["progress", "heartbeat", "log"])
def test_the_end_waits_for_a_report_that_another_thread_has_begun(kind: str) -> None:
    """Else the last progress, of the pacer say, came after the end and was lost."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(which: str) -> None:
        if which == kind:
            begun.set()
            assert go_on.wait(WAIT)

    run = Run(hold)
    say = {
        "progress": lambda: run.current.progress(1),
        "heartbeat": run.current.heartbeat,
        "log": lambda: run.voice.log({"message": "m"}),
    }
    speaker, ending = threading.Thread(target=say[kind]), threading.Thread(target=run.end)
    speaker.start()
    assert begun.wait(WAIT)
    ending.start()
    ending.join(0.2)  # it is not to come through, so there is no event to wait for
    go_on.set()
    speaker.join(WAIT)
    ending.join(WAIT)
    assert run.kinds() == [kind, "ended"]


def test_a_forked_child_says_nothing_and_waits_for_nobody() -> None:
    """The parent's lock, held at the moment of the fork, is never released there."""
    run = Run()
    run.current.progress(1)
    with run.voice._lock:
        pid = os.fork()
        if pid == 0:
            thread = threading.Thread(target=_say_everything, args=(run,))  # it does not own the lock
            thread.start()
            thread.join(WAIT)
            os._exit(1 if thread.is_alive() or len(run.reports) != 1 else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _say_everything(run: Run) -> None:
    run.current.progress(2)
    run.current.heartbeat()
    if run.voice.admits_log():
        run.voice.log({})
    run.voice.close()


def test_reports_of_a_process_are_whole_though_finalizers_speak_in_the_middle() -> None:
    """The collector may execute code of the task's in the middle of a report, in the same thread."""
    ours, theirs = multiprocessing.Pipe()

    class Interrupted:
        closed = False
        left = 3

        def send_bytes(self, data: bytes) -> None:
            if self.left:
                self.left -= 1
                report("log", b"of a finalizer")
            ours.send_bytes(data)

    report = reporter(Interrupted())  # type: ignore[arg-type]
    thread = threading.Thread(target=report, args=("started", b"first"), daemon=True)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()
    report("ended", b"last")
    report("log", b"late")
    ours.close()
    received = []
    with contextlib.suppress(EOFError):
        while True:
            received.append((theirs.recv_bytes(), theirs.recv_bytes()))
    theirs.close()
    words = [(b"log", b"of a finalizer")] * 3
    assert received == [(b"started", b"first"), *words, (b"ended", b"last")]


def test_an_engine_that_reports_at_the_end_brings_the_newest_progress() -> None:
    def task() -> str:
        run = current_run()
        for number in range(50):
            run.progress(number + 1, 50)
            run.heartbeat()
        logging.getLogger("tasks.own").warning("one")
        return run.run_id

    reports = perform(command(task), 1 << 20)
    assert [kind for kind, _ in reports] == ["log", "progress", "ended"]
    assert json.loads(reports[1][1])["done"] == 50


def test_records_that_come_with_the_end_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stay, and how many did not is the first that is told."""
    monkeypatch.setattr(apart, "_MOST_LOGS", 10)

    def task() -> None:
        for number in range(50):
            logging.getLogger("tasks.own").warning("record %d", number)

    reports = perform(command(task), 1 << 20)
    texts = [json.loads(event)["message"] for kind, event in reports if kind == "log"]
    assert texts[0].startswith("40 earlier log records")
    assert texts[1:] == [f"record {number}" for number in range(40, 50)]
