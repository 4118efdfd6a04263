"""What the world outside wants of a worker service: signals, and the end of stdin.

Owns: the order to drain and the order to stop. Never: carries them out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading

__all__ = ["Orders"]


class Orders:
    """What the world outside wants of the service: first to drain, then, or at once, to stop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.anything = asyncio.Event()
        self.stop = asyncio.Event()

    def watch_signals(self) -> None:
        """Take SIGTERM for an order to drain, a second one or SIGINT for one to stop."""
        for number, order in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._stop)):
            try:
                self._loop.add_signal_handler(number, order)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_, order=order: self._loop.call_soon_threadsafe(order))

    def watch_stdin(self) -> None:
        """Take the end of stdin for an order to stop."""
        threading.Thread(target=self._read_stdin, name="wove-ws-stdin-0", daemon=True).start()

    def _read_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop ended first
            self._loop.call_soon_threadsafe(self._stop)

    def _terminate(self) -> None:
        if self.anything.is_set():
            self._stop()
        self.anything.set()

    def _stop(self) -> None:
        self.stop.set()
        self.anything.set()
