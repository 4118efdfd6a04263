"""The sockets of a service, which no process that a task forks may keep.

Owns: which there are, and how a child drops them. Never: opens, closes or reads one in the
process that serves.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Protocol

from websockets.asyncio.server import ServerConnection

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
        self._listening: tuple[Socket, ...] = ()
        self._connections: weakref.WeakSet[ServerConnection] = weakref.WeakSet()
        _fork.forget_in_child(self)

    def listen(self, sockets: Iterable[Socket]) -> None:
        """Count in what the service listens on."""
        self._listening = tuple(sockets)

    def add(self, connection: ServerConnection) -> None:
        """Count a connection in, for as long as it lives."""
        self._connections.add(connection)

    def abandon_after_fork(self) -> None:
        """Drop a forked child's copies of the descriptors; not a word to the peers."""
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            connected = [each.transport.get_extra_info("socket") for each in list(self._connections)]
            for sock in (*self._listening, *connected):
                if sock is not None and sock.fileno() >= 0:
                    # The number stays taken, or a finalizer would close another file.
                    os.dup2(nothing, sock.fileno(), inheritable=False)
        finally:
            os.close(nothing)
        self._listening, self._connections = (), weakref.WeakSet()
