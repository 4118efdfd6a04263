"""A timer of the event loop for something that knows by itself when it is due.

Owns: one pending call of the loop. Never: decides what is due, never is one of many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Alarm"]


class Alarm:
    """Call *act* with the loop's time when *next_at* says so; user code cannot delay it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        next_at: Callable[[], float | None],
        act: Callable[[float], None],
    ) -> None:
        self._loop = loop
        self._next_at = next_at
        self._act = act
        self._handle: asyncio.TimerHandle | None = None
        self._is_stopped = False

    def arm(self) -> None:
        """Look again when it is due next; it may have become earlier."""
        moment = None if self._is_stopped else self._next_at()
        if moment is None or (self._handle is not None and self._handle.when() <= moment):
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(moment, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._act(self._loop.time())
        self.arm()

    def stop(self) -> None:
        """Be silent for good."""
        self._is_stopped = True
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
