"""A link that loses its connection or its worker and finds it again, on transports in memory."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import pytest
from fault_helpers import until

from wove_ws_sync.connection import Connection
from wove_ws_sync.errors import AuthenticationRejected, ConnectionLost, DeliveryTimeout, ExecutorClosed
from wove_ws_sync.frames import FEATURES
from wove_ws_sync.link import Link, LinkState
from wove_ws_sync.options import DeliveryOptions, LinkOptions
from wove_ws_sync.session import Session
from wove_ws_sync.testing import ManualClock, MemoryTransport

WAIT = 10.0
ALL = frozenset(FEATURES)
HERE, ELSEWHERE = "a" * 32, "b" * 32


class Fixture:
    """A link with one session; every dial takes the next transport that a test laid ready."""

    def __init__(self, **config: Any) -> None:
        self.clock = ManualClock()
        self.ready: SimpleQueue[MemoryTransport] = SimpleQueue()
        self.made: list[MemoryTransport] = []
        self.headers: list[dict[str, str]] = []
        options = LinkOptions.from_config({"url": "ws://127.0.0.1:9/wove", **config})
        self.link = Link(options, dial=self.dial, clock=self.clock, spread=lambda: 0.0)
        self.session = Session(self.link, "env")
        assert self.link.attach(self.session)
        self.events: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def dial(self, options: LinkOptions, headers: Mapping[str, str], *, clock: Any) -> MemoryTransport:
        self.headers.append(dict(headers))
        transport = self.ready.get(timeout=WAIT)
        if transport.dial_error is not None:
            raise transport.dial_error
        return transport

    def worker(self, name: str = HERE, features: frozenset[str] | None = ALL) -> MemoryTransport:
        """Lay a connection to a worker ready for the next dial."""
        transport = MemoryTransport(self.clock, features=features, worker=name)
        self.made.append(transport)
        self.ready.put(transport)
        return transport

    def submit(self, run_id: str, wait: bool = True, size: int = 0, **delivery: Any) -> None:
        command = {"type": "run_task", "run_id": run_id, "task_id": "task", "padding": "x" * size}
        self.session.submit(command, DeliveryOptions(**delivery), self.events.put, wait=wait)

    def next(self) -> dict[str, Any]:
        return self.events.get(timeout=WAIT)

    def redial(self) -> None:
        """Let the time of the next dial come."""
        until(lambda: self.link.state is LinkState.BACKOFF)
        self.clock.advance(0.2)


@pytest.fixture
def make() -> Iterator[Callable[..., Fixture]]:
    """Make fixtures, and close their links afterwards."""
    made: list[Fixture] = []

    def factory(**config: Any) -> Fixture:
        made.append(Fixture(**config))
        return made[-1]

    yield factory
    for fixture in made:
        for transport in fixture.made:
            transport.resume_reading()
        fixture.link.close(WAIT)


def state(run_id: str, what: str) -> dict[str, Any]:
    return {"type": "resume_state", "alive": [], "finished": [], "unknown": [], "lost": [], what: [run_id]}


def ended(run_id: str) -> dict[str, Any]:
    return {"type": "task_result", "run_id": run_id, "result": 1}


def lose(fixture: Fixture, worker: MemoryTransport, **delivery: Any) -> None:
    """Have a run under way on *worker*, and lose the connection."""
    fixture.submit("r1", **delivery)
    worker.sent(1)
    worker.hang_up(1006, "gone")


def test_the_handshake_offers_the_extensions(make: Callable[..., Fixture]) -> None:
    """The same name for every connection of the link, and how long it may take to come back."""
    fixture = make(resume_window=7.5)
    lose(fixture, fixture.worker())
    fixture.worker()
    fixture.redial()
    until(lambda: len(fixture.headers) == 2)
    first, second = fixture.headers
    assert first["X-Wove-Sync"] == "1; f=resume,ack,drain,progress"
    assert first["X-Wove-Resume-Window"] == "7.5"
    assert len(first["X-Wove-Host"]) == 32 and first["X-Wove-Host"] == second["X-Wove-Host"]


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
def test_f14_the_same_worker_gives_its_runs_back(make: Callable[..., Fixture], policy: str) -> None:
    """resume is the first thing said; what is alive goes on, and nothing is sent twice."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_orphan_policy=policy)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.submit("r2")
    again = fixture.worker()
    fixture.redial()
    resume, new = again.sent(2)
    assert (resume["type"], resume["run_ids"], resume["more"]) == ("resume", ["r1"], False)
    assert (new["type"], new["run_id"]) == ("run_task", "r2")
    again.feed(state("r1", "alive"), ended("r1"), ended("r2"))
    assert {fixture.next()["run_id"], fixture.next()["run_id"]} == {"r1", "r2"}
    stats = fixture.link.stats()
    assert (stats["losses"], stats["resumes"], stats["resumed_runs"], stats["requeues"]) == (1, 1, 1, 0)
    assert "losses=1 resumes=1" in repr(fixture.link)


def test_records_name_the_connection_that_they_are_about(
    make: Callable[..., Fixture], caplog: pytest.LogCaptureFixture
) -> None:
    """The loss of the first is not that of the one that is dialled next."""
    caplog.set_level(logging.INFO, "wove_ws_sync.host")
    fixture = make()
    lose(fixture, fixture.worker())
    again = fixture.worker()
    fixture.redial()
    again.sent(1)
    told = [(record.__dict__["action"], record.__dict__["generation"]) for record in caplog.records]
    assert told == [("connect", 1), ("lose", 1), ("connect", 2)]


@pytest.mark.parametrize(("policy", "last"), [("cancel", 9.5), ("requeue", 10.0)])
def test_f14_there_is_a_dial_when_the_window_is_nearly_over(
    make: Callable[..., Fixture], policy: str, last: float
) -> None:
    """A worker that can be reached again within the window has its runs asked for, however late that is."""
    fixture = make(resume_window=10.0, reconnect_initial_delay=8.0)
    lose(fixture, fixture.worker(), delivery_orphan_policy=policy)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.worker().dial_error = ConnectionRefusedError("no")
    fixture.clock.advance(8.0)
    until(lambda: fixture.link.stats()["dials"] == 2 and fixture.link.state is LinkState.BACKOFF)
    again = fixture.worker()
    fixture.clock.advance(last - 8.0)
    assert again.sent(1)[0]["type"] == "resume"
    again.feed(state("r1", "alive"), ended("r1"))
    assert fixture.next()["type"] == "task_result"


def test_what_the_worker_never_saw_is_sent_again(make: Callable[..., Fixture]) -> None:
    """Lost on the way out: no caller hears of it."""
    fixture = make()
    lose(fixture, fixture.worker())
    again = fixture.worker()
    fixture.redial()
    again.sent(1)
    again.feed(state("r1", "unknown"))
    assert again.sent(2)[1]["run_id"] == "r1"
    again.feed(ended("r1"))
    assert fixture.next()["type"] == "task_result"
    assert fixture.link.stats()["resends"] == 1


@pytest.mark.parametrize("policy", ["cancel", "requeue"])
@pytest.mark.parametrize("features", [ALL, frozenset(), None], ids=["ours", "plain", "foreign"])
def test_f13_another_worker_has_nothing_to_give_back(
    make: Callable[..., Fixture], policy: str, features: frozenset[str] | None
) -> None:
    """A restarted worker is another one: the orphan policy decides as soon as it answers."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_orphan_policy=policy)
    again = fixture.worker(ELSEWHERE if features else "", features)
    fixture.redial()
    if policy == "requeue":
        [second] = again.sent(1)
        assert (second["type"], second["run_id"], second["attempt"]) == ("run_task", "r1", 2)
        again.feed(ended("r1"))
        assert fixture.next()["type"] == "task_result"
    else:
        error = fixture.next()["exception"]
        assert isinstance(error, ConnectionLost)
        assert (error.close_code, error.maybe_executed) == (1006, True)


def test_a_worker_that_does_not_answer_the_question_is_not_waited_for(make: Callable[..., Fixture]) -> None:
    """Five seconds after the question, and no sooner than the window, the policy decides."""
    fixture = make(resume_window=1.0)
    lose(fixture, fixture.worker())
    again = fixture.worker()
    fixture.redial()
    again.sent(1)
    fixture.clock.advance(4.9)
    again.settle()
    assert fixture.events.empty()
    fixture.clock.advance(0.1)
    assert isinstance(fixture.next()["exception"], ConnectionLost)


def test_a_run_without_a_window_is_lost_at_once(make: Callable[..., Fixture]) -> None:
    """resume_window=0 is how Wove has it."""
    fixture = make(resume_window=0)
    lose(fixture, fixture.worker())
    assert isinstance(fixture.next()["exception"], ConnectionLost)


def test_a_deadline_counts_while_the_connection_is_lost(make: Callable[..., Fixture]) -> None:
    """And the worker learns from the next list that the run is not wanted any more."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_timeout=5.0)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.clock.advance(5.0)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)
    again = fixture.worker()
    fixture.submit("r2")
    assert [frame.get("run_ids", frame.get("run_id")) for frame in again.sent(2)] == [[], "r2"]


@pytest.mark.parametrize("how", ["stop", "time"])
def test_a_cancel_that_waits_while_the_worker_is_asked_is_told_at_its_end(
    make: Callable[..., Fixture], how: str
) -> None:
    """Under require_ack it could not be told before, as nobody knew whether the worker has the run."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_cancel_mode="require_ack")
    again = fixture.worker()
    fixture.redial()
    assert again.sent(1)[0]["run_ids"] == ["r1"]
    run = fixture.link.find("r1")
    assert run is not None
    fixture.link.cancel(run)
    if how == "stop":
        fixture.session.abandon()
    else:
        fixture.clock.advance(10.0)
    assert fixture.next()["acknowledged"] is False
    assert again.sent(2)[1]["type"] == "cancel_task"


@pytest.mark.parametrize("policy", ["fail", "detach", "requeue"])
def test_what_ends_as_the_worker_does_not_answer_is_ended_there(
    make: Callable[..., Fixture], policy: str
) -> None:
    """Unless it is to be delivered again, under the same id."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_orphan_policy=policy)
    again = fixture.worker()
    fixture.redial()
    again.sent(1)
    fixture.clock.advance(60.0)
    told = {"fail": "cancel_task", "detach": "detach_task", "requeue": "run_task"}
    assert again.sent(2)[1]["type"] == told[policy]


@pytest.mark.parametrize("policy", ["cancel", "detach"])
def test_what_ends_while_the_worker_is_asked_is_ended_there(
    make: Callable[..., Fixture], policy: str
) -> None:
    """The run is in the list of those that are wanted, which has left."""
    fixture = make()
    lose(fixture, fixture.worker(), delivery_orphan_policy=policy)
    again = fixture.worker()
    fixture.redial()
    assert again.sent(1)[0]["run_ids"] == ["r1"]
    fixture.session.abandon()
    fixture.next()
    again.feed(state("r1", "alive"))
    assert again.sent(2)[1]["type"] == f"{policy}_task"


def test_terminal_events_are_acknowledged_together(make: Callable[..., Fixture]) -> None:
    """Half a second later, or when there are many; also those of runs that nobody knows any more."""
    fixture = make()
    worker = fixture.worker()
    for number in range(3):
        fixture.submit(f"r{number}")
    worker.feed(*(ended(f"r{number}") for number in range(3)), ended("forgotten"))
    worker.settle()
    assert len(worker.sent(3)) == 3
    fixture.clock.advance(0.5)
    acknowledged = worker.sent(4)[3]
    assert (acknowledged["type"], acknowledged["run_ids"]) == ("event_ack", ["r0", "r1", "r2", "forgotten"])
    worker.feed([ended(f"unknown-{number}") for number in range(300)])
    fixture.submit("last")
    assert [len(frame["run_ids"]) for frame in worker.sent(6)[4:] if "run_ids" in frame] == [300]


def test_f24_a_worker_that_does_not_read_gets_no_acknowledgement_of_unknown_runs(
    make: Callable[..., Fixture],
) -> None:
    """It could have this process hold any number of them."""
    fixture = make()
    worker = fixture.worker()
    fixture.submit("r")
    worker.sent(1)
    worker.reading = False
    for number in range(30):
        worker.feed([ended(f"{'x' * 4000}{number}-{position}") for position in range(256)])
    worker.settle()
    assert 1024 * 1024 < worker.queued_bytes < 3 * 1024 * 1024
    worker.feed(ended("r"))
    assert fixture.next()["type"] == "task_result"
    fixture.clock.advance(0.5)
    worker.resume_reading()
    fixture.submit("last")
    until(lambda: ["r"] in [frame.get("run_ids") for frame in worker.sent(1)])


def test_a_run_id_that_is_used_again_names_a_new_run(make: Callable[..., Fixture]) -> None:
    """The worker hears first that the earlier end has arrived, as it would send that one again."""
    fixture = make()
    worker = fixture.worker()
    for _ in range(2):
        fixture.submit("r")
        worker.feed(ended("r"))
        assert fixture.next()["type"] == "task_result"
    assert [frame["type"] for frame in worker.sent(3)] == ["run_task", "event_ack", "run_task"]


def test_a_run_id_that_is_used_again_at_once_names_a_new_run(
    make: Callable[..., Fixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same if somebody submits it before the reader has gone on from the earlier end."""
    fixture = make()
    worker = fixture.worker()
    there, go_on = threading.Event(), threading.Event()
    acknowledge = Connection.acknowledge

    def paused(connection: Connection) -> None:
        there.set()
        go_on.wait(WAIT)
        acknowledge(connection)

    monkeypatch.setattr(Connection, "acknowledge", paused)
    fixture.submit("r")
    worker.feed(ended("r"))
    assert there.wait(WAIT)
    fixture.submit("r")
    go_on.set()
    assert fixture.next()["type"] == "task_result"
    worker.feed(ended("r"))
    assert fixture.next()["type"] == "task_result"
    assert [frame["type"] for frame in worker.sent(3)] == ["run_task", "event_ack", "run_task"]


def test_an_end_that_comes_before_the_runs_are_found_is_not_acknowledged(
    make: Callable[..., Fixture],
) -> None:
    """Nobody took it: the worker must keep it for its answer to resume."""
    fixture = make()
    lose(fixture, fixture.worker())
    again = fixture.worker()
    fixture.redial()
    again.sent(1)
    again.feed(ended("r1"))
    again.settle()
    fixture.clock.advance(0.5)
    again.feed(state("r1", "finished"), ended("r1"))
    assert fixture.next()["type"] == "task_result"
    fixture.clock.advance(0.5)
    assert [frame["run_ids"] for frame in again.sent(2)] == [["r1"], ["r1"]]
    assert fixture.link.stats()["dropped_stale"] == 1


def test_f18_a_worker_that_drains_keeps_what_it_has(make: Callable[..., Fixture]) -> None:
    """What is new goes over a second connection; the first one ends behind its last run."""
    fixture = make()
    old = fixture.worker()
    fixture.submit("r1")
    old.sent(1)
    old.feed({"type": "draining", "timeout": 30.0})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    new = fixture.worker(ELSEWHERE)
    fixture.submit("r2")
    assert new.sent(1)[0]["run_id"] == "r2"
    assert fixture.link.state is LinkState.READY
    old.feed({"type": "task_started", "run_id": "r1"}, ended("r1"))
    assert [fixture.next()["type"], fixture.next()["type"]] == ["task_started", "task_result"]
    assert [frame["type"] for frame in old.sent(3)] == ["run_task", "event_ack", "shutdown"]
    until(lambda: old.disposed)
    new.feed(ended("r2"))
    assert fixture.next()["run_id"] == "r2"
    stats = fixture.link.stats()
    assert (stats["drains"], stats["losses"], stats["dials"]) == (1, 0, 2)


@pytest.mark.parametrize("policy", ["cancel", "requeue"])
def test_f18_a_run_handed_back_goes_to_the_next_worker(make: Callable[..., Fixture], policy: str) -> None:
    """It had not started: that costs nothing under any policy, and the dial comes by itself."""
    fixture = make()
    old, new = fixture.worker(), fixture.worker(ELSEWHERE)
    fixture.submit("r1", delivery_orphan_policy=policy)
    old.sent(1)
    error = {"kind": "WorkerStopping", "retryable": True, "source": "executor", "started": False}
    old.feed({"type": "draining", "timeout": 30.0}, {"type": "task_error", "run_id": "r1", "error": error})
    [again] = new.sent(1)
    assert (again["run_id"], "attempt" in again) == ("r1", False)
    new.feed(ended("r1"))
    assert fixture.next()["type"] == "task_result"


def test_a_draining_worker_that_dies_takes_its_runs_with_it(make: Callable[..., Fixture]) -> None:
    """It listens no more, so there is nothing to wait for; what another worker has is not touched."""
    fixture = make()
    old, new = fixture.worker(), fixture.worker(ELSEWHERE)
    fixture.submit("lost")
    fixture.submit("again", delivery_orphan_policy="requeue")
    old.sent(2)
    old.feed({"type": "draining", "timeout": 30.0})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    fixture.submit("new")
    new.sent(1)
    old.hang_up()
    assert isinstance(fixture.next()["exception"], ConnectionLost)
    assert [frame["run_id"] for frame in new.sent(2)] == ["new", "again"]
    new.feed(ended("new"), ended("again"))
    assert {fixture.next()["run_id"], fixture.next()["run_id"]} == {"new", "again"}


def test_a_link_closes_while_a_worker_drains(make: Callable[..., Fixture]) -> None:
    """Both connections are told, and all threads end."""
    fixture = make()
    old, new = fixture.worker(), fixture.worker(ELSEWHERE)
    fixture.submit("r1")
    old.sent(1)
    old.feed({"type": "draining", "timeout": 30.0})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    fixture.submit("r2")
    new.sent(1)
    fixture.link.close(WAIT)
    assert fixture.link.state is LinkState.CLOSED
    assert old.disposed and new.disposed
    assert {fixture.next()["type"], fixture.next()["type"]} == {"task_cancelled"}


def test_detach_lets_go_and_attach_takes_up(make: Callable[..., Fixture]) -> None:
    """detach_task when the session stops, attach_task from another session, the result by that."""
    fixture = make()
    worker = fixture.worker()
    fixture.submit("r1", delivery_orphan_policy="detach")
    worker.sent(1)
    fixture.session.abandon()
    assert isinstance(fixture.next()["exception"], ConnectionLost)
    assert worker.sent(2)[1]["type"] == "detach_task"
    fixture.session.attach("r1", DeliveryOptions(delivery_heartbeat_seconds=5.0), fixture.events.put)
    attach = worker.sent(3)[2]
    assert (attach["type"], attach["run_id"]) == ("attach_task", "r1")
    assert attach["delivery"]["delivery_heartbeat_seconds"] == 5.0
    worker.feed(ended("r1"))
    assert fixture.next()["type"] == "task_result"


@pytest.mark.parametrize("features", [None, frozenset()], ids=["foreign", "plain"])
def test_attach_needs_a_worker_that_keeps_runs(
    make: Callable[..., Fixture], features: frozenset[str] | None
) -> None:
    """An error that says so, and nothing is sent."""
    fixture = make()
    fixture.worker("", features)
    fixture.session.attach("r1", DeliveryOptions(), fixture.events.put)
    error = fixture.next()["exception"]
    assert isinstance(error, RuntimeError) and "'resume'" in str(error)


def test_submit_waits_for_room(make: Callable[..., Fixture]) -> None:
    """What may have to be sent again is bounded; a worker that starts a run makes room."""
    fixture = make(send_buffer_bytes=4096)
    worker = fixture.worker()
    fixture.submit("r1", size=3000)
    thread = threading.Thread(target=fixture.submit, args=("r2",), kwargs={"size": 3000})
    thread.start()
    until(lambda: fixture.link.stats()["waits_for_room"])
    assert len(worker.sent(1)) == 1
    worker.feed({"type": "task_started", "run_id": "r1"})
    assert worker.sent(2)[1]["run_id"] == "r2"
    thread.join(WAIT)
    assert fixture.link.stats()["buffered_bytes"] < 4096


def test_a_deadline_ends_the_wait_for_room(make: Callable[..., Fixture]) -> None:
    """The run ends with DeliveryTimeout; a message larger than the buffer goes when it is empty."""
    fixture = make(send_buffer_bytes=2048)
    worker = fixture.worker()
    fixture.submit("large", size=100_000)
    thread = threading.Thread(
        target=fixture.submit, args=("late",), kwargs={"size": 3000, "delivery_timeout": 2.0}
    )
    thread.start()
    until(lambda: fixture.link.stats()["waits_for_room"])
    fixture.clock.advance(2.0)
    late = fixture.next()
    assert late["run_id"] == "late" and isinstance(late["exception"], DeliveryTimeout)
    thread.join(WAIT)
    assert len(worker.sent(1)) == 1


def test_closing_ends_the_wait_for_room(make: Callable[..., Fixture]) -> None:
    """ExecutorClosed, and nothing is left behind."""
    fixture = make(send_buffer_bytes=2048)
    fixture.worker()
    fixture.submit("r1", size=3000)
    raised: SimpleQueue[BaseException] = SimpleQueue()

    def submit() -> None:
        try:
            fixture.submit("r2", size=3000)
        except BaseException as exc:
            raised.put(exc)

    thread = threading.Thread(target=submit)
    thread.start()
    until(lambda: fixture.link.stats()["waits_for_room"])
    fixture.link.close(WAIT)
    assert isinstance(raised.get(timeout=WAIT), ExecutorClosed)
    thread.join(WAIT)


def test_a_requeued_run_asks_first_however_late(make: Callable[..., Fixture]) -> None:
    """The window is long over when the same worker is back: what it has is found, not run again."""
    fixture = make(resume_window=1.0)
    lose(fixture, fixture.worker(), delivery_orphan_policy="requeue", delivery_timeout=600.0)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    again = fixture.worker()
    fixture.clock.advance(300.0)
    assert again.sent(1)[0]["run_ids"] == ["r1"]
    again.feed(state("r1", "finished"), ended("r1"))
    assert fixture.next()["type"] == "task_result"
    assert fixture.link.stats()["requeues"] == 0


@pytest.mark.parametrize("answer", ["unknown", "finished"])
def test_a_run_that_ends_every_connection_comes_to_an_end(make: Callable[..., Fixture], answer: str) -> None:
    """Its message, or its result, ends connection after connection: after ten of them it is given up."""
    fixture = make(resume_window=3600.0)
    lose(fixture, fixture.worker())
    for _ in range(11):
        again = fixture.worker()
        until(lambda: fixture.link.state is LinkState.BACKOFF or not fixture.events.empty())
        fixture.clock.advance(60.0)
        assert again.sent(1)[0]["run_ids"] == ["r1"]
        again.feed(state("r1", answer))
        again.settle()
        again.hang_up(1009, "too big")
    assert isinstance(fixture.next()["exception"], ConnectionLost)


def test_what_a_draining_worker_says_proves_nothing_of_the_next(make: Callable[..., Fixture]) -> None:
    """Its heartbeats go on while nobody answers at the address yet: a new run is patient all the same."""
    fixture = make()
    old = fixture.worker()
    fixture.submit("r1")
    old.sent(1)
    old.feed({"type": "draining", "timeout": 30.0}, {"type": "heartbeat", "run_id": "r1"})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    assert fixture.next()["type"] == "heartbeat"
    refused = fixture.worker()
    refused.dial_error = ConnectionRefusedError("not yet")
    fixture.submit("r2")
    fixture.redial()
    assert fixture.worker(ELSEWHERE).sent(1)[0]["run_id"] == "r2"


def test_a_worker_that_drains_before_it_answers_is_waited_for(make: Callable[..., Fixture]) -> None:
    """It has the runs of the connection before: no goodbye, and another worker does not make them lost."""
    fixture = make()
    lose(fixture, fixture.worker())
    again, new = fixture.worker(), fixture.worker(ELSEWHERE)
    fixture.redial()
    again.sent(1)
    again.feed({"type": "draining", "timeout": 30.0})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    fixture.submit("r2")
    assert new.sent(1)[0]["run_id"] == "r2"
    again.feed(state("r1", "alive"), ended("r1"))
    assert fixture.next()["type"] == "task_result"
    assert [frame["type"] for frame in again.sent(3)] == ["resume", "event_ack", "shutdown"]


def test_a_run_handed_back_to_nobody_ends_at_once(make: Callable[..., Fixture]) -> None:
    """The address answers with a final no while a worker drains: its runs do not wait for its end."""
    fixture = make()
    old, refused = fixture.worker(), fixture.worker()
    refused.dial_error = AuthenticationRejected("no", status=401)
    fixture.submit("r1")
    old.sent(1)
    old.feed({"type": "draining", "timeout": 30.0})
    until(lambda: fixture.link.state is LinkState.DRAINING)
    fixture.submit("r2")
    assert isinstance(fixture.next()["exception"], AuthenticationRejected)
    error = {"kind": "WorkerStopping", "retryable": True, "source": "executor", "started": False}
    old.feed({"type": "task_error", "run_id": "r1", "error": error})
    assert isinstance(fixture.next()["exception"], AuthenticationRejected)


def test_a_large_submission_gets_its_turn(make: Callable[..., Fixture]) -> None:
    """Whoever waits for room first gets it first, however small those are that come later."""
    fixture = make(send_buffer_bytes=4096)
    worker = fixture.worker()
    fixture.submit("r0", size=1000)
    threads = []
    for name, size in (("large", 3500), ("small", 100)):
        threads.append(threading.Thread(target=fixture.submit, args=(name,), kwargs={"size": size}))
        threads[-1].start()
        until(lambda: len(fixture.link._crowd) == len(threads))
    worker.feed({"type": "task_started", "run_id": "r0"})
    assert [frame["run_id"] for frame in worker.sent(3)] == ["r0", "large", "small"]
    for thread in threads:
        thread.join(WAIT)


def test_ended_runs_hold_no_memory(make: Callable[..., Fixture]) -> None:
    """Nothing can be sent and callers give up: neither their messages nor their runs are kept."""
    fixture = make()
    worker = fixture.worker()
    fixture.submit("first")
    worker.sent(1)
    worker.reading = False
    for number in range(500):
        fixture.submit(f"r{number}", size=1000, wait=False, delivery_timeout=600.0)
        fixture.session.cancel(f"r{number}")
    assert worker.queued_bytes == 0
    stats = fixture.link.stats()
    assert stats["buffered_bytes"] < 1000 and stats["runs"] == 1
    assert all(run.receipt is None for _, _, run in fixture.link._table._alarms._heap if run.terminal)


def test_f35_an_exception_that_strikes_a_waiter_blocks_nobody(make: Callable[..., Fixture]) -> None:
    """Its turn for room goes with it, wherever in the way back it struck."""
    fixture = make(send_buffer_bytes=2048)
    worker = fixture.worker()
    fixture.submit("r1", size=3000)
    fixture.link._crowd.append((threading.get_ident(), object()))  # as a strike would leave it
    fixture.link._mend()  # as it does on its way out
    worker.feed({"type": "task_started", "run_id": "r1"})
    fixture.submit("r2", size=100)
    assert [frame["run_id"] for frame in worker.sent(2)] == ["r1", "r2"]


def test_f35_a_message_withdrawn_by_a_decision_that_was_struck_is_made_anew(
    make: Callable[..., Fixture],
) -> None:
    """Nothing empty leaves, and the run goes out after all."""
    fixture = make()
    worker = fixture.worker()
    fixture.submit("first")
    worker.sent(1)
    worker.reading = False
    fixture.submit("r1", wait=False)
    run = fixture.link.find("r1")
    assert run is not None and run.withdraw()  # here the exception struck
    fixture.link._mend()
    worker.resume_reading()
    fixture.submit("last")
    assert [frame["run_id"] for frame in worker.sent(3)] == ["first", "r1", "last"]
