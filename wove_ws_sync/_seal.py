"""Messages that nobody between host and worker service can read, change, repeat, drop or reorder.

Owns: the keys of one connection, one for each direction, and the form of a sealed message. Never:
knows who the peer is (``_proof`` does), touches a socket, looks into a message.

A sealed message is a row of boxes, each AES-256-GCM over 1 MiB of the message, the last over what
is left. The nonce of a box is the number of the message in its direction, the number of the box in
its message, and whether it is the last one; none of them travels. A message that is not the next
one, or not whole, therefore does not open.
"""

from __future__ import annotations

from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["PIECE_BYTES", "BrokenSeal", "SealKeys", "Way", "derive_keys", "sealed_size"]

#: So much of a message is in one box; a fragment of a message that leaves holds one box.
PIECE_BYTES = 1024 * 1024
_TAG_BYTES = 16
_BOX_BYTES = PIECE_BYTES + _TAG_BYTES
_KEY_BYTES = 32


class BrokenSeal(ValueError):
    """A message that this peer did not send, or not as the next one."""


class SealKeys(NamedTuple):
    """The two ways of one connection, as one side sees them."""

    outgoing: Way
    incoming: Way


class Way:
    """One direction of one connection. One thread at a time; not to be pickled or copied."""

    __slots__ = ("_broken", "_cipher", "_number")

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)
        self._number = 0
        self._broken = False

    def seal(self, message: bytes, start: int = 0) -> bytes:
        """Return the box of the piece of *message* at *start*; pieces are to be taken in order.

        With the last piece the message counts as sent: the next call is about the next one.
        """
        end = start + PIECE_BYTES
        last = end >= len(message)
        piece = message if last and not start else memoryview(message)[start:end]
        box = self._cipher.encrypt(self._nonce(start // PIECE_BYTES, last), piece, None)
        self._number += last
        return box

    def open(self, sealed: bytes | bytearray) -> bytes | bytearray:
        """Return the message in *sealed*, in place if that is a bytearray of several boxes.

        Raises BrokenSeal, and for everything after that, too.
        """
        if self._broken:
            raise BrokenSeal("a message after one that could not be opened")
        self._broken = True
        try:
            if len(sealed) <= _BOX_BYTES:
                message: bytes | bytearray = self._cipher.decrypt(self._nonce(0, True), sealed, None)
            else:
                message = self._open_boxes(sealed if isinstance(sealed, bytearray) else bytearray(sealed))
        except InvalidTag:
            raise BrokenSeal("a sealed message was changed, or is not the next one") from None
        self._number += 1
        self._broken = False
        return message

    def _open_boxes(self, buffer: bytearray) -> bytearray:
        filled = 0
        for index, start in enumerate(range(0, len(buffer), _BOX_BYTES)):
            end = start + _BOX_BYTES
            nonce = self._nonce(index, end >= len(buffer))
            piece = self._cipher.decrypt(nonce, memoryview(buffer)[start:end], None)
            buffer[filled : filled + len(piece)] = piece
            filled += len(piece)
        del buffer[filled:]
        return buffer

    def _nonce(self, box: int, last: bool) -> bytes:
        return b"%b%b%c" % (self._number.to_bytes(8), box.to_bytes(3), last)


def sealed_size(size: int) -> int:
    """Return how many bytes a message of *size* bytes has when it is sealed."""
    return size + _TAG_BYTES * max(1, -(-size // PIECE_BYTES))


def derive_keys(material: bytes, transcript: bytes, *, of_host: bool) -> SealKeys:
    """Return the keys of one connection as the host has them, or as the worker service has them.

    *material* is what only the two know, *transcript* is everything that they said to get there.
    """
    digest = hashes.Hash(hashes.SHA256())
    digest.update(transcript)
    salt = digest.finalize()
    to_worker, to_host = (
        Way(HKDF(hashes.SHA256(), _KEY_BYTES, salt, info).derive(material))
        for info in (b"wove-sync-v1 host to worker", b"wove-sync-v1 worker to host")
    )
    return SealKeys(to_worker, to_host) if of_host else SealKeys(to_host, to_worker)
