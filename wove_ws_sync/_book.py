"""The runs that have not ended, and what has to happen when one ends or is delivered again.

Owns: which runs there are, which connection carries each, what their messages weigh, the one end
of each, and order after an exception. Never: hears of events, moments or losses itself;
:mod:`wove_ws_sync.runs` and ``_losses`` do, and say what follows.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from typing import Any

from ._alarms import Alarms
from ._line import Line
from ._run import (
    CancelAtWorker,
    Deliver,
    DetachAtWorker,
    Effect,
    Run,
    RunState,
    cancelled,
    connection_lost,
    failed,
)

__all__ = ["RunBook"]

# Of more runs than these it is not remembered that a worker still has them.
_MOST_LEFT = 10_000


class RunBook:
    """What :class:`~wove_ws_sync.runs.RunTable` decides about. The link's state lock guards every call."""

    def __init__(self, max_requeues: int) -> None:
        self._max_requeues = max_requeues
        self.runs: dict[str, Run] = {}
        self.line = Line(self.runs, max_requeues)
        self.alarms = Alarms(self.runs)
        # What has ended and was not told yet, and by which thread that will be.
        self._untold: dict[Run, tuple[int, RunState, dict[str, Any], int | None]] = {}
        # Runs that have ended here and perhaps not at the worker: which connection will bring the end there.
        self._left: OrderedDict[str, int] = OrderedDict()
        #: How many runs each connection carries, by generation.
        self.carried: Counter[int] = Counter()
        #: The bytes of all messages that may have to be sent, or sent again.
        self.buffered = 0
        self.counts: Counter[str] = Counter()

    def homeless(self) -> list[Run]:
        """Return the runs that no connection carries: those in line and those in limbo."""
        if len(self.runs) == self.carried.total():
            return []
        return [run for run in self.runs.values() if run.generation is None]

    def add(self, run: Run, now: float) -> None:
        """Take in a new run, and put it in line."""
        self.runs[run.run_id] = run
        self.line.enter(run)
        self.buffered += len(run.message)
        self.alarms.set(run, now)

    def carry(self, run: Run, generation: int | None) -> None:
        """Note which connection carries *run* from now on, None for none."""
        if run.generation is not None:
            self.carried[run.generation] -= 1
            if not self.carried[run.generation]:
                del self.carried[run.generation]
        if generation is not None:
            self.carried[generation] += 1
        run.generation, run.asked = generation, None

    def is_left(self, run_id: str) -> bool:
        """Tell whether a run of that id has ended here and its end at the worker is still to come."""
        return run_id in self._left

    def ended_there(self, run_id: str, generation: int) -> None:
        """Note that the end of a run came over a connection, or that none will."""
        if self._left.get(run_id) == generation:
            del self._left[run_id]

    def hears_no_more(self, generation: int) -> None:
        """Expect nothing of a connection that is lost: what a worker has of it is over with the next one."""
        for run_id in [run_id for run_id, of in self._left.items() if of == generation]:
            del self._left[run_id]

    def forget_message(self, run: Run) -> None:
        """Drop a message that will not be sent again."""
        self.buffered -= len(run.message)
        run.message = b""

    # -- delivering again ----------------------------------------------------------

    def queue_again(self, run: Run) -> None:
        """Put *run* in line as if it had not been sent."""
        self.carry(run, None)
        run.receipt, run.limbo_until = None, None
        run.answered = run.begun = False
        run.state = RunState.QUEUED
        self.line.enter_again(run)

    def requeue(self, run: Run) -> bool:
        """Deliver a run once more that may have been executed; False if it has no delivery left."""
        if run.attempt > self._max_requeues or not run.message:
            return False
        run.attempt += 1
        self.counts["requeues"] += 1
        self.queue_again(run)
        return True

    # -- endings -----------------------------------------------------------------

    def give_up(self, run: Run) -> list[Effect]:
        """Decide by its orphan policy for a run that a worker may have executed."""
        requeue = run.delivery.delivery_orphan_policy == "requeue" and run.state is not RunState.CANCELLING
        if requeue and self.requeue(run):
            return []
        return self.orphan(run, connection_lost(run, run.loss))

    def let_go(self, run: Run, generation: int | None) -> Effect:
        """Return what the worker has to be told of a run that has ended here, and perhaps not there."""
        stopped = run.state in (RunState.CANCELLED, RunState.TIMED_OUT)
        detached = run.delivery.delivery_orphan_policy == "detach" and not stopped
        return (DetachAtWorker if detached else CancelAtWorker)(run, generation)

    def orphan(self, run: Run, error: BaseException) -> list[Effect]:
        """End *run* with *error*, or with what it is being cancelled for."""
        if run.state is not RunState.CANCELLING:
            detached = run.delivery.delivery_orphan_policy == "detach" and run.maybe_executed
            state = RunState.DETACHED if detached else RunState.ORPHANED
            return self.finish(run, state, failed(run, error))
        if run.timeout is not None:
            return self.time_out(run)
        return self.finish(run, RunState.CANCELLED, cancelled(run, acknowledged=False))

    def time_out(self, run: Run) -> list[Effect]:
        """End a run whose ``timeout`` is set."""
        assert run.timeout is not None
        return self.finish(run, RunState.TIMED_OUT, failed(run, run.timeout))

    def finish(self, run: Run, state: RunState, event: dict[str, Any]) -> list[Effect]:
        """Set the terminal state, once, and free what the run held."""
        if run in self._untold:  # an exception struck the thread that was ending it, which goes on with it
            return []
        assert not run.terminal, f"run {run.run_id!r} ended twice"
        bringer = run.generation if run.answered and run.asked is None else run.asked
        if bringer is not None and state is not RunState.DETACHED:
            self._left[run.run_id] = bringer
            if len(self._left) > _MOST_LEFT:
                self._left.popitem(last=False)
        self._untold[run] = (threading.get_ident(), state, event, run.generation)
        run.state = state
        self.forget_message(run)
        self.carry(run, None)
        del self.runs[run.run_id]
        self.line.leave(run)
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
                if self.runs.get(run.run_id) is run:
                    del self.runs[run.run_id]
                if not run.withdraw():
                    effects.append(self.let_go(run, generation))
                effects.append(Deliver(run, event))
        self._rebuild(now)
        return effects

    def _rebuild(self, now: float) -> None:
        """Set anew whatever follows from the runs themselves."""
        self.carried.clear()
        self.buffered = 0
        for run in self.runs.values():
            if run.state is RunState.QUEUED and run.receipt is not None:  # it did not get to the transport
                run.receipt = run.generation = None
            if run.generation is not None:
                self.carried[run.generation] += 1
            self.buffered += len(run.message)
        self.line.rebuild(self.runs.values())
        self.alarms.rebuild(self.runs.values(), now)
