"""Waiting on the event loop: for a moment that something knows by itself, for a state of things.

Owns: one pending call of the loop; one wait at a time. Never: decides what is due or settled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

__all__ = ["Alarm", "Settlement"]


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


class Settlement:
    """Wait until something is true that others change; they call :meth:`check` when they did."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._is_true: Callable[[], bool] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._is_closed = False

    async def wait_for(self, is_true: Callable[[], bool], timeout: float) -> None:
        """Return when *is_true* says so, after *timeout* seconds, or when it is closed."""
        self._is_true, self._wake = is_true, self._loop.create_future()
        self.check()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake, timeout)
        self._is_true = None

    def check(self) -> None:
        """Look whether it is true by now; costs next to nothing while nobody waits."""
        if self._is_true is not None and self._wake is not None and (self._is_closed or self._is_true()):
            self._is_true = None
            if not self._wake.done():
                self._wake.set_result(None)

    def close(self) -> None:
        """Let nobody wait any more."""
        self._is_closed = True
        self.check()
