"""A man in the middle of hosts and a worker service: reads everything, and changes what a test says.

It takes the WebSocket protocol apart, so that a test can change a header of the handshake or
drop, repeat, swap and edit whole messages. ``FaultProxy`` is for the bytes below.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

__all__ = ["Frame", "Middle", "Tape"]

_PATIENCE = 60.0


class Frame(NamedTuple):
    """One frame as it passed: the head with length and mask, and the payload as it travels."""

    opcode: int
    head: bytes
    payload: bytes

    @property
    def bytes(self) -> bytes:
        """Return all of it."""
        return self.head + self.payload

    def flipped(self, place: int = 0) -> Frame:
        """Return it with one bit of its payload changed."""
        changed = bytearray(self.payload)
        changed[place] ^= 1
        return self._replace(payload=bytes(changed))


class Tape(NamedTuple):
    """What passed on one connection: the request, and the frames of the host."""

    request: list[bytes]
    frames: list[Frame]


def _same(frame: Frame) -> list[Frame]:
    return [frame]


def _untouched(head: bytes) -> bytes:
    return head


class Middle:
    """Listen on loopback and pass on to ``port``; the attributes say what is changed on the way.

    ``on_request`` and ``on_answer`` get a whole head; ``up`` and ``down`` get each data frame and
    return what passes in its place. ``tapes`` has what passed, one for each connection.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.on_request: Callable[[bytes], bytes] = _untouched
        self.on_answer: Callable[[bytes], bytes] = _untouched
        self.up: Callable[[Frame], list[Frame]] = _same
        self.down: Callable[[Frame], list[Frame]] = _same
        self.tapes: list[Tape] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Middle:
        self._begin(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _begin(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=f"middle-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                host, _ = self._listener.accept()
                worker = socket.create_connection(("127.0.0.1", self.target), timeout=_PATIENCE)
                worker.settimeout(None)
                self._sockets += [host, worker]
                tape = Tape([], [])
                self.tapes.append(tape)
                self._begin(self._carry_up, host, worker, tape)
                self._begin(self._carry_down, worker, host)

    def _carry_up(self, host: socket.socket, worker: socket.socket, tape: Tape) -> None:
        def request(head: bytes) -> bytes:
            tape.request.append(head)
            return self.on_request(head)

        def frame(frame: Frame) -> list[Frame]:
            tape.frames.append(frame)
            return self.up(frame)

        _carry(host, worker, request, frame)

    def _carry_down(self, worker: socket.socket, host: socket.socket) -> None:
        def answer(head: bytes) -> bytes:
            return self.on_answer(head)  # the one that is set by then

        def frame(frame: Frame) -> list[Frame]:
            return self.down(frame)

        _carry(worker, host, answer, frame)


def _carry(
    source: socket.socket,
    sink: socket.socket,
    on_head: Callable[[bytes], bytes],
    on_frame: Callable[[Frame], list[Frame]],
) -> None:
    reader = source.makefile("rb")
    try:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = reader.readline()
            if not line:
                return
            head += line
        sink.sendall(on_head(head))
        while True:
            frame = _next_frame(reader.read)
            frames = [frame] if frame.opcode & 8 else on_frame(frame)
            sink.sendall(b"".join(each.bytes for each in frames))
    except (OSError, EOFError, ValueError):
        pass
    finally:
        with contextlib.suppress(OSError, ValueError):
            sink.shutdown(socket.SHUT_WR)
        reader.close()


def _next_frame(read: Callable[[int], bytes]) -> Frame:
    def exactly(size: int) -> bytes:
        data = read(size)
        if len(data) < size:
            raise EOFError
        return data

    head = exactly(2)
    size = head[1] & 0x7F
    if size == 126:
        head += (more := exactly(2))
        (size,) = struct.unpack("!H", more)
    elif size == 127:
        head += (more := exactly(8))
        (size,) = struct.unpack("!Q", more)
    if head[1] & 0x80:
        head += exactly(4)
    return Frame(head[0] & 0x0F, head, exactly(size))
