"""What becomes of runs whose connection is lost, and perhaps found again.

Owns: who is sent again, who waits in limbo, what a worker's answer about a run means, and how
often a run may end a connection. Never: hears of the loss itself; the link tells
:class:`~wove_ws_sync.runs.RunTable`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ._book import RunBook
from ._run import CancelAtWorker, Effect, Loss, Run, RunState, connection_lost

__all__ = ["Losses"]

# So many connections may end inside one message before the message is taken for the reason.
_MAX_CUTS = 3
# So many may end where a message was sent, or a result was to come, and nothing of the run arrived.
_MAX_FUTILE = 10


class Losses:
    """The decisions about runs that a connection or a worker left behind."""

    def __init__(self, book: RunBook) -> None:
        self._book = book

    def lost(self, generation: int, loss: Loss, now: float, limbo_until: float | None) -> list[Effect]:
        """Decide for every run of a connection; see ``RunTable.lost``."""
        effects: list[Effect] = []
        for run in self._book.homeless():
            if run.asked == generation:
                run.asked = None
            self._wait_in_limbo(run, run.limbo_until, now)
        for run in [run for run in self._book.runs.values() if run.generation == generation]:
            run.loss = loss
            self._book.carry(run, None)
            if not run.maybe_seen and run.state is not RunState.CANCELLING:
                # A message inside which connection after connection ends is what ends them.
                run.cuts += run.receipt is not None and run.receipt.started
                if run.cuts > _MAX_CUTS:
                    effects += self._book.orphan(run, connection_lost(run, loss))
                else:
                    self._book.queue_again(run)
            elif limbo_until is None:
                effects += self._book.give_up(run)
            elif run.state is not RunState.CANCELLING:  # which keeps its own time
                run.state = RunState.LIMBO
                self._wait_in_limbo(run, limbo_until, now)
        return effects

    def _wait_in_limbo(self, run: Run, until: float | None, now: float) -> None:
        """Bound the wait, but for what is to be delivered again: that has to ask first, whenever that is."""
        run.limbo_until = None if run.delivery.delivery_orphan_policy == "requeue" else until
        self._book.alarms.set(run, now)

    def in_limbo(self) -> list[Run]:
        """Return the runs whose connection is lost and that the worker may still have."""
        return [run for run in self._book.homeless() if run.in_limbo]

    def resuming(self, until: float, now: float, generation: int) -> None:
        """Let what is in limbo wait for the worker's answer over a connection, until that moment at least."""
        for run in self.in_limbo():
            run.asked = generation
            if run.state is not RunState.CANCELLING:
                run.limbo_until = max(run.limbo_until or until, until)
                self._book.alarms.set(run, now)

    def resumed(self, notice: dict[str, Any], now: float, generation: int) -> list[Effect]:
        """Apply one ``resume_state``: the worker has a run, never saw it, or cannot say."""
        effects: list[Effect] = []
        for run in self._listed(notice.get("alive")):
            effects += self._found(run, now, generation)
        for run in self._listed(notice.get("finished")):
            effects += self._futile(run) or self._found(run, now, generation)
        for run in self._listed(notice.get("unknown")):
            if run.answered or run.state is RunState.CANCELLING:  # it had seen it: never mind what it says
                effects += self._book.give_up(run)
            elif futile := self._futile(run):
                effects += futile
            else:
                self._send_again(run)
        for run in self._listed(notice.get("lost")):
            effects += self._book.give_up(run)
        for run_id in [*_ids(notice.get("unknown")), *_ids(notice.get("lost"))]:
            self._book.ended_there(run_id, generation)
        return effects

    def _listed(self, ids: Any) -> Iterable[Run]:
        """Yield the runs in limbo among those that the worker lists."""
        for run_id in _ids(ids):
            run = self._book.runs.get(run_id)
            if run is not None and run.in_limbo:
                yield run

    def _found(self, run: Run, now: float, generation: int) -> list[Effect]:
        self._book.carry(run, generation)
        run.life, run.limbo_until, run.answered = now, None, True
        self._book.counts["resumed_runs"] += 1
        if run.state is RunState.CANCELLING:
            return [CancelAtWorker(run, generation)]
        run.state = RunState.RUNNING
        self._book.alarms.set(run, now)
        return []

    def _futile(self, run: Run) -> list[Effect]:
        """End a run whose message, or whose result, ends connection after connection."""
        run.futile += 1
        if run.futile <= _MAX_FUTILE or run.state is RunState.CANCELLING:
            return []
        return self._book.orphan(run, connection_lost(run, run.loss))

    def forsake(self) -> list[Effect]:
        """Give up what is in limbo: the worker that had it is not coming back."""
        effects: list[Effect] = []
        for run in self.in_limbo():
            effects += self._book.give_up(run)
        return effects

    def handed_back(self, run: Run, error: dict[str, Any]) -> bool:
        """Send a run again that a stopping worker gave back, if that is safe."""
        if error.get("started") is not False:
            return run.delivery.delivery_orphan_policy == "requeue" and self._book.requeue(run)
        run.cuts += 1  # a worker that takes nothing and does not go away must not be asked for ever
        if run.cuts > _MAX_CUTS or not run.message:
            return False
        self._send_again(run)
        return True

    def _send_again(self, run: Run) -> None:
        self._book.counts["resends"] += 1
        self._book.queue_again(run)


def _ids(listed: Any) -> Iterable[str]:
    return [run_id for run_id in listed if isinstance(run_id, str)] if isinstance(listed, list) else []
