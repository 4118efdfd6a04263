"""Messages of one connection as they travel: in pieces if they are large, and sealed if that was agreed.

Owns: both, and the limit of what a host may send. Never: knows a command or an event.
"""

from __future__ import annotations

from collections.abc import Iterator

from websockets.asyncio.server import ServerConnection

from .._seal import PIECE_BYTES, BrokenSeal, SealKeys, Way
from ..frames import InvalidMessage

__all__ = ["Channel"]


class Channel:
    """Receive and send whole messages on the event loop. *limit* is in bytes, before sealing."""

    def __init__(self, socket: ServerConnection, limit: int, keys: SealKeys | None) -> None:
        self.received_bytes = self.sent_bytes = (
            0  # of messages; what TLS, frames and seals add is not counted
        )
        self._socket = socket
        self._limit = limit
        self._keys = keys

    async def receive(self) -> bytes | bytearray:
        """Return the next message. Raises InvalidMessage with a close code, websockets' ConnectionClosed.

        Cancelling it loses nothing.
        """
        # A text stays one only where none may come: one that is to be sealed and is not.
        received = await self._socket.recv(decode=False if self._keys is None else None)
        if isinstance(received, str):
            raise InvalidMessage("a message that is not sealed", 1008)
        message = received if self._keys is None else _opened(self._keys.incoming, received)
        self.received_bytes += len(message)
        if len(message) > self._limit:
            raise InvalidMessage(f"message exceeds {self._limit} bytes", 1009)
        return message

    async def confirm(self) -> None:
        """Wait until the host has shown that it has the keys, if there are any: by an empty message.

        What was recorded on another connection ends here. Raises as :meth:`receive`.
        """
        if self._keys is not None and await self.receive():
            raise InvalidMessage("a sealed connection begins with an empty message", 1008)

    async def send(self, message: bytes) -> None:
        """Send *message*; pings and pongs get in between its pieces. Raises ConnectionClosed."""
        if self._keys is not None:
            await self._socket.send(_sealed(self._keys.outgoing, message), text=False)
        else:
            await self._socket.send(message if len(message) <= PIECE_BYTES else _pieces(message), text=True)
        self.sent_bytes += len(message)


def _pieces(message: bytes) -> Iterator[memoryview]:
    view = memoryview(message)
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]


def _sealed(way: Way, message: bytes) -> bytes | Iterator[bytes]:
    """Return *message* sealed, in pieces if it is large: each is sealed when its turn has come."""
    if len(message) <= PIECE_BYTES:
        return way.seal(message)
    return (way.seal(message, start) for start in range(0, len(message), PIECE_BYTES))


def _opened(way: Way, message: bytes) -> bytes | bytearray:
    try:
        return way.open(message)
    except BrokenSeal as exc:
        raise InvalidMessage(str(exc), 1008) from None
