"""How often may something be said, and who says later what had to wait.

Owns: the buckets that count, and one thread per process for what waits. Never: knows what
is said, never keeps anybody waiting.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable

from .. import _fork

__all__ = ["PROCESS_BURST", "PROCESS_RATE", "Bucket", "Pacer", "for_process", "later"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count()
#: A pacer's thread ends when nothing has waited for so many seconds.
_LINGER = 0.5
#: What all runs of one process together may log: so many records, then so many in each second.
PROCESS_BURST, PROCESS_RATE = 5000, 1000.0


class Bucket:
    """So many at once, then so many a second. Thread-safe, and safe in finalizers."""

    def __init__(self, burst: int, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = float(burst)
        self._since = 0.0
        # Guards the two above; a finalizer may come here in the middle of it.
        self._lock = threading.RLock()

    def take(self, now: float) -> bool:
        """Take one; False if there is none left."""
        with self._lock:
            self._left = min(self._burst, self._left + max(0.0, now - self._since) * self._rate)
            self._since = now
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True


class Pacer:
    """Call what had to wait, each when it is due, in a thread that ends when there is nothing."""

    def __init__(self) -> None:
        # Guards both attributes; reentrant, as a finalizer may report in the middle of it.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: collections.deque[tuple[float, Callable[[], None]]] = collections.deque()
        self._thread: threading.Thread | None = None

    def add(self, due: float, act: Callable[[], None]) -> bool:
        """Call *act* at *due*, or a little later; False if there is no thread to be had for it.

        Everybody waits about as long, so they are called in the order in which they came.
        """
        with self._changed:
            self._waiting.append((due, act))
            self._changed.notify()
            if self._thread is not None:
                return True
            name = f"wove-ws-pacer-{next(_numbers)}"
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                self._waiting.clear()
            return self._thread is not None

    def _work(self) -> None:
        while (act := self._next()) is not None:
            try:
                act()
            except Exception:
                _logger.debug("What had to wait could not be said.", exc_info=True)
            del act

    def _next(self) -> Callable[[], None] | None:
        """Wait for what is due next; None if there is nothing, and the thread is to end."""
        with self._changed:
            while True:
                if not self._waiting and not self._changed.wait(_LINGER) and not self._waiting:
                    self._thread = None
                    return None
                if not self._waiting:
                    continue
                left = self._waiting[0][0] - time.monotonic()
                if left <= 0:
                    return self._waiting.popleft()[1]
                self._changed.wait(left)


_pacer = Pacer()
_log_bucket = Bucket(PROCESS_BURST, PROCESS_RATE)


def later(due: float, act: Callable[[], None]) -> bool:
    """Have this process's pacer call *act* at *due*; False if it cannot."""
    return _pacer.add(due, act)


def for_process(now: float) -> bool:
    """Take one log record of those that this process may send; False if there is none left."""
    return _log_bucket.take(now)


@_fork.in_child
def _begin_anew() -> None:
    """The parent's locks may be held for ever here, and its thread is not here."""
    global _log_bucket, _pacer
    _pacer = Pacer()
    _log_bucket = Bucket(PROCESS_BURST, PROCESS_RATE)
