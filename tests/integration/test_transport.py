"""The transport on real sockets: messages both ways, refusals, deadlines, ends."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve
from ws_peer import (
    BINARY,
    CLOSE,
    CONT,
    PATIENCE,
    PING,
    PONG,
    TEXT,
    Listener,
    Peer,
    connected,
    dialled,
    frame,
    in_thread,
    options_for,
    text_of,
)

from wove_ws_sync import _wire, security
from wove_ws_sync.timing import Clock
from wove_ws_sync.transport import TransportClosed, WebSocketTransport, dial

MIB = 1024 * 1024
# By how much a busy machine may be late, in seconds; a hang would take PATIENCE.
SLACK = 3.0


def send(transport: WebSocketTransport, data: bytes) -> None:
    """Send one message and wait until it has left."""
    assert transport.pump(transport.post(data), PATIENCE)


def ended(transport: WebSocketTransport) -> TransportClosed:
    """Return how the connection ends; also that it stays so, and that the text is fit for a log."""
    with pytest.raises(TransportClosed) as caught:
        while True:
            transport.recv()
    with pytest.raises(TransportClosed) as again:
        transport.recv()
    first, second = caught.value, again.value
    assert (str(first), first.close_code, first.reason) == (str(second), second.close_code, second.reason)
    assert str(first).isprintable()
    assert len(str(first)) < 300
    return first


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """Run the `websockets` library as an echo; yield its port."""

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, "127.0.0.1", 0, max_size=None, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(PATIENCE)


@pytest.fixture(scope="module")
def echo_port() -> Iterator[int]:
    """The port of an echo that serves every test of this module."""
    with echo_server() as port:
        with dialled(options_for(port)):
            pass  # it has all its descriptors now
        yield port


# -- messages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 125, 126, 1023, 1024, 65535, 65536, MIB - 1, MIB, MIB + 1, 5 * MIB + 7, 64 * MIB]
)
def test_message_both_ways(echo_port: int, size: int) -> None:
    """A message of any size comes back byte for byte from a strict server."""
    data = text_of(size)
    with dialled(options_for(echo_port)) as transport:
        sending = in_thread(send, transport, data)
        assert transport.recv() == data
        sending.result(PATIENCE)
        assert transport.queued_bytes == 0
        assert not transport.wants_write


def test_many_small_messages(echo_port: int) -> None:
    """Thousands of small messages, posted by several threads, arrive once each, in order per thread."""
    threads, each = 8, 1000
    with dialled(options_for(echo_port)) as transport:
        write_lock = threading.Lock()

        def talk(number: int) -> None:
            for count in range(each):
                parcel = transport.post(b"%d %d" % (number, count))
                with write_lock:
                    assert transport.pump(parcel, PATIENCE)

        talking = [in_thread(talk, number) for number in range(threads)]
        seen: dict[int, list[int]] = {number: [] for number in range(threads)}
        for _ in range(threads * each):
            number, count = map(int, transport.recv().split())
            seen[number].append(count)
        for future in talking:
            future.result(PATIENCE)
    assert all(counts == list(range(each)) for counts in seen.values())


def test_waiting_messages_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small messages that wait together share system calls; every one is marked as sent."""

    def script(peer: Peer) -> list[bytes]:
        return [peer.recv_message() for _ in range(1000)]

    with connected(script) as (transport, listener):
        calls: list[int] = []
        push = transport._wire.push

        def counted(data: bytes) -> None:
            calls.append(len(data))
            push(data)

        monkeypatch.setattr(transport._wire, "push", counted)
        parcels = [transport.post(b"message %d" % number) for number in range(1000)]
        assert transport.queued_bytes == sum(parcel.size for parcel in parcels)
        assert transport.pump()
        assert len(calls) == 1
        assert all(parcel.started and parcel.sent and parcel.sent_at is not None for parcel in parcels)
        assert transport.queued_bytes == 0
        assert listener.result() == [b"message %d" % number for number in range(1000)]


def test_large_message_leaves_in_fragments() -> None:
    """A message over 1 MiB leaves in fragments of 1 MiB, each with a mask of its own."""
    data = text_of(3 * MIB + 5)

    def script(peer: Peer) -> list[tuple[int, bool, int]]:
        frames = [peer.recv_frame() for _ in range(4)]
        assert b"".join(payload for _, _, payload in frames) == data
        return [(opcode, fin, len(payload)) for opcode, fin, payload in frames]

    with connected(script) as (transport, listener):
        send(transport, data)
        expected = [(TEXT, False, MIB), (CONT, False, MIB), (CONT, False, MIB), (CONT, True, 5)]
        assert listener.result() == expected


@pytest.mark.parametrize("size", [10, 100_000])
def test_masks_differ(size: int) -> None:
    """The same payload looks different each time."""

    def script(peer: Peer) -> list[bytearray]:
        return [peer.recv_exactly((6 if size < 126 else 14) + size) for _ in range(2)]

    with connected(script) as (transport, listener):
        send(transport, b"\0" * size)
        send(transport, b"\0" * size)
        first, second = listener.result()
        assert first != second


def test_f27_many_fragments_are_joined_fast() -> None:
    """16 MiB in fragments of 4 KiB, with pings between, take no quadratic time."""
    data = text_of(16 * MIB)

    def script(peer: Peer) -> None:
        view = memoryview(data)
        for start in range(0, len(data), 4096):
            peer.send(frame(CONT if start else TEXT, bytes(view[start : start + 4096]), fin=False))
            if start % MIB == 0:
                peer.send(frame(PING, b"still there?"))
        peer.send(frame(CONT, b""))
        peer.drain()

    with connected(script) as (transport, _):
        started = time.monotonic()
        assert transport.recv() == data
        assert time.monotonic() - started < 10.0


def test_f27_empty_fragments_cost_nothing() -> None:
    """Fragments without a payload do not pile up."""
    count = 200_000

    def script(peer: Peer) -> None:
        peer.send(frame(TEXT, b"a", fin=False) + frame(CONT, fin=False) * count + frame(CONT, b"b"))
        peer.drain()

    with connected(script) as (transport, _), traced() as peak:
        assert transport.recv() == b"ab"
        assert peak() < 2 * MIB


def test_text_is_not_judged() -> None:
    """Invalid UTF-8 comes as it is: decoding is for who parses it."""
    with connected(lambda peer: peer.send(frame(TEXT, b"\xff\xfe"))) as (transport, _):
        assert transport.recv() == b"\xff\xfe"


# -- refusals ------------------------------------------------------------------------


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of memory allocated since."""
    tracemalloc.start()
    try:
        base = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()


def claiming(length: int, *, opcode: int = TEXT) -> bytes:
    """Return the header of a frame that claims to be *length* long."""
    return struct.pack("!BBQ", 0x80 | opcode, 127, length)


LIMIT = 1000


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (claiming(1 << 40), 1009),
        (claiming((1 << 63) + (1 << 40)), 1009),
        (frame(TEXT, b"x" * (LIMIT + 1)), 1009),
        (frame(TEXT, b"x" * LIMIT, fin=False) + frame(CONT, b"x"), 1009),
        (frame(TEXT, b"x", mask=b"abcd"), 1002),
        (frame(PING, b"x", mask=b"abcd"), 1002),
        (frame(TEXT, b"x", rsv=4), 1002),
        (frame(TEXT, b"x", rsv=2), 1002),
        (frame(PONG, b"x", rsv=1), 1002),
        (frame(3, b"x"), 1002),
        (frame(0xB, b"x"), 1002),
        (frame(PING, b"x", fin=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (claiming(1 << 40, opcode=PONG), 1002),
        (frame(CONT, b"x"), 1002),
        (frame(TEXT, b"x", fin=False) + frame(TEXT, b"x"), 1002),
        (frame(TEXT, b"x", fin=False) + frame(BINARY, b"x"), 1002),
        (frame(BINARY, b"x"), 1007),
        (frame(BINARY, b"x", fin=False), 1007),
        (frame(CLOSE, b"x"), 1002),
        (frame(CLOSE, struct.pack("!H", 1005)), 1002),
        (frame(CLOSE, struct.pack("!H", 999)), 1002),
        (frame(CLOSE, struct.pack("!H", 1000) + b"\xff"), 1007),
        (frame(CLOSE, b"x" * 126), 1002),
    ],
)
def test_f27_broken_rule(sent: bytes, code: int) -> None:
    """What the protocol or the limit forbids ends the connection with its close code, without allocation."""

    def script(peer: Peer) -> int:
        peer.send(frame(TEXT, b"before") + sent)
        return peer.close_code()

    with connected(script, max_message_bytes=LIMIT) as (transport, listener):
        assert transport.recv() == b"before"
        with traced() as peak:
            closed = ended(transport)
            assert peak() < MIB
        assert closed.close_code == code
        assert closed.reason
        assert transport.wants_write
        assert transport.pump()
        assert listener.result() == code


def test_limit_itself_is_allowed() -> None:
    """Messages of exactly the limit pass, whole and in fragments; the count starts anew each time."""
    half = b"x" * (LIMIT // 2)
    whole, in_two = frame(TEXT, half * 2), frame(TEXT, half, fin=False) + frame(CONT, half)
    sent = whole + in_two * 2 + whole
    with connected(lambda peer: peer.send(sent), max_message_bytes=LIMIT) as (transport, _):
        assert [len(transport.recv()) for _ in range(4)] == [LIMIT] * 4


def test_no_memory_for_a_message() -> None:
    """A message that does not fit into memory is refused like one over the limit."""

    def script(peer: Peer) -> int:
        peer.send(claiming(1 << 50))
        return peer.close_code()

    with connected(script, max_message_bytes=1 << 60) as (transport, listener):
        assert ended(transport).close_code == 1009
        assert transport.pump()
        assert listener.result() == 1009


# -- ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1000, ""), (1001, "going away"), (1008, "x" * 123), (1011, "caf\xe9"), (1012, ""), (4401, "who?")],
)
def test_close_of_the_peer(code: int, reason: str) -> None:
    """The peer's close code and reason are kept, after the messages before it, and are answered."""

    def script(peer: Peer) -> bytes:
        peer.send(frame(TEXT, b"last") + frame(CLOSE, struct.pack("!H", code) + reason.encode()))
        return peer.recv_until(CLOSE)

    with connected(script) as (transport, listener):
        assert transport.recv() == b"last"
        closed = ended(transport)
        assert (closed.close_code, closed.reason) == (code, reason)
        assert str(code) in str(closed)
        assert transport.pump()
        assert listener.result() == struct.pack("!H", code)


def test_close_without_a_code() -> None:
    """An empty close frame has no code, and is answered by an empty one."""

    def script(peer: Peer) -> bytes:
        peer.send(frame(CLOSE))
        return peer.recv_until(CLOSE)

    with connected(script) as (transport, listener):
        closed = ended(transport)
        assert (closed.close_code, closed.reason) == (None, "")
        assert transport.pump()
        assert listener.result() == b""


def test_reason_is_fit_for_a_log() -> None:
    """Control characters in a close reason do not reach a log."""
    payload = struct.pack("!H", 1000) + b"a\r\nINJECTED \x1b[31m"
    with connected(lambda peer: peer.send(frame(CLOSE, payload))) as (transport, _):
        assert ended(transport).reason == "a??INJECTED ?[31m"


@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
def test_close_code_survives_the_end_of_the_stream(rst: bool) -> None:
    """The peer ends TCP right behind its close frame, with our bytes unread: message and code are kept."""

    def script(peer: Peer) -> None:
        peer.sock.recv(1, socket.MSG_PEEK)
        peer.send(frame(TEXT, b"result") + frame(CLOSE, struct.pack("!H", 1012)))
        if not rst:
            peer.drain()  # closing with unread bytes makes it a RST

    with connected(script) as (transport, listener):
        assert transport.pump(transport.post(b"x" * 100_000), PATIENCE)
        if rst:
            listener.result()
            with pytest.raises(TransportClosed):
                while True:
                    transport.pump(transport.post(b"x" * MIB), PATIENCE)
        assert transport.recv() == b"result"
        assert ended(transport).close_code == 1012


def test_failed_writer_leaves_what_has_arrived() -> None:
    """When sending fails, the reader still gets the messages and the close frame that came before."""
    data = frame(TEXT, b"result") + frame(CLOSE, struct.pack("!H", 1001))
    with connected(lambda peer: peer.send(data)) as (transport, listener):
        listener.result()
        poller = select.poll()
        poller.register(transport.fileno(), select.POLLIN)
        assert poller.poll(PATIENCE * 1000)
        transport._fail(TransportClosed("sending failed"))
        with pytest.raises(TransportClosed, match="sending failed"):
            transport.pump()
        assert transport.recv() == b"result"
        assert ended(transport).close_code == 1001


def test_f10_whoever_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells one call only why a connection broke: the reader knows, also if a writer was told."""
    told, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(_wire, "_WRITE_WAIT", PATIENCE)  # how long the reader waits for the writer

    with connected(Peer.reset) as (transport, listener):
        listener.result()
        raw = transport._wire._raw

        class Raw:
            def send(self, data: memoryview, flags: int) -> int:
                try:
                    return raw.send(data, flags)
                finally:
                    told.set()
                    go_on.wait(PATIENCE)  # nobody has heard of it yet

            def __getattr__(self, name: str) -> Any:
                return getattr(raw, name)

        monkeypatch.setattr(transport._wire, "_raw", Raw())
        transport.ping()
        writing = in_thread(transport.pump)
        assert told.wait(PATIENCE)
        with raw.dup() as same:
            assert same.recv(1) == b""  # and nobody else will be told
        reading = in_thread(transport.recv)
        with pytest.raises(TimeoutError):
            reading.result(0.1)
        go_on.set()
        for future in (reading, writing):
            with pytest.raises(TransportClosed, match="Connection reset by peer"):
                future.result(PATIENCE)
        assert str(ended(transport)) == "The connection broke: Connection reset by peer."


@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize(
    "start", [b"", b"\x81", claiming(MIB) + b"x" * 1000], ids=["between", "header", "payload"]
)
def test_f8_lost(start: bytes, rst: bool) -> None:
    """A connection that ends without a close frame has no code, wherever it ends, and is noticed at once."""

    def script(peer: Peer) -> None:
        peer.send(start)
        if rst:
            peer.reset()

    with connected(script) as (transport, listener):
        listener.result()
        started = time.monotonic()
        closed = ended(transport)
        assert time.monotonic() - started < SLACK
        assert (closed.close_code, closed.reason) == (None, "")


def test_abort_wakes_reader_and_writer() -> None:
    """abort() from a third thread ends a blocked recv() and a blocked pump() at once; twice is once."""
    entered = threading.Event()

    def script(peer: Peer) -> None:
        entered.wait(PATIENCE)

    with connected(script, receive_buffer=4096) as (transport, _):
        try:
            reading = in_thread(transport.recv)
            writing = in_thread(transport.pump, transport.post(b"x" * 64 * MIB), None)
            fill_up(transport)
            started = time.monotonic()
            transport.abort()
            transport.abort()
            for future in (reading, writing):
                with pytest.raises(TransportClosed, match="This side ended the connection"):
                    future.result(PATIENCE)
            assert time.monotonic() - started < SLACK
            with pytest.raises(TransportClosed):
                transport.pump()
            assert not transport.post(b"harmless").started
            assert not transport.wants_write
        finally:
            entered.set()


def fill_up(transport: WebSocketTransport) -> None:
    """Wait until the kernel takes no more bytes: for 50 ms the wire's tail has not shrunk."""
    pause, end, before = threading.Event(), time.monotonic() + PATIENCE, -1
    while time.monotonic() < end:
        left = len(transport._wire._tail)
        if left and left == before:
            return
        before = left
        pause.wait(0.05)
    raise TimeoutError("the peer reads after all")


def test_dispose() -> None:
    """dispose() gives the descriptor back; twice is once, and everything after it is harmless."""
    with connected(lambda peer: peer.drain()) as (transport, _):
        descriptor = transport.fileno()
        transport.abort()
        transport.dispose()
        transport.dispose()
        transport.abort()
        assert transport.fileno() == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        assert not transport.idle()
        assert not transport.wants_write
        with pytest.raises(TransportClosed):
            transport.pump()
        transport.detach_after_fork()


def test_detach_after_fork() -> None:
    """A forked child closes its copy only: the peer hears nothing, and nothing is shut down."""
    go = threading.Event()

    def script(peer: Peer) -> bytes:
        go.wait(PATIENCE)
        peer.sock.settimeout(0.2)
        try:
            return peer.sock.recv(1)
        except TimeoutError:
            return b"nothing"

    with connected(script) as (transport, listener):
        parent = os.dup(transport.fileno())  # what the parent still holds
        try:
            transport.detach_after_fork()
            transport.detach_after_fork()
            assert transport.fileno() == -1
            go.set()
            assert listener.result() == b"nothing"
        finally:
            os.close(parent)


def test_socket_options() -> None:
    """The socket has keepalive, no Nagle, and gives up on unacknowledged bytes in time."""
    with connected(lambda peer: peer.drain(), ping_interval=3.0, pong_timeout=1.5) as (transport, _):
        with socket.socket(fileno=os.dup(transport.fileno())) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 4500
            assert not os.get_inheritable(sock.fileno())


# -- control frames ------------------------------------------------------------------


def test_ping_is_answered() -> None:
    """A ping is answered with its payload by the next pump, and the owner is woken for it."""

    def script(peer: Peer) -> bytes:
        peer.send(frame(PING, b"are you there?"))
        return peer.recv_until(PONG)

    with connected(script) as (transport, listener):
        woken = threading.Event()
        transport.wake = woken.set
        in_thread(transport.recv)
        assert woken.wait(PATIENCE)
        assert transport.wants_write
        assert transport.pump()
        assert listener.result() == b"are you there?"


def test_flood_of_pings_costs_no_memory() -> None:
    """Of pings that could not be answered yet only the newest is kept."""
    count = 100_000

    def script(peer: Peer) -> bytes:
        peer.send(b"".join(frame(PING, b"%120d" % number) for number in range(count)) + frame(TEXT, b"end"))
        return peer.recv_until(PONG)

    with connected(script) as (transport, listener), traced() as peak:
        assert transport.recv() == b"end"
        assert transport.pump()
        assert listener.result() == b"%120d" % (count - 1)
        assert peak() < 64 * MIB  # the script's own


def test_pong_while_both_sides_send() -> None:
    """The peer writes a ping and 40 MB before it reads anything of our 40 MB: nobody waits for the other."""
    data, answer = text_of(40 * MIB), text_of(40 * MIB)

    def script(peer: Peer) -> list[int]:
        peer.send(frame(PING, b"now") + frame(TEXT, answer))
        frames = [peer.recv_frame()]
        while not (frames[-1][0] in (TEXT, CONT) and frames[-1][1]):
            frames.append(peer.recv_frame())
        assert b"".join(payload for opcode, _, payload in frames if opcode in (TEXT, CONT)) == data
        return [opcode for opcode, _, _ in frames]

    with connected(script) as (transport, listener):
        sending = in_thread(transport.pump, transport.post(data), PATIENCE)
        assert transport.recv() == answer
        assert sending.result(PATIENCE)
        assert listener.result().count(PONG) == 1


def test_control_frames_overtake() -> None:
    """Pong, ping and an error's close frame leave between the fragments of a message under way."""
    read = threading.Event()

    def script(peer: Peer) -> list[int]:
        peer.sock.recv(1, socket.MSG_PEEK)
        peer.send(frame(PING, b"p"))
        read.wait(PATIENCE)
        opcodes = []
        while CLOSE not in opcodes:
            opcodes.append(peer.recv_frame()[0])
        return opcodes

    with connected(script, receive_buffer=4096) as (transport, listener):
        woken = threading.Event()
        transport.wake = woken.set
        in_thread(transport.recv)
        parcel = transport.post(b"x" * 64 * MIB)
        assert not transport.pump(parcel, 0.0)
        assert woken.wait(PATIENCE)
        transport.ping()
        transport.close(1002, "enough")
        read.set()
        assert not transport.pump(parcel, PATIENCE)  # nothing follows a close frame
        opcodes = listener.result()
        assert opcodes[0] == TEXT
        assert PONG in opcodes
        assert opcodes[-2:] == [PING, CLOSE]
        assert len(opcodes) < 32
        assert not parcel.sent
        assert not transport.wants_write


def test_goodbye_follows_what_was_posted() -> None:
    """close(1000) leaves behind the messages that were posted before, and the first close frame counts."""

    def script(peer: Peer) -> list[bytes]:
        return [peer.recv_message(), peer.recv_message(), peer.recv_until(CLOSE)]

    with connected(script) as (transport, listener):
        transport.post(b"one")
        transport.post(b"shutdown")
        transport.close(1000, "bye " + "\u20ac" * 100)
        assert transport.pump()
        one, two, close = listener.result()
        assert (one, two, close[:2]) == (b"one", b"shutdown", struct.pack("!H", 1000))
        assert close[2:].decode() == "bye " + "\u20ac" * 39  # whole characters, 125 bytes at most
        transport.close(1002, "late")
        assert not transport.wants_write


# -- deadlines -----------------------------------------------------------------------


def test_peer_that_stops_reading() -> None:
    """pump() keeps its deadline while the peer does not read; a later one, in another thread, goes on."""
    read = threading.Event()
    data = text_of(32 * MIB)

    def script(peer: Peer) -> tuple[bytes, bytes]:
        read.wait(PATIENCE)
        return peer.recv_message(), peer.recv_message()

    with connected(script, receive_buffer=4096) as (transport, listener):
        parcel, behind = transport.post(data), transport.post(b"behind")
        started = time.monotonic()
        assert not transport.pump(parcel, 0.5)
        assert 0.4 < time.monotonic() - started < 0.5 + SLACK
        started = time.monotonic()
        assert not transport.pump()
        assert not transport.pump(behind, 0.0)
        assert time.monotonic() - started < SLACK
        assert (parcel.started, parcel.sent, behind.started) == (True, False, False)
        assert transport.queued_bytes == len(data) + 6
        assert transport.wants_write
        read.set()
        assert in_thread(transport.pump, behind, PATIENCE).result(PATIENCE)
        assert parcel.sent
        assert listener.result() == (data, b"behind")


def test_withdraw() -> None:
    """A message of which nothing has left can be taken back; one that has started or left cannot."""
    read = threading.Event()

    def script(peer: Peer) -> tuple[bytes, bytes]:
        read.wait(PATIENCE)
        return peer.recv_message(), peer.recv_message()

    with connected(script, receive_buffer=4096) as (transport, listener):
        large, second, third = (transport.post(data) for data in (b"x" * 32 * MIB, b"second", b"third"))
        assert not transport.pump(large, 0.0)
        assert not large.withdraw()
        assert second.withdraw()
        assert not second.withdraw()
        assert not transport.pump(second, 0.0)
        assert transport.queued_bytes == large.size + third.size
        read.set()
        assert transport.pump(third, PATIENCE)
        assert not third.withdraw()
        assert listener.result() == (b"x" * 32 * MIB, b"third")
        assert not second.started
        assert transport.queued_bytes == 0
        assert not transport.pump(second, 0.0)  # it will never leave: no wait


class Interrupted(Exception):
    """What a signal handler raises."""


@pytest.mark.parametrize("kind", [Interrupted, TimeoutError, KeyboardInterrupt])
def test_exception_out_of_a_send(kind: type[BaseException]) -> None:
    """An exception that strikes a send passes through as it is, and the connection is over."""

    def struck(number: int, frame: object) -> None:
        raise kind("struck")

    def script(peer: Peer) -> None:
        read.wait(PATIENCE)
        peer.drain()

    read = threading.Event()
    with connected(script, receive_buffer=4096) as (transport, listener):
        parcel = transport.post(b"x" * 32 * MIB)
        handler = signal.signal(signal.SIGALRM, struck)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(kind, match="struck"):
                transport.pump(parcel, PATIENCE)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        with pytest.raises(TransportClosed):
            transport.pump(transport.post(b"hello"), 0.0)
        with pytest.raises(TransportClosed):
            transport.recv()
        read.set()
        listener.result()


def test_it_is_known_what_may_have_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss, ``maybe_sent`` is False exactly for messages whose last byte the kernel did not take."""
    with connected(lambda peer: peer.drain()) as (transport, _):
        first, second, third = (transport.post(b"x" * 94) for _ in range(3))  # 100 bytes each in a frame
        send_to_kernel = transport._wire._raw.send
        answers: list[Any] = [150, BrokenPipeError(errno.EPIPE, "Broken pipe")]

        class Raw:
            def send(self, data: memoryview, flags: int) -> int:
                assert not first.sent
                assert third.maybe_sent  # as long as the call runs
                answer = answers.pop(0)
                if isinstance(answer, Exception):
                    raise answer
                return send_to_kernel(data[:answer], flags)

            def __getattr__(self, name: str) -> Any:
                return getattr(raw, name)

        raw = transport._wire._raw
        monkeypatch.setattr(transport._wire, "_raw", Raw())
        with pytest.raises(TransportClosed, match="Broken pipe"):
            transport.pump(third, PATIENCE)
        assert [parcel.sent for parcel in (first, second, third)] == [True, False, False]
        assert [parcel.maybe_sent for parcel in (first, second, third)] == [True, False, False]
        assert all(parcel.started for parcel in (first, second, third))
        assert not transport.post(b"late").started


def test_interrupted_system_call_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an exception in the call that took the last byte, the peer may have seen the message."""
    with connected(lambda peer: peer.drain()) as (transport, _):
        flush = transport._wire.flush

        def struck() -> bool:
            if transport._wire.pending:
                flush()
                raise KeyboardInterrupt
            return flush()

        monkeypatch.setattr(transport._wire, "flush", struck)
        parcel = transport.post(b"perhaps")
        with pytest.raises(KeyboardInterrupt):
            transport.pump(parcel, PATIENCE)
        assert parcel.maybe_sent
        assert not parcel.sent


# -- liveness ------------------------------------------------------------------------


class FastClock(Clock):
    """A clock that runs faster than real time."""

    def __init__(self, speed: float) -> None:
        self._speed = speed

    def monotonic(self) -> float:
        """Return real time, sped up."""
        return time.monotonic() * self._speed


def test_idle_and_moments() -> None:
    """idle() means: the reader waits and nothing is unread; moments tell bytes from unfinished messages."""
    steps = [threading.Event() for _ in range(4)]

    def script(peer: Peer) -> None:
        long = frame(TEXT, b"x" * 100_000)
        for event, data in zip(
            steps, (frame(TEXT, b"whole"), long[:5000], long[5000:6000], long[6000:]), strict=True
        ):
            event.wait(PATIENCE)
            peer.send(data)
        peer.drain()

    def until(condition: Callable[[], bool]) -> None:
        end, pause = time.monotonic() + PATIENCE, threading.Event()
        while not condition():
            assert time.monotonic() < end
            pause.wait(0.005)

    with connected(script) as (transport, _):
        assert not transport.idle()  # nobody reads
        dialled_at = transport.last_byte_at
        assert transport.partial_at == 0.0
        reading = in_thread(transport.recv)
        until(transport.idle)
        steps[0].set()
        assert reading.result(PATIENCE) == b"whole"
        whole_at = transport.last_byte_at
        assert whole_at > dialled_at
        assert transport.partial_at == 0.0

        steps[1].set()
        poller = select.poll()
        poller.register(transport.fileno(), select.POLLIN)
        assert poller.poll(PATIENCE * 1000)
        assert not transport.idle()  # unread
        reading = in_thread(transport.recv)
        until(lambda: transport.partial_at > 0.0 and transport.idle())
        part_at = transport.partial_at
        assert part_at == transport.last_byte_at > whole_at
        steps[2].set()
        until(lambda: transport.partial_at > part_at)
        steps[3].set()
        assert reading.result(PATIENCE) == b"x" * 100_000


def test_f12_trickling_message_is_given_up() -> None:
    """A message that comes at less than 1 KiB/s is given up after 30 s; silence between messages is fine."""
    speed = 100.0

    def script(peer: Peer) -> None:
        pause = threading.Event()
        pause.wait(0.5)  # 50 s of its clock between messages
        peer.send(frame(TEXT, b"fine"))
        with contextlib.suppress(OSError):
            peer.send(claiming(MIB))
            for _ in range(300):
                peer.send(b"x")
                pause.wait(0.01)

    with connected_at(speed, script) as transport:
        assert transport.recv() == b"fine"
        started = time.monotonic()
        assert "inside a message" in str(ended(transport))
        assert 25.0 < (time.monotonic() - started) * speed < 150.0


def test_f12_slow_message_is_not_given_up() -> None:
    """A message that takes long but makes progress is waited for."""
    speed = 100.0
    data = text_of(400_000)

    def script(peer: Peer) -> None:
        pause = threading.Event()
        peer.send(claiming(len(data)))
        for start in range(0, len(data), 10_000):
            peer.send(data[start : start + 10_000])
            pause.wait(0.02)  # 5 KB/s of its clock
        peer.drain()

    with connected_at(speed, script) as transport:
        assert transport.recv() == data


@contextlib.contextmanager
def connected_at(speed: float, script: Callable[[Peer], Any]) -> Iterator[WebSocketTransport]:
    """Dial a scripted server with a clock that runs faster."""
    with Listener(lambda peer: script(peer.upgrade())) as listener:
        options = options_for(listener.port, open_timeout=5.0 * speed)
        transport = dial(options, security.handshake_headers(options), clock=FastClock(speed))
        try:
            yield transport
        finally:
            transport.abort()
            transport.dispose()
