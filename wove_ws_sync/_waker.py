"""Waiting for a moment, a nudge or a writable socket, whichever comes first.

Owns: one socket pair a link. Never: knows why somebody waits.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading

__all__ = ["Waker"]

# poll(2) counts milliseconds in an int, 24 days at most; whoever waits looks at the clock again.
_LONGEST = 86400.0


class Waker:
    """A wait that any thread, a signal handler or a finalizer may end."""

    def __init__(self) -> None:
        # Guards the descriptor's number while it is passed to the kernel: after close() it may belong
        # to another file. Reentrant, as a finalizer may call wake() anywhere; held for no wait.
        self._descriptor_lock = threading.RLock()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def wake(self) -> None:
        """End the present wait, or the next one. Never blocks, never raises."""
        with self._descriptor_lock, contextlib.suppress(OSError):
            self._sender.send(b"\0")

    def wait(self, timeout: float | None, writable: int = -1) -> None:
        """Wait for *timeout* seconds (None: no limit), a nudge, or descriptor *writable*."""
        poller = select.poll()
        poller.register(self._receiver, select.POLLIN)
        if writable >= 0:
            poller.register(writable, select.POLLOUT)
        poller.poll(None if timeout is None else min(timeout, _LONGEST) * 1000.0)
        with contextlib.suppress(BlockingIOError):
            while len(self._receiver.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        """Give the descriptors back."""
        with self._descriptor_lock:
            self.close_after_fork()

    def close_after_fork(self) -> None:
        """Give a forked child's copies of the descriptors back; takes no lock."""
        self._receiver.close()
        self._sender.close()
