"""The bytes of one connection: a TCP stream, with TLS on top or not.

Owns: the raw socket, the read buffer, the TLS state and who may touch which of them.
Never: knows a frame or a message, resolves a name, looks at the environment.

The reader receives, the holder of the link's write lock sends; neither waits for the
other. TLS runs over memory buffers under a lock of its own, as an OpenSSL object bears
one thread at a time: no TLS call blocks or touches the descriptor. The socket never
blocks; waiting is poll(2), which shutdown(2) from any thread ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import ssl
import threading
from typing import cast

from .timing import Clock, Deadline

__all__ = ["EndOfStream", "NotHTTP", "Wire"]

_BUFFER_BYTES = 256 * 1024
_HEAD_BYTES = 64 * 1024
# A peer that sends less than _STALL_BYTES in _STALL_WINDOW seconds inside a message makes no progress.
_STALL_BYTES = 30 * 1024
_STALL_WINDOW = 30.0
# Longest single wait for a peer that reads; then the socket is tried again, in case it is gone.
_WRITE_WAIT = 1.0
# What a call that sends may say without telling why the connection broke: a signal handler's own
# error, that the peer does not read now, and that somebody has been told already.
_NO_REASONS = (None, errno.EAGAIN, errno.EPIPE)
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
_EMPTY = memoryview(b"")


class EndOfStream(ConnectionError):
    """The peer ended the stream."""


class NotHTTP(ValueError):
    """What arrived is no HTTP response head, or one without an end."""


class Wire:
    """Move bytes over *raw*, a connected socket that belongs to this object from now on.

    ``deadline`` bounds every wait until it is set to ``Deadline()`` after the handshake.
    ``last_byte_at`` and ``partial_at`` are moments of *clock*: the last byte received, and
    the last one received between :meth:`enter_message` and :meth:`leave_message`.
    """

    def __init__(self, raw: socket.socket, clock: Clock, deadline: Deadline) -> None:
        raw.setblocking(False)
        self.deadline = deadline
        self.last_byte_at = clock.monotonic()
        self.partial_at = 0.0
        self._raw = raw
        self._clock = clock
        # Guards the descriptor's number while it is passed to the kernel: after close() the number
        # may belong to another file. Reentrant, as a finalizer may call abort() anywhere.
        self._descriptor_lock = threading.RLock()
        self._readable = _poll(raw, select.POLLIN)
        self._writable = _poll(raw, select.POLLOUT)
        # Reader only.
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._more = False
        self._waiting = False
        self._inside = False
        self._window_start = self._window_bytes = 0.0
        # Write lock only: bytes the kernel did not take yet, which leave before any other, and how
        # many of the same push() it took. Encrypted bytes are never fewer than plain ones.
        self._tail = _EMPTY
        self.accepted = 0
        # What broke the connection, if the kernel told a writer: it tells one call only, and whoever
        # reads then sees no more than the end of the stream. Set under the descriptor lock.
        self._told: OSError | None = None
        # TLS: _tls_lock is held around each call into the three objects and nothing else.
        self._tls_lock = threading.Lock()
        self._tls: ssl.SSLObject | None = None
        self._inbound = ssl.MemoryBIO()
        self._outbound = ssl.MemoryBIO()
        self._cipher = _EMPTY

    # -- reading: the reader thread, or whoever dials -----------------------------

    @property
    def buffered(self) -> int:
        """Return how many bytes :meth:`take` can give."""
        return self._end - self._start

    def take(self, count: int) -> bytes:
        """Return the next *count* buffered bytes."""
        start, self._start = self._start, self._start + count
        return self._view[start : self._start].tobytes()

    def fill(self, limit: int = _BUFFER_BYTES) -> None:
        """Wait for bytes and buffer what has come, up to *limit*. Raises EndOfStream, OSError."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _BUFFER_BYTES:
            self._view[: self.buffered] = self._view[self._start : self._end]
            self._start, self._end = 0, self.buffered
        self._end += self._read(self._view[self._end : self._end + limit])

    def read_into(self, target: memoryview) -> None:
        """Fill *target*, without a copy through the buffer for what is not in it yet."""
        done = min(self.buffered, len(target))
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        while done < len(target):
            done += self._read(target[done:])

    def read_head(self) -> bytes:
        """Return one HTTP response head with its empty line; what follows stays buffered.

        Raises NotHTTP for anything else, and as soon as it is clear: at most 64 KiB are read.
        """
        while True:
            data = self._view[self._start : self._end].tobytes()
            end = data.find(b"\r\n\r\n")
            if not data.startswith(b"HTTP/1."[: len(data)]):
                raise NotHTTP("the answer is not HTTP")
            if end >= 0:
                return self.take(end + 4)
            if len(data) >= _HEAD_BYTES:
                raise NotHTTP(f"the headers are longer than {_HEAD_BYTES} bytes")
            self.fill(_HEAD_BYTES - len(data))

    def enter_message(self) -> None:
        """Note that the bytes from here on, the last ones included, belong to an unfinished message."""
        if not self._inside:
            self._inside = True
            self.partial_at = self.last_byte_at
            self._window_start, self._window_bytes = self._clock.monotonic(), 0

    def leave_message(self) -> None:
        """Note that the message is complete."""
        self._inside = False

    def idle(self) -> bool:
        """Tell whether the reader waits for bytes and the kernel holds none. Any thread."""
        return self._waiting and not _poll(self._raw, select.POLLIN).poll(0)

    def _read(self, target: memoryview) -> int:
        if self._tls is None:
            return self._receive(target)
        while True:
            with self._tls_lock:
                try:
                    # Asked first, as it costs less than the exception. Replies that a read causes
                    # (KeyUpdate) stay in _outbound for the next writer.
                    if self._inbound.pending or self._tls.pending():
                        return cast("int", self._tls.read(min(len(target), _BUFFER_BYTES), target))
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    raise EndOfStream("the peer closed the connection") from None
            count = self._receive(self._cipher)
            with self._tls_lock:
                self._inbound.write(self._cipher[:count])

    def _receive(self, target: memoryview) -> int:
        """Return how many bytes came; wait for the first."""
        while True:
            # Asking first keeps idle() exact: as long as _waiting is set, unread bytes are in the
            # kernel. A read that was filled to the brim has more coming: no need to ask.
            if not self._more:
                self._wait_readable()
            try:
                count = self._raw.recv_into(target)
            except BlockingIOError:
                self._more = False
                continue
            if count == 0:
                raise self._ended()
            self._more = count == len(target)
            self.last_byte_at = self._clock.monotonic()
            if self._inside:
                self.partial_at = self.last_byte_at
                self._window_bytes += count
            return count

    def _ended(self) -> OSError:
        """Return why there is nothing more to read."""
        # A writer that the kernel is telling why holds the lock until it has noted it. It never waits
        # in there, but a signal handler may strike it, and that one may wait for this thread.
        if self._descriptor_lock.acquire(timeout=_WRITE_WAIT):
            self._descriptor_lock.release()
        told = self._told
        if told is None:
            return EndOfStream("the peer closed the connection")
        return OSError(told.errno, told.strerror)

    def _wait_readable(self) -> None:
        now = self._clock.monotonic()
        if self._inside and now - self._window_start >= _STALL_WINDOW:
            if self._window_bytes < _STALL_BYTES:
                rate = f"{_STALL_BYTES} bytes in {_STALL_WINDOW:.0f} s"
                raise TimeoutError(errno.ETIMEDOUT, f"fewer than {rate} arrived inside a message")
            self._window_start, self._window_bytes = now, 0
        self._waiting = True
        try:
            ready = self._readable.poll(_milliseconds(self.deadline.remaining(now)))
        finally:
            self._waiting = False
        if not ready:
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time")

    # -- writing: hold the link's write lock, or be the one who dials --------------

    @property
    def pending(self) -> bool:
        """Tell whether bytes wait for the kernel to take them."""
        return len(self._tail) > 0

    def push(self, data: bytes | bytearray | memoryview) -> None:
        """Take *data* over for sending; only when nothing is pending."""
        self.accepted = 0
        if self._tls is None:
            self._tail = memoryview(data)
            return
        rest = memoryview(data)
        with self._tls_lock:
            while rest:
                rest = rest[self._tls.write(rest) :]
            self._tail = memoryview(self._outbound.read())

    def flush(self) -> bool:
        """Give the kernel what it takes without waiting; return whether nothing is pending."""
        while self._tail:
            try:
                with self._descriptor_lock:
                    count = self._send()
            except BlockingIOError:
                return False
            self._tail = self._tail[count:]
            self.accepted += count
        return True

    def _send(self) -> int:
        try:
            return self._raw.send(self._tail, _NO_SIGNAL)
        except OSError as exc:
            if exc.errno not in _NO_REASONS:
                self._told = OSError(exc.errno, exc.strerror)  # a traceback would keep buffers alive
            raise

    def wait_writable(self, timeout: float | None) -> None:
        """Wait up to *timeout* seconds, and never long, for the peer to read."""
        self._writable.poll(_milliseconds(_WRITE_WAIT if timeout is None else min(timeout, _WRITE_WAIT)))

    def send(self, data: memoryview) -> None:
        """Send all of *data* before the deadline."""
        self.push(data)
        self._drain()

    def _drain(self) -> None:
        while not self.flush():
            remaining = self.deadline.remaining(self._clock.monotonic())
            if remaining == 0.0:
                raise TimeoutError(errno.ETIMEDOUT, "the peer does not read")
            self.wait_writable(remaining)

    # -- the connection ------------------------------------------------------------

    def start_tls(self, context: ssl.SSLContext, server_hostname: str) -> ssl.SSLObject:
        """Do the TLS handshake before the deadline and return what tells of its outcome.

        Raises ssl.SSLError, EndOfStream, TimeoutError. Once there is a second thread nobody else
        may touch what it returns.
        """
        tls = context.wrap_bio(self._inbound, self._outbound, server_hostname=server_hostname)
        self._cipher = memoryview(bytearray(_BUFFER_BYTES))
        while True:
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_records()
                self._inbound.write(self._cipher[: self._receive(self._cipher)])
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._tail = memoryview(self._outbound.read())  # the alert that tells the peer why
                    self.flush()
                raise
            else:
                break
        self._send_records()
        self._tls = tls
        return tls

    def _send_records(self) -> None:
        self._tail = memoryview(self._outbound.read())
        self._drain()

    def set_option(self, level: int, name: int, value: int) -> None:
        """Set a socket option."""
        self._raw.setsockopt(level, name, value)

    def peer_address(self) -> str:
        """Return the IP address of the other end."""
        return str(self._raw.getpeername()[0])

    def fileno(self) -> int:
        """Return the descriptor, -1 when it is closed."""
        return self._raw.fileno()

    def abort(self) -> None:
        """End the stream both ways and wake whoever waits. Any thread; never blocks; idempotent."""
        # On the raw socket: ending TLS here would race with the two threads that use it.
        with self._descriptor_lock, contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back, once nobody reads any more. Idempotent."""
        with self._descriptor_lock:
            self._raw.close()

    def detach_after_fork(self) -> None:
        """Give a forked child's copy of the descriptor back; no lock, not a word to the peer."""
        descriptor = self._raw.detach()
        if descriptor >= 0:
            os.close(descriptor)


def _poll(raw: socket.socket, event: int) -> select.poll:
    poller = select.poll()
    descriptor = raw.fileno()
    if descriptor >= 0:
        poller.register(descriptor, event)
    return poller


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000.0
