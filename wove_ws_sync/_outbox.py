"""What waits to be sent, and in which order it leaves.

Owns: the queue of messages, the control frames, cutting large messages into fragments, and sealing
them, once their order is final. Never: touches the wire; it hands out bytes, and is told when they
are in the kernel.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol

import websocket

from ._framing import MaskingKeys, format_frame

if TYPE_CHECKING:
    from ._seal import Way

__all__ = ["Outbox", "Parcel"]

ABNF = websocket.ABNF

# Large enough to cost little, small enough that a pong or a cancel need not wait long. A sealed
# message has one box in each fragment.
_FRAGMENT_BYTES = 1024 * 1024
# Small messages that wait together leave in one system call of about this size.
_BATCH_BYTES = 64 * 1024


class Withdrawing(Protocol):
    """Something that messages wait in."""

    def withdraw(self, parcel: Parcel) -> bool:
        """Take *parcel* out; False if it is not there any more."""


class Parcel:
    """One outgoing message, and how far it got: not ``started``, ``started``, ``sent``.

    ``started`` says that a byte of it may have left; ``sent_at`` is the moment its last byte was in
    the kernel, None before. ``data`` is empty once the wire has all of it.
    """

    __slots__ = ("at_risk", "data", "outbox", "queued", "sent_at", "size", "started")

    def __init__(self, data: bytes) -> None:
        self.data = data
        # Who has it in line, if anybody; "queued" is false again when it is taken out of there.
        self.outbox: Withdrawing | None = None
        self.queued = False
        self.size = len(data)
        self.started = False
        self.sent_at: float | None = None
        # Set while the system call runs that may take its last byte, and for good if that was
        # interrupted: whether it was taken is not known then.
        self.at_risk = False

    @property
    def sent(self) -> bool:
        """Tell whether the last byte is in the kernel."""
        return self.sent_at is not None

    @property
    def maybe_sent(self) -> bool:
        """Tell whether the peer may have seen all of it. False is certain, whoever asks and when."""
        return self.at_risk or self.sent_at is not None

    def withdraw(self) -> bool:
        """Take the message back; False if a byte of it may have left, or is about to. Any thread, no I/O."""
        return self.outbox is not None and self.outbox.withdraw(self)


class Outbox:
    """Order what a connection sends: control frames first, between fragments too, then messages.

    Any thread puts in. The holder of the link's write lock takes out: :meth:`next_chunk`, then
    :meth:`expose` and :meth:`settle` around each attempt to send it. With a *seal* every message
    leaves sealed.
    """

    def __init__(self, seal: Way | None = None) -> None:
        self.queued_bytes = 0
        self._seal = seal
        # Guards _queue, _withdrawn and queued_bytes. Reentrant: finalizers and signal handlers may post.
        self._lock = threading.RLock()
        self._queue: deque[Parcel] = deque()
        self._withdrawn = 0
        # The newest control frame of each kind, so that a flood of pings costs no memory. No lock:
        # one dict operation at a time.
        self._control: dict[int, bytes] = {}
        self._goodbye: bytes | None = None
        # Write lock only: masking keys, the message being cut into fragments, and those whose end
        # is in the chunk handed out last, with the place of that end in it.
        self._keys = MaskingKeys()
        self._current: Parcel | None = None
        self._offset = 0
        self._leaving: list[tuple[int, Parcel]] = []
        self._closed = False

    def post(self, parcel: Parcel) -> None:
        """Queue one message."""
        parcel.outbox = self
        with self._lock:
            self._queue.append(parcel)
            parcel.queued = True  # last: what an exception keeps from being so is not sent
            self.queued_bytes += parcel.size

    def withdraw(self, parcel: Parcel) -> bool:
        """Take *parcel* out of the queue; False if it is not there any more."""
        with self._lock:
            if not parcel.queued:
                return False
            parcel.queued = False  # its place in the queue is passed over
            parcel.data = b""
            self.queued_bytes -= parcel.size
            self._withdrawn += 1
            if self._withdrawn > 64 + len(self._queue) // 2:
                self._queue = deque(one for one in self._queue if one.queued)
                self._withdrawn = 0
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
        chunk: bytes | bytearray = bytearray()
        while len(chunk) < _BATCH_BYTES and not self._closed:
            piece = self._next_frame()
            if not piece:
                break
            if not chunk and len(piece) >= _BATCH_BYTES:
                chunk = piece  # as it is: no copy of a large fragment
            else:
                chunk += piece
            parcel = self._current
            if parcel is not None and self._offset >= parcel.size:
                self._leaving.append((len(chunk), parcel))
                parcel.data, self._current = b"", None
        return chunk

    def _next_frame(self) -> bytes | bytearray:
        for opcode in (ABNF.OPCODE_PONG, ABNF.OPCODE_PING, ABNF.OPCODE_CLOSE):
            payload = self._control.pop(opcode, None)
            if payload is not None:
                self._closed = opcode == ABNF.OPCODE_CLOSE
                return format_frame(opcode, payload, self._keys.next())
        if self._current is None:
            with self._lock:
                while self._queue and self._current is None:
                    parcel = self._queue.popleft()
                    if parcel.queued:
                        parcel.started = True  # first: what is neither was never queued
                        parcel.queued = False
                        self._current, self._offset = parcel, 0
        if self._current is not None:
            return self._next_fragment(self._current)
        if self._goodbye is not None:
            self._closed = True
            return format_frame(ABNF.OPCODE_CLOSE, self._goodbye, self._keys.next())
        return b""

    def _next_fragment(self, parcel: Parcel) -> bytes | bytearray:
        start, self._offset = self._offset, self._offset + _FRAGMENT_BYTES
        if self._seal is None:
            payload: bytes | memoryview = memoryview(parcel.data)[start : self._offset]
            opcode = ABNF.OPCODE_TEXT
        else:
            payload = self._seal.seal(parcel.data, start)
            opcode = ABNF.OPCODE_BINARY
        opcode = ABNF.OPCODE_CONT if start else opcode
        return format_frame(opcode, payload, self._keys.next(), fin=self._offset >= parcel.size)

    def expose(self) -> None:
        """Note that the chunk is about to be offered to the kernel."""
        for _, parcel in self._leaving:
            parcel.at_risk = True

    def settle(self, accepted: int, now: float) -> None:
        """Note that the kernel has taken the first *accepted* bytes of the chunk, and no more."""
        if not self._leaving:
            return
        sent = [parcel for end, parcel in self._leaving if end <= accepted]
        self._leaving = [(end, parcel) for end, parcel in self._leaving if end > accepted]
        for parcel in sent:
            parcel.sent_at = now
        for _, parcel in self._leaving:
            parcel.at_risk = False
        with self._lock:
            self.queued_bytes -= sum(parcel.size for parcel in sent)
