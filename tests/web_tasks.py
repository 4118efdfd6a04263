"""Tasks for the tests of web servers; the worker service imports them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

__all__ = ["WAIT", "meet", "wait_for"]

# Only a failing test spends it, in seconds.
WAIT = 40.0
_lock = threading.Lock()
_barriers: dict[int, threading.Barrier] = {}


def meet(parties: int) -> int:
    """Return once so many calls are here at the same time."""
    with _lock:
        barrier = _barriers.setdefault(parties, threading.Barrier(parties))
    barrier.wait(WAIT)
    return parties


def wait_for(path: str) -> bool:
    """Return once there is such a file."""
    ends = time.monotonic() + WAIT
    while not Path(path).exists():
        if time.monotonic() > ends:
            raise TimeoutError(path)
        time.sleep(0.02)
    return True
