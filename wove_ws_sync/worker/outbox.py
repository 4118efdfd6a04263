"""What tasks report, on its way from their threads to the loop that serves connections.

Owns: the queue between them, with one wake-up for many reports. Never: blocks a task,
never looks into a report.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Outbox"]

#: How long ``task_started`` may wait for the end of a short task, in seconds.
_SOON = 0.002


class Outbox:
    """Bring events from any thread to the loop, where *happened* takes them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, happened: Callable[[Any, str, bytes], None]) -> None:
        self._loop = loop
        self._happened = happened
        self._items: collections.deque[tuple[Any, str, bytes]] = collections.deque()
        self._awake = False
        self._looking = False

    def look_soon(self) -> None:
        """Have the loop look by itself in a moment: a short task then needs one wake-up, not two."""
        if not self._looking:
            self._looking = True
            self._loop.call_later(_SOON, self._look)

    def _look(self) -> None:
        self._looking = False
        self._drain()

    def post(self, run: Any, kind: str, event: bytes) -> None:
        """Queue what happened to *run*, a Run or a Shared. Any thread, never blocks."""
        if kind == "started":
            run.began_at = time.monotonic()  # the loop's clock; the loop itself may look much later
        self._items.append((run, kind, event))
        # The drain clears the flags before it looks, so what is appended is seen or wakes it again.
        if not self._awake and not (self._looking and kind == "started"):
            self._awake = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                self._items.clear()

    def _drain(self) -> None:
        self._awake = False
        for _ in range(len(self._items)):  # not until it is empty: a flood must not hold the loop
            run, kind, event = self._items.popleft()
            self._happened(run, kind, event)
