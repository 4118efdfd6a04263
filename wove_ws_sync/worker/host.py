"""One host and what is its own, as pure state: its runs, and the ends that are kept for it.

Owns: what ``resume`` is answered, what is let go and to whom. Never: a socket, a clock, a
timer (``now`` is an argument), never stops a job itself: it returns the runs whose jobs
are to be stopped. A connection is only a token here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .commands import AttachTask, Resume
from .events import service_error
from .kept import Kept, KeptEvents
from .runs import Run, RunTable
from .shelf import Identity, Shelf

__all__ = ["Host", "Resumed", "fitting", "result_dropped"]

#: Runs remembered as lost; where there are more, every unknown one counts as lost until the next ``resume``.
_MAX_LOST = 100_000


class Resumed(NamedTuple):
    """What to do about a ``resume``: send *state*, then *ended*, and stop the jobs of *stopped*."""

    state: dict[str, Any]
    ended: list[Kept]
    stopped: list[Run]


class Host:
    """One host, present or away.

    ``connection`` is the one that counts, None while the host is away. ``unconfirmed`` are
    the runs and ends that it has from an earlier connection and has not said to want: it
    hears nothing of them. ``leaving`` is set once it said ``shutdown``. *forgotten*
    says that it may have been here before, and that nothing is known of that.
    """

    def __init__(
        self,
        identity: Identity | None,
        kept: KeptEvents | None,
        shelf: Shelf | None,
        *,
        forgotten: bool = False,
    ) -> None:
        self.identity = identity
        self.connection: Any = None
        self.runs = RunTable()
        self.kept = kept
        self.unconfirmed: set[str] = set()
        self.leaving = False
        self.window = 0.0
        self.away_since = 0.0
        self.window_is_over = False
        self._shelf = shelf
        # What is not found may have been here before this host was, or been let go for it and not been kept.
        self._is_strange = True
        self._was_forgotten = forgotten
        self._was_let_go = False
        # What this ``resume`` has called lost so far, and what the one before did: it may not have arrived.
        self._lost: set[str] = set()
        self._lost_before: set[str] = set()

    def __repr__(self) -> str:
        state = "away" if self.connection is None else "present"
        return f"<Host {self.identity} {state} runs={len(self.runs)}>"

    def enter(self, connection: Any, window: float, *, familiar: bool) -> Any:
        """Go by *connection* from now on; return the one before, which must be closed, or None.

        *familiar* says that the host was here before.
        """
        before, self.connection = self.connection, connection
        self.window = window
        self.window_is_over = False
        if familiar and not self._lost and not self._was_forgotten:
            self._is_strange = False
        self.unconfirmed = {run.run_id for run in self.runs}
        for run in self.runs:
            run.beat_queued = False  # that was the queue of another connection
        if self.kept is not None:
            self.unconfirmed.update(self.kept)
        return before

    def find(self, run_id: str, now: float) -> Run | Kept | None:
        """Return the run, or its kept end; one that this host had let go is taken back."""
        found: Run | Kept | None = self.runs.get(run_id)
        if found is None and self.kept is not None:
            found = self.kept.get(run_id)
        if found is None and self._shelf is not None:
            found = self._take(run_id, self.identity, now)
        return found

    def has(self, run_id: str) -> bool:
        """Tell whether the run, or its kept end, is here; the shelf is left alone."""
        return self.runs.get(run_id) is not None or (
            self.kept is not None and self.kept.get(run_id) is not None
        )

    def keep(self, run: Run, event: bytes, now: float) -> None:
        """Keep the terminal event of a run until it is acknowledged, if this host acknowledges."""
        if self.kept is not None:
            self.kept.put(run, event, now)

    def end_of(self, run: Run) -> bytes:
        """Return the terminal event of *run* as far as it is still kept; b"" if nobody waits for it."""
        assert self.kept is not None
        if run.owner is not self or run.acknowledged:
            return b""
        kept = self.kept.get(run.run_id)
        return result_dropped(run) if kept is None else kept.event

    def acknowledge(self, run_ids: Iterable[str]) -> int:
        """Forget runs whose terminal events have arrived; return how many of them were unknown."""
        assert self.kept is not None
        unknown = 0
        for run_id in run_ids:
            self.unconfirmed.discard(run_id)
            kept = self.kept.pop(run_id)
            if kept is None:
                unknown += 1
            else:
                kept.run.acknowledged = True
        return unknown

    def resume(self, command: Resume, now: float) -> Resumed:
        """Say what is known of the runs that are listed; after the last list the others end."""
        lists: dict[str, list[str]] = {"alive": [], "finished": [], "unknown": [], "lost": []}
        ended = []
        for run_id in dict.fromkeys(command.run_ids):
            self.unconfirmed.discard(run_id)
            found = self.find(run_id, now)
            if found is None:
                lists["lost" if self._may_be_lost(run_id) else "unknown"].append(run_id)
            elif isinstance(found, Run):
                lists["alive"].append(run_id)
            else:
                lists["finished"].append(run_id)
                ended.append(found)
        self._lost.update(lists["lost"])
        stopped = [] if command.more else self._end_resume(now)
        return Resumed({"type": "resume_state", **lists}, ended, stopped)

    def _may_be_lost(self, run_id: str) -> bool:
        """Tell whether a run that is not here may have been, so that nothing can be said of it."""
        dropped = self.kept is not None and self.kept.incomplete
        return dropped or self._is_strange or self._was_let_go or run_id in self._lost_before

    def _end_resume(self, now: float) -> list[Run]:
        """Go by what was listed: of what was dropped so far it has been told, and the others end."""
        stopped = self._drop_unconfirmed(now)
        self._lost_before, self._lost = self._lost, set()
        self._is_strange = self._was_forgotten = False
        self._was_let_go = len(self._lost_before) > _MAX_LOST
        if self._was_let_go:
            self._lost_before = set()
        if self.kept is not None:
            self.kept.incomplete = False
        return stopped

    def let_go(self, run_id: str, now: float) -> list[Run] | None:
        """Put a run, or its kept end, on the shelf; None if there is none."""
        run = self.runs.get(run_id)
        if run is not None:
            return self._put(run)
        kept = None if self.kept is None else self.kept.pop(run_id)
        if kept is None:
            return None
        return self._put_end(kept, now)

    def attach(self, command: AttachTask, now: float) -> Run | Kept | None:
        """Take a run, or its kept end, from the shelf, whoever put it there."""
        self.unconfirmed.discard(command.run_id)
        found = self.find(command.run_id, now) or self._take(command.run_id, None, now)
        if found is not None:
            run = found.run if isinstance(found, Kept) else found
            run.beat_interval = command.beat_interval
            run.cancel_mode = command.cancel_mode
            run.orphan_policy = command.orphan_policy
        return found

    def end_window(self, now: float) -> list[Run]:
        """Cancel runs under "cancel", which leaves an error each, and let go of those under "detach"."""
        self.window_is_over = True
        stopped = []
        for run in self.runs:
            if run.orphan_policy == "cancel":
                self.runs.ended(run)
                self.keep(run, _host_away(run, self.window), now)
                stopped.append(run)
        return stopped + self.let_go_of_detached(now)

    def let_go_of_detached(self, now: float) -> list[Run]:
        """Put what is under "detach" on the shelf, ends as well, so that it outlives this host."""
        stopped = []
        self._was_let_go = True  # the shelf may drop it, or another host take it
        for run in self.runs:
            if run.orphan_policy == "detach":
                stopped += self._put(run)
        if self.kept is not None:
            for kept in [self.kept.get(run_id) for run_id in self.kept]:
                if kept is not None and kept.run.orphan_policy == "detach":
                    stopped += self._put_end(kept, now)
        return stopped

    def _drop_unconfirmed(self, now: float) -> list[Run]:
        stopped = []
        for run_id in self.unconfirmed:
            run = self.runs.get(run_id)
            kept = None if self.kept is None else self.kept.pop(run_id)
            if run is not None and run.orphan_policy == "detach":
                stopped += self._put(run)
            elif run is not None:
                self.runs.ended(run)
                stopped.append(run)
            elif kept is not None and kept.run.orphan_policy == "detach":
                stopped += self._put_end(kept, now)
        self.unconfirmed.clear()
        return stopped

    def _put(self, run: Run) -> list[Run]:
        if self._shelf is None or self.identity is None:
            raise RuntimeError("An anonymous host has nowhere to leave a run.")
        self.runs.remove(run)
        return self._shelf.put(run, self.identity)

    def _put_end(self, kept: Kept, now: float) -> list[Run]:
        assert self._shelf is not None and self.identity is not None and self.kept is not None
        self.kept.pop(kept.run.run_id)
        return self._shelf.put_end(kept, self.identity, now)

    def _take(self, run_id: str, origin: Identity | None, now: float) -> Run | Kept | None:
        """Take a run, or its end, from the shelf, if it was put there by *origin* (None: by anybody)."""
        found = None if self._shelf is None else self._shelf.take(run_id, origin)
        if isinstance(found, Run):
            self.runs.adopt(found, self)
        elif found is not None:
            found.run.owner = self
            self.keep(found.run, found.event, now)
        return found


def result_dropped(run: Run) -> bytes:
    """Return the error that takes the place of a terminal event for which there was no room."""
    message = "The run has ended, but its host did not take that before newer results took the room."
    return service_error(run.run_id, run.task_id, "ResultDropped", message, retryable=False)


def fitting(run: Run, event: bytes, limit: int) -> bytes:
    """Return the terminal event, or an error if it was made for a host that accepts more than *limit*."""
    if len(event) <= limit:
        return event
    message = f"The result takes {len(event)} bytes as a message; this host accepts {limit}."
    return service_error(run.run_id, run.task_id, "ResultTooLarge", message, retryable=False)


def _host_away(run: Run, window: float) -> bytes:
    message = f"The run was cancelled because its host was away for longer than {window:g} s."
    return service_error(run.run_id, run.task_id, "HostAway", message, retryable=True)
