"""Hosts and for how long they may be away, as pure state.

Owns: what a new connection finds, what an absence ends, the shelf of each key id. Never:
a socket, a clock, a timer (``now`` is an argument), never stops a job itself: it returns
the runs whose jobs are to be stopped.

=================== ===========================================================
a host without      is anonymous: it exists as long as its one connection, and
``resume``          nothing outlives that
a host with it      is known by its key id and its own name; its connections
                    follow each other, the newest counts
=================== ===========================================================
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from .greeting import Greeting
from .host import Host, result_dropped
from .kept import Account, KeptEvents
from .runs import Run
from .shelf import KEEP_SECONDS, Identity, Shelf

__all__ = ["HostTable"]

#: Hosts that are away; beyond that one of them is forgotten.
_MAX_AWAY = 1000
#: So many names of hosts that were forgotten are known.
_MAX_FORGOTTEN = 100_000
#: What is kept for all hosts that are away and on all shelves takes at most, in bytes.
_MAX_UNHEARD_BYTES = 512 * 1024 * 1024


class HostTable:
    """Every host of the service, present or away, and the shelf of each key id.

    *counters* counts what is dropped, *max_kept_bytes* bounds what is kept for each host. Methods
    that return runs have ended them: their jobs are to be stopped.
    """

    def __init__(self, counters: Counter[str], *, max_kept_bytes: int) -> None:
        self._counters = counters
        self._max_kept_bytes = max_kept_bytes
        self._present: set[Host] = set()
        self._named: dict[Identity, Host] = {}
        self._away: dict[Identity, Host] = {}  # the first is away for longest
        self._shelves: dict[str, Shelf] = {}
        self._unheard = Account()  # what is kept for nobody who is here
        self._forgotten: set[Identity] = set()
        self._forgot_names = False

    def present(self) -> list[Host]:
        """Return the hosts that have a connection."""
        return list(self._present)

    def live_runs(self) -> list[Run]:
        """Return every run that is queued or running, whoever has it."""
        return [run for owner in self._owners() for run in owner.runs]

    def is_any_alive(self) -> bool:
        """Tell whether there is such a run."""
        return any(len(owner.runs) for owner in self._owners())

    def kept_bytes(self) -> int:
        """Return what the kept ends of all hosts and shelves take, in bytes."""
        return sum(owner.kept.size for owner in self._owners() if owner.kept is not None)

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
        if host.kept is not None:
            host.kept.book(None)
        return host, before, stopped

    def _new_host(self, identity: Identity | None, greeting: Greeting) -> Host:
        kept = shelf = None
        if "ack" in greeting.features:
            kept = KeptEvents(self._max_kept_bytes, self._counters, stub=result_dropped)
        if identity is not None:
            shelf = self._shelves.setdefault(identity[0], Shelf(self._counters, self._unheard))
        forgotten = self._forgot_names or identity in self._forgotten
        return Host(identity, kept, shelf, forgotten=forgotten)

    def leave(self, host: Host, now: float) -> list[Run]:
        """Note that the connection of *host* is gone: it is away, or forgotten."""
        host.connection = None
        self._present.discard(host)
        if host.identity is None or host.leaving:
            return self._forget(host, now)
        host.away_since = now
        self._away[host.identity] = host
        assert host.kept is not None  # resume needs ack
        host.kept.book(self._unheard)
        self.make_room()
        if len(self._away) <= _MAX_AWAY:
            return []
        self._counters["forgotten_host"] += 1
        return self._forget(self._least_missed(), now)

    def _least_missed(self) -> Host:
        """Return a host that is away: with nothing here, else with its window over, else for longest."""
        away = list(self._away.values())
        empty = (host for host in away if not host.runs and not host.kept)
        over = (host for host in away if host.window_is_over)
        return next(empty, None) or next(over, None) or away[0]

    def make_room(self) -> None:
        """Have hosts that are away, those away for longest first, and shelves give up what is too much."""
        if self._unheard.bytes <= _MAX_UNHEARD_BYTES:
            return
        kept = [host.kept for host in self._away.values() if host.kept]
        steps: list[Callable[[], bool]] = [functools.partial(each.shrink, 0) for each in kept[:-1]]
        steps += [shelf.make_room for shelf in self._shelves.values()]
        steps += [each.shrink for each in kept[-1:]]
        steps += [each.drop_stub for each in kept]
        for make_room in steps:
            while self._unheard.bytes > _MAX_UNHEARD_BYTES and make_room():
                pass

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
        if host.kept is not None:
            host.kept.book(None)
        if host.identity is not None:
            self._named.pop(host.identity, None)
            self._away.pop(host.identity, None)
            if not host.leaving:
                stopped = host.let_go_of_detached(now)
                self._remember(host.identity)
        return stopped + host.runs.clear()

    def _remember(self, forgotten: Identity) -> None:
        """Keep the name of a host that was forgotten: what it asks for later may have run here."""
        self._forgotten.add(forgotten)
        if len(self._forgotten) > _MAX_FORGOTTEN:
            self._forgotten.clear()
            self._forgot_names = True  # from now on any host may be one of them
