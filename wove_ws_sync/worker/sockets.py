"""The sockets of a service, which no process that a task forks may keep.

Owns: which there are, and how a child drops them. Never: opens, closes or reads one in the
process that serves.
"""

from __future__ import annotations

import os
from typing import Protocol

from .. import _fork

__all__ = ["Sockets"]


class Socket(Protocol):
    """What has a descriptor; -1 when it is closed."""

    def fileno(self) -> int: ...


class Sockets:
    """What a service listens on and is connected by.

    A child that outlived the service would keep its port, and keep hosts from seeing that it is gone.
    """

    def __init__(self) -> None:
        self._open: set[Socket] = set()
        _fork.forget_in_child(self)

    def add(self, sock: Socket) -> None:
        """Count a socket in."""
        self._open.add(sock)

    def discard(self, sock: Socket) -> None:
        """Count it out, once it is closed or about to be."""
        self._open.discard(sock)

    def abandon_after_fork(self) -> None:
        """Drop a forked child's copies of the descriptors; not a word to the peers."""
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            for sock in self._open:
                if sock.fileno() >= 0:  # the number stays taken, or a finalizer would close another file
                    os.dup2(nothing, sock.fileno(), inheritable=False)
        finally:
            os.close(nothing)
        self._open = set()
