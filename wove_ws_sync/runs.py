"""The table of runs: pure state, ``(event or tick, now) → effects``.

Owns: every run's state, deadlines, slots and cancel rules (``docs/topics/delivery``).
Never: starts a thread, touches a socket, reads a clock, calls a sink. The link holds its
state lock around each call and applies the effects after releasing it.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from typing import Any

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
    failed,
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
    "Loss",
    "Posted",
    "Receipt",
    "Run",
    "RunState",
    "RunTable",
    "connection_lost",
]

# So many connections may end inside one message before the message is taken for the reason.
_MAX_CUTS = 3
# So many may end where a message was sent, or a result was to come, and nothing of the run arrived.
_MAX_FUTILE = 10
# From its third delivery on, a run that has only one left goes alone.
_MAX_SHARED = 2


@dataclasses.dataclass(slots=True)
class _Slots:
    taken: int = 0
    waiting: deque[Run] = dataclasses.field(default_factory=deque)


class RunTable:
    """All runs of one link. Not thread-safe: the link's state lock guards every call."""

    def __init__(self, *, cancel_ack_timeout: float, max_requeues: int) -> None:
        self._cancel_ack_timeout = cancel_ack_timeout
        self._max_requeues = max_requeues
        self._runs: dict[str, Run] = {}
        # What has ended and was not told yet, and by which thread that will be.
        self._untold: dict[Run, tuple[int, RunState, dict[str, Any], int | None]] = {}
        # How many runs each connection carries, by generation.
        self._carried: Counter[int] = Counter()
        self._ready: deque[Run] = deque()
        # Runs before their last delivery, each of which may be what kills workers: one at a time.
        self._suspects: deque[Run] = deque()
        self._suspect: Run | None = None
        self._slots: dict[tuple[Hashable, int], _Slots] = {}
        self._alarms: list[tuple[float, int, Run]] = []
        self._order = itertools.count()
        self.heartbeat_factor = 1.0
        #: The bytes of all messages that may have to be sent, or sent again.
        self.buffered = 0
        self.dropped: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

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

    def carried(self, generation: int) -> int:
        """Return how many runs that have not ended went out over a connection and count on it."""
        return self._carried[generation]

    def homeless(self) -> list[Run]:
        """Return the runs that no connection carries: those in line and those in limbo."""
        if len(self._runs) == self._carried.total():
            return []
        return [run for run in self._runs.values() if run.generation is None]

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
        self._sweep(self._ready)
        self.buffered += len(run.message)
        limit = run.delivery.delivery_max_in_flight
        if limit is None:
            self._ready.append(run)
        else:
            slots = self._slots.setdefault((run.session, limit), _Slots())
            self._sweep(slots.waiting)
            slots.waiting.append(run)
            self._fill_slots(slots, limit)
        self._set_alarm(run, now)

    def _sweep(self, line: deque[Run]) -> None:
        """Drop what has ended from a line that nobody takes from for long."""
        if len(line) > 64 + 2 * len(self._runs):
            waiting = [run for run in line if not run.terminal]
            line.clear()
            line.extend(waiting)

    @property
    def has_ready(self) -> bool:
        """Tell whether :meth:`take_ready` may have something to give."""
        return bool(self._ready) or (self._suspect is None and bool(self._suspects))

    def take_ready(self) -> list[Run]:
        """Return the runs that may be sent now, each once, in order."""
        taken = [run for run in self._ready if not run.terminal]
        self._ready.clear()
        while self._suspect is None and self._suspects:
            run = self._suspects.popleft()
            if not run.terminal:
                self._suspect = run
                taken.append(run)
        return taken

    def sent(self, run: Run, receipt: Receipt, now: float, generation: int) -> None:
        """Note that *run* goes to the transport of a connection, which answers through *receipt*."""
        run.life = now
        run.receipt = receipt
        self._carry(run, generation)
        run.state = RunState.SENT
        self._set_alarm(run, now)

    # -- coming in ---------------------------------------------------------------

    def receive(self, event: dict[str, Any], now: float, generation: int) -> list[Effect]:
        """Apply one event frame that came over a connection.

        Events of unknown and ended runs, and of runs that this connection does not carry, are
        counted and dropped.
        """
        run = self._runs.get(event["run_id"])
        if run is None or run.generation != generation:
            self.dropped["unknown_run" if run is None else "stale"] += 1
            return []
        run.life = now
        run.answered = True
        if event["type"] not in TERMINAL_EVENTS:
            run.cuts = 0
            if event["type"] == "task_started" and run.delivery.delivery_orphan_policy != "requeue":
                self._forget_message(run)  # it will not be sent again, whatever comes
            if run.state is RunState.SENT and event["type"] != "log":
                run.state = RunState.RUNNING
            return [Deliver(run, event)]
        if run.state is RunState.CANCELLING and run.timeout is not None:
            run.timeout.cancel_acknowledged = event["type"] == "task_cancelled"
            run.timeout.late_result = event["type"] != "task_cancelled"
            return self._time_out(run)
        if event["type"] == "task_cancelled":
            return self._finish(run, RunState.CANCELLED, {**event, "acknowledged": True})
        stopping = worker_stopping(event)
        if stopping is not None and run.state is not RunState.CANCELLING and self._handed_back(run, stopping):
            return []
        return self._finish(run, RunState.DONE, event)

    def waits_elsewhere(self, run_id: str, generation: int) -> bool:
        """Tell whether the run counts on another connection, or on none yet: its end must come again."""
        run = self._runs.get(run_id)
        return run is not None and run.generation != generation

    def _handed_back(self, run: Run, error: dict[str, Any]) -> bool:
        """Send a run again that a stopping worker gave back, if that is safe."""
        if error.get("started") is not False:
            return run.delivery.delivery_orphan_policy == "requeue" and self._requeue(run)
        run.cuts += 1  # a worker that takes nothing and does not go away must not be asked for ever
        if run.cuts > _MAX_CUTS or not run.message:
            return False
        self.counts["resends"] += 1
        self._queue_again(run)
        return True

    def _forget_message(self, run: Run) -> None:
        self.buffered -= len(run.message)
        run.message = b""

    def cancel(self, run: Run, now: float) -> list[Effect]:
        """Cancel *run* by its ``delivery_cancel_mode``; a second call changes nothing.

        Whatever had not left this process ends at once. Under "best_effort" the rest ends
        at once too; under "require_ack" it stays CANCELLING until the worker answers or
        ``cancel_ack_timeout`` has passed.
        """
        if run.terminal or run.state is RunState.CANCELLING:
            return []
        if run.withdraw():
            return self._finish(run, RunState.CANCELLED, cancelled(run, acknowledged=run.attempt == 1))
        if run.delivery.delivery_cancel_mode == "best_effort":
            command = CancelAtWorker(run, run.generation)
            return [command, *self._finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))]
        return self._await_ack(run, now, run.deadline.earliest(Deadline(now + self._cancel_ack_timeout)))

    # -- time --------------------------------------------------------------------

    def next_alarm(self) -> float | None:
        """Return the earliest moment at which :meth:`tick` may have something to decide."""
        return self._alarms[0][0] if self._alarms else None

    def judge(self, run: Run, now: float) -> list[Effect]:
        """Decide what is due for one run at *now*."""
        return [] if run.terminal else self._judge(run, now)

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
                return self._finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))
            return []
        if run.deadline.expired(now):
            text = f"Delivery timeout exceeded for task '{run.task_id}' ({run.delivery.delivery_timeout}s)."
        elif (silent_at := self._silent_at(run, now)) is not None and now >= silent_at:
            text = (
                f"Delivery heartbeat timed out for task '{run.task_id}' "
                f"after {run.delivery.delivery_heartbeat_seconds}s without heartbeat."
            )
        elif Deadline(run.limbo_until).expired(now):
            return self._give_up(run)
        else:
            return []
        run.timeout = DeliveryTimeout(text, run_id=run.run_id)
        if run.withdraw():
            return self._time_out(run)
        if run.delivery.delivery_cancel_mode == "require_ack" and not run.in_limbo:
            return self._await_ack(run, now, Deadline(now + self._cancel_ack_timeout))
        return [CancelAtWorker(run, run.generation), *self._time_out(run)]

    def _silent_at(self, run: Run, now: float) -> float | None:
        """Return when *run* has been silent for too long; the clock starts when its last byte left."""
        interval = run.delivery.delivery_heartbeat_seconds
        if interval is None or run.receipt is None or run.in_limbo:
            return None
        since = now if run.receipt.sent_at is None else max(run.life, run.receipt.sent_at)
        return since + interval * self.heartbeat_factor

    def _set_alarm(self, run: Run, now: float) -> None:
        if run.state is RunState.CANCELLING:
            alarm = run.ack_by
        else:
            silent_at = self._silent_at(run, now)
            alarm = Deadline(silent_at).earliest(run.deadline).earliest(Deadline(run.limbo_until)).at
        if alarm is None or (run.alarm is not None and run.alarm <= alarm):
            return
        run.alarm = alarm
        heapq.heappush(self._alarms, (alarm, next(self._order), run))
        if len(self._alarms) > 64 + 2 * len(self._runs):
            self._alarms = [
                entry for entry in self._alarms if not entry[2].terminal and entry[2].alarm == entry[0]
            ]
            heapq.heapify(self._alarms)

    # -- a connection that is lost, and perhaps found again --------------------------

    def lost(self, generation: int, loss: Loss, now: float, limbo_until: float | None) -> list[Effect]:
        """Decide for every run of a connection what the loss of it means.

        What had not left this process whole is sent again, under every policy. What the worker may
        have seen waits in LIMBO for :meth:`resumed`, until *limbo_until* or not at all (None: such a
        worker keeps nothing); then its orphan policy decides.
        """
        effects: list[Effect] = []
        for run in self.homeless():
            self._wait_in_limbo(run, run.limbo_until, now)
        for run in [run for run in self._runs.values() if run.generation == generation]:
            run.loss = loss
            self._carry(run, None)
            if not run.maybe_seen and run.state is not RunState.CANCELLING:
                # A message inside which connection after connection ends is what ends them.
                run.cuts += run.receipt is not None and run.receipt.started
                if run.cuts > _MAX_CUTS:
                    effects += self._orphan(run, connection_lost(run, loss))
                else:
                    self._queue_again(run)
            elif limbo_until is None:
                effects += self._give_up(run)
            elif run.state is not RunState.CANCELLING:  # which keeps its own time
                run.state = RunState.LIMBO
                self._wait_in_limbo(run, limbo_until, now)
        return effects

    def _wait_in_limbo(self, run: Run, until: float | None, now: float) -> None:
        """Bound the wait, but for what is to be delivered again: that has to ask first, whenever that is."""
        run.limbo_until = None if run.delivery.delivery_orphan_policy == "requeue" else until
        self._set_alarm(run, now)

    def limbo(self) -> list[str]:
        """Return the ids of the runs whose connection is lost and that the worker may still have."""
        return [run.run_id for run in self.homeless() if run.in_limbo]

    def resuming(self, until: float, now: float) -> None:
        """Let what is in limbo wait for the worker's answer, until that moment at least."""
        for run in self.homeless():
            if run.in_limbo and run.state is not RunState.CANCELLING:
                run.limbo_until = max(run.limbo_until or until, until)
                self._set_alarm(run, now)

    def resumed(self, notice: dict[str, Any], now: float, generation: int) -> list[Effect]:
        """Apply one ``resume_state``: the worker has a run, never saw it, or cannot say."""
        effects: list[Effect] = []
        for run in self._limbo_of(notice.get("alive")):
            effects += self._found(run, now, generation)
        for run in self._limbo_of(notice.get("finished")):
            effects += self._futile(run) or self._found(run, now, generation)
        for run in self._limbo_of(notice.get("unknown")):
            if run.answered or run.state is RunState.CANCELLING:  # it had seen it: never mind what it says
                effects += self._give_up(run)
            elif futile := self._futile(run):
                effects += futile
            else:
                self.counts["resends"] += 1
                self._queue_again(run)
        for run in self._limbo_of(notice.get("lost")):
            effects += self._give_up(run)
        return effects

    def _found(self, run: Run, now: float, generation: int) -> list[Effect]:
        self._carry(run, generation)
        run.life, run.limbo_until, run.answered = now, None, True
        self.counts["resumed_runs"] += 1
        if run.state is RunState.CANCELLING:
            return [CancelAtWorker(run, generation)]
        run.state = RunState.RUNNING
        self._set_alarm(run, now)
        return []

    def _futile(self, run: Run) -> list[Effect]:
        """End a run whose message, or whose result, ends connection after connection."""
        run.cuts += 1
        if run.cuts <= _MAX_FUTILE or run.state is RunState.CANCELLING:
            return []
        return self._orphan(run, connection_lost(run, run.loss))

    def _limbo_of(self, *lists: Any) -> Iterable[Run]:
        for ids in lists:
            for run_id in ids if isinstance(ids, list) else ():
                run = self._runs.get(run_id) if isinstance(run_id, str) else None
                if run is not None and run.in_limbo:
                    yield run

    def forsake(self) -> list[Effect]:
        """Give up what is in limbo: the worker that had it is not coming back."""
        effects: list[Effect] = []
        for run in self.homeless():
            if run.in_limbo:
                effects += self._give_up(run)
        return effects

    def _give_up(self, run: Run) -> list[Effect]:
        """Decide by its orphan policy for a run that a worker may have executed."""
        requeue = run.delivery.delivery_orphan_policy == "requeue" and run.state is not RunState.CANCELLING
        if requeue and self._requeue(run):
            return []
        return self._orphan(run, connection_lost(run, run.loss))

    def _requeue(self, run: Run) -> bool:
        if run.attempt > self._max_requeues or not run.message:
            return False
        run.attempt += 1
        self.counts["requeues"] += 1
        self._queue_again(run)
        return True

    def _queue_again(self, run: Run) -> None:
        self._carry(run, None)
        run.receipt, run.limbo_until = None, None
        run.answered = False
        run.state = RunState.QUEUED
        if self._suspect is run:
            self._suspect = None
            self._suspects.appendleft(run)
        elif self._is_suspect(run):
            self._suspects.append(run)
        else:
            self._ready.append(run)

    def _carry(self, run: Run, generation: int | None) -> None:
        if run.generation is not None:
            self._carried[run.generation] -= 1
            if not self._carried[run.generation]:
                del self._carried[run.generation]
        if generation is not None:
            self._carried[generation] += 1
        run.generation = generation

    # -- endings -----------------------------------------------------------------

    def fail(self, run: Run, error: BaseException) -> list[Effect]:
        """End *run* with *error*: no connection could be had, say."""
        return self._orphan(run, error)

    def abandon(self, session: Hashable) -> list[Effect]:
        """End the runs of a session that stops, each by its ``delivery_orphan_policy``."""
        effects: list[Effect] = []
        for run in self.of_session(session):
            policy = run.delivery.delivery_orphan_policy
            if run.withdraw():
                pass
            elif policy == "detach":
                effects.append(DetachAtWorker(run, run.generation))
            elif run.state is not RunState.CANCELLING:
                effects.append(CancelAtWorker(run, run.generation))
            if policy == "cancel" and run.timeout is None:
                effects += self._finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))
            else:
                effects += self._orphan(run, orphaned(run))
        return effects

    def _orphan(self, run: Run, error: BaseException) -> list[Effect]:
        if run.state is not RunState.CANCELLING:
            detached = run.delivery.delivery_orphan_policy == "detach" and run.maybe_executed
            state = RunState.DETACHED if detached else RunState.ORPHANED
            return self._finish(run, state, failed(run, error))
        if run.timeout is not None:
            return self._time_out(run)
        return self._finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))

    def _await_ack(self, run: Run, now: float, until: Deadline) -> list[Effect]:
        run.ack_by = until.at
        run.state = RunState.CANCELLING
        run.alarm = None
        self._set_alarm(run, now)
        return [CancelAtWorker(run, run.generation)]

    def _time_out(self, run: Run) -> list[Effect]:
        assert run.timeout is not None
        return self._finish(run, RunState.TIMED_OUT, failed(run, run.timeout))

    def _finish(self, run: Run, state: RunState, event: dict[str, Any]) -> list[Effect]:
        """Set the terminal state, once, and free what the run held."""
        assert not run.terminal, f"run {run.run_id!r} ended twice"
        self._untold[run] = (threading.get_ident(), state, event, run.generation)
        run.state = state
        self._forget_message(run)
        self._carry(run, None)
        if self._suspect is run:
            self._suspect = None
        del self._runs[run.run_id]
        limit = run.delivery.delivery_max_in_flight
        if limit is not None:
            self._free_slot(run, limit)
        return [Deliver(run, event)]

    def told(self, run: Run) -> None:
        """Note that the end of *run* was told. Takes no lock: any thread, at any time."""
        self._untold.pop(run, None)

    # -- after an exception that struck in the middle of a decision ------------------

    def mend(self, now: float) -> list[Effect]:
        """Finish what this thread began to end and did not tell, and put everything else in order.

        A signal handler may raise between any two steps of the main thread. What a run says of
        itself is set in an order that can be gone on from; all the rest follows from the runs.
        """
        effects: list[Effect] = []
        for run, (thread, state, event, generation) in list(self._untold.items()):
            if thread == threading.get_ident():
                run.state, run.message, run.generation = state, b"", None
                if self._runs.get(run.run_id) is run:
                    del self._runs[run.run_id]
                if not run.withdraw():
                    detached = run.delivery.delivery_orphan_policy == "detach"
                    effects.append((DetachAtWorker if detached else CancelAtWorker)(run, generation))
                effects.append(Deliver(run, event))
        self._index(now)
        return effects

    def _index(self, now: float) -> None:
        """Set anew whatever follows from the runs themselves."""
        self._carried.clear()
        self._ready.clear()
        self._suspects.clear()
        self._slots, self._alarms = {}, []
        self._suspect, self.buffered = None, 0
        for run in self._runs.values():
            if run.state is RunState.QUEUED and run.receipt is not None:  # it did not get to the transport
                run.receipt = run.generation = None
            if run.generation is not None:
                self._carried[run.generation] += 1
            self.buffered += len(run.message)
            limit = run.delivery.delivery_max_in_flight
            if limit is not None:
                slots = self._slots.setdefault((run.session, limit), _Slots())
                slots.taken += run.holds_slot
                if not run.holds_slot:
                    slots.waiting.append(run)
            if run.state is not RunState.QUEUED:
                self._suspect = run if self._is_suspect(run) else self._suspect
            elif limit is None or run.holds_slot:
                (self._suspects if self._is_suspect(run) else self._ready).append(run)
            run.alarm = None
            self._set_alarm(run, now)
        for (_, limit), slots in self._slots.items():
            self._fill_slots(slots, limit)

    def _is_suspect(self, run: Run) -> bool:
        """Tell whether the next delivery of *run*, or the present one, is one to be made alone."""
        return _MAX_SHARED < run.attempt > self._max_requeues

    # -- slots -------------------------------------------------------------------

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
