"""The state of a link, and how a decision about it is acted on.

Owns: the state lock, the run table, the link's states, which connection carries what is new.
Never: starts a thread, waits for anything; that is ``_link_threads``.

Decide under the state lock, act after it. Lock order: the write lock may take the state
lock inside it, never the reverse; the state lock is a leaf (no I/O, no callback).
"""

from __future__ import annotations

import contextlib
import copy
import enum
import logging
import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

from . import frames
from ._condition import Condition
from ._reconnect import Reconnect
from ._tell import host_log, note, tell
from .connection import Connection
from .options import LinkOptions
from .runs import CancelAtWorker, Deliver, Effect, Posted, Run, RunTable
from .timing import Clock, Deadline
from .transport import Parcel, Transport, dial

__all__ = ["OVER", "Dial", "LinkCore", "LinkState", "running", "same_error", "too_large"]

Dial = Callable[..., Transport]

# In a reader or watchdog thread: whose it is.
running = threading.local()


class LinkState(enum.Enum):
    """Where a link is.

    BACKOFF: runs wait for the next dial. DRAINING: the worker stops, and nothing new is there to
    dial for. FATAL: the worker refused this host.
    """

    IDLE = "idle"
    DIALING = "dialing"
    READY = "ready"
    LOST = "lost"
    BACKOFF = "backoff"
    DRAINING = "draining"
    FATAL = "fatal"
    CLOSING = "closing"
    CLOSED = "closed"


#: The states in which a link takes nothing new, and never will again.
OVER = (LinkState.CLOSING, LinkState.CLOSED)


class LinkCore:
    """What a link knows and decides; all of it may be called from any thread."""

    def __init__(
        self,
        options: LinkOptions,
        *,
        dial: Dial = dial,
        clock: Clock | None = None,
        spread: Callable[[], float] = lambda: random.uniform(-1.0, 1.0),
    ) -> None:
        self.options = options
        self.pid = os.getpid()
        # What worker services know the link by, whichever connection it comes on.
        self._name = uuid4().hex
        # Sessions whose executors were collected, for the watchdog: a finalizer may take no lock.
        self._dropped: SimpleQueue[Hashable] = SimpleQueue()
        self._unwanted: SimpleQueue[str] = SimpleQueue()
        # State changes to log once the state lock is released.
        self._news: deque[tuple[LinkState, LinkState]] = deque()
        self._dial = dial
        self._clock = clock or Clock()
        # Guards the run table, the state, the sessions and the connections. A leaf.
        self._state_lock = threading.Lock()
        # Says that one of those changed in a way that somebody may wait for; nobody waits under a lock.
        self._changed = Condition()
        self._table = RunTable(
            cancel_ack_timeout=options.cancel_ack_timeout, max_requeues=options.max_requeues
        )
        self._sessions: set[Hashable] = set()
        self._counts: Counter[str] = Counter()
        self._state = LinkState.IDLE
        self._reconnect = Reconnect(options, spread)
        # The connection that takes what is new, dialled or to be dialled, and all that have not
        # ended: those of workers that drain are there too.
        self._connection: Connection | None = None
        self._live: dict[int, Connection] = {}
        # Those whose threads may not have ended.
        self._undisposed: list[Connection] = []
        self._generation = 0
        # The instance that the newest connection reached; runs can only be resumed there.
        self._worker = ""
        self._sealed = False  # whether a connection of this link was
        # Those who wait for room in the send buffer, in order.
        self._crowd: deque[tuple[int, object]] = deque()
        # Those who wait for a connection.
        self._connecting: set[object] = set()
        self._idle_since = self._clock.monotonic()
        # Since when the watchdog has found the reader at work on what it could not finish.
        self._busy_since: float | None = None
        self._judged_at = self._idle_since

    def _new_connection(self, dial_at: float) -> Connection:
        """Hold ``_state_lock``."""
        connection = Connection(self._generation + 1, self._clock, dial_at)
        self._undisposed = [*(known for known in self._undisposed if not known.over.is_set()), connection]
        self._generation += 1
        self._connection = self._live[self._generation] = connection
        return connection

    def _retire(self, connection: Connection) -> None:
        """Hold ``_state_lock``."""
        self._live.pop(connection.generation, None)
        if self._connection is connection:
            self._connection = None

    def _rest(self) -> LinkState:
        """Return the state of a link that nobody waits for. Hold ``_state_lock``."""
        return LinkState.DRAINING if self._live else LinkState.IDLE

    def _set_state(self, state: LinkState) -> None:
        """Hold ``_state_lock``."""
        self._news.append((self._state, state))
        self._state = state
        self._changed.notify_all()

    def _forget(self, session: Hashable, idle_since: float) -> None:
        """Hold ``_state_lock``."""
        self._sessions.discard(session)
        if not self._sessions:
            self._idle_since = idle_since

    def _next_decision(self) -> float | None:
        """Return when a run or the link itself is due. Hold ``_state_lock``."""
        return Deadline(self._table.next_alarm()).earliest(Deadline(self._idle_until())).at

    def _idle_until(self) -> float | None:
        """Return when the link closes for want of users. Hold ``_state_lock``."""
        if self._sessions or len(self._table) or self._state is not LinkState.READY:
            return None
        return None if self.options.idle_timeout is None else self._idle_since + self.options.idle_timeout

    def _cancel(self, wanted: Run | str) -> None:
        """Cancel a run by its cancel mode; nothing happens if it has ended."""
        with self._state_lock:
            run = self._table.get(wanted) if isinstance(wanted, str) else wanted
            if run is None:
                return
            effects = self._table.cancel(run, self._clock.monotonic())
            self._follow_up(effects)
            moment = self._next_decision()
        self._apply(effects)
        self._mind(moment)

    def _post_ready(self, now: float) -> list[Effect]:
        """Hand what may go to the transport's queue (no I/O). Hold ``_state_lock``."""
        connection = self._connection
        if connection is None or connection.transport is None or self._state is not LinkState.READY:
            return []
        effects: list[Effect] = []
        limit = connection.transport.peer_max_message_bytes
        while ready := self._table.take_ready():  # a run that fails here gives its slot to another
            for run in ready:
                message = frames.with_attempt(run.message, run.attempt)
                if limit is not None and len(message) > limit:
                    effects += self._table.fail(run, too_large(run.run_id, len(message), limit))
                elif run.needs is not None and not connection.offers(run.needs):
                    effects += self._table.fail(run, _unsupported(run.run_id, run.needs))
                else:
                    parcel = Parcel(message)
                    if run.needs is None:  # who attaches to a run wants just that end
                        connection.make_way(run.run_id)
                    self._table.sent(run, parcel, now, connection.generation)
                    connection.transport.post(parcel)
        return effects

    def _follow_up(self, effects: list[Effect]) -> None:
        """Let those go who may now: after *effects* freed slots and buffer, say. Hold ``_state_lock``."""
        if self._table.has_ready:
            effects += [*self._post_ready(self._clock.monotonic()), Posted()]
        if self._crowd:
            self._changed.notify_all()

    def _apply(self, effects: list[Effect]) -> None:
        """Act on what was decided; hold no lock."""
        with contextlib.suppress(IndexError):
            while self._news:
                old, new = self._news.popleft()
                change = (self.options.host, old.name, new.name)
                note(host_log, logging.DEBUG, "link %s: %s -> %s", *change, extra=self._extra("state"))
        rest = iter(effects)
        try:
            for effect in rest:
                self._act(effect)
        finally:  # an exception that strikes a caller's thread must not cost other runs their end
            for effect in rest:
                self._act(effect)
        if not all(isinstance(effect, Deliver) for effect in effects):
            self.flush()

    def _act(self, effect: Effect) -> None:
        if isinstance(effect, Posted):
            return
        run = effect.run
        if isinstance(effect, Deliver):
            tell(run, effect.event, self._extra("event", run.run_id), own_thread=self.in_own_thread())
            self._table.told(run)
        else:
            self._tell_worker(run, effect.generation, cancel=isinstance(effect, CancelAtWorker))

    def _mend(self, *, tell: bool = True) -> None:
        """Put in order what an exception left half done that struck in this thread; hold no lock."""
        with self._state_lock:
            now = self._clock.monotonic()
            effects = self._table.mend(now)
            connection = self._connection
            if connection is not None and connection.transport is not None:
                for run in self._table.of_all():
                    parcel = run.receipt
                    if run.generation != connection.generation or not isinstance(parcel, Parcel):
                        continue
                    if not (parcel.queued or parcel.started):  # nor withdrawn for good
                        run.receipt = Parcel(frames.with_attempt(run.message, run.attempt))
                        connection.transport.post(run.receipt)
            for ticket in [one for one in self._crowd if one[0] == threading.get_ident()]:
                self._crowd.remove(ticket)
            self._follow_up(effects)
            effects.append(Posted())
            moment = self._next_decision()
        self._apply([effect for effect in effects if tell or not isinstance(effect, Deliver)])
        self._mind(moment)

    def _tell_worker(self, run: Run, generation: int | None, *, cancel: bool) -> None:
        """Tell the worker that has a run to cancel it, or to let go of it."""
        connection = self._connection if generation is None else self._live.get(generation)
        if connection is None or connection.transport is None:
            return  # a worker that comes back learns what is wanted from the list of those that are
        if generation is None and not (run.terminal and connection.offers("resume")):
            return  # what ended after that list had left has to be said
        if cancel:
            command = {
                "type": "cancel_task",
                "run_id": run.run_id,
                "task_id": run.task_id,
                "delivery_cancel_mode": run.delivery.delivery_cancel_mode,
                "delivery_orphan_policy": run.delivery.delivery_orphan_policy,
            }
        elif connection.offers("resume"):
            command = {"type": "detach_task", "run_id": run.run_id, "task_id": run.task_id}
        else:
            return
        connection.transport.post(frames.encode(command))

    def flush(self) -> None:
        """Send what was submitted with ``flush=False``, as far as it goes without blocking."""
        for connection in list(self._live.values()):
            connection.flush()

    def _mind(self, moment: float | None) -> None:
        """Wake the watchdogs that mean to sleep beyond *moment*."""
        if moment is None:
            return
        for connection in list(self._live.values()):
            until = connection.watching_until
            if until is None or moment < until:
                connection.waker.wake()

    def _extra(self, action: str, run_id: str | None = None) -> dict[str, Any]:
        return {"action": action, "run_id": run_id, "generation": self._generation}

    def in_own_thread(self) -> bool:
        """Tell whether the caller is one of the link's threads, which must not wait for the link."""
        return getattr(running, "link", None) is self


def too_large(run_id: str, size: int, limit: int) -> ValueError:
    """Return the error for a command that no message may carry."""
    return ValueError(
        f"Run {run_id!r} is a message of {size} bytes, more than the {limit} bytes that may be sent at once. "
        "Pass a reference to the data instead, or raise max_message_bytes on both sides."
    )


def _unsupported(run_id: str, feature: str) -> RuntimeError:
    return RuntimeError(
        f"Run {run_id!r} cannot be attached to: the worker service does not have the extension {feature!r}, "
        "and so keeps no results. Use the worker service of wove_ws_sync."
    )


def same_error(exc: BaseException) -> BaseException:
    """Return a copy to raise in another thread, so that tracebacks do not mix."""
    try:
        return copy.copy(exc)
    except Exception:
        return exc
