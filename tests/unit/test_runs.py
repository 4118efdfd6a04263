"""The run table: every rule of the state table, with chosen moments and no threads."""

from __future__ import annotations

from typing import Any

import pytest
from run_machine import Receipt

from wove_ws_sync.errors import ConnectionLost, DeliveryTimeout
from wove_ws_sync.options import DeliveryOptions
from wove_ws_sync.runs import CancelAtWorker, Deliver, Effect, Loss, Run, RunState, RunTable, connection_lost


def make_run(run_id: str = "r", **delivery: Any) -> Run:
    return Run(
        run_id=run_id,
        task_id="task",
        message=b"{}",
        delivery=DeliveryOptions(**delivery),
        session="session",
        environment="env",
        sink=lambda event: None,
    )


def table(max_requeues: int = 3) -> RunTable:
    return RunTable(cancel_ack_timeout=10.0, max_requeues=max_requeues)


def on_its_way(runs: RunTable, run: Run, now: float = 0.0, receipt: Receipt | None = None) -> Run:
    runs.register(run, now)
    post(runs, now, receipt)
    return run


def post(runs: RunTable, now: float = 0.0, receipt: Receipt | None = None, generation: int = 1) -> list[str]:
    """Hand what is ready to connection number *generation*; return whose it was."""
    ready = runs.take_ready()
    for run in ready:
        runs.sent(run, receipt or Receipt(sent_at=now), now, generation)
    return [run.run_id for run in ready]


def lose(runs: RunTable, code: int | None = None, reason: str = "", *, generation: int = 1) -> list[Effect]:
    """Lose connection number *generation*, to a worker that keeps nothing."""
    return runs.lost(generation, Loss(code, reason), 0.0, None)


def event(kind: str, run_id: str = "r", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "run_id": run_id, **fields}


def delivered(effects: list[Effect]) -> list[dict[str, Any]]:
    return [effect.event for effect in effects if isinstance(effect, Deliver)]


def cancels(effects: list[Effect]) -> list[str]:
    return [effect.run.run_id for effect in effects if isinstance(effect, CancelAtWorker)]


def test_result_ends_a_run_once() -> None:
    """The first terminal event wins; what comes later is counted and dropped."""
    runs = table()
    run = on_its_way(runs, make_run())
    assert delivered(runs.receive(event("task_started"), 1.0, 1)) == [event("task_started")]
    assert run.state is RunState.RUNNING
    assert len(delivered(runs.receive(event("task_result"), 2.0, 1))) == 1
    assert run.state is RunState.DONE
    assert runs.receive(event("task_error"), 3.0, 1) == []
    assert runs.dropped["unknown_run"] == 1
    assert len(runs) == 0


def test_a_start_is_told_once_for_each_attempt() -> None:
    """A worker that repeats it would fill the memory of whoever takes no events meanwhile."""
    runs = table()
    on_its_way(runs, make_run(delivery_orphan_policy="requeue"))
    told = [len(delivered(runs.receive(event("task_started"), 1.0, 1))) for _ in range(3)]
    assert told == [1, 0, 0] and runs.dropped["repeated"] == 2
    lose(runs)
    post(runs, 2.0, generation=2)
    assert len(delivered(runs.receive(event("task_started"), 3.0, 2))) == 1
    assert len(delivered(runs.receive(event("task_started"), 3.0, 2))) == 0


def test_an_id_in_flight_is_refused() -> None:
    """Two runs of one id could not be told apart."""
    runs = table()
    on_its_way(runs, make_run())
    with pytest.raises(ValueError, match="'r' is already in flight"):
        runs.register(make_run(), 0.0)


def test_an_id_may_be_used_again_after_its_end() -> None:
    """Ended runs leave nothing behind."""
    runs = table()
    on_its_way(runs, make_run())
    runs.receive(event("task_result"), 1.0, 1)
    on_its_way(runs, make_run())
    assert len(runs) == 1


@pytest.mark.parametrize("way", ["cancel", "deadline", "stop"])
def test_an_id_is_refused_while_the_worker_has_its_run(way: str) -> None:
    """The end of a run that was given up on this side would be taken for that of the new one."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_timeout=1.0))
    if way == "cancel":
        runs.cancel(run, 1.0)
    elif way == "deadline":
        runs.tick(1.0)
    else:
        runs.abandon("session")
    assert run.terminal
    with pytest.raises(ValueError, match="'r' has ended here, but its end at the worker service is still"):
        runs.register(make_run(), 1.0)
    runs.receive(event("task_started"), 1.0, 1)
    runs.receive(event("task_cancelled"), 1.0, 2)
    with pytest.raises(ValueError, match="still to come"):
        runs.register(make_run(), 1.0)
    runs.receive(event("task_cancelled"), 1.0, 1)
    on_its_way(runs, make_run())
    assert len(delivered(runs.receive(event("task_result"), 2.0, 1))) == 1


def test_an_id_is_free_where_no_end_is_to_come() -> None:
    """Of what never left, what a lost connection carried, and what the worker was to keep for others."""
    runs = table()
    runs.cancel(on_its_way(runs, make_run(), receipt=Receipt(started=False, sent_at=None)), 1.0)
    runs.cancel(on_its_way(runs, make_run()), 1.0)
    lose(runs)
    on_its_way(runs, make_run(delivery_orphan_policy="detach"))
    runs.abandon("session")
    on_its_way(runs, make_run())
    assert len(runs) == 1


def test_ids_of_silent_workers_are_forgotten() -> None:
    """A worker that never answers a cancellation costs a bounded number of ids."""
    runs = table()
    for number in range(10_001):
        runs.cancel(on_its_way(runs, make_run(f"r{number}")), 0.0)
    runs.register(make_run("r0"), 0.0)
    with pytest.raises(ValueError, match="still to come"):
        runs.register(make_run("r1"), 0.0)


@pytest.mark.parametrize("receipt", [None, Receipt(started=False, sent_at=None), Receipt()])
def test_deadline_counts_from_register(receipt: Receipt | None) -> None:
    """delivery_timeout covers the queue, the send and the run alike, with Wove's text."""
    runs = table()
    run = make_run(delivery_timeout=3.0)
    runs.register(run, 100.0)
    if receipt is not None:
        runs.take_ready()
        runs.sent(run, receipt, 101.0, 1)
    assert runs.next_alarm() == 103.0
    assert runs.tick(102.9) == []
    effects = runs.tick(103.0)
    [ended] = delivered(effects)
    assert isinstance(ended["exception"], DeliveryTimeout)
    assert str(ended["exception"]) == "Delivery timeout exceeded for task 'task' (3.0s)."
    assert cancels(effects) == (["r"] if receipt is not None and receipt.started else [])
    assert run.state is RunState.TIMED_OUT
    assert runs.next_alarm() is None or runs.tick(1e9) == []


def test_silence_ends_a_run_and_cancels_it_at_the_worker() -> None:
    """The heartbeat deadline, with Wove's text."""
    runs = table()
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0), now=10.0)
    assert runs.tick(10.9) == []
    effects = runs.tick(11.0)
    assert cancels(effects) == ["r"]
    assert str(delivered(effects)[0]["exception"]) == (
        "Delivery heartbeat timed out for task 'task' after 1.0s without heartbeat."
    )


@pytest.mark.parametrize("kind", ["task_started", "heartbeat", "log"])
def test_every_event_of_the_run_is_life(kind: str) -> None:
    """A log says as much as a heartbeat."""
    runs = table()
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0))
    runs.receive(event(kind), 0.9, 1)
    assert runs.tick(1.8) == []
    assert delivered(runs.tick(1.9))


def test_foreign_workers_get_twice_the_heartbeat() -> None:
    """Wove's own worker beats exactly at the value, which leaves no margin."""
    runs = table()
    runs.heartbeat_factor = 2.0
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0))
    assert runs.tick(1.9) == []
    assert delivered(runs.tick(2.0))


def test_bytes_of_an_unfinished_message_are_life_for_all() -> None:
    """While one message fills the wire, no heartbeat can come."""
    runs = table()
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0))
    assert runs.tick(1.0, floor=0.9) == []
    assert runs.tick(1.8, floor=0.9) == []
    assert delivered(runs.tick(1.9, floor=0.9))


def test_the_heartbeat_clock_starts_when_the_last_byte_left() -> None:
    """A worker cannot answer what it has not got."""
    runs = table()
    receipt = Receipt(started=True, sent_at=None)
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0), receipt=receipt)
    for now in (1.0, 2.0, 3.0, 4.0):
        assert runs.tick(now) == []
    receipt.sent_at = 4.5
    assert runs.tick(5.0) == []
    assert delivered(runs.tick(5.5))


def test_f29_best_effort_cancel_ends_at_once() -> None:
    """cancel_task goes out, nobody waits, the late result is dropped."""
    runs = table()
    run = on_its_way(runs, make_run())
    effects = runs.cancel(run, 1.0)
    assert cancels(effects) == ["r"]
    assert delivered(effects) == [
        {"type": "task_cancelled", "run_id": "r", "task_id": "task", "acknowledged": False}
    ]
    assert runs.cancel(run, 1.1) == []
    assert runs.receive(event("task_result"), 2.0, 1) == []


def test_f29_require_ack_waits_for_the_worker() -> None:
    """Under require_ack a run is cancelled only when the worker says so."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_cancel_mode="require_ack"))
    effects = runs.cancel(run, 1.0)
    assert cancels(effects) == ["r"] and delivered(effects) == []
    assert run.state is RunState.CANCELLING
    [ended] = delivered(runs.receive(event("task_cancelled"), 2.0, 1))
    assert ended["acknowledged"] is True


def test_f44_runs_that_never_arrived_are_not_taken_for_what_ends_connections() -> None:
    """Three times swallowed whole, then cut in the middle for the first time: it is sent again."""
    runs = table()
    run = on_its_way(runs, make_run())
    for generation in range(1, 4):
        runs.lost(generation, Loss(), 0.0, 10.0)
        runs.resumed({"unknown": ["r"]}, 0.0, generation + 1)
        receipt = Receipt(sent_at=0.0 if generation < 3 else None)
        assert post(runs, receipt=receipt, generation=generation + 1) == ["r"]
    assert runs.lost(4, Loss(), 0.0, 10.0) == [] and not run.terminal
    assert post(runs, generation=5) == ["r"]


def test_f29_require_ack_waits_for_no_answer_that_cannot_come() -> None:
    """What runs where nothing can be stopped is cancelled at once, unacknowledged; what is queued waits."""
    runs = table()
    runs.stops_running = False
    running = on_its_way(runs, make_run("running", delivery_cancel_mode="require_ack"))
    queued = on_its_way(runs, make_run("queued", delivery_cancel_mode="require_ack"))
    runs.receive(event("task_started", "running"), 1.0, 1)
    effects = runs.cancel(running, 2.0)
    assert cancels(effects) == ["running"] and delivered(effects)[0]["acknowledged"] is False
    assert delivered(runs.cancel(queued, 2.0)) == [] and queued.state is RunState.CANCELLING


def test_f29_a_deadline_waits_for_no_answer_that_cannot_come() -> None:
    runs = table()
    runs.stops_running = False
    run = on_its_way(runs, make_run(delivery_cancel_mode="require_ack", delivery_timeout=5.0))
    runs.receive(event("task_started"), 1.0, 1)
    effects = runs.tick(5.0)
    assert cancels(effects) == ["r"] and run.state is RunState.TIMED_OUT


def test_f29_require_ack_lets_a_result_win() -> None:
    """A result that comes before the acknowledgement is the run's end."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_cancel_mode="require_ack"))
    runs.cancel(run, 1.0)
    assert delivered(runs.receive(event("task_result"), 2.0, 1)) == [event("task_result")]
    assert run.state is RunState.DONE


@pytest.mark.parametrize(("delivery_timeout", "moment"), [(None, 11.0), (5.0, 5.0)])
def test_f29_require_ack_waits_no_longer_than_it_may(delivery_timeout: float | None, moment: float) -> None:
    """cancel_ack_timeout, or the run's deadline if that comes first."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_cancel_mode="require_ack", delivery_timeout=delivery_timeout))
    runs.cancel(run, 1.0)
    assert runs.tick(moment - 0.1) == []
    [ended] = delivered(runs.tick(moment))
    assert ended["type"] == "task_cancelled" and ended["acknowledged"] is False


@pytest.mark.parametrize(
    ("answer", "acknowledged", "late"),
    [("task_cancelled", True, False), ("task_result", False, True), (None, False, False)],
)
def test_f29_require_ack_after_a_timeout(answer: str | None, acknowledged: bool, late: bool) -> None:
    """The deadline is final; the error says what the worker answered to the cancel."""
    runs = table()
    on_its_way(runs, make_run(delivery_cancel_mode="require_ack", delivery_heartbeat_seconds=1.0))
    assert cancels(runs.tick(1.0)) == ["r"]
    effects = runs.receive(event(answer), 2.0, 1) if answer else runs.tick(11.0)
    error = delivered(effects)[0]["exception"]
    assert isinstance(error, DeliveryTimeout)
    assert (error.cancel_acknowledged, error.late_result) == (acknowledged, late)


def test_what_never_left_is_cancelled_for_sure() -> None:
    """A run still in the queue ends acknowledged, under either mode."""
    for mode in ("best_effort", "require_ack"):
        runs = table()
        run = make_run(delivery_cancel_mode=mode)
        runs.register(run, 0.0)
        [ended] = delivered(runs.cancel(run, 0.0))
        assert ended["acknowledged"] is True
        assert runs.take_ready() == []


def test_slots_hold_back_and_let_go_in_order() -> None:
    """delivery_max_in_flight: at most so many at once, the next when one ends."""
    runs = table()
    for number in range(4):
        runs.register(make_run(f"r{number}", delivery_max_in_flight=2), 0.0)
    first = runs.take_ready()
    assert [run.run_id for run in first] == ["r0", "r1"]
    for run in first:
        runs.sent(run, Receipt(), 0.0, 1)
    waiting = runs.get("r2")
    assert waiting is not None
    runs.cancel(waiting, 0.5)
    runs.receive(event("task_result", "r0"), 1.0, 1)
    assert [run.run_id for run in runs.take_ready()] == ["r3"]
    runs.receive(event("task_result", "r1"), 1.0, 1)
    assert runs.take_ready() == []


def test_loss_ends_what_a_worker_may_have_seen() -> None:
    """ConnectionLost for each, saying that it may have run, and how the connection ended."""
    runs = table()
    on_its_way(runs, make_run())
    [ended] = delivered(lose(runs, 1006, "gone"))
    error = ended["exception"]
    assert isinstance(error, ConnectionLost)
    assert error.maybe_executed
    assert (error.close_code, error.attempt) == (1006, 1)
    assert len(runs) == 0


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
@pytest.mark.parametrize(
    "receipt", [None, Receipt(started=False, sent_at=None), Receipt(started=True, sent_at=None)]
)
def test_loss_sends_again_what_had_not_left(policy: str, receipt: Receipt | None) -> None:
    """Nobody can have seen it, so every policy allows it; it is in line once, and as the first attempt."""
    runs = table()
    run = make_run(delivery_orphan_policy=policy)
    runs.register(run, 0.0)
    if receipt is not None:
        runs.take_ready()
        runs.sent(run, receipt, 0.0, 1)
    for _ in range(2):
        assert delivered(lose(runs)) == []
    assert runs.take_ready() == [run]
    assert (run.attempt, run.message) == (1, b"{}")


def test_requeue_sends_again_a_limited_number_of_times() -> None:
    """A run that kills every worker it meets must come to an end."""
    runs = table(max_requeues=2)
    run = on_its_way(runs, make_run(delivery_orphan_policy="requeue"))
    for attempt in (2, 3):
        runs.receive(event("task_started"), 1.0, 1)
        assert delivered(lose(runs)) == []
        assert runs.take_ready() == [run]
        assert run.attempt == attempt
        runs.sent(run, Receipt(), 2.0, 1)
    [ended] = delivered(lose(runs))
    assert ended["exception"].attempt == 3
    assert runs.counts["requeues"] == 2


def test_a_requeued_run_keeps_its_slot_and_its_deadline() -> None:
    """Another attempt is the same run: same place, same clock."""
    runs = table()
    options = {"delivery_orphan_policy": "requeue", "delivery_max_in_flight": 1, "delivery_timeout": 5.0}
    first = on_its_way(runs, make_run("first", **options))
    runs.register(make_run("second", **options), 0.0)
    lose(runs)
    assert runs.take_ready() == [first]
    assert [item["run_id"] for item in delivered(runs.tick(5.0))] == ["first", "second"]


@pytest.mark.parametrize("policy", ["fail", "detach"])
def test_loss_keeps_woves_text_for_its_policies(policy: str) -> None:
    """Programs match on it."""
    runs = table()
    on_its_way(runs, make_run(delivery_orphan_policy=policy))
    [ended] = delivered(lose(runs))
    assert str(ended["exception"]) == (
        f"Task 'task' orphaned after receiver failure in environment 'env' (policy='{policy}')."
    )


@pytest.mark.parametrize(("policy", "frames"), [("cancel", 1), ("fail", 1), ("requeue", 1), ("detach", 0)])
def test_stopping_ends_runs_by_policy(policy: str, frames: int) -> None:
    """All policies but detach send one cancel_task; other sessions are not touched."""
    runs = table()
    on_its_way(runs, make_run(delivery_orphan_policy=policy))
    other = make_run("other")
    other.session = "another"
    on_its_way(runs, other)
    effects = runs.abandon("session")
    assert len(cancels(effects)) == frames
    [ended] = delivered(effects)
    if policy == "cancel":
        assert ended["type"] == "task_cancelled"
    else:
        assert (
            str(ended["exception"])
            == f"Task 'task' became orphaned in environment 'env' with policy '{policy}'."
        )
    assert [run.run_id for run in runs.of_all()] == ["other"]


def test_alarms_of_ended_runs_are_forgotten() -> None:
    """A long delivery_timeout must not hold memory after the run."""
    runs = table()
    for number in range(10_000):
        on_its_way(runs, make_run(f"r{number}", delivery_timeout=3600.0))
        runs.receive(event("task_result", f"r{number}"), 0.0, 1)
    assert len(runs._alarms._heap) <= 128


def test_a_message_that_ends_connections_is_given_up() -> None:
    """A peer that hangs up inside one message again and again means that message."""
    runs = table()
    run = make_run()
    runs.register(run, 0.0)
    for _ in range(3):
        assert runs.take_ready() == [run]
        runs.sent(run, Receipt(started=True, sent_at=None), 0.0, 1)
        assert delivered(lose(runs, 1009, "too big")) == []
    runs.take_ready()
    runs.sent(run, Receipt(started=True, sent_at=None), 0.0, 1)
    [ended] = delivered(lose(runs, 1009, "too big"))
    assert ended["exception"].close_code == 1009
    assert not ended["exception"].maybe_executed


def in_limbo(runs: RunTable, run: Run, until: float = 10.0) -> Run:
    """Send *run* and lose its connection, to a worker that may have it when it is back."""
    on_its_way(runs, run)
    assert runs.lost(1, Loss(1006, "gone"), 0.0, until) == []
    assert run.state is RunState.LIMBO
    return run


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
def test_limbo_ends_by_policy_when_its_time_is_over(policy: str) -> None:
    """Nobody came back: ConnectionLost with what the first loss said, or a wait for whoever answers."""
    runs = table()
    run = in_limbo(runs, make_run(delivery_orphan_policy=policy))
    assert runs.tick(9.9) == []
    ended = delivered(runs.tick(10.0))
    if policy == "requeue":  # the worker that has it must be asked, whenever it is there again
        assert (run.state, run.attempt, ended) == (RunState.LIMBO, 1, [])
        runs.resuming(20.0, 15.0, 2)
        assert runs.tick(20.0) == []
        assert (run.state, run.attempt) == (RunState.QUEUED, 2)
    else:
        error = ended[0]["exception"]
        assert (error.close_code, error.reason, error.maybe_executed) == (1006, "gone", True)
        assert run.state is (RunState.DETACHED if policy == "detach" else RunState.ORPHANED)


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
def test_what_the_worker_still_has_goes_on(policy: str) -> None:
    """Alive or finished: the run counts on the new connection, and its one result comes by that."""
    runs = table()
    run = in_limbo(runs, make_run(delivery_orphan_policy=policy, delivery_heartbeat_seconds=1.0))
    assert runs.limbo() == ["r"]
    assert runs.receive(event("task_result"), 1.0, 2) == []
    assert runs.waits_elsewhere("r", 2)
    assert runs.resumed({"alive": ["r"]}, 5.0, 2) == []
    assert (run.state, run.generation, run.attempt) == (RunState.RUNNING, 2, 1)
    assert runs.tick(5.9) == []
    assert delivered(runs.receive(event("task_result"), 5.9, 2)) == [event("task_result")]
    assert runs.counts["resumed_runs"] == 1


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
def test_what_never_arrived_is_sent_again_and_what_is_lost_follows_its_policy(policy: str) -> None:
    """ "unknown" proves that nothing ran, unless the worker had answered before; "lost" proves nothing."""
    runs = table()
    run = in_limbo(runs, make_run(delivery_orphan_policy=policy))
    assert runs.resumed({"unknown": ["r"]}, 1.0, 2) == []
    assert (run.state, run.attempt) == (RunState.QUEUED, 1)
    assert post(runs, 1.0, generation=2) == ["r"]
    runs.receive(event("heartbeat"), 1.5, 2)
    runs.lost(2, Loss(), 2.0, 12.0)
    ended = delivered(runs.resumed({"unknown": ["r"], "lost": ["r"]}, 3.0, 3))
    assert bool(ended) is (policy != "requeue")
    assert run.attempt == (2 if policy == "requeue" else 1)


@pytest.mark.parametrize("answer", ["alive", "finished", "unknown", "lost"])
def test_an_id_is_refused_until_the_worker_has_answered(answer: str) -> None:
    """The end of what was asked for, and ended here before the answer, is not that of a new run."""
    runs = table()
    run = in_limbo(runs, make_run())
    runs.resuming(20.0, 1.0, 2)
    runs.cancel(run, 1.0)
    assert run.terminal
    with pytest.raises(ValueError, match="'r' has ended here, but its end at the worker service is still"):
        runs.register(make_run(), 1.0)
    assert runs.resumed({answer: ["r"]}, 2.0, 2) == []
    if answer in ("alive", "finished"):
        with pytest.raises(ValueError, match="still to come"):
            runs.register(make_run(), 2.0)
        assert delivered(runs.receive(event("task_result"), 3.0, 2)) == []
    runs.register(make_run(), 3.0)


@pytest.mark.parametrize("asked", [False, True])
def test_an_id_is_free_where_nobody_will_answer(asked: bool) -> None:
    """What ended before the worker could be asked, or before the connection broke over which it was."""
    runs = table()
    run = in_limbo(runs, make_run())
    if asked:
        runs.resuming(20.0, 1.0, 2)
        assert runs.lost(2, Loss(), 1.0, 10.0) == []
    runs.cancel(run, 1.0)
    runs.register(make_run(), 1.0)


def test_a_deadline_counts_in_limbo_and_silence_does_not() -> None:
    """Nobody can beat over a lost connection; the deadline is final all the same."""
    runs = table()
    in_limbo(runs, make_run(delivery_timeout=5.0, delivery_heartbeat_seconds=1.0))
    assert runs.tick(4.9) == []
    [ended] = delivered(runs.tick(5.0))
    assert isinstance(ended["exception"], DeliveryTimeout)


class Unsure(Receipt):
    """A message whose send was interrupted."""

    maybe_sent = True  # type: ignore[assignment]


@pytest.mark.parametrize("interrupted", [False, True])
def test_silence_counts_again_when_the_worker_has_answered(interrupted: bool) -> None:
    """Also for a message of which it is not known when it left, as its send was interrupted."""
    runs = table()
    receipt = Unsure(sent_at=None) if interrupted else Receipt()
    on_its_way(runs, make_run(delivery_heartbeat_seconds=1.0), receipt=receipt)
    runs.lost(1, Loss(), 0.0, 10.0)
    runs.resumed({"alive": ["r"]}, 5.0, 2)
    assert runs.tick(5.9) == []
    [ended] = delivered(runs.tick(6.0))
    assert isinstance(ended["exception"], DeliveryTimeout)


def test_a_cancel_that_waits_for_its_answer_is_asked_again() -> None:
    """require_ack over a lost connection: resumed, asked again, and acknowledged."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_cancel_mode="require_ack"))
    runs.cancel(run, 1.0)
    assert runs.lost(1, Loss(), 2.0, 12.0) == []
    assert run.state is RunState.CANCELLING
    assert cancels(runs.resumed({"alive": ["r"]}, 3.0, 2)) == ["r"]
    [ended] = delivered(runs.receive(event("task_cancelled"), 4.0, 2))
    assert ended["acknowledged"] is True


def test_another_worker_has_nothing_of_the_one_before() -> None:
    """forsake(): what was in limbo is lost, what waits in line is not touched."""
    runs = table()
    lost = in_limbo(runs, make_run("lost"))
    runs.register(make_run("waiting"), 0.0)
    assert [item["run_id"] for item in delivered(runs.forsake())] == ["lost"]
    assert lost.state is RunState.ORPHANED
    assert post(runs) == ["waiting"]


@pytest.mark.parametrize("policy", ["cancel", "fail", "requeue", "detach"])
@pytest.mark.parametrize("started", [False, True])
def test_a_worker_that_stops_hands_runs_back(policy: str, started: bool) -> None:
    """What it had not started is sent again under every policy, what it had only under requeue."""
    runs = table()
    run = on_its_way(runs, make_run(delivery_orphan_policy=policy))
    error = {"kind": "WorkerStopping", "retryable": True, "source": "executor", "started": started}
    ended = delivered(runs.receive(event("task_error", error=error), 1.0, 1))
    again = policy == "requeue" or not started
    assert bool(ended) is not again
    assert (run.state is RunState.QUEUED) is again
    assert run.attempt == (2 if again and started else 1)


def test_a_worker_that_takes_nothing_is_not_asked_for_ever() -> None:
    """After three runs handed back the fourth is the run's end."""
    runs = table()
    runs.register(make_run(), 0.0)
    error = {"kind": "WorkerStopping", "retryable": True, "source": "executor", "started": False}
    for _ in range(3):
        post(runs)
        assert runs.receive(event("task_error", error=error), 1.0, 1) == []
    post(runs)
    assert delivered(runs.receive(event("task_error", error=error), 1.0, 1))


def test_f17_before_its_last_delivery_a_run_goes_alone() -> None:
    """Three workers died; one of these runs kills them. It is found, and the others are spared."""
    runs = table()
    names = [f"r{number}" for number in range(10)]
    for name in names:
        runs.register(make_run(name, delivery_orphan_policy="requeue"), 0.0)
    for generation in (1, 2, 3):
        assert post(runs, generation=generation) == names
        assert lose(runs, generation=generation) == []
    generation = 4
    ended: list[dict[str, Any]] = []
    while len(runs):
        [name] = post(runs, generation=generation)
        if name == "r4":
            ended += delivered(lose(runs, generation=generation))
            generation += 1
        else:
            ended += delivered(runs.receive(event("task_result", name), 1.0, generation))
    assert [item["run_id"] for item in ended if item["type"] == "task_error"] == ["r4"]
    assert sorted(item["run_id"] for item in ended) == names


def test_what_is_buffered_is_what_may_be_sent_again() -> None:
    """A run that has started is kept only for the policy that may start it anew."""
    runs = table()
    for policy in ("cancel", "requeue"):
        on_its_way(runs, make_run(policy, delivery_orphan_policy=policy))
    assert runs.buffered == 4
    for policy in ("cancel", "requeue"):
        runs.receive(event("heartbeat", policy), 1.0, 1)
        assert runs.buffered == 4
    for policy in ("cancel", "requeue"):
        runs.receive(event("task_started", policy), 1.0, 1)
    assert runs.buffered == 2
    runs.receive(event("task_result", "requeue"), 2.0, 1)
    assert runs.buffered == 0


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (1012, "restart", "was lost (close code 1012: restart); run"),
        (1001, "Closed with code 1001.", "was lost (Closed with code 1001); run"),
        (None, "no bytes for 5 s after a ping", "was lost (no bytes for 5 s after a ping); run"),
        (None, "", "was lost; run"),
    ],
)
def test_a_loss_says_once_why(code: int | None, reason: str, said: str) -> None:
    """What the peer closed with, or what was seen on this side."""
    assert said in str(connection_lost(make_run(delivery_orphan_policy="cancel"), Loss(code, reason)))
