"""Servers that do exactly what a test tells them, byte by byte, for tests of the transport.

``Listener`` accepts connections on a free loopback port and plays a script for each in a
thread of its own; ``Peer`` is what the script holds. All waits are bounded, and a script
that raises something other than the end of its connection fails the test at the end.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from wove_ws_sync import security
from wove_ws_sync.options import LinkOptions
from wove_ws_sync.timing import Clock
from wove_ws_sync.transport import WebSocketTransport, dial

# Only a failing test spends it, in seconds.
PATIENCE = 30.0

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def accept_for(key: str) -> str:
    """Return the Sec-WebSocket-Accept that belongs to *key*."""
    digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
    return base64.b64encode(digest).decode()


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes = b"") -> bytes:
    """Return one frame as a server sends it, or as it must not."""
    size = len(payload)
    first = fin << 7 | rsv << 4 | opcode
    masked = 0x80 if mask else 0
    if size < 126:
        head = struct.pack("!BB", first, masked | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    if mask:
        payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return head + mask + payload


class Peer:
    """The server's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = b""
        self._ahead = b""

    def read_request(self) -> str:
        """Return the request up to its empty line."""
        while b"\r\n\r\n" not in self.request:
            self.request += self._some()
        self.request, _, self._ahead = self.request.partition(b"\r\n\r\n")
        return self.request.decode("latin-1")

    def headers(self) -> dict[str, str]:
        """Return the headers of the request, names in lower case."""
        lines = self.request.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def upgrade(self, *extra: str, behind: bytes = b"") -> Peer:
        """Read the request and accept it, with *extra* header lines and bytes right *behind* them."""
        self.read_request()
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {accept_for(self.headers()['sec-websocket-key'])}",
            *extra,
        ]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + behind)
        return self

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def recv_exactly(self, size: int) -> bytearray:
        """Return the next *size* bytes."""
        data = bytearray(size)
        view = memoryview(data)
        done = min(size, len(self._ahead))
        view[:done], self._ahead = self._ahead[:done], self._ahead[done:]
        while done < size:
            count = self.sock.recv_into(view[done:])
            if count == 0:
                raise ConnectionAbortedError("the client ended the connection")
            done += count
        return data

    def recv_frame(self) -> tuple[int, bool, bytes]:
        """Return opcode, fin and unmasked payload of the next frame; a client must mask."""
        first, second = self.recv_exactly(2)
        assert second & 0x80, "the client did not mask"
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self.recv_exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.recv_exactly(8))
        key, data = self.recv_exactly(4), self.recv_exactly(size)
        for i in range(4):
            data[i::4] = data[i::4].translate(bytes(value ^ key[i] for value in range(256)))
        return first & 0x0F, bool(first & 0x80), bytes(data)

    def recv_message(self) -> bytes:
        """Return the next text message, control frames left out."""
        parts: list[bytes] = []
        while True:
            opcode, fin, payload = self.recv_frame()
            if opcode in (TEXT, CONT):
                assert opcode == (CONT if parts else TEXT)
                parts.append(payload)
                if fin:
                    return b"".join(parts)

    def recv_until(self, wanted: int) -> bytes:
        """Return the payload of the next frame of opcode *wanted*; drop what comes before."""
        while True:
            opcode, _, payload = self.recv_frame()
            if opcode == wanted:
                return payload

    def close_code(self) -> int:
        """Return the code of the client's close frame."""
        (code,) = struct.unpack("!H", self.recv_until(CLOSE)[:2])
        return int(code)

    def drain(self) -> None:
        """Read until the client ends the connection."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass

    def reset(self) -> None:
        """End the connection by RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _some(self) -> bytes:
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionAbortedError("the client ended the connection")
        return data


class Listener:
    """A TCP or TLS server whose connections play *script*; ``result()`` is what the first one returned."""

    def __init__(
        self, script: Callable[[Peer], Any], *, context: ssl.SSLContext | None = None, receive_buffer: int = 0
    ) -> None:
        self.accepted = 0
        self.over = threading.Event()  # set when the test is done: for scripts that hold a connection open
        self._script = script
        self._context = context
        self._socket = socket.socket()
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(16)
        self.port = self._socket.getsockname()[1]
        self._results: list[Future[Any]] = [Future()]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name=f"listener-{self.port}")]

    def result(self, timeout: float = PATIENCE) -> Any:
        """Return what the script of the first connection returned, or raise what it raised."""
        return self._results[0].result(timeout)

    def __enter__(self) -> Listener:
        self._threads[0].start()
        return self

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self.over.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} hangs"
        self._socket.close()
        for future in self._results:
            error = future.exception() if future.done() and kind is None else None
            if error is not None and not isinstance(error, OSError):
                raise error

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            self.accepted += 1
            if self.accepted > 1:
                self._results.append(Future())
            self._open.append(sock)
            thread = threading.Thread(
                target=self._serve, args=(sock, self._results[-1]), name=f"peer-{self.port}-{self.accepted}"
            )
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, future: Future[Any]) -> None:
        sock.settimeout(PATIENCE)
        try:
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
                self._open.append(sock)
            future.set_result(self._script(Peer(sock)))
        except BaseException as exc:
            future.set_exception(exc)
        finally:
            sock.close()


class FullBacklog:
    """An address that drops every SYN: its queue of waiting connections is full."""

    def __enter__(self) -> FullBacklog:
        self._sockets = [socket.socket()]
        self._sockets[0].bind(("127.0.0.1", 0))
        self._sockets[0].listen(0)
        self.address = self._sockets[0].getsockname()
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(self.address)
            self._sockets.append(sock)
        return self

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        for sock in self._sockets:
            sock.close()


def options_for(port: int, *, scheme: str = "ws", target: str = "/wove", **config: Any) -> LinkOptions:
    """Return checked options for a server of this test."""
    host = config.pop("host", "127.0.0.1")
    return security.link_options({"url": f"{scheme}://{host}:{port}{target}", "open_timeout": 5.0, **config})


def dial_to(options: LinkOptions) -> WebSocketTransport:
    """Dial as a link does."""
    return dial(options, security.handshake_headers(options), clock=Clock())


@contextlib.contextmanager
def dialled(options: LinkOptions) -> Iterator[WebSocketTransport]:
    """Dial, and give the connection back at the end."""
    transport = dial_to(options)
    try:
        yield transport
    finally:
        transport.abort()
        transport.dispose()


@contextlib.contextmanager
def connected(script: Callable[[Peer], Any], **config: Any) -> Iterator[tuple[WebSocketTransport, Listener]]:
    """Dial a server that accepts the upgrade and then plays *script*."""
    receive_buffer = config.pop("receive_buffer", 0)
    with (
        Listener(lambda peer: script(peer.upgrade()), receive_buffer=receive_buffer) as listener,
        dialled(options_for(listener.port, **config)) as transport,
    ):
        yield transport, listener


def in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run *function* in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=run, name=f"in-thread-{function.__name__}", daemon=True).start()
    return future


def text_of(size: int) -> bytes:
    """Return *size* bytes of text in which every stretch is different."""
    return (os.urandom(size // 2 + 1).hex().encode())[:size]
