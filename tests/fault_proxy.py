"""A TCP proxy between hosts and a worker that spoils the bytes' way as a test says.

``FaultProxy`` listens on a free loopback port and copies to its ``target_port``, both
of which stay the same or change as a test says. ``up`` is the way from the hosts to the
worker, ``down`` the way back; their settings hold for every connection, also for those
that are open. Bytes are bytes: TLS passes as well. One thread does all of it; it is not
named as the package's own threads are, and every descriptor is given back at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import random
import selectors
import socket
import struct
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

__all__ = ["FaultProxy", "Passage", "Way"]

# Only a failing test spends it, in seconds.
PATIENCE = 30.0
# What waits in one direction of a connection, besides the buffers of the kernel.
_HELD_BYTES = 256 * 1024
_READ_BYTES = 64 * 1024
_LINGER_ZERO = struct.pack("ii", 1, 0)

Ending = Literal["fin", "rst"]


@dataclasses.dataclass
class Toxics:
    """What happens to the bytes of one direction; may be changed at any time through ``FaultProxy.set``."""

    # Seconds that every byte is late, and up to how many more, by ``FaultProxy.random``.
    latency: float = 0.0
    jitter: float = 0.0
    # Bytes per second.
    bandwidth: float | None = None
    # The size of one write, and the seconds between two.
    slice_bytes: int | None = None
    slice_gap: float = 0.0
    # Read everything and pass nothing on, not even the end: the peer looks alive and is gone.
    swallow: bool = False
    # Read nothing, so that the buffers of the sender fill.
    stalled: bool = False
    # End each connection when exactly so many of its bytes have passed in this direction.
    cut_after: int | None = None
    cut_by: Ending = "rst"
    # Seconds by which the FIN is late.
    close_delay: float = 0.0


class Way:
    """One direction of one connection; ``received`` and ``passed`` count its bytes."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.received = 0
        self.passed = 0
        self._source = source
        self._sink = sink
        self._waiting: deque[tuple[float, memoryview]] = deque()
        self._held = 0
        self._next_at = 0.0
        self._latest = 0.0
        self._finished_at: float | None = None
        self._over = False

    def wants_read(self, toxics: Toxics) -> bool:
        return self._finished_at is None and not toxics.stalled and self._held < _HELD_BYTES

    def read(self, toxics: Toxics, spread: float, now: float) -> None:
        """Take what has come. Raises OSError for a reset."""
        try:
            data = self._source.recv(_READ_BYTES)
        except BlockingIOError:
            return
        self.received += len(data)
        if not data:
            self._finished_at = now
        elif not toxics.swallow:
            self._latest = max(self._latest, now + toxics.latency + toxics.jitter * spread)
            self._waiting.append((self._latest, memoryview(data)))
            self._held += len(data)

    def due_at(self, toxics: Toxics) -> float | None:
        """Return when there is something to pass on, None if there is nothing."""
        if toxics.swallow or self._over:
            return None
        if self._waiting:
            return max(self._next_at, self._waiting[0][0])
        return None if self._finished_at is None else self._finished_at + toxics.close_delay

    def write(self, toxics: Toxics, now: float) -> None:
        """Pass on what is due, or the end. Raises OSError if the sink is gone."""
        due = self.due_at(toxics)
        if due is None or due > now:
            return
        if not self._waiting:
            self._over = True
            with contextlib.suppress(OSError):
                self._sink.shutdown(socket.SHUT_WR)
            return
        _, data = self._waiting[0]
        size = len(data) if toxics.slice_bytes is None else min(len(data), toxics.slice_bytes)
        if toxics.bandwidth is not None:
            size = min(size, max(1, int(toxics.bandwidth / 20)))
        if toxics.cut_after is not None:
            size = min(size, max(0, toxics.cut_after - self.passed))
        if size == 0:
            return
        try:
            count = self._sink.send(data[:size])
        except BlockingIOError:
            return
        self.passed += count
        self._held -= count
        self._waiting.popleft()
        if count < len(data):
            self._waiting.appendleft((0.0, data[count:]))
        if toxics.bandwidth is not None:
            self._next_at = max(now, self._next_at) + count / toxics.bandwidth
        elif toxics.slice_bytes is not None:
            self._next_at = now + toxics.slice_gap

    def cut_due(self, toxics: Toxics) -> bool:
        """Tell whether the connection must end here and what passed has reached the other side's kernel."""
        if toxics.cut_after is None or self.passed < toxics.cut_after:
            return False
        unsent = fcntl.ioctl(self._sink.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        return bool(struct.unpack("i", unsent)[0] == 0)


class Passage:
    """One connection through the proxy: ``up`` and ``down`` are its two ways."""

    def __init__(self, host: socket.socket, worker: socket.socket) -> None:
        self.up = Way(host, worker)
        self.down = Way(worker, host)
        self.open = True
        self.sockets = (host, worker)

    def ways(self, proxy: FaultProxy) -> tuple[tuple[Way, Toxics], tuple[Way, Toxics]]:
        return (self.up, proxy.up), (self.down, proxy.down)

    def end(self, how: Ending) -> None:
        """Close both sockets."""
        self.open = False
        for sock in self.sockets:
            if how == "rst":
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            else:
                # Unread bytes would make a reset of it.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(_READ_BYTES):
                        pass
            sock.close()


class FaultProxy:
    """A context manager; every method may be called from any thread."""

    def __init__(self, target: str | int, *, rng: random.Random | None = None) -> None:
        self.up = Toxics()
        self.down = Toxics()
        self.target_port = target if isinstance(target, int) else port_of(target)
        self.passages: list[Passage] = []
        self.random = rng or random.Random(0)
        self._changed = threading.Condition()  # guards everything here; notified at every turn of the thread
        self._selector = selectors.DefaultSelector()
        self._nudged, self._nudge = socket.socketpair()
        self._nudged.setblocking(False)
        self._selector.register(self._nudged, selectors.EVENT_READ)
        # Bound and never listening: keeps the port while nobody may connect.
        self._keeper = self._bound(0)
        self.port: int = self._keeper.getsockname()[1]
        self._listener: socket.socket | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)

    def url_for(self, url: str) -> str:
        """Return *url* with the proxy's port in it."""
        return url.replace(f":{port_of(url)}/", f":{self.port}/")

    # -- what a test does ----------------------------------------------------------

    def set(self, toxics: Toxics | None = None, **values: Any) -> None:
        """Change settings of ``up``, of ``down``, or of both without *toxics*."""
        with self._changed:
            for one in (self.up, self.down) if toxics is None else (toxics,):
                for name, value in values.items():
                    assert hasattr(one, name), name
                    setattr(one, name, value)
        self._wake()

    def heal(self) -> None:
        """Take every setting back; what was swallowed stays lost."""
        self.set(**{field.name: field.default for field in dataclasses.fields(Toxics)})

    def end_all(self, how: Ending = "rst") -> int:
        """End every open connection; return how many there were."""
        with self._changed:
            passages = self.open_passages()
            for passage in passages:
                self._end(passage, how)
            self._changed.notify_all()
        return len(passages)

    def pause(self) -> None:
        """Refuse new connections; the port stays ours."""
        with self._changed:
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None
        self._wake()

    def resume(self) -> None:
        """Listen again, on the same port."""
        with self._changed:
            if self._listener is None:
                self._listener = self._bound(self.port)
                self._listener.setblocking(False)
                self._listener.listen(128)
                self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake()

    def open_passages(self) -> list[Passage]:
        """Return the connections that are open."""
        with self._changed:
            return [passage for passage in self.passages if passage.open]

    def passed(self, number: int = 0) -> tuple[int, int]:
        """Return how many bytes of connection *number* have passed, up and down.

        Exact, as what was sent is counted before the lock is given back.
        """
        with self._changed:
            passage = self.passages[number]
            return passage.up.passed, passage.down.passed

    def wait_for(self, condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
        """Wait until *condition*, which may look at the counters, is true."""
        ends_at = time.monotonic() + timeout
        with self._changed:
            while not condition():
                if not self._changed.wait(max(0.0, ends_at - time.monotonic())):
                    raise TimeoutError(f"not within {timeout} s: {self!r}")

    def __repr__(self) -> str:
        counts = [(passage.open, passage.up.passed, passage.down.passed) for passage in self.passages[-5:]]
        return f"<FaultProxy {self.port} -> {self.target_port} (open, up, down)={counts}>"

    def __enter__(self) -> FaultProxy:
        self.resume()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.pause()
        with self._changed:
            self._closing = True
        self._wake()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the proxy hangs"
        self.end_all()
        for sock in (self._keeper, self._nudged, self._nudge):
            sock.close()
        self._selector.close()

    # -- the thread ------------------------------------------------------------------

    @staticmethod
    def _bound(port: int) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
        return sock

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._nudge.send(b"\0")

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    return
                timeout = self._prepare(time.monotonic())
            ready = self._selector.select(timeout)
            with self._changed:
                self._turn({key.fileobj for key, _ in ready}, time.monotonic())
                self._changed.notify_all()

    def _prepare(self, now: float) -> float | None:
        """Register what each socket is waited for; return the seconds until something is due."""
        moments: list[float] = []
        for passage in self.passages:
            if not passage.open:
                continue
            wanted = dict.fromkeys(passage.sockets, 0)
            for way, toxics in passage.ways(self):
                if way.wants_read(toxics):
                    wanted[way._source] |= selectors.EVENT_READ
                due = way.due_at(toxics)
                if toxics.cut_after is not None and way.passed >= toxics.cut_after:
                    moments.append(now + 0.001)
                elif due is not None and due <= now:
                    wanted[way._sink] |= selectors.EVENT_WRITE
                elif due is not None:
                    moments.append(due)
            for sock, events in wanted.items():
                self._register(sock, events)
        return max(0.0, min(moments) - now) if moments else None

    def _register(self, sock: socket.socket, events: int) -> None:
        registered = sock in self._selector.get_map()
        if events and registered:
            self._selector.modify(sock, events)
        elif events:
            self._selector.register(sock, events)
        elif registered:
            self._selector.unregister(sock)

    def _turn(self, ready: set[Any], now: float) -> None:
        if self._nudged in ready:
            with contextlib.suppress(BlockingIOError):
                while self._nudged.recv(4096):
                    pass
        if self._listener is not None and self._listener in ready:
            self._accept(self._listener)
        for passage in self.passages:
            if passage.open:
                self._move(passage, ready, now)

    def _accept(self, listener: socket.socket) -> None:
        try:
            host, _ = listener.accept()
        except OSError:
            return
        try:
            worker = socket.create_connection(("127.0.0.1", self.target_port), timeout=5.0)
        except OSError:  # nobody there: as if the host had come to the worker itself
            host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            host.close()
            return
        for sock in (host, worker):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.passages.append(Passage(host, worker))

    def _move(self, passage: Passage, ready: set[Any], now: float) -> None:
        try:
            for way, toxics in passage.ways(self):
                if way._source in ready and way.wants_read(toxics):
                    way.read(toxics, self.random.random() if toxics.jitter else 0.0, now)
                way.write(toxics, now)
                if way.cut_due(toxics):
                    self._end(passage, toxics.cut_by)
                    return
        except OSError:
            # A reset passes through, unless everything is swallowed.
            if self.up.swallow and self.down.swallow:
                passage.up._finished_at = passage.down._finished_at = now
            else:
                self._end(passage, "rst")
            return
        if passage.up._over and passage.down._over:
            self._end(passage, "fin")

    def _end(self, passage: Passage, how: Ending) -> None:
        for sock in passage.sockets:
            self._register(sock, 0)
        passage.end(how)


def port_of(url: str) -> int:
    """Return the port of a ``ws://host:port/path`` URL."""
    return int(url.rpartition(":")[2].partition("/")[0])
