"""What the numbers of a service say, at chosen moments."""

from __future__ import annotations

import random
from typing import Any

import pytest

from wove_ws_sync.worker.commands import RunTask
from wove_ws_sync.worker.events import cancelled_event, error_event, life_event, plain_error, service_error
from wove_ws_sync.worker.runs import Run
from wove_ws_sync.worker.statistics import BOUNDS, Statistics, quantile
from wove_ws_sync.worker.status import _failure, _live

OK = b'{"type":"task_result","run_id":"r","task_id":"t","result_pickle":""}'
ERROR = error_event("r", "t", plain_error("ValueError", "no", "task"))
CANCELLED = cancelled_event("r", "t")


def run_of(run_id: str = "r", task_id: str = "t") -> Run:
    return Run(RunTask(run_id, task_id, "", None, None, "best_effort"), None)


def finished(
    statistics: Statistics, accepted: float, started: float | None, ended: float, event: Any = OK
) -> Run:
    run = run_of()
    statistics.accepted(run, accepted)
    if started is not None:
        run.began_at = started
        statistics.started(run, ended)
    statistics.ended(run, event, ended)
    return run


def test_a_run_is_queued_then_running_then_ended() -> None:
    """Each moves on once, and the times are those of its steps."""
    statistics, run = Statistics(100.0), run_of()
    statistics.accepted(run, 100.0)
    assert (statistics.queued, statistics.running) == (1, 0)
    run.began_at = 101.0
    statistics.started(run, 101.5)
    assert (statistics.queued, statistics.running) == (0, 1)
    statistics.ended(run, OK, 104.0)
    assert (statistics.queued, statistics.running) == (0, 0)
    [record] = statistics.recent
    assert (record.outcome, record.started, record.ran) == ("ok", 101.0, 3.0)
    assert statistics.wait_seconds.sum == 1.0
    assert statistics.run_seconds.sum == 3.0
    assert statistics.ended_total == {"ok": 1, "error": 0, "cancelled": 0, "abandoned": 0}


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (OK, "ok"),
        (ERROR, "error"),
        (service_error("r", "t", "WorkerStopping", "…", retryable=True), "error"),
        (CANCELLED, "cancelled"),
        (None, "abandoned"),
    ],
)
def test_the_outcome_is_that_of_the_terminal_event(event: bytes | None, outcome: str) -> None:
    """As the service encodes them."""
    statistics = Statistics(0.0)
    finished(statistics, 0.0, None, 1.0, event)
    assert statistics.recent[0].outcome == outcome
    assert statistics.ended_total[outcome] == sum(statistics.ended_total.values()) == 1


def test_an_end_counts_once() -> None:
    """Whatever is told of a run after it changes nothing."""
    statistics = Statistics(0.0)
    run = finished(statistics, 0.0, 0.5, 1.0)
    statistics.ended(run, ERROR, 2.0)
    statistics.started(run, 2.0)
    statistics.progressed(run, 1, 2, "late", 2.0)
    assert statistics.ended_total["ok"] == sum(statistics.ended_total.values()) == 1
    assert (statistics.queued, statistics.running) == (0, 0)


def test_a_run_that_never_began_has_no_run_time() -> None:
    """It was withdrawn from the queue; only its end counts."""
    statistics = Statistics(0.0)
    finished(statistics, 0.0, None, 5.0, CANCELLED)
    assert sum(statistics.run_seconds.counts) == sum(statistics.wait_seconds.counts) == 0
    assert statistics.recent[0].ran is None


def test_a_beginning_lies_between_acceptance_and_now() -> None:
    """Clocks of threads and the order of their reports do not make times negative."""
    statistics, run = Statistics(0.0), run_of()
    statistics.accepted(run, 10.0)
    run.began_at = 9.0
    statistics.started(run, 11.0)
    assert run.record.started == 10.0


def test_progress_is_shown_and_bounded() -> None:
    """What a task says of itself may be of any length."""
    statistics, run = Statistics(0.0), run_of(task_id="t" * 5000, run_id="r" * 5000)
    statistics.accepted(run, 0.0)
    statistics.started(run, 0.0)
    statistics.progressed(run, 3, 12, "m" * 5000, 1.0)
    shown = _live(run.record, 2.0)
    assert (shown["done"], shown["total"], shown["running"]) == (3, 12, 2.0)
    assert max(len(shown[field]) for field in ("id", "task", "message")) <= 300


def test_everything_is_bounded() -> None:
    """100,000 runs over a day leave a fixed amount."""
    statistics = Statistics(0.0)
    for number in range(100_000):
        finished(statistics, float(number), number + 0.1, number + 0.5, ERROR)
    assert len(statistics.recent) == 50
    assert len(statistics.failures) == 20
    assert len(statistics._bins) == 600
    assert not statistics._queued and not statistics._running


def test_the_curves_have_what_happened_when_it_did() -> None:
    """In bins of five seconds; the last one is the one of now."""
    statistics = Statistics(1000.0)
    for moment in (1000.0, 1001.0, 1004.9, 1005.0, 1011.0):
        finished(statistics, moment, moment, moment, OK)
    bins = statistics.series(1012.0, step=5, count=4)
    assert [each.second for each in bins] == [995, 1000, 1005, 1010]
    assert [each.ends.get("ok", 0) for each in bins] == [0, 3, 1, 1]
    assert [each.accepted for each in bins] == [0, 3, 1, 1]
    later = statistics.series(1030.0, step=5, count=4)
    assert [each.ends.get("ok", 0) for each in later] == [0, 0, 0, 0]


def test_the_rate_is_of_whole_seconds() -> None:
    """The second that is not over yet would make it too low."""
    statistics = Statistics(0.0)
    for second in range(20):
        for _ in range(second):
            finished(statistics, second, second, second + 0.5)
    assert statistics.over_last(19.2, 3).ends == {"ok": 16 + 17 + 18}


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quantiles_are_exact_to_a_class(share: float) -> None:
    """Against the sorted times, at most one class off."""
    rnd, statistics = random.Random(7), Statistics(0.0)
    times = sorted(rnd.expovariate(3) for _ in range(2001))
    for each in times:
        finished(statistics, 0.0, 0.0, each)
    found = quantile(statistics.series(100.0, step=200, count=1)[0].times, share)
    true = times[int(share * 2001)]
    assert found is not None
    assert true / 2**0.55 < found < true * 2**0.55


def test_quantiles_of_nothing_and_of_the_largest() -> None:
    """There is no typical time without times; what is beyond the last class is not made larger."""
    assert quantile({}, 0.5) is None
    assert quantile({len(BOUNDS): 3}, 0.5) == BOUNDS[-1]


def test_an_error_is_shown_by_its_text() -> None:
    """Kind, message and traceback are those that the host gets, without running a pickle."""
    statistics = Statistics(0.0)
    error = plain_error("ValueError", "what <b>it</b> was", "task", text="Traceback …")
    finished(statistics, 0.0, 0.0, 1.0, error_event("r", "t", error, b"never read"))
    finished(statistics, 0.0, 0.0, 1.0, service_error("r", "t", "HostAway", "away", retryable=True))
    shown = [_failure(failure, 2.0) for failure in statistics.failures]
    assert (shown[0]["kind"], shown[0]["message"], shown[0]["traceback"]) == (
        "ValueError",
        "what <b>it</b> was",
        "Traceback …",
    )
    assert (shown[1]["kind"], shown[1]["message"], shown[1]["ago"]) == ("HostAway", "away", 1.0)


class Planted:
    """Its pickle makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_pickle_that_does_something_is_not_run(tmp_path: Any) -> None:
    """A task could have made it, and it would run on the loop of the service."""
    planted = tmp_path / "planted"
    event = error_event("r", "t", {"kind": "E", "message": Planted(str(planted))})
    statistics = Statistics(0.0)
    finished(statistics, 0.0, 0.0, 1.0, event)
    assert "cannot be shown" in _failure(statistics.failures[0], 1.0)["message"]
    assert not planted.exists()


@pytest.mark.parametrize(
    "event", [ERROR[:40], b'{"type":"task_error","error_pickle":"!"}', b'{"type":"task_error"}']
)
def test_an_event_of_another_shape_is_shown_as_that(event: bytes) -> None:
    """An engine of somebody else's making may send anything."""
    statistics = Statistics(0.0)
    finished(statistics, 0.0, 0.0, 1.0, event)
    assert "cannot be shown" in _failure(statistics.failures[0], 1.0)["message"]


def test_a_large_error_is_not_kept() -> None:
    """Twenty of them could take all memory."""
    statistics = Statistics(0.0)
    error = plain_error("ValueError", "no", "task")
    finished(statistics, 0.0, 0.0, 1.0, error_event("r", "t", error, b"A" * 1024 * 1024))
    assert statistics.failures[0].event == b""
    assert "too large" in _failure(statistics.failures[0], 1.0)["message"]


def test_other_events_end_nothing_well() -> None:
    """What is no terminal event is not counted as a success."""
    statistics = Statistics(0.0)
    finished(statistics, 0.0, 0.0, 1.0, life_event("r", "t", started=True))
    assert statistics.ended_total["ok"] == 0
