"""The future of one run.

Owns: :class:`RunFuture`, how an event frame becomes its state, when its value is unpickled. Never:
starts a run or knows the executor it came from, but for the one who wants to hear of its end.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import sys
import threading
import time
from types import FrameType
from typing import Any, Protocol, TypeVar

from . import _fork
from ._condition import Condition
from ._observe import Observed, OnEvent
from .errors import DeliveryCancelled, ForkedError
from .frames import TERMINAL_EVENTS
from .session import Session, exiting

__all__ = ["Keeper", "RunFuture", "in_a_callback"]

_T = TypeVar("_T")
_CANCELLED = concurrent.futures._base.CANCELLED
_FINISHED = concurrent.futures._base.FINISHED
_NOTIFIED = concurrent.futures._base.CANCELLED_AND_NOTIFIED
_ENDED = (_CANCELLED, _NOTIFIED, _FINISHED)
# That of the standard library's own futures.
_log = logging.getLogger("concurrent.futures")


class Keeper(Protocol):
    """Who keeps a future until its run has ended; ``on_event`` is told of every event before."""

    on_event: OnEvent | None

    def ended(self, future: RunFuture[Any]) -> None:
        """Let go of *future*; called in whichever thread ends it, perhaps more than once."""


class RunFuture(Observed, concurrent.futures.Future[_T]):
    """The future of one run. ``run_id`` names it in logs, events and errors.

    The result is unpickled once, by the first thread that asks. Thread-safe.
    """

    def __init__(self, run_id: str, keeper: Keeper) -> None:
        self._pid = os.getpid()
        super().__init__()
        self.run_id = run_id
        self._keeper = keeper
        self._session: Session | None = None
        self._started = False
        self._unwanted = False
        self._acknowledged = False
        self._event: dict[str, Any] | None = None
        # Held while the result is unpickled, so that it happens once.
        self._decoding = threading.RLock()
        # Who of those that wait for several futures is still to be told of the end, and what of it.
        self._to_tell: list[Any] = []
        self._failed = False

    @property
    def _condition(self) -> Condition:
        """Return what guards the state: the standard library begins here with all that it does to a future.

        A forked child gets a condition of its own, as nobody may be left there to release the parent's.
        """
        pid = os.getpid()
        if pid == self._pid:
            return self._own_condition
        _fork.check()
        condition: Condition = self.__dict__.setdefault(f"_condition_{pid}", Condition())
        return condition

    @_condition.setter
    def _condition(self, condition: threading.Condition) -> None:
        self._own_condition = Condition()  # in place of the one that the standard library sets

    def __repr__(self) -> str:
        state = "running" if self.running() else "done" if self.done() else "pending"
        return f"<{type(self).__name__} {self.run_id} {'cancelled' if self.cancelled() else state}>"

    def running(self) -> bool:
        """Tell whether the worker has started the run and it has not ended."""
        return self._started and not self.done()

    def cancel(self) -> bool:
        """Cancel the run, a running one too; return whether it is cancelled now.

        With ``delivery_cancel_mode="best_effort"`` this returns at once. With "require_ack"
        it blocks until the worker answers, ``cancel_ack_timeout`` at most; False means that
        the result came first. ``result()`` raises DeliveryCancelled, whose ``acknowledged``
        says whether the worker confirmed.
        """
        self._check_process()
        if not self.done() and self._session is not None:
            self._session.cancel(self.run_id)
            if not self._in_links_thread() and not exiting():
                self._await_end(None)
        return self.cancelled()

    def _ask_to_cancel(self) -> None:
        """Cancel without waiting for an acknowledgement."""
        self._unwanted = True  # for a submit() that is still pickling
        if not self.done() and self._session is not None:
            self._session.cancel(self.run_id)

    def _cancel_soon(self) -> None:
        """Cancel from a finalizer: takes no lock."""
        session = self._session
        if session is not None and not session.foreign:
            session.link.cancel_soon(self.run_id)

    def result(self, timeout: float | None = None) -> _T:
        """Return what the task returned, or raise what it raised, unpickled in this thread.

        Raises TimeoutError if the run has not ended within *timeout* seconds (it goes on),
        DeliveryCancelled, DeliveryTimeout, ConnectionLost, PayloadError, or ForkedError in a
        forked child.
        """
        self._decode(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what :meth:`result` would raise, None for a success."""
        self._decode(timeout)
        return super().exception(0)

    def _await_end(self, timeout: float | None) -> bool:
        """Wait until the run has ended; return whether it has. An exception may strike anywhere here."""
        return self._own_condition.until(self._has_ended, timeout)

    def _has_ended(self) -> bool:
        """Tell the same as ``done()``, which looks whose process this is and takes the lock."""
        return self._state in _ENDED

    def _decode(self, timeout: float | None) -> None:
        self._check_process()
        if not self._has_ended() and self._in_links_thread():
            raise RuntimeError(
                f"Run '{self.run_id}' has not ended, and waiting for it in a done-callback would keep its "
                "result from arriving; wait in a thread of your own."
            )
        ends_at = None if timeout is None else time.monotonic() + timeout
        try:
            if exiting() and not self._has_ended():  # asked by another function that runs at exit
                raise concurrent.futures.CancelledError
            if not self._await_end(timeout):
                raise TimeoutError
            if self._state != _FINISHED:
                raise concurrent.futures.CancelledError
        except concurrent.futures.CancelledError:
            raise DeliveryCancelled(
                f"Run '{self.run_id}' was cancelled.", run_id=self.run_id, acknowledged=self._acknowledged
            ) from None
        if self._event is None:
            return
        # Another thread may be unpickling: this one keeps its own deadline.
        remaining = (
            -1 if ends_at is None else min(max(0.0, ends_at - time.monotonic()), threading.TIMEOUT_MAX)
        )
        try:
            if not self._decoding.acquire(timeout=remaining):
                raise TimeoutError
            self._load()
        finally:
            try:  # noqa: SIM105  # no call may come between an exception that strikes and the release
                self._decoding.release()
            except RuntimeError:  # not acquired
                pass

    def _load(self) -> None:
        """Unpickle what the run brought, unless that is done. Hold ``_decoding``."""
        if self._event is None:
            return
        assert self._session is not None
        decoded = self._session.decode(self._event)
        if decoded["type"] == "task_error":
            self._exception = decoded["exception"]
        else:
            self._result = decoded["result"]
        self._event = None

    def _get_snapshot(self) -> Any:
        # How newer versions of asyncio read a finished future, instead of result() and exception().
        if self.done() and not self.cancelled():
            self._decode(None)  # another thread may be unpickling
        return super()._get_snapshot()  # type: ignore[misc]

    def _in_links_thread(self) -> bool:
        return self._session is not None and self._session.link.in_own_thread()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            _fork.check()
            raise self._forked()

    def _forked(self) -> ForkedError:
        return ForkedError(f"Run '{self.run_id}' belongs to the parent of this forked process.")

    def abandon_after_fork(self) -> None:
        """Fail in a forked child, where no result will come; takes no lock of the parent's, calls nobody."""
        self._waiters = []
        self._done_callbacks: list[Any] = []
        if not self.done():
            self.set_exception(self._forked())

    def _on_event(self, event: dict[str, Any]) -> None:
        """Take one event frame: the run's sink."""
        try:
            if not self._has_ended():  # or the event comes again, as an exception struck the first time
                self._observe(event, self._keeper.on_event)
        finally:  # whatever the callbacks of others raise, SystemExit say
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "task_started":
            self._started = True
        elif kind in TERMINAL_EVENTS:
            try:
                self._end(kind, event)
            except BaseException:  # of a callback, or Ctrl-C in cancel(): the end must come all the same
                self._end(kind, event)
                raise

    def _end(self, kind: str, event: dict[str, Any]) -> None:
        """Set the state and tell everybody; called again, go on where an exception struck."""
        try:
            with self._condition:
                if not self._has_ended():
                    self._acknowledged = bool(event.get("acknowledged"))
                    self._failed = kind == "task_error"
                    self._event = None if kind == "task_cancelled" else event  # decoded when it is asked for
                    self._to_tell = list(self._waiters)
                    self._state = _NOTIFIED if kind == "task_cancelled" else _FINISHED
                while self._to_tell:
                    self._tell(self._to_tell[0])
                    del self._to_tell[0]
                self._condition.notify_all()
            if not self._in_links_thread():  # who cancels has its callbacks to itself: nobody waits for them
                self._keeper.ended(self)
            self._invoke_callbacks()
        finally:
            self._keeper.ended(self)

    def _tell(self, waiter: Any) -> None:
        """Tell somebody who waits by the standard library's functions for several futures."""
        if self._state == _NOTIFIED:
            waiter.add_cancelled(self)
        elif self._failed:
            waiter.add_exception(self)
        else:
            waiter.add_result(self)

    def _invoke_callbacks(self) -> None:
        """Call each done-callback once, whatever they raise; of what gets out the first goes on."""
        raised: BaseException | None = None
        while self._done_callbacks:
            try:
                self._done_callbacks.pop(0)(self)
            except Exception:
                _log.exception("exception calling callback for %r", self)
            except BaseException as exc:  # sys.exit(), or Ctrl-C
                raised = raised or exc
        if raised is not None:
            raise raised


def in_a_callback() -> bool:
    """Tell whether the caller is in a done-callback of some run, by the stack, which no strike can spoil."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not RunFuture._invoke_callbacks.__code__:
        frame = frame.f_back
    return frame is not None
