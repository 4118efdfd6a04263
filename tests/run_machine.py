"""The run table under a state machine: what users, workers, connections and time do to it, in any order."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from wove_ws_sync.errors import ConnectionLost, DeliveryTimeout
from wove_ws_sync.frames import EVENTS, TERMINAL_EVENTS
from wove_ws_sync.options import DeliveryOptions
from wove_ws_sync.runs import Deliver, Effect, Loss, Run, RunState, RunTable

SESSIONS = ["a", "b"]
SECONDS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.5, 10.0, 60.0])

DELIVERIES = st.builds(
    DeliveryOptions,
    delivery_timeout=st.sampled_from([None, 0.5, 3.0, 20.0]),
    delivery_heartbeat_seconds=st.sampled_from([None, 0.5, 2.0]),
    delivery_cancel_mode=st.sampled_from(["best_effort", "require_ack"]),
    delivery_orphan_policy=st.sampled_from(["fail", "cancel", "requeue", "detach"]),
    delivery_max_in_flight=st.sampled_from([None, None, 1, 2]),
)


@dataclasses.dataclass
class Receipt:
    """A message in the transport's hands: all of it has left, unless a test says otherwise."""

    started: bool = True
    sent_at: float | None = 0.0
    withdrawn: bool = False

    @property
    def maybe_sent(self) -> bool:
        return self.sent_at is not None

    def withdraw(self) -> bool:
        self.withdrawn = self.withdrawn or not self.started
        return self.withdrawn


class Runs(RuleBasedStateMachine):
    """A link without a socket: what it would do to its table, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.table = RunTable(cancel_ack_timeout=5.0, max_requeues=3)
        self.generation = 1
        self.draining: set[int] = set()
        self.registered: dict[str, Run] = {}
        self.ended: Counter[str] = Counter()
        self.count = 0

    known = Bundle("known")

    @initialize(factor=st.sampled_from([1.0, 2.0]), max_requeues=st.sampled_from([0, 1, 2, 3]))
    def connect(self, factor: float, max_requeues: int) -> None:
        self.table = RunTable(cancel_ack_timeout=5.0, max_requeues=max_requeues)
        self.table.heartbeat_factor = factor
        self.max_requeues = max_requeues

    def apply(self, effects: list[Effect]) -> None:
        """Do what a link does with effects, and judge them."""
        for effect in effects:
            run = effect.run
            assert self.registered[run.run_id] is run
            if not isinstance(effect, Deliver):
                continue
            assert effect.event["run_id"] == run.run_id
            assert not self.ended[run.run_id], "an event came after the end"
            if effect.event["type"] in TERMINAL_EVENTS:
                self.ended[run.run_id] += 1
                assert run.terminal
                assert run.message == b""
                self.table.told(run)

    def apply_again(self, effects: list[Effect]) -> None:
        """Do it after a strike: what was being told may be told once more, as sinks allow for."""
        self.apply(
            [
                effect
                for effect in effects
                if not isinstance(effect, Deliver) or not self.ended[effect.run.run_id]
            ]
        )
        for effect in effects:
            self.table.told(effect.run)

    def alive(self) -> list[Run]:
        return [run for run_id, run in self.registered.items() if not self.ended[run_id]]

    # -- what users do ---------------------------------------------------------------

    def new_run(self, delivery: DeliveryOptions, session: str) -> Run:
        """Return a run that the table does not know yet."""
        self.count += 1
        return Run(
            run_id=f"r{self.count}",
            task_id="task",
            message=b"{}",
            delivery=delivery,
            session=session,
            environment="env",
            sink=lambda event: None,
        )

    @rule(target=known, delivery=DELIVERIES, session=st.sampled_from(SESSIONS))
    def register(self, delivery: DeliveryOptions, session: str) -> str:
        run = self.new_run(delivery, session)
        self.registered[run.run_id] = run
        self.table.register(run, self.now)
        return run.run_id

    @rule(target=known, delivery=DELIVERIES, session=st.sampled_from(SESSIONS), done=st.booleans())
    def send(self, delivery: DeliveryOptions, session: str, done: bool) -> str:
        """Register a run and let everything that is ready leave, so that there is something to lose."""
        run_id = self.register(delivery, session)
        self.post(refused=False)
        for run in self.alive():
            self.leave(run.run_id, done=done or run.run_id != run_id)
        return run_id

    @rule(run_id=known)
    def cancel(self, run_id: str) -> None:
        run = self.registered[run_id]
        before = run.state
        self.apply(self.table.cancel(run, self.now))
        if before not in (RunState.QUEUED, RunState.SENT, RunState.RUNNING, RunState.LIMBO):
            assert run.state is before

    @precondition(lambda self: len(self.alive()) > 4)
    @rule(session=st.sampled_from(SESSIONS))
    def abandon(self, session: str) -> None:
        self.apply(self.table.abandon(session))
        assert self.table.of_session(session) == []

    # -- what the transport and the worker do ------------------------------------------

    @rule(refused=st.booleans())
    def post(self, refused: bool) -> None:
        for position, run in enumerate(self.table.take_ready()):
            assert run.state is RunState.QUEUED
            if refused and position == 0:
                self.apply(self.table.fail(run, ValueError("too large")))
            else:
                self.table.sent(run, Receipt(started=False, sent_at=None), self.now, self.generation)

    @rule(run_id=known, done=st.booleans())
    def leave(self, run_id: str, done: bool) -> None:
        receipt = self.registered[run_id].receipt
        if isinstance(receipt, Receipt) and receipt.sent_at is None:
            receipt.started = True
            receipt.sent_at = self.now if done else None

    @rule(
        run_id=known,
        kind=st.sampled_from(sorted(EVENTS)),
        back=st.sampled_from([0, 0, 0, 1]),
        stopping=st.sampled_from([None, None, True, False]),
    )
    def receive(self, run_id: str, kind: str, back: int, stopping: bool | None) -> None:
        """An event, by this connection or an earlier one; perhaps the worker hands the run back."""
        run, generation = self.registered[run_id], self.generation - back
        event: dict[str, Any] = {"type": kind, "run_id": run_id}
        if kind == "task_error" and stopping is not None:
            event["error"] = {"kind": "WorkerStopping", "retryable": True, "source": "executor"}
            event["error"]["started"] = stopping
        dropped = self.table.dropped.total()
        wanted = not self.ended[run_id] and run.generation == generation
        repeated = wanted and kind == "task_started" and run.begun
        effects = self.table.receive(event, self.now, generation)
        self.apply(effects)
        unwanted = repeated or not wanted
        assert not (unwanted and effects)
        assert self.table.dropped.total() == dropped + unwanted
        assert not wanted or kind != "task_started" or run.begun
        if wanted and kind in TERMINAL_EVENTS and "error" not in event:
            assert self.ended[run_id] == 1
        if wanted and "error" in event and not self.ended[run_id]:
            assert run.state is RunState.QUEUED

    @rule(kind=st.sampled_from(sorted(EVENTS)))
    def receive_for_nobody(self, kind: str) -> None:
        event = {"type": kind, "run_id": "nobody"}
        assert self.table.receive(event, self.now, self.generation) == []

    # -- connections that come and go ----------------------------------------------------

    @rule()
    def drain(self) -> None:
        """The worker stops: its connection keeps what it has, another one takes what is new."""
        self.draining.add(self.generation)
        self.generation += 1

    @precondition(lambda self: any(run.generation is not None for run in self.alive()))
    @rule(window=st.sampled_from([None, 1.0, 10.0]), drained=st.booleans())
    def lose(self, window: float | None, drained: bool) -> None:
        if drained and self.draining:
            lost, window = self.draining.pop(), None
        else:
            lost, self.generation = self.generation, self.generation + 1
        carried = [run for run in self.alive() if run.generation == lost]
        others = {run.run_id: run.state for run in self.alive() if run.generation != lost}
        before = {run.run_id: (run.maybe_seen, run.state, run.attempt, run.cuts) for run in carried}
        self.expect_losses(
            self.table.lost(lost, Loss(1006, "gone"), self.now, None if window is None else self.now + window)
        )
        for run in carried:
            seen, state, attempt, cuts = before[run.run_id]
            assert run.generation is None
            if state is RunState.CANCELLING:
                assert run.terminal is (window is None)
            elif not seen:
                assert run.terminal is (run.cuts > 3)
                assert run.terminal or (run.state, run.attempt) == (RunState.QUEUED, attempt)
                assert run.cuts - cuts in (0, 1)
            elif window is not None:
                assert run.state is RunState.LIMBO
            else:
                self.expect_policy(run, attempt)
        for run_id, state in others.items():
            assert self.registered[run_id].state is state

    def expect_losses(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert isinstance(effect, Deliver)
            error = effect.event.get("exception")
            assert error is None or isinstance(error, ConnectionLost | DeliveryTimeout)
        self.apply(effects)

    def expect_policy(self, run: Run, attempt: int) -> None:
        """The worker that had it is gone: requeued, or at its end."""
        again = run.delivery.delivery_orphan_policy == "requeue" and attempt <= self.max_requeues
        assert run.terminal is not again
        if again:
            assert (run.state, run.attempt, run.message) == (RunState.QUEUED, attempt + 1, b"{}")

    @precondition(lambda self: self.table.limbo())
    @rule(answer=st.lists(st.sampled_from(["alive", "finished", "unknown", "lost"]), max_size=8))
    def resume(self, answer: list[str]) -> None:
        """The worker is there again and says what it has, of some runs or all."""
        limbo = self.table.limbo()
        self.table.resuming(self.now + 5.0, self.now, self.generation)
        notice: dict[str, Any] = {"alive": ["nobody", 7], "finished": None}
        for run_id, what in zip(limbo, answer, strict=False):
            notice.setdefault(what, None)
            notice[what] = [*(notice[what] or []), run_id]
        before = {run_id: self.registered[run_id].state for run_id in limbo}
        self.apply(self.table.resumed(notice, self.now, self.generation))
        for run_id, what in zip(limbo, answer, strict=False):
            run = self.registered[run_id]
            if what in ("alive", "finished") and not run.terminal:
                kept = before[run_id] if before[run_id] is RunState.CANCELLING else RunState.RUNNING
                assert (run.state, run.generation) == (kept, self.generation)
            elif what == "alive":
                raise AssertionError("a run that is alive ended")
            else:
                assert run.terminal or run.state is RunState.QUEUED
        for run_id in limbo[len(answer) :]:
            assert self.registered[run_id].state is before[run_id]

    @precondition(lambda self: self.table.limbo())
    @rule()
    def forsake(self) -> None:
        """Another worker answers: what was in limbo is lost."""
        limbo = {run_id: self.registered[run_id] for run_id in self.table.limbo()}
        before = {run_id: (run.state, run.attempt) for run_id, run in limbo.items()}
        self.expect_losses(self.table.forsake())
        for run_id, run in limbo.items():
            state, attempt = before[run_id]
            if state is RunState.CANCELLING:
                assert run.terminal
            else:
                self.expect_policy(run, attempt)
        assert self.table.limbo() == []

    # -- time ----------------------------------------------------------------------------

    @rule(seconds=SECONDS, unread=st.booleans())
    def tick(self, seconds: float, unread: bool) -> None:
        self.now += seconds
        self.apply(self.table.tick(self.now, self.now if unread else 0.0))
        alarm = self.table.next_alarm()
        assert alarm is None or alarm > self.now
        for run in self.alive():
            assert run.state is RunState.CANCELLING or not run.deadline.expired(self.now)

    # -- what is always true ---------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        alive = self.alive()
        assert self.table.of_all() == alive
        assert max(self.ended.values(), default=0) <= 1
        assert not any(run.terminal for run in alive)

    @invariant()
    def slots_are_taken_by_the_living(self) -> None:
        sharing: dict[Any, list[Run]] = {}
        for run in self.alive():
            if run.delivery.delivery_max_in_flight is not None:
                sharing.setdefault((run.session, run.delivery.delivery_max_in_flight), []).append(run)
        assert set(self.table._line._slots) == set(sharing)
        for key, runs in sharing.items():
            slots = self.table._line._slots[key]
            assert slots.taken == sum(run.holds_slot for run in runs) == min(key[1], len(runs))
            waiting = [run for run in slots.waiting if not run.terminal]
            assert waiting == [run for run in runs if not run.holds_slot]

    @invariant()
    def who_may_go_is_ready(self) -> None:
        queued = [run for run in self.alive() if run.state is RunState.QUEUED]
        free = [run for run in queued if run.holds_slot or run.delivery.delivery_max_in_flight is None]
        line = self.table._line
        ready = [run.run_id for run in [*line._ready, *line._suspects] if not run.terminal]
        assert sorted(ready) == sorted(run.run_id for run in free)

    @invariant()
    def suspects_go_alone(self) -> None:
        suspect = self.table._line._suspect
        assert suspect is None or (not suspect.terminal and suspect.state is not RunState.QUEUED)
        for run in self.table._line._suspects:
            assert run.attempt > self.max_requeues

    @invariant()
    def what_is_buffered_and_carried_adds_up(self) -> None:
        alive = self.alive()
        assert self.table.buffered == sum(len(run.message) for run in alive)
        carried = Counter(run.generation for run in alive if run.generation is not None)
        assert all(self.table.carried(number) == carried[number] for number in range(self.generation + 1))
        assert self.table.homeless() == [run for run in alive if run.generation is None]

    @invariant()
    def no_deadline_is_forgotten(self) -> None:
        moments: list[float] = []
        for run in self.alive():
            if run.state is RunState.CANCELLING:
                moments.append(_given(run.ack_by))
                continue
            if run.deadline.at is not None:
                moments.append(run.deadline.at)
            if run.limbo_until is not None:
                moments.append(run.limbo_until)
            interval = run.delivery.delivery_heartbeat_seconds
            at_worker = run.receipt is not None and run.receipt.sent_at is not None and not run.in_limbo
            if interval is not None and at_worker:
                assert run.receipt is not None
                silent_since = max(run.life, _given(run.receipt.sent_at))
                moments.append(silent_since + interval * self.table.heartbeat_factor)
        if moments:
            assert _given(self.table.next_alarm()) <= min(moments)
        kept = {(moment, run) for moment, _, run in self.table._alarms._heap}
        assert all(run.alarm is None or (run.alarm, run) in kept for run in self.alive())

    def look(self) -> None:
        """Check what is always true, on a walk that hypothesis does not lead."""
        self.nothing_is_lost()
        self.slots_are_taken_by_the_living()
        self.who_may_go_is_ready()
        self.suspects_go_alone()
        self.what_is_buffered_and_carried_adds_up()
        self.no_deadline_is_forgotten()

    def teardown(self) -> None:
        for session in SESSIONS:
            self.abandon(session)
        assert self.table._line._slots == {}
        assert sorted(self.ended.elements()) == sorted(self.registered)


def _given(moment: Any) -> float:
    assert isinstance(moment, float)
    return moment
