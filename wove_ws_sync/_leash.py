"""A socket that another thread can end.

Owns: a second descriptor of the same connection, which works whatever TLS does with the first one.
Never: reads or writes, decides when it is time.
"""

from __future__ import annotations

import contextlib
import socket
import threading

__all__ = ["Leash"]


class Leash:
    """End what another thread does with its sockets, even while it waits inside of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the two below; a leaf
        self._held: list[socket.socket] = []
        self._is_cut = False

    def hold(self, sock: socket.socket) -> None:
        """Take a socket that is connected, before anything is sent. Raises TimeoutError if it is too late."""
        with self._lock:
            if not self._is_cut:
                self._held.append(sock.dup())
                return
        raise TimeoutError("timed out")

    def cut(self) -> None:
        """End every connection that is held, and those to come."""
        with self._lock:
            self._is_cut = True
            for sock in self._held:
                with contextlib.suppress(OSError):  # it has ended already
                    sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the descriptors back; the thread that used the sockets calls it at the end."""
        with self._lock:
            self._is_cut = True
            while self._held:
                self._held.pop().close()
