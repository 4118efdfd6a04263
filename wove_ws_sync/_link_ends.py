"""What the end of a connection means: for its runs, for the link, for the next dial.

Owns: whether a connection has a successor, which runs wait for it, and the error of those that do
not. Never: closes or dials, calls anybody; ``_link_threads`` acts on what is decided here.
"""

from __future__ import annotations

from typing import NamedTuple

from ._link_core import OVER, LinkCore, LinkState, same_error
from ._reconnect import is_final
from .connection import Connection
from .runs import Effect, Loss, Run, connection_lost
from .transport import TransportClosed

__all__ = ["End", "LinkEnds"]


class End(NamedTuple):
    """What follows from the end of a connection. *lost*: it was up, and somebody misses it."""

    loss: Loss
    lost: bool
    successor: Connection | None
    effects: list[Effect]


class LinkEnds(LinkCore):
    """A link that knows what to do when a connection, or a dial, has ended."""

    def _decide_end(self, connection: Connection, exc: BaseException, now: float) -> End | None:
        """Take a connection out that ended with *exc*; None if that was done before. Hold ``_state_lock``."""
        if connection.generation not in self._live:
            return None
        loss = Loss(getattr(exc, "close_code", None), connection.close_reason)
        limbo_until = self._limbo_until(connection, now)
        carried = self._table.carried(connection.generation)
        effects: list[Effect] = []
        current = self._connection is connection
        lost = connection.transport is not None and self._state is not LinkState.CLOSING
        lost = lost and (current or carried > 0)
        self._retire(connection)
        self._counts["losses"] += lost
        if connection.transport is not None:
            effects += self._table.lost(connection.generation, loss, now, limbo_until)
            if current:
                self._reconnect.lost(now, connection.up_since)
            elif connection.awaits_answers():  # which will not come any more
                effects += self._table.forsake()
        else:
            connection.error = exc
            self._table.dial_error = same_error(exc)
            if is_final(exc):
                self._reconnect.refused(exc, now)
        successor = None
        if self._state is not LinkState.CLOSING:
            successor = self._succeed(connection, exc, loss, now, effects, current=current)
        elif not self._live:
            self._set_state(LinkState.CLOSED)
        self._follow_up(effects)
        return End(loss, lost, successor, effects)

    def _limbo_until(self, connection: Connection, now: float) -> float | None:
        """Return until when the worker may give back its runs, None for not at all. Hold ``_state_lock``."""
        window = self.options.resume_window
        gone = connection.draining or self._state in OVER or not connection.offers("resume")
        return None if gone or not window else now + window

    def _succeed(
        self,
        connection: Connection,
        exc: BaseException,
        loss: Loss,
        now: float,
        effects: list[Effect],
        *,
        current: bool,
    ) -> Connection | None:
        """Plan the next dial if runs wait for one, and end those for which it comes too late.

        Hold ``_state_lock``.
        """
        if self._connection is not None:  # only a worker that drained is gone
            return None
        never_up = connection.transport is None
        refused = never_up and is_final(exc)
        if current:
            dialled = LinkState.FATAL if refused else LinkState.IDLE
            self._set_state(dialled if never_up else LinkState.LOST)
        successor = None
        if homeless := self._table.homeless():
            limbo_until = min((run.limbo_until for run in homeless if run.limbo_until), default=None)
            dial_at = self._reconnect.next_dial(exc, now, limbo_until) if current else now
            effects += self._give_up(exc, loss, dial_at, refused=refused)
            if self._table.homeless():
                try:
                    successor = self._new_connection(dial_at)
                    successor.told_to_wait = getattr(exc, "retry_after", None) is not None
                    self._set_state(LinkState.BACKOFF)
                except OSError as no_descriptor:
                    effects += self._fail_homeless(no_descriptor)
        if successor is None and not refused:
            self._set_state(self._rest())
        return successor

    def _give_up(self, exc: BaseException, loss: Loss, dial_at: float, *, refused: bool) -> list[Effect]:
        """End the runs for which the next dial would come too late. Hold ``_state_lock``.

        A run with a ``delivery_timeout`` waits for a later dial until then; one without waits for
        ``resume_window``, and only if there was a connection before; what is in limbo keeps its own
        time. Nothing waits for a final answer.
        """
        patient = self._reconnect.worth_waiting(dial_at)
        effects: list[Effect] = []
        for run in self._table.homeless():
            limited = run.deadline.at is not None or run.limbo_until is not None
            if refused or not (patient or limited):
                effects += self._table.fail(run, self._error_for(run, exc, loss))
        return effects

    def _error_for(self, run: Run, exc: BaseException, loss: Loss) -> BaseException:
        """Return why *run* ends with the dial that failed, or the connection that ended, with *exc*."""
        if run.in_limbo or run.attempt > 1:
            error = connection_lost(run, run.loss)
            error.__cause__ = same_error(exc)
            return error
        return connection_lost(run, loss) if isinstance(exc, TransportClosed) else same_error(exc)

    def _fail_homeless(self, exc: BaseException) -> list[Effect]:
        """End whoever waits for a connection. Hold ``_state_lock``."""
        return [
            effect
            for run in self._table.homeless()
            for effect in self._table.fail(run, self._error_for(run, exc, Loss()))
        ]
