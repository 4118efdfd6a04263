"""A condition that survives an exception of a signal handler, wherever it strikes.

Owns: the lock and the waiters of one future. Never: holds its lock across a wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

__all__ = ["Condition"]

if TYPE_CHECKING:
    _Lock = threading.Condition
else:
    _Lock = type(threading.RLock())


class Condition(_Lock):
    """Stands in for ``threading.Condition()``, whose ``with`` runs Python code after it has the lock.

    A signal handler that raises there (Ctrl-C, a time limit) would leave the lock held for ever,
    and the thread that brings results waiting for it. Here the condition is the lock, and
    ``with`` a single step of the interpreter's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiters: deque[threading.Lock] = deque()

    def until(self, reached: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until *reached*, which a notification announces; return whether it is. Hold nothing."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)  # first, so that no notification can be missed
        try:
            if not reached():
                waiter.acquire(timeout=_allowed(timeout))
            return reached()
        finally:
            self._forget(waiter)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a notification, as the standard library's does."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        self.release()
        try:
            return waiter.acquire(timeout=_allowed(timeout))
        finally:
            self.acquire()
            self._forget(waiter)

    def notify(self, n: int = 1) -> None:
        """Wake *n* of those who wait."""
        for _ in range(n):
            try:
                self._waiters.popleft().release()
            except IndexError:
                return

    def notify_all(self) -> None:
        """Wake all who wait."""
        self.notify(len(self._waiters))

    def _forget(self, waiter: threading.Lock) -> None:
        with contextlib.suppress(ValueError):  # it was notified
            self._waiters.remove(waiter)


def _allowed(timeout: float | None) -> float:
    return -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
