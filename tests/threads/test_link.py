"""The link's two threads and two locks, on a transport in memory and a clock that stands still."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import pytest
from fault_helpers import until, within
from strikes import Struck, struck

import wove_ws_sync.link
from wove_ws_sync import _book, _link_core, _link_threads, connection, runs
from wove_ws_sync.errors import (
    AuthenticationRejected,
    ConnectionLost,
    DeliveryTimeout,
    ExecutorClosed,
    HandshakeRejected,
)
from wove_ws_sync.link import Link, LinkState
from wove_ws_sync.options import DeliveryOptions, LinkOptions
from wove_ws_sync.session import Session
from wove_ws_sync.testing import ManualClock, MemoryTransport
from wove_ws_sync.timing import Deadline

WAIT = 10.0


class Fixture:
    """A link with one session, and a queue of what its runs got."""

    def __init__(self, **config: Any) -> None:
        self.clock = ManualClock()
        self.transport = MemoryTransport(self.clock)
        options = LinkOptions.from_config({"url": "ws://127.0.0.1:9/wove", **config})
        self.link = Link(options, dial=self.transport.dial, clock=self.clock)
        self.session = self.new_session()
        self.events: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def new_session(self) -> Session:
        session = Session(self.link, "env")
        assert self.link.attach(session)
        return session

    def submit(self, run_id: str, session: Session | None = None, wait: bool = True, **delivery: Any) -> None:
        command = {"type": "run_task", "run_id": run_id, "task_id": "task", "delivery": {}}
        (session or self.session).submit(command, DeliveryOptions(**delivery), self.events.put, wait=wait)

    def next(self) -> dict[str, Any]:
        return self.events.get(timeout=WAIT)


@pytest.fixture
def make() -> Iterator[Callable[..., Fixture]]:
    """Make fixtures, and close their links afterwards."""
    made: list[Fixture] = []

    def factory(**config: Any) -> Fixture:
        made.append(Fixture(**config))
        return made[-1]

    yield factory
    for fixture in made:
        fixture.transport.resume_reading()
        fixture.link.close(WAIT)


def test_a_run_goes_out_and_its_events_come_back(make: Callable[..., Fixture]) -> None:
    """The first use dials; events reach the run's own sink in order."""
    fixture = make()
    fixture.submit("r1")
    assert fixture.transport.sent(1)[0]["run_id"] == "r1"
    fixture.transport.feed({"type": "task_started", "run_id": "r1"}, {"type": "task_result", "run_id": "r1"})
    assert [fixture.next()["type"], fixture.next()["type"]] == ["task_started", "task_result"]
    assert fixture.link.state is LinkState.READY


def test_one_dial_for_many_threads(make: Callable[..., Fixture]) -> None:
    """However many threads come first, one connection is made."""
    fixture = make()
    threads = [threading.Thread(target=fixture.submit, args=(f"r{n}",)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(fixture.transport.sent(16)) == 16
    assert fixture.link.stats()["dials"] == 1


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeoutError])
def test_f35_a_strike_in_the_thread_that_dials_is_not_the_end_of_others_runs(
    make: Callable[..., Fixture], monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    """It ends the run of the thread that it strikes; the connection comes nevertheless."""
    fixture = make()
    start = threading.Thread.start

    def struck(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        other = threading.Thread(target=fixture.submit, args=("other",))
        other.start()
        other.join(WAIT)
        raise raised

    monkeypatch.setattr(threading.Thread, "start", struck)
    with pytest.raises(raised):
        fixture.submit("own")
    assert fixture.next()["run_id"] == "own"
    until(lambda: "other" in [frame["run_id"] for frame in fixture.transport.sent(1)])
    until(lambda: [frame["run_id"] for frame in fixture.transport.sent(1)].count("own") in (0, 2))
    fixture.transport.feed({"type": "task_result", "run_id": "other"})
    assert fixture.next()["type"] == "task_result"
    assert fixture.link.stats()["dials"] == 1


def test_a_rejected_handshake_fails_every_waiter(make: Callable[..., Fixture]) -> None:
    """Runs and connect() alike get the dial's error; for 5 s nobody asks again, then the next use does."""
    fixture = make()
    fixture.transport.dial_error = AuthenticationRejected("no", status=401)
    with pytest.raises(AuthenticationRejected):
        fixture.link.connect(Deadline())
    assert fixture.link.state is LinkState.FATAL
    fixture.transport.dial_error = None
    fixture.clock.advance(4.9)
    fixture.submit("r1")
    assert isinstance(fixture.next()["exception"], AuthenticationRejected)
    with pytest.raises(AuthenticationRejected):
        fixture.link.connect(Deadline())
    assert fixture.link.stats()["dials"] == 1
    fixture.clock.advance(0.1)
    fixture.submit("r2")
    assert fixture.transport.sent(1)[0]["run_id"] == "r2"


def test_loss_ends_every_run_and_the_next_use_dials(make: Callable[..., Fixture]) -> None:
    """ConnectionLost with the peer's close code for each run on its way."""
    fixture = make()
    for number in range(3):
        fixture.submit(f"r{number}")
    fixture.transport.sent(3)
    fixture.transport.hang_up(1012, "restart")
    errors = [fixture.next()["exception"] for _ in range(3)]
    assert all(isinstance(error, ConnectionLost) and error.close_code == 1012 for error in errors)
    fixture.transport = MemoryTransport(fixture.clock)
    fixture.link._dial = fixture.transport.dial
    fixture.submit("again")
    assert fixture.transport.sent(1)[0]["run_id"] == "again"
    assert fixture.link.stats()["losses"] == 1


def test_deadline_fires_while_the_peer_does_not_read(make: Callable[..., Fixture]) -> None:
    """A run that could not be sent is taken back, and nothing of it goes out later."""
    fixture = make()
    fixture.link.connect(Deadline())
    fixture.transport.reading = False
    fixture.submit("r1", wait=False, delivery_timeout=5.0)
    fixture.clock.advance(5.0)
    error = fixture.next()["exception"]
    assert isinstance(error, DeliveryTimeout)
    fixture.transport.resume_reading()
    fixture.submit("r2")
    assert [frame["run_id"] for frame in fixture.transport.sent(1)] == ["r2"]


def test_silence_cancels_at_the_worker(make: Callable[..., Fixture]) -> None:
    """Missing heartbeats end the run with Wove's text and send cancel_task."""
    fixture = make()
    fixture.submit("r1", delivery_heartbeat_seconds=2.0)
    fixture.transport.sent(1)
    fixture.clock.advance(1.9)
    fixture.transport.feed({"type": "heartbeat", "run_id": "r1"})
    assert fixture.next()["type"] == "heartbeat"
    fixture.clock.advance(1.9)
    fixture.clock.advance(0.1)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)
    assert fixture.transport.sent(2)[1]["type"] == "cancel_task"


def test_a_suspended_host_reads_before_it_judges(make: Callable[..., Fixture]) -> None:
    """What arrived while this process stood still counts, however late the clock is."""
    fixture = make()
    fixture.submit("r1", delivery_heartbeat_seconds=2.0)
    fixture.transport.sent(1)
    held, go_on = threading.Event(), threading.Event()

    def slow_sink(event: dict[str, Any]) -> None:
        held.set()
        go_on.wait(WAIT)

    command = {"type": "run_task", "run_id": "slow", "task_id": "task", "delivery": {}}
    fixture.session.submit(command, DeliveryOptions(), slow_sink)
    fixture.transport.feed({"type": "task_started", "run_id": "slow"})
    assert held.wait(WAIT)
    fixture.transport.feed({"type": "heartbeat", "run_id": "r1"})
    fixture.clock.advance(60.0)
    go_on.set()
    assert fixture.next()["type"] == "heartbeat"
    fixture.transport.feed({"type": "task_result", "run_id": "r1"})
    assert fixture.next()["type"] == "task_result"


def test_f24_a_flood_hides_the_silence_of_others_for_half_a_minute(make: Callable[..., Fixture]) -> None:
    """What is unread may be anybody's heartbeat, but a reader may be kept from it for ever."""
    fixture = make()
    fixture.submit("quiet", delivery_heartbeat_seconds=2.0)
    heard = itertools.count()
    count = 0
    started = fixture.clock.monotonic()

    def loud_sink(event: dict[str, Any]) -> None:
        nonlocal count
        if event["type"] == "heartbeat":
            count = next(heard)
            fixture.transport.feed(event)

    command = {"type": "run_task", "run_id": "loud", "task_id": "task", "delivery": {}}
    fixture.session.submit(command, DeliveryOptions(), loud_sink)
    fixture.transport.sent(2)
    fixture.transport.feed({"type": "heartbeat", "run_id": "loud"})
    while fixture.events.empty() and fixture.clock.monotonic() < started + 120.0:
        before = count
        until(lambda before=before: count > before)
        fixture.clock.advance(0.1)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)
    assert fixture.clock.monotonic() >= started + 30.0


def test_f46_a_host_that_was_busy_once_reads_before_it_judges(
    make: Callable[..., Fixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half minute of a flood is one without a break: what was long before a suspension does not count."""
    fixture = make(ping_interval=3600.0)
    idle, behind = MemoryTransport.idle, False
    monkeypatch.setattr(MemoryTransport, "idle", lambda transport: not behind and idle(transport))
    fixture.submit("r1", delivery_heartbeat_seconds=60.0)
    fixture.transport.sent(1)

    def beat() -> None:
        fixture.transport.feed({"type": "heartbeat", "run_id": "r1"})
        assert fixture.next()["type"] == "heartbeat"

    def judged() -> None:
        until(lambda: fixture.link._judged_at == fixture.clock.monotonic())

    beat()
    fixture.clock.advance(59.5)
    fixture.transport.feed({"type": "log", "run_id": "nobody"})
    behind = True
    fixture.clock.advance(0.5)
    judged()
    behind = False
    beat()
    fixture.clock.advance(50.0)
    beat()
    behind = True
    fixture.clock.advance(100.0)
    fixture.transport.feed({"type": "log", "run_id": "nobody"})
    judged()
    behind = False
    beat()


def test_a_quiet_peer_is_pinged_and_then_given_up(make: Callable[..., Fixture]) -> None:
    """No byte within pong_timeout of a ping is a loss."""
    fixture = make(ping_interval=10.0, pong_timeout=5.0)
    fixture.submit("r1")
    fixture.transport.sent(1)
    fixture.clock.advance(10.0)
    with fixture.transport._changed:
        assert fixture.transport._changed.wait_for(lambda: fixture.transport.pings == 1, WAIT)
    fixture.clock.advance(5.0)
    error = fixture.next()["exception"]
    assert isinstance(error, ConnectionLost)
    assert "no bytes for 5.0 s after a ping" in error.reason


@pytest.mark.parametrize("message", [b"{", b"\xff", b"[" * 100_000, b"1" * 5_000])
def test_what_is_not_json_closes_with_1007(make: Callable[..., Fixture], message: bytes) -> None:
    """It may have been a terminal event, so the connection cannot go on."""
    fixture = make()
    fixture.submit("r1")
    fixture.transport.sent(1)
    fixture.transport.feed(message)
    error = fixture.next()["exception"]
    assert isinstance(error, ConnectionLost) and error.close_code == 1007
    assert fixture.transport.closes[0][0] == 1007


@pytest.mark.parametrize(
    "message",
    [
        None,
        42,
        [],
        {"events": []},
        {"events": {}},
        {"type": "task_progress", "run_id": "r1"},
        {"run_id": "r1"},
        {"type": "task_result"},
        {"type": "task_result", "run_id": ["r1"]},
        {"type": "task_result", "run_id": "unknown"},
        [None, {"type": "task_result", "run_id": 7}],
    ],
)
def test_odd_json_is_counted_and_hurts_nobody(make: Callable[..., Fixture], message: Any) -> None:
    """A hundred runs go on behind it."""
    fixture = make()
    for number in range(100):
        fixture.submit(f"r{number}")
    fixture.transport.sent(100)
    fixture.transport.feed(message)
    fixture.transport.feed({"events": [{"type": "task_result", "run_id": f"r{n}"} for n in range(100)]})
    assert {fixture.next()["run_id"] for _ in range(100)} == {f"r{n}" for n in range(100)}
    dropped = sum(count for key, count in fixture.link.stats().items() if key.startswith("dropped_"))
    assert dropped == (
        0 if message in ([], {"events": []}) else len(message) if isinstance(message, list) else 1
    )


def test_a_failing_receiver_hurts_only_itself(make: Callable[..., Fixture]) -> None:
    """An exception out of a sink is logged; the reader goes on."""
    fixture = make()

    def broken(event: dict[str, Any]) -> None:
        raise RuntimeError("broken")

    command = {"type": "run_task", "run_id": "broken", "task_id": "task", "delivery": {}}
    fixture.session.submit(command, DeliveryOptions(), broken)
    fixture.submit("r1")
    fixture.transport.feed(
        {"type": "task_result", "run_id": "broken"}, {"type": "task_result", "run_id": "r1"}
    )
    assert fixture.next()["run_id"] == "r1"


def test_one_session_never_ends_anothers_runs(make: Callable[..., Fixture]) -> None:
    """Closing a session cancels its own runs; the connection and the others stay."""
    fixture = make()
    other = fixture.new_session()
    fixture.submit("mine")
    fixture.submit("theirs", session=other)
    fixture.transport.sent(2)
    fixture.session.close()
    assert fixture.next()["run_id"] == "mine"
    assert fixture.transport.sent(3)[2]["type"] == "cancel_task"
    fixture.transport.feed({"type": "task_result", "run_id": "theirs"})
    assert fixture.next()["run_id"] == "theirs"


def test_an_idle_link_says_goodbye(make: Callable[..., Fixture]) -> None:
    """Without sessions it sends shutdown and closes after idle_timeout; its threads end."""
    fixture = make(idle_timeout=60.0, ping_interval=1000.0)
    fixture.link.connect(Deadline())
    fixture.session.close()
    fixture.clock.advance(59.0)
    assert fixture.link.state is LinkState.READY
    fixture.clock.advance(1.0)
    assert fixture.transport.sent(1) == [{"type": "shutdown"}]
    fixture.link.close(WAIT)
    assert fixture.transport.disposed
    assert fixture.link.state is LinkState.CLOSED
    with pytest.raises(ExecutorClosed):
        fixture.submit("late")


def test_a_dropped_session_closes_the_link_behind_its_last_run(make: Callable[..., Fixture]) -> None:
    """A collected executor's run goes on; then the link closes without waiting for idle_timeout."""
    fixture = make(idle_timeout=1000.0)
    fixture.submit("r1")
    fixture.transport.sent(1)
    connection = fixture.link._connection
    assert connection is not None
    fixture.session.drop()
    fixture.transport.feed({"type": "task_result", "run_id": "r1"})
    assert fixture.next()["type"] == "task_result"
    assert connection.over.wait(WAIT)


def test_max_in_flight_sends_the_next_when_one_ends(make: Callable[..., Fixture]) -> None:
    """The reader frees the slot; the message leaves without any thread of the caller's."""
    fixture = make()
    for number in range(3):
        fixture.submit(f"r{number}", delivery_max_in_flight=1)
    assert len(fixture.transport.sent(1)) == 1
    for number in range(3):
        fixture.transport.feed({"type": "task_result", "run_id": f"r{number}"})
        assert fixture.next()["run_id"] == f"r{number}"
    assert [frame["run_id"] for frame in fixture.transport.sent(3)] == ["r0", "r1", "r2"]


def test_closing_ends_runs_and_threads(make: Callable[..., Fixture]) -> None:
    """close() leaves no run without an end and no thread behind."""
    fixture = make()
    fixture.submit("r1")
    fixture.transport.sent(1)
    fixture.link.close(WAIT)
    assert fixture.next()["type"] == "task_cancelled"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wove-ws-")]


CLOSING = {
    str(Path(module.__file__))
    for module in (wove_ws_sync.link, _link_core, _link_threads, connection, runs, _book)
}


def strike(act: Callable[[], Any], step: int) -> bool:
    """Call *act* and raise as its function number *step* begins; tell whether it came so far."""
    left = step

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename in CLOSING and frame.f_code.co_name != "<genexpr>":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise Struck

    return struck(act, trace)


def test_f35_a_strike_anywhere_in_the_first_submit(make: Callable[..., Fixture]) -> None:
    """Whatever becomes of that run, the next one goes out, and deadlines are kept."""
    step, came = 0, True
    while came:
        fixture = make()
        came = strike(lambda fixture=fixture: fixture.submit("own", wait=False), step)
        fixture.submit("next")
        until(lambda fixture=fixture: "next" in [frame["run_id"] for frame in fixture.transport.sent(1)])
        fixture.submit("late", delivery_timeout=1.0)
        fixture.clock.advance(1.0)
        until(lambda fixture=fixture: fixture.link.find("late") is None)
        fixture.link.close(WAIT)
        assert fixture.link.state is LinkState.CLOSED
        step += 1
    assert step > 15


def test_f35_a_strike_while_closing_before_the_next_dial(make: Callable[..., Fixture]) -> None:
    """The watchdog that waits for the dial ends, too; nobody is told who is not to be told."""
    step, came = 0, True
    while came:
        fixture = make()
        fixture.link.connect(Deadline())
        fixture.transport.reading = False
        fixture.submit("r", wait=False)
        fixture.transport.hang_up()
        until(lambda fixture=fixture: fixture.link.state is LinkState.BACKOFF)
        came = strike(lambda fixture=fixture: fixture.link.start_closing(tell=False), step)
        with within(0.0):
            fixture.link.close(WAIT)
        assert fixture.link.state is LinkState.CLOSED
        assert step == 0 or fixture.events.empty(), step
        step += 1
    assert step > 10


def test_f35_a_strike_anywhere_in_closing(make: Callable[..., Fixture]) -> None:
    """Each run ends once, the worker hears of it, and the threads go; a second call is harmless."""
    step, came = 0, True
    while came:
        fixture = make()
        for policy in ("cancel", "fail", "detach"):
            fixture.submit(policy, delivery_orphan_policy=policy)
        fixture.transport.sent(3)
        came = strike(fixture.link.start_closing, step)
        fixture.link.close(WAIT)
        assert sorted(fixture.next()["run_id"] for _ in range(3)) == ["cancel", "detach", "fail"]
        assert fixture.events.empty(), step
        assert fixture.link.state is LinkState.CLOSED
        assert fixture.transport.sent(4)[-1]["type"] == "shutdown"
        step += 1
    assert step > 40


def reconnect(fixture: Fixture) -> MemoryTransport:
    """Put a new peer in the place of the lost one."""
    fixture.transport = MemoryTransport(fixture.clock)
    fixture.link._dial = fixture.transport.dial
    return fixture.transport


def test_what_had_not_left_goes_out_over_the_next_connection(make: Callable[..., Fixture]) -> None:
    """The caller of a run that nobody can have seen hears nothing of the loss."""
    fixture = make()
    fixture.link.connect(Deadline())
    lost = fixture.transport
    lost.reading = False
    fixture.submit("r1", wait=False)
    reconnect(fixture)
    lost.hang_up(1012, "restart")
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.clock.advance(1.0)
    assert fixture.transport.sent(1)[0]["run_id"] == "r1"
    fixture.transport.feed({"type": "task_result", "run_id": "r1"})
    assert fixture.next()["type"] == "task_result"


def test_requeue_delivers_again_and_says_so(make: Callable[..., Fixture]) -> None:
    """The second delivery carries its number; the run has one end."""
    fixture = make()
    fixture.submit("r1", delivery_orphan_policy="requeue")
    fixture.transport.sent(1)
    lost = fixture.transport
    reconnect(fixture)
    lost.hang_up()
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.clock.advance(1.0)
    [frame] = fixture.transport.sent(1)
    assert (frame["run_id"], frame["attempt"]) == ("r1", 2)
    fixture.transport.feed({"type": "task_result", "run_id": "r1"})
    assert fixture.next()["type"] == "task_result"
    assert fixture.link.stats()["requeues"] == 1


def test_f5_dials_back_off_and_honour_the_peers_wish(make: Callable[..., Fixture]) -> None:
    """0.1 s, 0.16 s ... without jitter here; Retry-After when it is longer; one dial for all."""
    fixture = make()
    fixture.link._reconnect._spread = lambda: 0.0
    dials: list[float] = []
    errors: list[BaseException] = [
        ConnectionRefusedError("no"),
        ConnectionRefusedError("no"),
        HandshakeRejected("busy", status=503, retry_after=7.0),
    ]
    real = fixture.transport.dial

    def dial(*args: Any, **kwargs: Any) -> MemoryTransport:
        dials.append(fixture.clock.monotonic())
        if errors:
            raise errors.pop(0)
        return real(*args, **kwargs)

    fixture.link._dial = dial
    fixture.submit("r1", delivery_timeout=60.0)
    fixture.submit("r2", delivery_timeout=60.0)
    for number, delay in ((1, 0.1), (2, 0.16), (3, 7.0)):
        until(lambda number=number: len(dials) == number and fixture.link.state is LinkState.BACKOFF)
        fixture.clock.advance(delay * 0.9)
        fixture.clock.advance(delay * 0.11)
    assert len(fixture.transport.sent(2)) == 2
    assert [round(later - sooner, 2) for sooner, later in itertools.pairwise(dials)] == [
        0.1,
        0.16,
        7.07,
    ]


def test_a_deadline_ends_a_run_while_nobody_answers(make: Callable[..., Fixture]) -> None:
    """Waiting for a connection counts like any other waiting."""
    fixture = make()
    fixture.transport.dial_error = ConnectionRefusedError("no")
    fixture.submit("r1", delivery_timeout=3.0)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.clock.advance(3.0)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)


def test_without_a_deadline_hope_ends_with_the_resume_window(make: Callable[..., Fixture]) -> None:
    """Nothing may wait for ever for a worker that does not come back."""
    fixture = make(resume_window=10.0)
    fixture.link._reconnect._spread = lambda: 0.0
    fixture.submit("r1", delivery_orphan_policy="requeue")
    fixture.transport.sent(1)
    lost = fixture.transport
    reconnect(fixture).dial_error = ConnectionRefusedError("no")
    lost.hang_up()
    for _ in range(3):
        until(lambda: fixture.link.state is LinkState.BACKOFF)
        dials = fixture.link.stats()["dials"]
        fixture.clock.advance(4.0)
        until(lambda dials=dials: fixture.link.stats()["dials"] > dials)
    error = fixture.next()["exception"]
    assert isinstance(error, ConnectionLost) and error.maybe_executed
    assert isinstance(error.__cause__, ConnectionRefusedError)


def test_f4_a_fatal_answer_ends_whoever_waits(make: Callable[..., Fixture]) -> None:
    """401 after a loss: no dial loop."""
    fixture = make()
    fixture.submit("r1", delivery_orphan_policy="requeue", delivery_timeout=60.0)
    fixture.transport.sent(1)
    lost = fixture.transport
    reconnect(fixture).dial_error = AuthenticationRejected("no", status=401)
    lost.hang_up()
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.clock.advance(1.0)
    error = fixture.next()["exception"]
    assert isinstance(error, ConnectionLost) and isinstance(error.__cause__, AuthenticationRejected)
    assert fixture.link.state is LinkState.FATAL
    assert fixture.link.stats()["dials"] == 2


def test_a_slot_that_a_refused_run_frees_is_used(make: Callable[..., Fixture]) -> None:
    """A run too large for the peer fails, and the next one goes out without any other traffic."""
    fixture = make()
    fixture.transport.peer_max_message_bytes = 200
    fixture.link.connect(Deadline())
    fixture.submit("first", delivery_max_in_flight=1)
    fixture.submit("x" * 300, delivery_max_in_flight=1)
    fixture.submit("last", delivery_max_in_flight=1)
    fixture.transport.feed({"type": "task_result", "run_id": "first"})
    assert [fixture.next()["run_id"] for _ in range(2)] == ["first", "x" * 300]
    assert [frame["run_id"] for frame in fixture.transport.sent(2)] == ["first", "last"]


def test_the_watchdog_minds_a_run_that_got_a_slot(make: Callable[..., Fixture]) -> None:
    """Its heartbeat deadline counts from when it left, though no caller submitted it then."""
    fixture = make(ping_interval=3600.0)
    for run_id in ("first", "second"):
        fixture.submit(run_id, delivery_max_in_flight=1, delivery_heartbeat_seconds=5.0)
    fixture.transport.feed({"type": "task_result", "run_id": "first"})
    assert fixture.next()["run_id"] == "first"
    fixture.transport.sent(2)
    until(
        lambda: fixture.link._connection is not None and fixture.link._connection.watching_until is not None
    )
    fixture.clock.advance(5.0)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)


def test_nobody_dials_for_runs_that_were_cancelled(make: Callable[..., Fixture]) -> None:
    """The link goes idle instead, and the next use dials at once."""
    fixture = make()
    fixture.transport.dial_error = ConnectionRefusedError("no")
    fixture.submit("r1", delivery_timeout=60.0)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.session.cancel("r1")
    assert fixture.next()["type"] == "task_cancelled"
    fixture.clock.advance(60.0)
    until(lambda: fixture.link.state is LinkState.IDLE)
    assert fixture.link.stats()["dials"] == 1
    fixture.transport.dial_error = None
    fixture.submit("r2")
    assert fixture.transport.sent(1)[0]["run_id"] == "r2"


def test_connect_does_not_sit_out_the_backoff(make: Callable[..., Fixture]) -> None:
    """start() of another executor dials now, not when the pause is over."""
    fixture = make(reconnect_initial_delay=25.0)
    fixture.transport.dial_error = ConnectionRefusedError("no")
    fixture.submit("r1", delivery_timeout=60.0)
    until(lambda: fixture.link.state is LinkState.BACKOFF)
    fixture.transport.dial_error = None
    fixture.link.connect(Deadline())
    assert fixture.transport.sent(1)[0]["run_id"] == "r1"


def test_deadlines_go_on_while_a_callback_blocks_after_a_loss(make: Callable[..., Fixture]) -> None:
    """The next connection's watchdog starts before anybody is told."""
    fixture = make()
    entered, go_on = threading.Event(), threading.Event()

    def slow(event: dict[str, Any]) -> None:
        entered.set()
        go_on.wait(WAIT)

    command = {"type": "run_task", "run_id": "slow", "task_id": "task", "delivery": {}}
    fixture.session.submit(command, DeliveryOptions(), slow)
    fixture.submit("r1", delivery_timeout=5.0, delivery_orphan_policy="requeue")
    fixture.transport.sent(2)
    lost = fixture.transport
    reconnect(fixture).dial_error = ConnectionRefusedError("no")
    lost.hang_up()
    assert entered.wait(WAIT)
    fixture.clock.advance(5.0)
    assert isinstance(fixture.next()["exception"], DeliveryTimeout)
    go_on.set()
