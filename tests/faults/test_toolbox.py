"""The tools of the fault tests do what the tests rely on: the proxy byte by byte, the ledger line by line."""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest
from fault_proxy import PATIENCE, FaultProxy

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker


class Server:
    """A listening socket and the ends of its connections."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(PATIENCE)
        self.port = self.socket.getsockname()[1]

    def accept(self) -> socket.socket:
        end, _ = self.socket.accept()
        end.settimeout(PATIENCE)
        return end


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own."""
    made = Server()
    yield made
    made.socket.close()


@contextlib.contextmanager
def pair(proxy: FaultProxy, server: Server) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give a host's and a worker's end of one connection through *proxy*."""
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as host,
        server.accept() as worker,
    ):
        yield host, worker


def exactly(sock: socket.socket, size: int) -> bytes:
    """Return the next *size* bytes."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"ended after {len(data)} bytes of {size}"
        data += piece
    return data


def to_the_end(sock: socket.socket) -> tuple[bytes, str]:
    """Return what comes until the end, and which end it was."""
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        return data, "rst"
    return data, "fin"


def test_bytes_pass_and_are_counted(server: Server) -> None:
    """Both ways, in order, and the ends of the stream too."""
    with FaultProxy(server.port) as proxy, pair(proxy, server) as (host, worker):
        data = random.Random(1).randbytes(3_000_000)
        sending = threading.Thread(target=lambda: (host.sendall(data), host.shutdown(socket.SHUT_WR)))
        sending.start()
        assert to_the_end(worker) == (data, "fin")
        sending.join(PATIENCE)
        worker.sendall(b"answer")
        assert exactly(host, 6) == b"answer"
        assert len(proxy.passages) == 1
        assert proxy.passed() == (3_000_000, 6)
        worker.close()
        proxy.wait_for(lambda: not proxy.open_passages())
        assert to_the_end(host) == (b"", "fin")


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_cut_after_exactly_so_many_bytes(server: Server, way: str, how: Any) -> None:
    """The receiver gets these bytes and then the end; not one more, not one less."""
    with FaultProxy(server.port) as proxy:
        proxy.set(getattr(proxy, way), cut_after=100_003, cut_by=how)
        with pair(proxy, server) as (host, worker):
            source, sink = (host, worker) if way == "up" else (worker, host)
            with contextlib.suppress(OSError):
                for _ in range(200):
                    source.sendall(b"x" * 1000)
            proxy.wait_for(lambda: not proxy.open_passages())
            data, end = to_the_end(sink)
            assert (len(data), end) == (100_003, how)
            assert proxy.passed()[way == "down"] == 100_003


def test_reset_is_a_reset(server: Server) -> None:
    """RST on both sides; the next connection works."""
    with FaultProxy(server.port) as proxy:
        with pair(proxy, server) as (host, worker):
            host.sendall(b"hello")
            assert exactly(worker, 5) == b"hello"
            assert proxy.end_all() == 1
            assert to_the_end(host)[1] == to_the_end(worker)[1] == "rst"
        with pair(proxy, server) as (host, worker):
            host.sendall(b"again")
            assert exactly(worker, 5) == b"again"


def test_a_reset_passes_through(server: Server) -> None:
    """Who sits behind the proxy sees how the other side ended."""
    with FaultProxy(server.port) as proxy, pair(proxy, server) as (host, worker):
        worker.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        worker.close()
        assert to_the_end(host) == (b"", "rst")


def test_swallow_keeps_both_sides_open(server: Server) -> None:
    """Nothing passes, not even the end; what comes after the cure does."""
    with FaultProxy(server.port) as proxy, pair(proxy, server) as (host, worker):
        proxy.set(swallow=True)
        host.sendall(b"x" * 10_000_000)
        proxy.wait_for(lambda: proxy.passages[0].up.received == 10_000_000)
        assert proxy.passed() == (0, 0)
        assert select.select([worker], [], [], 0)[0] == []
        proxy.heal()
        host.sendall(b"after")
        assert exactly(worker, 5) == b"after"


def test_stalled_fills_the_buffers(server: Server) -> None:
    """The sender cannot send for ever; nothing is lost."""
    with FaultProxy(server.port) as proxy, pair(proxy, server) as (host, worker):
        proxy.set(proxy.up, stalled=True)
        host.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 100_000_000:
                sent += host.send(b"x" * 65536)
        assert 0 < sent < 100_000_000
        proxy.heal()
        assert len(exactly(worker, sent)) == sent


def test_slices_latency_and_bandwidth(server: Server) -> None:
    """Bytes come late, slowly, in small pieces and in order; the jitter is the one of the given source."""
    with FaultProxy(server.port, rng=random.Random(7)) as proxy, pair(proxy, server) as (host, worker):
        proxy.set(proxy.up, latency=0.05, jitter=0.05)
        started = time.monotonic()
        for number in range(5):
            host.sendall(b"%d" % number)
        assert exactly(worker, 5) == b"01234"
        assert time.monotonic() - started >= 0.05
        proxy.heal()
        proxy.set(proxy.down, slice_bytes=1, slice_gap=0.001)
        worker.sendall(bytes(range(100)))
        assert exactly(host, 100) == bytes(range(100))
        proxy.heal()
        proxy.set(proxy.down, bandwidth=100_000)
        started = time.monotonic()
        worker.sendall(b"x" * 30_000)
        assert exactly(host, 30_000)
        assert time.monotonic() - started >= 0.2


def test_the_end_may_come_late(server: Server) -> None:
    """FIN is passed on after close_delay, not before."""
    with FaultProxy(server.port) as proxy, pair(proxy, server) as (host, worker):
        proxy.set(close_delay=0.3)
        started = time.monotonic()
        worker.close()
        assert to_the_end(host) == (b"", "fin")
        assert time.monotonic() - started >= 0.3


def test_pause_resume_and_another_target(server: Server) -> None:
    """Refused while it pauses; then the same port again, to whoever is the target now."""
    other = Server()
    try:
        with FaultProxy(server.port) as proxy:
            with pair(proxy, server) as (host, worker):
                proxy.pause()
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
                host.sendall(b"still open")
                assert exactly(worker, 10) == b"still open"
            proxy.target_port = other.port
            proxy.resume()
            with pair(proxy, other) as (host, worker):
                host.sendall(b"other")
                assert exactly(worker, 5) == b"other"
    finally:
        other.socket.close()


def test_nobody_behind_it() -> None:
    """The host's connection is reset, which connect() may already see."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with FaultProxy(unused.getsockname()[1]) as proxy, pytest.raises(ConnectionResetError):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as host:
                host.recv(1)


def test_tls_through_it() -> None:
    """Bytes are bytes: our own link over wss, in slices."""
    with LoopbackWorker(workers=2, tls=True) as worker, FaultProxy(worker.url) as proxy:
        proxy.set(slice_bytes=100)
        config = {**worker.config, "url": proxy.url_for(worker.url)}
        with WebSocketExecutor(**config) as pool:
            assert pool.submit(len, b"x" * 10_000).result(PATIENCE) == 10_000
        assert proxy.passed()[0] > 10_000


def test_the_ledger_counts(tmp_path: Path) -> None:
    """A line for each execution, whoever writes it, a worker too."""
    folder = str(tmp_path)
    with LoopbackWorker(workers=4) as worker, WebSocketExecutor(**worker.config) as pool:
        runs = [f"run-{number}" for number in range(20)]
        futures = [pool.submit(ledger.record, folder, run, run) for run in [*runs, runs[0]]]
        assert [future.result(PATIENCE) for future in futures] == [*runs, runs[0]]
        pid = worker.pid
    assert ledger.record(folder, "here") is None
    counts = ledger.executions(folder)
    assert counts == dict.fromkeys(runs, 1) | {"run-0": 2, "here": 1}
    assert ledger.processes(folder) == {run: {pid} for run in runs} | {"here": {os.getpid()}}
    assert pid is not None
    assert ledger.serials(folder)[pid] == list(range(1, 22))
