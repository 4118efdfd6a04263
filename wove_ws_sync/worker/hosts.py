"""Hosts and what is theirs, as pure state: runs, kept ends, and for how long they may be away.

Owns: what a new connection finds, what ``resume`` is answered, what an absence ends.
Never: a socket, a clock, a timer (``now`` is an argument), never stops a job itself: it
returns the runs whose jobs are to be stopped. A connection is only a token here.

=================== ===========================================================
a host without      is anonymous: it exists as long as its one connection, and
``resume``          nothing outlives that
a host with it      is known by its key id and its own name; its connections
                    follow each other, the newest counts
=================== ===========================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from .commands import AttachTask, Resume
from .events import service_error
from .greeting import Greeting
from .kept import Kept, KeptEvents
from .runs import Run, RunTable
from .shelf import KEEP_SECONDS, MAX_KEPT_BYTES, Identity, Shelf

__all__ = ["Host", "HostTable", "Resumed"]

#: Hosts that are away; beyond that the one that is away for longest is forgotten.
_MAX_AWAY = 1000


class Resumed(NamedTuple):
    """What to do about a ``resume``: send *state*, then *ended*, and stop the jobs of *stopped*."""

    state: dict[str, Any]
    ended: list[Kept]
    stopped: list[Run]


class Host:
    """One host, present or away.

    ``connection`` is the one that counts, None while the host is away. ``unconfirmed`` are
    the runs and ends that it has from an earlier connection and has not said to want: it
    hears nothing of them. ``leaving`` is set once it said ``shutdown``.
    """

    def __init__(self, identity: Identity | None, kept: KeptEvents | None, shelf: Shelf | None) -> None:
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
        self._is_familiar = False

    def __repr__(self) -> str:
        state = "away" if self.connection is None else "present"
        return f"<Host {self.identity} {state} runs={len(self.runs)}>"

    def enter(self, connection: Any, window: float, *, familiar: bool) -> Any:
        """Go by *connection* from now on; return the one before, which must be closed, or None."""
        before, self.connection = self.connection, connection
        self.window = window
        self.window_is_over = False
        self._is_familiar = familiar
        self.unconfirmed = {run.run_id for run in self.runs}
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

    def resume(self, command: Resume, now: float) -> Resumed:
        """Say what is known of the runs that are listed; after the last list the others end."""
        lists: dict[str, list[str]] = {"alive": [], "finished": [], "unknown": [], "lost": []}
        ended = []
        remembers = self._is_familiar and not (self.kept is not None and self.kept.incomplete)
        for run_id in dict.fromkeys(command.run_ids):
            self.unconfirmed.discard(run_id)
            found = self.find(run_id, now)
            if found is None:
                lists["unknown" if remembers else "lost"].append(run_id)
            elif isinstance(found, Run):
                lists["alive"].append(run_id)
            else:
                lists["finished"].append(run_id)
                ended.append(found)
        state = {"type": "resume_state", **lists}
        return Resumed(state, ended, [] if command.more else self._drop_unconfirmed(now))

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
        if isinstance(found, Run):
            found.beat_interval = command.beat_interval
            found.cancel_mode = command.cancel_mode
            found.orphan_policy = command.orphan_policy
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


class HostTable:
    """Every host of the service, present or away, and the shelf of each key id.

    *counters* counts what is dropped. Methods that return runs have ended them: their jobs
    are to be stopped.
    """

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters
        self._present: set[Host] = set()
        self._named: dict[Identity, Host] = {}
        self._away: dict[Identity, Host] = {}  # the first is away for longest
        self._shelves: dict[str, Shelf] = {}

    def present(self) -> list[Host]:
        """Return the hosts that have a connection."""
        return list(self._present)

    def live_runs(self) -> list[Run]:
        """Return every run that is queued or running, whoever has it."""
        return [run for owner in self._owners() for run in owner.runs]

    def is_any_alive(self) -> bool:
        """Tell whether there is such a run."""
        return any(len(owner.runs) for owner in self._owners())

    def _owners(self) -> Iterator[Host | Shelf]:
        yield from self._present
        yield from self._away.values()
        yield from self._shelves.values()

    def enter(self, key: str, greeting: Greeting, connection: Any, now: float) -> tuple[Host, Any, list[Run]]:
        """Return the host that *connection* belongs to from now on.

        Further: the connection that it had until now, which must be closed, or None; and
        runs whose jobs are to be stopped.
        """
        identity = (key, greeting.host_id) if greeting.host_id else None
        host = None if identity is None else self._named.get(identity)
        stopped: list[Run] = []
        if host is not None and host.leaving:
            stopped = self._forget(host, now)
            before, host.connection = host.connection, None
            host = None
        else:
            before = None
        familiar = host is not None
        if host is None:
            host = self._new_host(identity, greeting)
        before = host.enter(connection, greeting.window, familiar=familiar) or before
        self._present.add(host)
        if identity is not None:
            self._named[identity] = host
            self._away.pop(identity, None)
        return host, before, stopped

    def _new_host(self, identity: Identity | None, greeting: Greeting) -> Host:
        kept = shelf = None
        if "ack" in greeting.features:
            kept = KeptEvents(MAX_KEPT_BYTES, self._counters, stub=_result_dropped)
        if identity is not None:
            shelf = self._shelves.setdefault(identity[0], Shelf(self._counters))
        return Host(identity, kept, shelf)

    def leave(self, host: Host, now: float) -> list[Run]:
        """Note that the connection of *host* is gone: it is away, or forgotten."""
        host.connection = None
        self._present.discard(host)
        if host.identity is None or host.leaving:
            return self._forget(host, now)
        host.away_since = now
        self._away[host.identity] = host
        if len(self._away) <= _MAX_AWAY:
            return []
        self._counters["forgotten_host"] += 1
        return self._forget(next(iter(self._away.values())), now)

    def next_at(self) -> float | None:
        """Return the moment at which ``due()`` has something to do, None if there is none."""
        moments = [self._next_of(host) for host in self._away.values()]
        moments += [moment for shelf in self._shelves.values() if (moment := shelf.next_at()) is not None]
        return min(moments, default=None)

    def due(self, now: float) -> list[Run]:
        """Do what absences and ages have brought about until *now*."""
        stopped = []
        for host in list(self._away.values()):
            if self._next_of(host) > now:
                continue
            if not host.window_is_over:
                self._counters["window_over"] += 1
                stopped += host.end_window(now)
            if self._next_of(host) <= now:
                self._counters["forgotten_host"] += 1
                stopped += self._forget(host, now)
        for shelf in self._shelves.values():
            if expired := shelf.expire(now):
                self._counters["expired_run"] += expired
        return stopped

    @staticmethod
    def _next_of(host: Host) -> float:
        wait = max(host.window, KEEP_SECONDS) if host.window_is_over else host.window
        return host.away_since + wait

    def _forget(self, host: Host, now: float) -> list[Run]:
        """Drop the host with everything that is its own; what is under "detach" is let go unless it left."""
        stopped: list[Run] = []
        self._present.discard(host)
        if host.identity is not None:
            self._named.pop(host.identity, None)
            self._away.pop(host.identity, None)
            if not host.leaving:
                stopped = host.let_go_of_detached(now)
        return stopped + host.runs.clear()


def _result_dropped(run: Run) -> bytes:
    message = "The run has ended, but its host did not acknowledge that before newer results took the room."
    return service_error(run.run_id, run.task_id, "ResultDropped", message, retryable=False)


def _host_away(run: Run, window: float) -> bytes:
    message = f"The run was cancelled because its host was away for longer than {window:g} s."
    return service_error(run.run_id, run.task_id, "HostAway", message, retryable=True)
