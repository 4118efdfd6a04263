"""The one door to the wire: whole messages in, whole messages out.

Owns: the dial under one deadline, what a close means, and the mapping of every library and
system error to one clear sentence. Never: knows what a run is, starts a thread that outlives
a dial, sends in the reader thread.

The reader thread calls ``recv()``, the holder of the link's write lock calls ``pump()``,
everything else may be called from any thread and never blocks.
"""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import websocket

from ._framing import FrameReader, Violation, close_payload
from ._handshake import Answer, upgrade
from ._outbox import Outbox, Parcel
from ._route import Witness, connect, nobody, place, tls_context
from ._wire import EndOfStream, Wire
from .errors import HandshakeRejected
from .options import LinkOptions
from .timing import Clock, Deadline

if TYPE_CHECKING:
    from ._seal import SealKeys

__all__ = ["Parcel", "Transport", "TransportClosed", "WebSocketTransport", "dial"]

ABNF = websocket.ABNF

_DATA = (ABNF.OPCODE_TEXT, ABNF.OPCODE_BINARY, ABNF.OPCODE_CONT)


class TransportClosed(Exception):
    """Tell that the connection is over; ``str()`` is one bounded sentence without payloads.

    ``close_code`` and ``reason`` are those of the close frame that ended it: the peer's, or
    ours if the peer broke a rule; None and "" if there was none.
    """

    def __init__(self, message: str, *, close_code: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.close_code = close_code
        self.reason = reason

    def again(self) -> TransportClosed:
        """Return an equal exception to raise; this one collects no tracebacks, which keep buffers alive."""
        return TransportClosed(str(self), close_code=self.close_code, reason=self.reason)


class Transport(Protocol):
    """What a link needs of a connection; :class:`WebSocketTransport` says what each member does.

    The owner may set ``wake``: the reader thread calls it when it queued an answer to the peer
    (a pong, a close frame) that somebody has to pump; it must not block.
    """

    wake: Callable[[], None]

    @property
    def features(self) -> frozenset[str] | None: ...
    @property
    def peer_max_message_bytes(self) -> int | None: ...
    @property
    def worker(self) -> str: ...
    @property
    def cancels(self) -> frozenset[str] | None: ...
    @property
    def last_byte_at(self) -> float: ...
    @property
    def partial_at(self) -> float: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def wants_write(self) -> bool: ...

    def recv(self) -> bytes | bytearray: ...
    def idle(self) -> bool: ...
    def post(self, message: bytes | Parcel) -> Parcel: ...
    def ping(self) -> None: ...
    def close(self, code: int, reason: str) -> None: ...
    def pump(self, until: Parcel | None = None, timeout: float | None = 0.0) -> bool: ...
    def fileno(self) -> int: ...
    def abort(self) -> None: ...
    def dispose(self) -> None: ...
    def detach_after_fork(self) -> None: ...


class WebSocketTransport:
    """A :class:`Transport` over a connected WebSocket; :func:`dial` makes one.

    ``features`` are the extensions that the worker agreed to, None for a worker that does
    not know of them; ``peer_max_message_bytes`` is the largest message it accepts, if it said;
    ``worker`` names the instance, "" for a worker that does not say; ``cancels`` are the kinds of
    runs that it can stop, None likewise.
    """

    def __init__(self, wire: Wire, answer: Answer, options: LinkOptions, clock: Clock) -> None:
        self.wake: Callable[[], None] = _nothing
        self.features = answer.features
        self.peer_max_message_bytes = answer.max_message_bytes
        self.worker = answer.worker
        self.cancels = answer.cancels
        self._wire = wire
        self._keys = answer.keys
        self._frames = FrameReader(wire, options.max_message_bytes, sealing=_sealing(answer, options))
        self._outbox = Outbox(None if answer.keys is None else answer.keys.outgoing)
        if answer.keys is not None:
            self._outbox.post(
                Parcel(b"")
            )  # shows that this side has the keys, before it has something to say
        self._clock = clock
        # Why the connection is over for the reader, and for writers. A writer that fails leaves the
        # reader what has arrived: results, and perhaps a close frame that says why.
        self._end: TransportClosed | None = None
        self._failure: TransportClosed | None = None

    def __repr__(self) -> str:
        over = self._end or self._failure
        state = f"over: {over}" if over else "open"
        return f"<WebSocketTransport fd={self.fileno()} {state}, {self.queued_bytes} bytes queued>"

    # -- the reader thread ---------------------------------------------------------

    def recv(self) -> bytes | bytearray:
        """Return the next message's text, opened if it was sealed; block until there is one. Reader only.

        UTF-8 is not checked here. Raises TransportClosed when the connection is over.
        """
        if self._end is not None:
            raise self._end.again()
        try:
            message = self._next_message()
            return message if self._keys is None else self._open(message, self._keys)
        except Violation as exc:
            self._answer(ABNF.OPCODE_CLOSE, close_payload(exc.code, exc.reason))
            text = f"The worker service broke the protocol: {exc.reason} (close code {exc.code})."
            self._end = TransportClosed(text, close_code=exc.code, reason=exc.reason)
            raise self._end.again() from None
        except OSError as exc:
            self._end = self._end or self._failure or _broken(exc)
            raise self._end.again() from exc
        except TransportClosed as exc:
            self._end = exc.again()
            raise
        except BaseException:
            self.abort()  # how much of a frame was read is unknown
            raise

    def _open(self, message: bytes | bytearray, keys: SealKeys) -> bytes | bytearray:
        try:
            return keys.incoming.open(message)
        except ValueError as exc:
            raise Violation(1008, str(exc)) from None

    def _next_message(self) -> bytes | bytearray:
        message: bytearray | None = None
        while True:
            opcode, fin, payload = self._frames.next_frame()
            if opcode in _DATA:
                if message is None:
                    if fin:
                        return payload
                    # One buffer that grows: many fragments, even empty ones, cost no more than their bytes.
                    message = bytearray()
                message += payload
                if fin:
                    return message
            elif opcode == ABNF.OPCODE_PING:
                self._answer(ABNF.OPCODE_PONG, payload)
            elif opcode == ABNF.OPCODE_CLOSE:
                raise self._closed_by_peer(payload)

    def _closed_by_peer(self, payload: bytes | bytearray) -> TransportClosed:
        if not payload:
            self._answer(ABNF.OPCODE_CLOSE, b"")
            return TransportClosed("The worker service closed the connection.")
        (code,) = struct.unpack("!H", payload[:2])
        try:
            reason = payload[2:].decode("utf-8")
        except UnicodeDecodeError:
            raise Violation(1007, "the reason in a close frame is not UTF-8") from None
        reason = "".join(char if char.isprintable() else "?" for char in reason)
        self._answer(ABNF.OPCODE_CLOSE, payload[:2])
        text = f"The worker service closed the connection with code {code}{f' ({reason})' if reason else ''}."
        return TransportClosed(text, close_code=code, reason=reason)

    def _answer(self, opcode: int, payload: bytes | bytearray) -> None:
        self._outbox.control(opcode, bytes(payload))
        self.wake()

    def idle(self) -> bool:
        """Tell whether the reader waits inside :meth:`recv` and the kernel holds nothing unread."""
        return self._wire.idle()

    @property
    def last_byte_at(self) -> float:
        """Return the clock's moment of the last byte received."""
        return self._wire.last_byte_at

    @property
    def partial_at(self) -> float:
        """Return the moment of the last byte inside a still unfinished message; 0.0 for never."""
        return self._wire.partial_at

    # -- any thread ------------------------------------------------------------------

    @property
    def queued_bytes(self) -> int:
        """Return the size of all messages that are posted and not in the kernel."""
        return self._outbox.queued_bytes

    @property
    def wants_write(self) -> bool:
        """Tell whether something is queued or half sent that could leave."""
        return self._failure is None and (self._wire.pending or self._outbox.waiting)

    def post(self, message: bytes | Parcel) -> Parcel:
        """Queue one message and return it: it tells how far it got, and can be withdrawn."""
        parcel = message if isinstance(message, Parcel) else Parcel(message)
        self._outbox.post(parcel)
        return parcel

    def ping(self) -> None:
        """Queue a ping. It overtakes messages, as every control frame does."""
        self._outbox.control(ABNF.OPCODE_PING, b"")

    def close(self, code: int, reason: str) -> None:
        """Queue a close frame; nothing is sent after it.

        With 1000 and 1001 what was posted before goes first; any other code overtakes it.
        """
        if code in (1000, 1001):
            self._outbox.goodbye(close_payload(code, reason))
        else:
            self._outbox.control(ABNF.OPCODE_CLOSE, close_payload(code, reason))

    def fileno(self) -> int:
        """Return the descriptor for poll(2); -1 if it is closed."""
        return self._wire.fileno()

    def abort(self) -> None:
        """End the connection at once and wake whoever reads or writes. Idempotent."""
        self._end = self._end or TransportClosed("This side ended the connection.")
        self._failure = self._failure or self._end
        self._wire.abort()

    def dispose(self) -> None:
        """Close the descriptor, after the reader has left :meth:`recv`. Idempotent."""
        self._failure = self._failure or self._end or TransportClosed("This side ended the connection.")
        self._wire.close()

    def detach_after_fork(self) -> None:
        """Close a forked child's copy of the descriptor, and do nothing else."""
        self._wire.detach_after_fork()

    # -- whoever holds the link's write lock -------------------------------------------

    def pump(self, until: Parcel | None = None, timeout: float | None = 0.0) -> bool:
        """Send what is queued. Hold the link's write lock.

        Without *until*: send what goes without waiting; return whether everything is out. With
        it: wait up to *timeout* seconds (None: no limit) until it is sent; return whether it is. What
        is half sent stays for the next call. Raises TransportClosed; any other exception that
        strikes here ends the connection too, as how much has left is unknown.
        """
        if self._failure is not None:
            raise self._failure.again()
        try:
            return self._pump(until, Deadline.after(timeout, self._clock.monotonic()))
        except OSError as exc:
            closed = _broken(exc)
            self._fail(closed)
            if exc.errno is None:  # not the system's: a signal handler raised it
                raise
            self._outbox.settle(self._wire.accepted, self._clock.monotonic())
            raise closed.again() from exc
        except TransportClosed:
            raise
        except BaseException:
            self._fail(TransportClosed("An exception struck while a message was being sent."))
            raise

    def _pump(self, until: Parcel | None, deadline: Deadline) -> bool:
        while True:
            self._outbox.expose()
            flushed = self._wire.flush()
            self._outbox.settle(self._wire.accepted, self._clock.monotonic())
            if until is not None and until.sent:
                return True
            remaining = deadline.remaining(self._clock.monotonic())
            if flushed:
                chunk = self._outbox.next_chunk()
                if not chunk:
                    return until is None
                self._wire.push(chunk)
            elif until is None or remaining == 0.0:
                return False
            else:
                self._wire.wait_writable(remaining)
                if self._failure is not None:
                    raise self._failure.again()

    def _fail(self, failure: TransportClosed) -> None:
        self._failure = self._failure or failure
        self._wire.abort()


def dial(
    options: LinkOptions, headers: Mapping[str, str], *, clock: Clock, witness: Witness = nobody
) -> WebSocketTransport:
    """Connect to the worker service: name, TCP, proxy, TLS and upgrade within ``open_timeout`` seconds.

    *witness* hears of each of these when it has succeeded, before the next one begins.
    Raises TimeoutError, ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError,
    ssl.SSLError, ConnectionError, another OSError, HandshakeRejected (AuthenticationRejected for
    401 and 403), and ValueError if a target taken for local is not. Nothing is left open then.
    """
    deadline = Deadline.after(options.open_timeout, clock.monotonic())
    context = tls_context(options)
    wire: Wire | None = None
    try:
        wire = connect(options, context, deadline, clock, witness)
        answer = upgrade(wire, options, headers, witness)
    except BaseException as exc:
        if wire is not None:
            wire.close()
        if not isinstance(exc, OSError) or _is_ours(exc):
            raise
        raise _undialled(exc, options, connected=wire is not None) from exc
    wire.deadline = Deadline()
    return WebSocketTransport(wire, answer, options, clock)


def _is_ours(exc: OSError) -> bool:
    """Tell whether the error is a clear sentence already: a rejection by the worker or the proxy."""
    return isinstance(exc, HandshakeRejected) or type(exc) is ConnectionError


def _undialled(exc: OSError, options: LinkOptions, *, connected: bool) -> OSError:
    """Return the error of a failed dial as one clear sentence, of the same family."""
    where, why = place(options), exc.strerror or type(exc).__name__
    if isinstance(exc, TimeoutError):
        return TimeoutError("timed out during opening handshake")
    if isinstance(exc, socket.gaierror):
        return socket.gaierror(exc.errno, f"The name in {where} cannot be resolved: {why}.")
    if isinstance(exc, ssl.SSLCertVerificationError):
        refused = (
            f"The certificate of {where} was refused: {exc.verify_message}. "
            "Check its dates and names, and executor_config.ca_file."
        )
        error = ssl.SSLCertVerificationError(1, refused)
        error.verify_code, error.verify_message = exc.verify_code, exc.verify_message
        return error
    ended = isinstance(exc, EndOfStream | ConnectionResetError | BrokenPipeError)
    if isinstance(exc, ssl.SSLError) or (ended and options.secure and connected):
        fault = "it closed the connection" if ended else str(getattr(exc, "reason", None) or why)
        # In TLS 1.3 a client learns that its certificate was refused after its own handshake is done.
        hint = " It may have refused the client certificate, or want one." if connected else ""
        return ssl.SSLError(1, f"TLS with {where} failed: {fault}.{hint}")
    if ended:
        return ConnectionError(
            f"The worker service at {where} closed the connection during the handshake. "
            "Check port and scheme (ws:// or wss://) of executor_config.url."
        )
    hint = " Check that the worker service runs there." if isinstance(exc, ConnectionRefusedError) else ""
    return OSError(exc.errno, f"No connection to {where}: {why}.{hint}")  # the subclass that fits errno


def _sealing(answer: Answer, options: LinkOptions) -> int:
    """Return how many bytes the seal adds to the largest message; 0 for no seal."""
    if answer.keys is None:
        return 0
    from ._seal import sealed_size

    return sealed_size(options.max_message_bytes) - options.max_message_bytes


def _broken(exc: OSError) -> TransportClosed:
    if isinstance(exc, EndOfStream):
        return TransportClosed("The worker service ended the connection without a close frame.")
    return TransportClosed(f"The connection broke: {exc.strerror or type(exc).__name__}.")


def _nothing() -> None:
    pass
