"""The table of runs: pure state, ``(event or tick, now) → effects``.

Owns: what an event, a moment, a cancellation or the end of a session means for a run
(``docs/topics/delivery-semantics``); ``_book`` keeps the runs, ``_losses`` decides about lost
connections. Never: starts a thread, touches a socket, reads a clock, calls a sink. The link
holds its state lock around each call and applies the effects after releasing it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

from ._book import RunBook
from ._losses import Losses
from ._run import (
    CancelAtWorker,
    Deliver,
    DetachAtWorker,
    Effect,
    Loss,
    Posted,
    Receipt,
    Run,
    RunState,
    cancelled,
    connection_lost,
    orphaned,
    worker_stopping,
)
from .errors import DeliveryTimeout
from .frames import TERMINAL_EVENTS
from .timing import Deadline

__all__ = [
    "CancelAtWorker",
    "Deliver",
    "DetachAtWorker",
    "Effect",
    "InFlight",
    "Loss",
    "Posted",
    "Receipt",
    "Run",
    "RunState",
    "RunTable",
    "connection_lost",
]


class InFlight(ValueError):
    """Tell that a run of that id is under way already."""


class RunTable:
    """All runs of one link. Not thread-safe: the link's state lock guards every call."""

    def __init__(self, *, cancel_ack_timeout: float, max_requeues: int) -> None:
        self._cancel_ack_timeout = cancel_ack_timeout
        self._book = RunBook(max_requeues)
        self._losses = Losses(self._book)
        # Parts of the book that are asked for every event.
        self._runs, self._line, self._alarms = self._book.runs, self._book.line, self._book.alarms
        #: Whether the worker may be able to stop a task that has begun.
        self.stops_running = True
        #: Why there is no connection: what the last dial ended with, None while there is one.
        self.dial_error: BaseException | None = None
        self.dropped: Counter[str] = Counter()
        self.counts = self._book.counts

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def buffered(self) -> int:
        """Return the bytes of all messages that may have to be sent, or sent again."""
        return self._book.buffered

    @property
    def heartbeat_factor(self) -> float:
        """Return what ``delivery_heartbeat_seconds`` is multiplied with."""
        return self._alarms.heartbeat_factor

    @heartbeat_factor.setter
    def heartbeat_factor(self, factor: float) -> None:
        self._alarms.heartbeat_factor = factor

    def get(self, run_id: str) -> Run | None:
        """Return the run if it is known and has not ended."""
        return self._runs.get(run_id)

    def of_all(self) -> list[Run]:
        """Return every run that has not ended, oldest first."""
        return list(self._runs.values())

    def of_session(self, session: Hashable) -> list[Run]:
        """Return the runs of *session* that have not ended, oldest first."""
        return [run for run in self._runs.values() if run.session == session]

    def carried(self, generation: int) -> int:
        """Return how many runs that have not ended went out over a connection and count on it."""
        return self._book.carried[generation]

    def homeless(self) -> list[Run]:
        """Return the runs that no connection carries: those in line and those in limbo."""
        return self._book.homeless()

    # -- going out ---------------------------------------------------------------

    def register(self, run: Run, now: float) -> None:
        """Take *run* in, QUEUED; its ``delivery_timeout`` counts from here.

        Raises InFlight, a ValueError, if a run of that id is, or has ended here and not at the worker yet.
        """
        if run.run_id in self._runs:
            remedy = "give every run an id of its own" if run.needs is None else "use the future that it has"
            raise InFlight(f"run_id {run.run_id!r} is already in flight; {remedy}.")
        if run.needs is None and self._book.is_left(run.run_id):  # who attaches to it wants just that end
            raise InFlight(
                f"run_id {run.run_id!r} has ended here, but its end at the worker service is still to come; "
                "give every run an id of its own."
            )
        run.deadline = run.deadline.earliest(Deadline.after(run.delivery.delivery_timeout, now))
        run.life = now
        self._book.add(run, now)

    @property
    def has_ready(self) -> bool:
        """Tell whether :meth:`take_ready` may have something to give."""
        return self._line.has_ready

    def take_ready(self) -> list[Run]:
        """Return the runs that may be sent now, each once, in order."""
        return self._line.take()

    def sent(self, run: Run, receipt: Receipt, now: float, generation: int) -> None:
        """Note that *run* goes to the transport of a connection, which answers through *receipt*."""
        run.life = now
        run.receipt = receipt
        self._book.carry(run, generation)
        run.state = RunState.SENT
        self._alarms.set(run, now)

    # -- coming in ---------------------------------------------------------------

    def receive(self, event: dict[str, Any], now: float, generation: int) -> list[Effect]:
        """Apply one event frame that came over a connection.

        Events of unknown and ended runs, and of runs that this connection does not carry, are
        counted and dropped.
        """
        effects = self._receive(event, now, generation)
        if event["type"] in TERMINAL_EVENTS:
            self._book.ended_there(event["run_id"], generation)
        return effects

    def _receive(self, event: dict[str, Any], now: float, generation: int) -> list[Effect]:
        run = self._runs.get(event["run_id"])
        if run is None or run.generation != generation:
            self.dropped["unknown_run" if run is None else "stale"] += 1
            return []
        run.life = now
        run.answered = True
        if event["type"] not in TERMINAL_EVENTS:
            run.cuts = run.futile = 0
            if event["type"] == "task_started":
                if run.begun:
                    self.dropped["repeated"] += 1
                    return []
                run.begun = True
                if run.delivery.delivery_orphan_policy != "requeue":
                    self._book.forget_message(run)  # it will not be sent again, whatever comes
            if run.state is RunState.SENT and event["type"] != "log":
                run.state = RunState.RUNNING
            return [Deliver(run, event)]
        if run.state is RunState.CANCELLING and run.timeout is not None:
            run.timeout.cancel_acknowledged = event["type"] == "task_cancelled"
            run.timeout.late_result = event["type"] != "task_cancelled"
            return self._book.time_out(run)
        if event["type"] == "task_cancelled":
            return self._book.finish(run, RunState.CANCELLED, {**event, "acknowledged": True})
        stopping = worker_stopping(event)
        if (
            stopping is not None
            and run.state is not RunState.CANCELLING
            and self._losses.handed_back(run, stopping)
        ):
            return []
        return self._book.finish(run, RunState.DONE, event)

    def waits_elsewhere(self, run_id: str, generation: int) -> bool:
        """Tell whether the run counts on another connection, or on none yet: its end must come again."""
        run = self._runs.get(run_id)
        return run is not None and run.generation != generation

    def knows(self, run_id: str) -> bool:
        """Tell whether the end of such a run is waited for, be it that it has ended here before."""
        return run_id in self._runs or self._book.is_left(run_id)

    def cancel(self, run: Run, now: float) -> list[Effect]:
        """Cancel *run* by its ``delivery_cancel_mode``; a second call changes nothing.

        Whatever had not left this process ends at once. Under "best_effort" the rest ends
        at once too; under "require_ack" it stays CANCELLING until the worker answers or
        ``cancel_ack_timeout`` has passed, unless the worker has said that it cannot stop what runs.
        """
        if run.terminal or run.state is RunState.CANCELLING:
            return []
        if run.withdraw():
            return self._book.finish(run, RunState.CANCELLED, cancelled(run, acknowledged=run.attempt == 1))
        if run.delivery.delivery_cancel_mode == "best_effort" or self._is_unstoppable(run):
            command = CancelAtWorker(run, run.reached_by)
            return [command, *self._book.finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))]
        return self._await_ack(run, now, run.deadline.earliest(Deadline(now + self._cancel_ack_timeout)))

    def _is_unstoppable(self, run: Run) -> bool:
        return run.state is RunState.RUNNING and not self.stops_running

    # -- time --------------------------------------------------------------------

    def next_alarm(self) -> float | None:
        """Return the earliest moment at which :meth:`tick` may have something to decide."""
        return self._alarms.next()

    def judge(self, run: Run, now: float) -> list[Effect]:
        """Decide what is due for one run at *now*."""
        return [] if run.terminal else self._judge(run, now)

    def tick(self, now: float, floor: float = 0.0) -> list[Effect]:
        """Decide everything due at *now*.

        *floor* is the last moment at which bytes of an unfinished message arrived: while
        one message fills the wire no heartbeat can come, so those bytes are life for all.
        """
        effects: list[Effect] = []
        while (run := self._alarms.due(now)) is not None:
            run.life = max(run.life, floor)
            effects += self._judge(run, now)
            if not run.terminal:
                self._alarms.set(run, now)
        return effects

    def _judge(self, run: Run, now: float) -> list[Effect]:
        if run.state is RunState.CANCELLING:
            if run.ack_by is None or now < run.ack_by:
                return []
            untold: list[Effect] = [CancelAtWorker(run, run.asked)] if run.in_limbo else []
            if run.timeout is not None:
                return untold + self._book.time_out(run)
            return untold + self._book.finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))
        if run.deadline.expired(now):
            text = f"Delivery timeout exceeded for task '{run.task_id}' ({run.delivery.delivery_timeout}s)."
        elif (silent_at := self._alarms.silent_at(run, now)) is not None and now >= silent_at:
            text = (
                f"Delivery heartbeat timed out for task '{run.task_id}' "
                f"after {run.delivery.delivery_heartbeat_seconds}s without heartbeat."
            )
        elif Deadline(run.limbo_until).expired(now):
            asked, effects = run.asked, self._book.give_up(run)
            return [self._book.let_go(run, asked), *effects] if run.terminal else effects
        else:
            return []
        run.timeout = DeliveryTimeout(text, run_id=run.run_id)
        if run.generation is None:
            run.timeout.__cause__ = self.dial_error
        if run.withdraw():
            return self._book.time_out(run)
        awaited = run.delivery.delivery_cancel_mode == "require_ack" and not self._is_unstoppable(run)
        if awaited and not run.in_limbo:
            return self._await_ack(run, now, Deadline(now + self._cancel_ack_timeout))
        return [CancelAtWorker(run, run.reached_by), *self._book.time_out(run)]

    # -- a connection that is lost, and perhaps found again --------------------------

    def lost(self, generation: int, loss: Loss, now: float, limbo_until: float | None) -> list[Effect]:
        """Decide for every run of a connection what the loss of it means.

        What had not left this process whole is sent again, under every policy. What the worker may
        have seen waits in LIMBO for :meth:`resumed`, until *limbo_until* or not at all (None: such a
        worker keeps nothing); then its orphan policy decides.
        """
        self._book.hears_no_more(generation)
        return self._losses.lost(generation, loss, now, limbo_until)

    def limbo(self) -> list[str]:
        """Return the ids of the runs whose connection is lost and that the worker may still have."""
        return [run.run_id for run in self._losses.in_limbo()]

    def resuming(self, until: float, now: float, generation: int) -> None:
        """Let what is in limbo wait for the worker's answer over a connection, until that moment at least."""
        self._losses.resuming(until, now, generation)

    def resumed(self, notice: dict[str, Any], now: float, generation: int) -> list[Effect]:
        """Apply one ``resume_state``: the worker has a run, never saw it, or cannot say."""
        return self._losses.resumed(notice, now, generation)

    def forsake(self) -> list[Effect]:
        """Give up what is in limbo: the worker that had it is not coming back."""
        return self._losses.forsake()

    # -- endings -----------------------------------------------------------------

    def fail(self, run: Run, error: BaseException) -> list[Effect]:
        """End *run* with *error*: no connection could be had, say."""
        return self._book.orphan(run, error)

    def abandon(self, session: Hashable) -> list[Effect]:
        """End the runs of a session that stops, each by its ``delivery_orphan_policy``."""
        effects: list[Effect] = []
        for run in self.of_session(session):
            policy = run.delivery.delivery_orphan_policy
            if run.withdraw():
                pass
            elif policy == "detach":
                effects.append(DetachAtWorker(run, run.reached_by))
            elif run.state is not RunState.CANCELLING or run.in_limbo:  # where it could not be told before
                effects.append(CancelAtWorker(run, run.reached_by))
            if policy == "cancel" and run.timeout is None:
                effects += self._book.finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))
            else:
                effects += self._book.orphan(run, orphaned(run))
        return effects

    def _await_ack(self, run: Run, now: float, until: Deadline) -> list[Effect]:
        run.ack_by = until.at
        run.state = RunState.CANCELLING
        run.alarm = None
        self._alarms.set(run, now)
        return [CancelAtWorker(run, run.generation)]

    def told(self, run: Run) -> None:
        """Note that the end of *run* was told. Takes no lock: any thread, at any time."""
        self._book.told(run)

    def mend(self, now: float) -> list[Effect]:
        """Put everything in order after an exception that struck in the middle of a decision."""
        return self._book.mend(now)
