"""Waiting for a moment, a nudge or a writable socket, whichever comes first.

Owns: one socket pair a link. Never: knows why somebody waits.
"""

from __future__ import annotations

import contextlib
import select
import socket

__all__ = ["Waker"]


class Waker:
    """A wait that any thread, a signal handler or a finalizer may end; it takes no lock."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def wake(self) -> None:
        """End the present wait, or the next one. Never blocks, never raises."""
        with contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def wait(self, timeout: float | None, writable: int = -1) -> None:
        """Wait for *timeout* seconds (None: no limit), a nudge, or descriptor *writable*."""
        poller = select.poll()
        poller.register(self._receiver, select.POLLIN)
        if writable >= 0:
            poller.register(writable, select.POLLOUT)
        poller.poll(None if timeout is None else timeout * 1000.0)
        with contextlib.suppress(BlockingIOError):
            while len(self._receiver.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        """Give the descriptors back."""
        self._receiver.close()
        self._sender.close()
