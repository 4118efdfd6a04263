"""Whatever happens in whatever order: the run table ends every run once and loses nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from wove_ws_sync.errors import ConnectionLost, DeliveryTimeout
from wove_ws_sync.frames import EVENTS, TERMINAL_EVENTS
from wove_ws_sync.options import DeliveryOptions
from wove_ws_sync.runs import CancelAtWorker, Deliver, Effect, Run, RunState, RunTable

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
    """A message in the transport's hands: nothing of it left yet."""

    started: bool = False
    sent_at: float | None = None

    @property
    def maybe_sent(self) -> bool:
        return self.sent_at is not None


class Runs(RuleBasedStateMachine):
    """A link without a socket: what it would do to its table, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.table = RunTable(cancel_ack_timeout=5.0)
        self.registered: dict[str, Run] = {}
        self.ended: Counter[str] = Counter()
        self.count = 0

    known = Bundle("known")

    @initialize(factor=st.sampled_from([1.0, 2.0]))
    def connect(self, factor: float) -> None:
        self.table.heartbeat_factor = factor

    def apply(self, effects: list[Effect]) -> None:
        """Do what a link does with effects, and judge them."""
        for effect in effects:
            run = effect.run
            assert self.registered[run.run_id] is run
            if isinstance(effect, CancelAtWorker):
                continue
            assert effect.event["run_id"] == run.run_id
            assert not self.ended[run.run_id], "an event came after the end"
            if effect.event["type"] in TERMINAL_EVENTS:
                self.ended[run.run_id] += 1
                assert run.terminal
                assert run.message == b""

    def alive(self) -> list[Run]:
        return [run for run_id, run in self.registered.items() if not self.ended[run_id]]

    # -- what users do ---------------------------------------------------------------

    @rule(target=known, delivery=DELIVERIES, session=st.sampled_from(SESSIONS))
    def register(self, delivery: DeliveryOptions, session: str) -> str:
        self.count += 1
        run = Run(
            run_id=f"r{self.count}",
            task_id="task",
            message=b"{}",
            delivery=delivery,
            session=session,
            environment="env",
            sink=lambda event: None,
        )
        self.registered[run.run_id] = run
        self.table.register(run, self.now)
        return run.run_id

    @rule(run_id=known)
    def cancel(self, run_id: str) -> None:
        run = self.registered[run_id]
        before = run.state
        self.apply(self.table.cancel(run, self.now))
        if before not in (RunState.QUEUED, RunState.SENT, RunState.RUNNING):
            assert run.state is before

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
                self.table.sent(run, Receipt(), self.now)

    @rule(run_id=known, done=st.booleans())
    def leave(self, run_id: str, done: bool) -> None:
        receipt = self.registered[run_id].receipt
        if isinstance(receipt, Receipt) and receipt.sent_at is None:
            receipt.started = True
            receipt.sent_at = self.now if done else None

    @rule(run_id=known, kind=st.sampled_from(sorted(EVENTS)))
    def receive(self, run_id: str, kind: str) -> None:
        dropped = self.table.dropped["unknown_run"]
        wanted = not self.ended[run_id] and self.registered[run_id].receipt is not None
        effects = self.table.receive({"type": kind, "run_id": run_id}, self.now)
        self.apply(effects)
        assert bool(effects) == wanted
        assert self.table.dropped["unknown_run"] == dropped + (not wanted)
        if wanted and kind in TERMINAL_EVENTS:
            assert self.ended[run_id] == 1

    @rule(kind=st.sampled_from(sorted(EVENTS)))
    def receive_for_nobody(self, kind: str) -> None:
        assert self.table.receive({"type": kind, "run_id": "nobody"}, self.now) == []

    @rule(max_requeues=st.sampled_from([0, 1, 3]))
    def lose(self, max_requeues: int) -> None:
        before = {run.run_id: (run.maybe_executed, run.state, run.attempt) for run in self.alive()}
        effects = self.table.lost(1006, "gone", max_requeues)
        for effect in effects:
            assert isinstance(effect, Deliver)
            error = effect.event.get("exception")
            assert error is None or isinstance(error, ConnectionLost | DeliveryTimeout)
        self.apply(effects)
        for run_id, (seen, state, attempt) in before.items():
            run = self.registered[run_id]
            again = run.delivery.delivery_orphan_policy == "requeue" and attempt <= max_requeues
            stays = state is not RunState.CANCELLING and (not seen or again)
            assert run.terminal is not stays
            if stays:
                assert (run.state, run.message) == (RunState.QUEUED, b"{}")
                assert run.attempt == attempt + seen

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
        assert set(self.table._slots) == set(sharing)
        for key, runs in sharing.items():
            slots = self.table._slots[key]
            assert slots.taken == sum(run.holds_slot for run in runs) == min(key[1], len(runs))
            waiting = [run for run in slots.waiting if not run.terminal]
            assert waiting == [run for run in runs if not run.holds_slot]

    @invariant()
    def who_may_go_is_ready(self) -> None:
        queued = [run for run in self.alive() if run.state is RunState.QUEUED]
        free = [run for run in queued if run.holds_slot or run.delivery.delivery_max_in_flight is None]
        ready = [run.run_id for run in self.table._ready if not run.terminal]
        assert sorted(ready) == sorted(run.run_id for run in free)

    @invariant()
    def no_deadline_is_forgotten(self) -> None:
        moments: list[float] = []
        for run in self.alive():
            if run.state is RunState.CANCELLING:
                moments.append(_given(run.ack_by))
                continue
            if run.deadline.at is not None:
                moments.append(run.deadline.at)
            interval = run.delivery.delivery_heartbeat_seconds
            if interval is not None and run.receipt is not None and run.receipt.sent_at is not None:
                silent_since = max(run.life, run.receipt.sent_at)
                moments.append(silent_since + interval * self.table.heartbeat_factor)
        if moments:
            assert _given(self.table.next_alarm()) <= min(moments)

    def teardown(self) -> None:
        for session in SESSIONS:
            self.abandon(session)
        assert self.table._slots == {}
        assert sorted(self.ended.elements()) == sorted(self.registered)


def _given(moment: Any) -> float:
    assert isinstance(moment, float)
    return moment


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
