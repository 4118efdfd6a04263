"""One kept connection to one worker service: what sessions do with it, from any thread.

Owns: sessions, submitting and cancelling, the bound on what waits to be sent, closing. Never:
pickles, waits for the peer longer than a run's deadline. Its threads are in ``_link_threads``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable

from . import _fork
from ._link_core import OVER, Dial, LinkState, same_error, too_large
from ._link_threads import LinkThreads
from .connection import Connection
from .errors import ExecutorClosed
from .options import DeliveryOptions
from .runs import CancelAtWorker, Deliver, Effect, Run
from .timing import Deadline
from .transport import Parcel, TransportClosed

__all__ = ["Dial", "Link", "LinkState", "too_large"]

# What repr() says if it happened.
_TOLD = ("losses", "resumes", "requeues")
# The longest single wait for room in the send buffer, in seconds.
_PATIENCE = 1.0


class Link(LinkThreads):
    """A connection that sessions share. Every public method may be called from any thread.

    Threads start with the first dial and end with the connection; the next use dials
    again. ``repr()`` shows state, runs in flight, generation, and what was lost.
    """

    def __repr__(self) -> str:
        counts = {**self._counts, **self._table.counts}
        told = "".join(f" {name}={counts[name]}" for name in _TOLD if counts.get(name))
        return (
            f"<Link {self.options.host}:{self.options.port} {self._state.name} runs={len(self._table)} "
            f"sessions={len(self._sessions)} generation={self._generation}{told}>"
        )

    @property
    def state(self) -> LinkState:
        """Return the state at this moment."""
        return self._state

    def stats(self) -> Counter[str]:
        """Return what was counted since the link was made, and how things stand now.

        ``docs/reference/stats`` lists the names; what never happened counts 0.
        """
        _fork.check()
        with self._state_lock:
            stats = self._counts + self._table.counts
            stats.update({f"dropped_{reason}": count for reason, count in self._table.dropped.items()})
            stats.update(
                runs=len(self._table),
                sessions=len(self._sessions),
                generation=self._generation,
                buffered_bytes=self._table.buffered,
            )
            return stats

    def count(self, what: str) -> None:
        """Count something that happened outside the link, a payload that could not be decoded, say."""
        with self._state_lock:
            self._counts[what] += 1

    # -- sessions ----------------------------------------------------------------

    def attach(self, session: Hashable) -> bool:
        """Count *session* in; False if the link is closing and another one must be made."""
        with self._state_lock:
            if self._state in OVER:
                return False
            self._sessions.add(session)
            return True

    def detach(self, session: Hashable) -> None:
        """Count *session* out and end what it left, each run by its orphan policy."""
        try:
            with self._state_lock:  # first: what is being submitted meanwhile must not slip through
                self._forget(session, self._clock.monotonic())
            self.abandon(session)
            with self._state_lock:
                moment = self._next_decision()
            self._mind(moment)
        except BaseException:
            self.drop(session)
            raise

    def abandon(self, session: Hashable) -> None:
        """End the runs of *session*, each by its orphan policy."""
        try:
            with self._state_lock:
                effects = self._table.abandon(session)
                self._follow_up(effects)
            self._apply(effects)
        except BaseException:
            self._mend()
            raise

    def drop(self, session: Hashable) -> None:
        """Count *session* out from a finalizer: takes no lock, the watchdog does the rest."""
        self._dropped.put(session)
        self._wake_watchdogs()

    def cancel_soon(self, run_id: str) -> None:
        """Cancel a run from a finalizer: takes no lock, the watchdog does the rest."""
        self._unwanted.put(run_id)
        self._wake_watchdogs()

    def _wake_watchdogs(self) -> None:
        for connection in list(self._live.values()):
            connection.waker.wake()

    # -- runs --------------------------------------------------------------------

    def deadline(self, delivery: DeliveryOptions) -> Deadline:
        """Return the deadline of a run that is submitted at this moment."""
        return Deadline.after(delivery.delivery_timeout, self._clock.monotonic())

    def submit(self, run: Run, *, wait: bool = True, flush: bool = True, block: bool = True) -> None:
        """Take *run* in and send it, now or as soon as there is a connection and a slot.

        With *block* the call waits for room in the send buffer, with *wait* it returns when the
        message has left this process, both until the run's deadline at the latest; without, and in
        the link's own threads, it never blocks. With neither *wait* nor *flush* the message leaves
        with the next one, or by :meth:`flush`.

        Raises ValueError for a run_id in flight, ExecutorClosed after :meth:`close`.
        """
        own_thread = self.in_own_thread()
        if run.deadline.at is None:
            run.deadline = self.deadline(run.delivery)
        try:
            effects, moment, connection = self._register(run, block=block and not own_thread)
            self._mind(moment)
            if effects:
                self._apply(effects)
            if run.terminal:
                return
            if connection is None:
                self._start_for(run)
        except BaseException:
            self._mend()
            raise
        if connection is None:
            return
        parcel = run.receipt
        if wait and isinstance(parcel, Parcel) and not own_thread:
            connection.push(parcel, run.deadline, lambda: run.terminal)
        elif wait or flush:
            connection.flush()

    def _start_for(self, run: Run) -> None:
        try:
            self._start()
        except BaseException as exc:  # no descriptor, no thread, Ctrl-C: nobody would send it
            with self._state_lock:
                effects: list[Effect] = []
                if not run.terminal:
                    if not run.withdraw():  # the connection was begun for others, and took this one too
                        effects.append(CancelAtWorker(run, run.generation))
                    effects += self._table.fail(run, exc)
            self._apply(effects)
            raise

    def _register(self, run: Run, *, block: bool) -> tuple[list[Effect], float | None, Connection | None]:
        """Take *run* into the table, once there is room for it, and post it if it may go."""
        # Whoever comes first gets the first room, however much it needs.
        ticket = (threading.get_ident(), object())
        try:
            while True:
                with self._state_lock:
                    now = self._clock.monotonic()
                    if self._state in OVER:
                        raise ExecutorClosed("The link to the worker service is closed; make a new executor.")
                    if run.session not in self._sessions:
                        raise ExecutorClosed("The executor was stopped while it sent this run.")
                    late = run.deadline.expired(now)
                    if not block or late or self._has_room(len(run.message), ticket):
                        self._table.register(run, now)
                        effects = self._decide(run, now, late=late)
                        return effects, self._next_decision(), self._connection
                    if ticket not in self._crowd:
                        self._crowd.append(ticket)
                self._wait_for_room(run, ticket)
        finally:
            if ticket in self._crowd:
                self._crowd.remove(ticket)
                self._changed.notify_all()

    def _decide(self, run: Run, now: float, *, late: bool) -> list[Effect]:
        """Let a run go that was just taken in, if it may. Hold ``_state_lock``."""
        if late:
            return self._table.judge(run, now)
        refusal = self._reconnect.refusal(now) if self._connection is None else None
        if refusal is not None:
            return self._table.fail(run, same_error(refusal))
        return self._post_ready(now)

    def has_room(self, size: int) -> bool:
        """Tell whether a message of *size* bytes would be taken in without waiting, as far as can be seen."""
        return self._has_room(size, None)

    def _has_room(self, size: int, ticket: object) -> bool:
        """Larger than the buffer is let in when that is empty. Hold ``_state_lock`` to rely on it."""
        if self._crowd and self._crowd[0] is not ticket:
            return False
        buffered = self._table.buffered
        return not buffered or buffered + size <= self.options.send_buffer_bytes

    def _wait_for_room(self, run: Run, ticket: object) -> None:
        """Wait a while for the workers to take what is buffered."""
        self.flush()  # what was submitted without flush is part of it
        self.count("waits_for_room")
        remaining = run.deadline.remaining(self._clock.monotonic())

        def there_is() -> bool:
            with self._state_lock:
                gone = self._state in OVER or run.session not in self._sessions
                return gone or self._has_room(len(run.message), ticket)

        self._changed.until(there_is, _PATIENCE if remaining is None else min(remaining, _PATIENCE))

    def find(self, run_id: str) -> Run | None:
        """Return the run if it is on its way."""
        with self._state_lock:
            return self._table.get(run_id)

    def cancel(self, run: Run) -> None:
        """Cancel *run* by its cancel mode; nothing happens if it has ended."""
        try:
            self._cancel(run)
        except BaseException:
            self._mend()
            raise

    def connect(self, deadline: Deadline) -> None:
        """Dial if need be and wait until the link is READY.

        Raises what the dial raised, or TimeoutError at *deadline*.
        """
        with self._state_lock:
            refusal = None if self._connection else self._reconnect.refusal(self._clock.monotonic())
        if refusal is not None:
            raise same_error(refusal)
        connection = self._start()
        with self._state_lock:
            self._connecting.add(waiter := object())
            if self._state is LinkState.BACKOFF and not connection.told_to_wait:
                connection.dial_at = self._clock.monotonic()  # somebody asks: no use in waiting longer
                connection.waker.wake()
        try:
            while not self._decided(connection):
                remaining = deadline.remaining(self._clock.monotonic())
                if remaining == 0.0:
                    raise TimeoutError("timed out during opening handshake")
                self._changed.until(lambda: self._decided(connection), remaining)
        finally:
            self._connecting.discard(waiter)
        if connection.error is not None:
            raise same_error(connection.error)
        if self._state in OVER:
            raise ExecutorClosed("The link to the worker service is closed; make a new executor.")

    def _decided(self, connection: Connection) -> bool:
        with self._state_lock:
            waiting = self._state in (LinkState.DIALING, LinkState.BACKOFF)
            return self._connection is not connection or not waiting

    def start_closing(self, *, tell: bool = True) -> None:
        """End every run by its policy and say goodbye; never blocks. Idempotent.

        Without *tell* the worker hears of it, but nobody in this process. An exception that strikes
        the caller passes through when all is done nevertheless.
        """
        with self._state_lock:
            if self._state in OVER and not len(self._table):
                return
        try:
            self._start_closing(tell=tell)
        except BaseException:
            self._mend(tell=tell)
            self._start_closing(tell=tell)
            raise

    def _start_closing(self, *, tell: bool) -> None:
        with self._state_lock:
            connection = self._connection
            if connection is not None and connection.dial_at is not None:  # nobody was dialled yet
                connection.error = TransportClosed("closed by this side")
                self._retire(connection)
            state = LinkState.CLOSING if self._live else LinkState.CLOSED
            if self._state is not state:
                self._set_state(state)
            effects: list[Effect] = []
            for session in {run.session for run in self._table.of_all()}:
                effects += self._table.abandon(session)
            saying = [*self._live.values()]
        self._apply([effect for effect in effects if tell or not isinstance(effect, Deliver)])
        for each in saying:
            each.say_goodbye()
        for each in list(self._undisposed):  # those that wait for their dial have something to notice, too
            each.waker.wake()

    def close(self, timeout: float) -> None:
        """Close and wait up to *timeout* seconds for the peer, then cut. Idempotent."""
        self.start_closing()
        if self.in_own_thread():
            return
        deadline = Deadline.after(timeout, self._clock.monotonic())
        with self._state_lock:
            ending = list(self._undisposed)
        for connection in ending:
            connection.over.wait(deadline.remaining(self._clock.monotonic()))
            connection.cut("closed by this side")
            if connection.transport is not None:  # a dial ends by its own deadline
                connection.over.wait(0.5)

    def abandon_after_fork(self) -> None:
        """Close the inherited descriptors in a forked child and renew the lock; takes none."""
        inherited, self._undisposed, self._live, self._connection = self._undisposed, [], {}, None
        self._state = LinkState.CLOSED
        self._state_lock = threading.Lock()
        for connection in inherited:
            connection.abandon_after_fork()
