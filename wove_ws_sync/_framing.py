"""WebSocket frames: what leaves, masked, and what arrives, checked by its header.

Owns: the formats, the limits, and the rules of RFC 6455 on the order
of frames. Never: sends, joins fragments, validates text.
"""

from __future__ import annotations

import functools
import os
import struct
from typing import NamedTuple, cast

import websocket

from ._wire import Wire

__all__ = ["Frame", "FrameReader", "MaskingKeys", "Violation", "close_payload", "format_frame"]

ABNF = websocket.ABNF

_CONTROL = (ABNF.OPCODE_CLOSE, ABNF.OPCODE_PING, ABNF.OPCODE_PONG)
_MAX_CONTROL_BYTES = 125
# From here on masking by tables is faster than as one large number; up to there it is slower.
_MASK_BY_TABLE_BYTES = 1024
# Payloads up to this size are taken from the read buffer, larger ones are read where they stay.
_BUFFERED_BYTES = 64 * 1024


class Violation(Exception):
    """The peer broke a rule; the connection ends with the close *code* and *reason*."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Frame(NamedTuple):
    """One frame that arrived; a payload of 64 KiB and more is a bytearray of its own."""

    opcode: int
    fin: bool
    payload: bytes | bytearray

    def __repr__(self) -> str:
        return f"Frame({self.opcode!r}, {self.fin!r}, {len(self.payload)} bytes)"


class MaskingKeys:
    """Keys from the system's random numbers, many for one system call. One thread at a time."""

    def __init__(self) -> None:
        self._block = b""
        self._offset = 0

    def next(self) -> bytes:
        """Return four bytes that nobody can predict (RFC 6455, 5.3)."""
        if self._offset >= len(self._block):
            self._block, self._offset = os.urandom(1024), 0
        self._offset += 4
        return self._block[self._offset - 4 : self._offset]


def format_frame(
    opcode: int, payload: bytes | memoryview, key: bytes, *, fin: bool = True
) -> bytes | bytearray:
    """Return one frame masked with *key* (RFC 6455, 5.2)."""
    size = len(payload)
    if size < ABNF.LENGTH_7:
        head = struct.pack("!BB", fin << 7 | opcode, 0x80 | size)
    elif size < ABNF.LENGTH_16:
        head = struct.pack("!BBH", fin << 7 | opcode, 0x80 | ABNF.LENGTH_7, size)
    else:
        head = struct.pack("!BBQ", fin << 7 | opcode, 0x80 | ABNF.LENGTH_7 + 1, size)
    if size < _MASK_BY_TABLE_BYTES:
        mask = (key * (size // 4 + 1))[:size]
        masked = int.from_bytes(payload, "little") ^ int.from_bytes(mask, "little")
        return head + key + masked.to_bytes(size, "little")
    frame = bytearray(head + key)
    start = len(frame)
    frame += payload
    for index in range(4):
        frame[start + index :: 4] = frame[start + index :: 4].translate(_table(key[index]))
    return frame


@functools.cache
def _table(key: int) -> bytes:
    """Return what each byte becomes under one byte of a masking key."""
    return bytes(value ^ key for value in range(256))


def close_payload(code: int, reason: str) -> bytes:
    """Return the payload of a close frame, with as much of *reason* as it holds."""
    text = reason.encode("utf-8", "replace")[: _MAX_CONTROL_BYTES - 2]
    return struct.pack("!H", code) + text.decode("utf-8", "ignore").encode("utf-8")


class FrameReader(websocket.frame_buffer):
    """Take frames off *wire*; one that breaks a rule or the limit is refused by its header.

    With *sealing*, how many bytes that adds to the largest message, messages are binary, else text.
    """

    def __init__(self, wire: Wire, max_message_bytes: int, *, sealing: int = 0) -> None:
        super().__init__(wire.take, skip_utf8_validation=True)
        self._wire = wire
        self._max_message_bytes = max_message_bytes
        self._sealing = sealing
        self._fragmented = False
        self._total = 0

    def next_frame(self) -> Frame:
        """Return the next frame. Raises Violation, EndOfStream, OSError; never call it after that."""
        try:
            frame = self.recv_frame()
        except websocket.WebSocketProtocolException:
            raise Violation(1002, "invalid close frame") from None  # the rest is checked below
        payload = cast("bytes | bytearray", frame.data)
        if frame.opcode not in _CONTROL:
            self._fragmented = not frame.fin
            self._total = self._total + len(payload) if self._fragmented else 0
        if not self._fragmented:
            self._wire.leave_message()
        return Frame(frame.opcode, bool(frame.fin), payload)

    def recv_length(self) -> None:
        """Read the length, then judge the frame, before any of its payload is read."""
        super().recv_length()
        if self.header is not None and self.length is not None:
            fin, rsv1, rsv2, rsv3, opcode, masked, _ = self.header
            if rsv1 or rsv2 or rsv3:
                raise Violation(1002, "reserved bits without an extension")
            if masked:
                raise Violation(1002, "a server must not mask its frames")
            if opcode in _CONTROL:
                self._judge_control(fin, self.length)
            else:
                self._judge_data(opcode, self.length)

    def _judge_control(self, fin: int, length: int) -> None:
        if not fin or length > _MAX_CONTROL_BYTES:
            raise Violation(1002, "a control frame must be whole and short")

    def _judge_data(self, opcode: int, length: int) -> None:
        if opcode not in (ABNF.OPCODE_CONT, ABNF.OPCODE_TEXT, ABNF.OPCODE_BINARY):
            raise Violation(1002, "unknown opcode")
        if (opcode == ABNF.OPCODE_CONT) != self._fragmented:
            raise Violation(1002, "a message must end before the next one starts")
        if self._sealing and opcode == ABNF.OPCODE_TEXT:
            raise Violation(1008, "a message that is not sealed")
        if not self._sealing and opcode == ABNF.OPCODE_BINARY:
            raise Violation(1007, "binary message without the bin extension")
        if self._total + length > self._max_message_bytes + self._sealing:
            raise Violation(1009, f"message exceeds max_message_bytes={self._max_message_bytes}")

    def recv_strict(self, bufsize: int) -> bytes:
        """Return exactly *bufsize* bytes of the stream."""
        wire = self._wire
        if wire.buffered < bufsize:
            if self._fragmented or self.mask_value is not None:  # set once the payload's turn has come
                wire.enter_message()
            if bufsize > _BUFFERED_BYTES:
                return self._read_in_place(bufsize)
            while wire.buffered < bufsize:
                wire.fill()
        return wire.take(bufsize)

    def _read_in_place(self, size: int) -> bytes:
        try:
            payload = bytearray(size)
        except MemoryError:
            raise Violation(1009, f"no memory for a message of {size} bytes") from None
        self._wire.read_into(memoryview(payload))
        return cast("bytes", payload)  # the library only passes it on
