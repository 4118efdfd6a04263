"""The table of runs: pure state, ``(event or tick, now) → effects``.

Owns: every run's state, deadlines, slots and cancel rules (``docs/topics/delivery``).
Never: starts a thread, touches a socket, reads a clock, calls a sink. The link holds its
state lock around each call and applies the effects after releasing it.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

from .errors import ConnectionLost, DeliveryTimeout
from .frames import TERMINAL_EVENTS
from .options import DeliveryOptions
from .timing import Deadline

__all__ = ["CancelAtWorker", "Deliver", "Effect", "Receipt", "Run", "RunState", "RunTable", "connection_lost"]


class RunState(enum.Enum):
    """Where a run is; the last four are final."""

    QUEUED = "queued"
    SENT = "sent"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    ORPHANED = "orphaned"


# So many connections may end inside one message before the message is taken for the reason.
_MAX_CUTS = 3
_TERMINAL_STATES = frozenset({RunState.DONE, RunState.CANCELLED, RunState.TIMED_OUT, RunState.ORPHANED})


class Receipt(Protocol):
    """What the transport knows of one queued message."""

    @property
    def started(self) -> bool:
        """Tell whether a byte of it may have left."""

    @property
    def sent_at(self) -> float | None:
        """Return when the last byte left, None before."""

    @property
    def maybe_sent(self) -> bool:
        """Tell whether the last byte may have left, noted or not."""


@dataclasses.dataclass(slots=True, eq=False)
class Run:
    """One task execution on its way; mutable, guarded by the link's state lock.

    ``sink`` takes the run's event frames, outside every lock, in whichever thread brings
    them: the reader for what arrives, the watchdog for deadlines, a caller for cancels.
    """

    run_id: str
    task_id: str
    message: bytes
    delivery: DeliveryOptions
    session: Hashable
    environment: str
    sink: Callable[[dict[str, Any]], None]
    deadline: Deadline = Deadline()
    attempt: int = 1
    cuts: int = 0
    state: RunState = RunState.QUEUED
    receipt: Receipt | None = None
    life: float = 0.0
    alarm: float | None = None
    ack_by: float | None = None
    timeout: DeliveryTimeout | None = None
    holds_slot: bool = False
    answered: bool = False

    @property
    def terminal(self) -> bool:
        """Tell whether the one terminal event has been decided."""
        return self.state in _TERMINAL_STATES

    @property
    def maybe_executed(self) -> bool:
        """Tell whether the whole run had left this process, so that a worker may have seen it."""
        return self.answered or (self.receipt is not None and self.receipt.maybe_sent)


class Deliver(NamedTuple):
    """Give *event* to the run's sink."""

    run: Run
    event: dict[str, Any]


class CancelAtWorker(NamedTuple):
    """Take the run back from the transport's queue or, once it left, send ``cancel_task``."""

    run: Run


Effect = Deliver | CancelAtWorker


@dataclasses.dataclass(slots=True)
class _Slots:
    taken: int = 0
    waiting: deque[Run] = dataclasses.field(default_factory=deque)


class RunTable:
    """All runs of one link. Not thread-safe: the link's state lock guards every call."""

    def __init__(self, *, cancel_ack_timeout: float) -> None:
        self._cancel_ack_timeout = cancel_ack_timeout
        self._runs: dict[str, Run] = {}
        self._ready: deque[Run] = deque()
        self._slots: dict[tuple[Hashable, int], _Slots] = {}
        self._alarms: list[tuple[float, int, Run]] = []
        self._order = itertools.count()
        self.heartbeat_factor = 1.0
        self.dropped: Counter[str] = Counter()
        self.requeues = 0

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: str) -> Run | None:
        """Return the run if it is known and has not ended."""
        return self._runs.get(run_id)

    def of_all(self) -> list[Run]:
        """Return every run that has not ended, oldest first."""
        return list(self._runs.values())

    def of_session(self, session: Hashable) -> list[Run]:
        """Return the runs of *session* that have not ended, oldest first."""
        return [run for run in self._runs.values() if run.session == session]

    # -- going out ---------------------------------------------------------------

    def register(self, run: Run, now: float) -> None:
        """Take *run* in, QUEUED; its ``delivery_timeout`` counts from here.

        Raises ValueError if a run of that id is in flight.
        """
        if run.run_id in self._runs:
            raise ValueError(f"run_id {run.run_id!r} is already in flight; give every run an id of its own.")
        run.deadline = run.deadline.earliest(Deadline.after(run.delivery.delivery_timeout, now))
        run.life = now
        self._runs[run.run_id] = run
        limit = run.delivery.delivery_max_in_flight
        if limit is None:
            self._ready.append(run)
        else:
            slots = self._slots.setdefault((run.session, limit), _Slots())
            slots.waiting.append(run)
            self._fill_slots(slots, limit)
        self._set_alarm(run, now)

    def take_ready(self) -> list[Run]:
        """Return the runs that may be sent now, each once, in order."""
        taken = [run for run in self._ready if not run.terminal]
        self._ready.clear()
        return taken

    def sent(self, run: Run, receipt: Receipt, now: float) -> None:
        """Note that *run* was handed to the transport, which answers through *receipt*."""
        run.state = RunState.SENT
        run.receipt = receipt
        run.life = now
        self._set_alarm(run, now)

    # -- coming in ---------------------------------------------------------------

    def receive(self, event: dict[str, Any], now: float) -> list[Effect]:
        """Apply one event frame; events of unknown and ended runs are counted and dropped."""
        run = self._runs.get(event["run_id"])
        if run is None or run.receipt is None:
            self.dropped["unknown_run"] += 1
            return []
        run.life = now
        run.answered = True
        if event["type"] not in TERMINAL_EVENTS:
            if run.delivery.delivery_orphan_policy != "requeue":
                run.message = b""  # it has arrived, and will not be sent again
            if run.state is RunState.SENT and event["type"] != "log":
                run.state = RunState.RUNNING
            return [Deliver(run, event)]
        if run.state is RunState.CANCELLING and run.timeout is not None:
            run.timeout.cancel_acknowledged = event["type"] == "task_cancelled"
            run.timeout.late_result = event["type"] != "task_cancelled"
            return self._time_out(run)
        if event["type"] == "task_cancelled":
            return self._finish(run, RunState.CANCELLED, {**event, "acknowledged": True})
        return self._finish(run, RunState.DONE, event)

    def cancel(self, run: Run, now: float) -> list[Effect]:
        """Cancel *run* by its ``delivery_cancel_mode``; a second call changes nothing.

        Whatever had not left this process ends at once. Under "best_effort" the rest ends
        at once too; under "require_ack" it stays CANCELLING until the worker answers or
        ``cancel_ack_timeout`` has passed.
        """
        if run.terminal or run.state is RunState.CANCELLING:
            return []
        if run.receipt is None or not run.receipt.started:
            return [
                CancelAtWorker(run),
                *self._finish(run, RunState.CANCELLED, _cancelled(run, acknowledged=True)),
            ]
        if run.delivery.delivery_cancel_mode == "best_effort":
            return [
                CancelAtWorker(run),
                *self._finish(run, RunState.CANCELLED, _cancelled(run, acknowledged=False)),
            ]
        return self._await_ack(run, now, run.deadline.earliest(Deadline(now + self._cancel_ack_timeout)))

    # -- time --------------------------------------------------------------------

    def next_alarm(self) -> float | None:
        """Return the earliest moment at which :meth:`tick` may have something to decide."""
        return self._alarms[0][0] if self._alarms else None

    def tick(self, now: float, floor: float = 0.0) -> list[Effect]:
        """Decide everything due at *now*.

        *floor* is the last moment at which bytes of an unfinished message arrived: while
        one message fills the wire no heartbeat can come, so those bytes are life for all.
        """
        effects: list[Effect] = []
        while self._alarms and self._alarms[0][0] <= now:
            moment, _, run = heapq.heappop(self._alarms)
            if run.terminal or run.alarm != moment:
                continue
            run.alarm = None
            run.life = max(run.life, floor)
            effects += self._judge(run, now)
            if not run.terminal:
                self._set_alarm(run, now)
        return effects

    def _judge(self, run: Run, now: float) -> list[Effect]:
        if run.state is RunState.CANCELLING:
            if run.ack_by is not None and now >= run.ack_by:
                if run.timeout is not None:
                    return self._time_out(run)
                return self._finish(run, RunState.CANCELLED, _cancelled(run, acknowledged=False))
            return []
        if run.deadline.expired(now):
            text = f"Delivery timeout exceeded for task '{run.task_id}' ({run.delivery.delivery_timeout}s)."
        elif (silent_at := self._silent_at(run, now)) is not None and now >= silent_at:
            text = (
                f"Delivery heartbeat timed out for task '{run.task_id}' "
                f"after {run.delivery.delivery_heartbeat_seconds}s without heartbeat."
            )
        else:
            return []
        run.timeout = DeliveryTimeout(text, run_id=run.run_id)
        left = run.receipt is not None and run.receipt.started
        if left and run.delivery.delivery_cancel_mode == "require_ack":
            return self._await_ack(run, now, Deadline(now + self._cancel_ack_timeout))
        return [CancelAtWorker(run), *self._time_out(run)]

    def _silent_at(self, run: Run, now: float) -> float | None:
        """Return when *run* has been silent for too long; the clock starts when its last byte left."""
        interval = run.delivery.delivery_heartbeat_seconds
        if interval is None or run.receipt is None:
            return None
        since = now if run.receipt.sent_at is None else max(run.life, run.receipt.sent_at)
        return since + interval * self.heartbeat_factor

    def _set_alarm(self, run: Run, now: float) -> None:
        if run.state is RunState.CANCELLING:
            alarm = run.ack_by
        else:
            silent_at = self._silent_at(run, now)
            alarm = Deadline(silent_at).earliest(run.deadline).at
        if alarm is None or (run.alarm is not None and run.alarm <= alarm):
            return
        run.alarm = alarm
        heapq.heappush(self._alarms, (alarm, next(self._order), run))
        if len(self._alarms) > 64 + 2 * len(self._runs):
            self._alarms = [
                entry for entry in self._alarms if not entry[2].terminal and entry[2].alarm == entry[0]
            ]
            heapq.heapify(self._alarms)

    # -- endings -----------------------------------------------------------------

    def lost(self, close_code: int | None, reason: str, max_requeues: int) -> list[Effect]:
        """Decide for every run what the loss of the connection means.

        What had not left this process whole is sent again, under every policy. What a worker may
        have seen is sent again under "requeue", *max_requeues* times, and ends with
        ConnectionLost otherwise.
        """
        effects: list[Effect] = []
        for run in self.of_all():
            if run.state is RunState.CANCELLING:
                effects += self._orphan(run, connection_lost(run, close_code, reason))
            elif not run.maybe_executed:
                # A message inside which connection after connection ends is what ends them.
                run.cuts += run.receipt is not None and run.receipt.started
                if run.cuts > _MAX_CUTS:
                    effects += self._orphan(run, connection_lost(run, close_code, reason))
                else:
                    self._queue_again(run)
            elif run.delivery.delivery_orphan_policy == "requeue" and run.attempt <= max_requeues:
                run.attempt += 1
                self.requeues += 1
                self._queue_again(run)
            else:
                effects += self._orphan(run, connection_lost(run, close_code, reason))
        return effects

    def _queue_again(self, run: Run) -> None:
        if run.receipt is not None:  # or it is in line already
            run.receipt = None
            run.answered = False
            run.state = RunState.QUEUED
            self._ready.append(run)

    def fail(self, run: Run, error: BaseException) -> list[Effect]:
        """End *run* with *error*: no connection could be had, say."""
        return self._orphan(run, error)

    def abandon(self, session: Hashable) -> list[Effect]:
        """End the runs of a session that stops, each by its ``delivery_orphan_policy``."""
        effects: list[Effect] = []
        for run in self.of_session(session):
            policy = run.delivery.delivery_orphan_policy
            if policy != "detach" and run.state is not RunState.CANCELLING:
                effects.append(CancelAtWorker(run))
            if policy == "cancel":
                effects += self._finish(run, RunState.CANCELLED, _cancelled(run, acknowledged=False))
            else:
                text = (
                    f"Task '{run.task_id}' became orphaned in environment '{run.environment}' "
                    f"with policy '{policy}'."
                )
                error = ConnectionLost(text, run_id=run.run_id, maybe_executed=run.maybe_executed)
                effects += self._finish(run, RunState.ORPHANED, failed(run, error))
        return effects

    def _orphan(self, run: Run, error: BaseException) -> list[Effect]:
        if run.state is not RunState.CANCELLING:
            return self._finish(run, RunState.ORPHANED, failed(run, error))
        if run.timeout is not None:
            return self._time_out(run)
        return self._finish(run, RunState.CANCELLED, _cancelled(run, acknowledged=False))

    def _await_ack(self, run: Run, now: float, until: Deadline) -> list[Effect]:
        run.state = RunState.CANCELLING
        run.ack_by = until.at
        run.alarm = None
        self._set_alarm(run, now)
        return [CancelAtWorker(run)]

    def _time_out(self, run: Run) -> list[Effect]:
        assert run.timeout is not None
        return self._finish(run, RunState.TIMED_OUT, failed(run, run.timeout))

    def _finish(self, run: Run, state: RunState, event: dict[str, Any]) -> list[Effect]:
        """Set the terminal state, once, and free what the run held."""
        assert not run.terminal, f"run {run.run_id!r} ended twice"
        run.state = state
        run.message = b""
        del self._runs[run.run_id]
        limit = run.delivery.delivery_max_in_flight
        if limit is not None:
            self._free_slot(run, limit)
        return [Deliver(run, event)]

    def _free_slot(self, run: Run, limit: int) -> None:
        slots = self._slots[run.session, limit]
        if run.holds_slot:
            slots.taken -= 1
        self._fill_slots(slots, limit)
        if not slots.taken and not slots.waiting:
            del self._slots[run.session, limit]

    def _fill_slots(self, slots: _Slots, limit: int) -> None:
        while slots.waiting and slots.taken < limit:
            run = slots.waiting.popleft()
            if not run.terminal:
                slots.taken += 1
                run.holds_slot = True
                self._ready.append(run)


def failed(run: Run, error: BaseException) -> dict[str, Any]:
    """Return the ``task_error`` event of an error made on this side."""
    return {
        "type": "task_error",
        "run_id": run.run_id,
        "task_id": run.task_id,
        "exception": error,
        "error": {
            "kind": type(error).__name__,
            "message": str(error),
            "traceback": "",
            "retryable": isinstance(error, ConnectionError),
            "source": "transport",
        },
    }


def _cancelled(run: Run, *, acknowledged: bool) -> dict[str, Any]:
    return {
        "type": "task_cancelled",
        "run_id": run.run_id,
        "task_id": run.task_id,
        "acknowledged": acknowledged,
    }


def connection_lost(run: Run, close_code: int | None, reason: str) -> ConnectionLost:
    """Return the error of a run whose connection broke."""
    policy = run.delivery.delivery_orphan_policy
    if policy == "cancel":
        said = f" (close code {close_code}{': ' + reason if reason else ''})" if close_code else ""
        seen = "may have run" if run.maybe_executed else "had not been sent"
        text = (
            f"The connection to the worker service was lost{said}; run '{run.run_id}' {seen}. "
            "Submit it again if that is safe."
        )
    else:
        text = (
            f"Task '{run.task_id}' orphaned after receiver failure in environment "
            f"'{run.environment}' (policy='{policy}')."
        )
    return ConnectionLost(
        text,
        run_id=run.run_id,
        close_code=close_code,
        reason=reason,
        attempt=run.attempt,
        maybe_executed=run.maybe_executed,
    )
