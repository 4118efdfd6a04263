"""What waits to be sent, and in which order it leaves.

Owns: the queue of messages, the control frames, cutting large messages into fragments.
Never: touches the wire; it hands out bytes, and is told when they are in the kernel.
"""

from __future__ import annotations

import threading
from collections import deque

import websocket

from ._framing import format_frame

__all__ = ["Outbox", "Parcel"]

ABNF = websocket.ABNF

# Large enough to cost little, small enough that a pong or a cancel need not wait long.
_FRAGMENT_BYTES = 1024 * 1024
# Small messages that wait together leave in one system call of about this size.
_BATCH_BYTES = 64 * 1024


class Parcel:
    """One outgoing message. ``started``: a byte of it may have left; ``sent``: all of it may have.

    ``sent_at`` is the moment its last byte went to the kernel, None before; from then on
    ``data`` is empty.
    """

    __slots__ = ("data", "sent_at", "size", "started")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.started = False
        self.sent_at: float | None = None

    @property
    def sent(self) -> bool:
        """Tell whether the last byte is in the kernel, or may be after an exception struck."""
        return self.sent_at is not None


class Outbox:
    """Order what a connection sends: control frames first, between fragments too, then messages.

    Any thread puts in; only the holder of the link's write lock calls :meth:`next_chunk` and
    :meth:`settle`.
    """

    def __init__(self) -> None:
        self.queued_bytes = 0
        # Guards _queue and queued_bytes. Reentrant: finalizers and signal handlers may post.
        self._lock = threading.RLock()
        self._queue: deque[Parcel] = deque()
        # The newest control frame of each kind, so that a flood of pings costs no memory. No lock:
        # one dict operation at a time.
        self._control: dict[int, bytes] = {}
        self._goodbye: bytes | None = None
        # Write lock only: the message being cut into fragments; those whose end was handed out.
        self._current: Parcel | None = None
        self._offset = 0
        self._leaving: list[Parcel] = []
        self._closed = False

    def post(self, data: bytes) -> Parcel:
        """Queue one message."""
        parcel = Parcel(data)
        with self._lock:
            self._queue.append(parcel)
            self.queued_bytes += parcel.size
        return parcel

    def withdraw(self, parcel: Parcel) -> bool:
        """Take *parcel* out of the queue; False if it is not there any more."""
        with self._lock:
            try:
                self._queue.remove(parcel)
            except ValueError:
                return False
            self.queued_bytes -= parcel.size
        return True

    def control(self, opcode: int, payload: bytes) -> None:
        """Queue a control frame; it replaces one of its kind, but the first close frame stays."""
        if opcode == ABNF.OPCODE_CLOSE:
            self._control.setdefault(opcode, payload)
        else:
            self._control[opcode] = payload

    def goodbye(self, payload: bytes) -> None:
        """Queue a close frame behind all messages."""
        self._goodbye = payload

    @property
    def waiting(self) -> bool:
        """Tell whether :meth:`next_chunk` has something to give."""
        queued = self._control or self._goodbye is not None or self._current or self._queue
        return bool(queued) and not self._closed

    def next_chunk(self) -> bytes | bytearray:
        """Return the next bytes to send, empty for none; nothing follows a close frame."""
        chunk = bytearray()
        while len(chunk) < _BATCH_BYTES and not self._closed:
            piece = self._next_frame()
            if not piece:
                break
            if not chunk and len(piece) >= _BATCH_BYTES:
                return piece  # as it is: no copy of a large fragment
            chunk += piece
        return chunk

    def _next_frame(self) -> bytes | bytearray:
        for opcode in (ABNF.OPCODE_PONG, ABNF.OPCODE_PING, ABNF.OPCODE_CLOSE):
            payload = self._control.pop(opcode, None)
            if payload is not None:
                self._closed = opcode == ABNF.OPCODE_CLOSE
                return format_frame(opcode, payload)
        if self._current is None:
            with self._lock:
                if self._queue:
                    self._current, self._offset = self._queue.popleft(), 0
        if self._current is not None:
            return self._next_fragment(self._current)
        if self._goodbye is not None:
            self._closed = True
            return format_frame(ABNF.OPCODE_CLOSE, self._goodbye)
        return b""

    def _next_fragment(self, parcel: Parcel) -> bytes | bytearray:
        parcel.started = True
        start, self._offset = self._offset, self._offset + _FRAGMENT_BYTES
        last = self._offset >= parcel.size
        payload = memoryview(parcel.data)[start : self._offset]
        if last:
            parcel.data, self._current = b"", None
            self._leaving.append(parcel)
        return format_frame(ABNF.OPCODE_CONT if start else ABNF.OPCODE_TEXT, payload, fin=last)

    def settle(self, now: float) -> None:
        """Note that all that was handed out is in the kernel, or may be."""
        leaving, self._leaving = self._leaving, []
        for parcel in leaving:
            parcel.sent_at = now
        if leaving:
            with self._lock:
                self.queued_bytes -= sum(parcel.size for parcel in leaving)
