"""A handshake that fails: everybody who waits for it hears the same, in time, and nobody dials on in vain.

What one dial makes of each answer is tested in ``tests/integration/test_handshake.py``.
"""

from __future__ import annotations

import contextlib
import ssl
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import trustme
from fault_helpers import MIB, WAIT, link_of, resident, within
from scripted_worker import Connection, ScriptedWorker, result, task
from ws_peer import CLOSE, FullBacklog, Listener, Peer, accept_for, dial_to, frame, options_for

from wove_ws_sync import (
    AuthenticationRejected,
    ConnectionLost,
    DeliveryTimeout,
    HandshakeRejected,
    SyncWebSocketEnvironmentExecutor,
    WebSocketExecutor,
)
from wove_ws_sync._wire import Wire
from wove_ws_sync.link import LinkState

BODY = "planted-body"
OPEN_TIMEOUT = 1.5


def silent(peer: Peer) -> None:
    """Read the request and say nothing."""
    peer.drain()


def dripping(peer: Peer) -> None:
    """Answer as it should be, one byte every 200 ms."""
    peer.read_request()
    answer = f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n{'X-More: x' * 100}"
    pause = threading.Event()
    with contextlib.suppress(OSError):
        for byte in answer.encode():
            peer.send(bytes([byte]))
            pause.wait(0.2)


@pytest.mark.parametrize("how", ["silent", "dripping", "no SYN answer"])
def test_f1_f2_one_error_for_all_who_wait(how: str) -> None:
    """Sixteen runs and four start() on one dial: each TimeoutError at open_timeout, with Wove's text."""
    with contextlib.ExitStack() as stack:
        if how == "no SYN answer":
            port = stack.enter_context(FullBacklog()).address[1]
        else:
            port = stack.enter_context(Listener(silent if how == "silent" else dripping)).port
        config = {"url": f"ws://127.0.0.1:{port}/wove", "open_timeout": OPEN_TIMEOUT}
        pool = stack.enter_context(WebSocketExecutor(**config))
        threads = stack.enter_context(ThreadPoolExecutor(4))
        with within(OPEN_TIMEOUT):
            futures: list[Any] = [pool.submit(task) for _ in range(16)]
            link = link_of(pool)
            for _ in range(4):
                executor = SyncWebSocketEnvironmentExecutor()
                start = {"environment_name": "e", "environment_config": config, "run_config": {}}
                futures.append(threads.submit(executor.start, **start))
            errors = [future.exception(WAIT) for future in futures]
        assert [(type(error), str(error)) for error in errors] == [
            (TimeoutError, "timed out during opening handshake")
        ] * 20
        assert link.stats()["dials"] == 1


def flooding(start: bytes, piece: bytes, total: int) -> Callable[[Peer], None]:
    """Return a script that offers *total* bytes more than anybody should take."""

    def script(peer: Peer) -> None:
        peer.read_request()
        with contextlib.suppress(OSError):
            peer.send(start)
            for _ in range(total // len(piece)):
                peer.send(piece)
        peer.drain()

    return script


@pytest.mark.parametrize(
    ("start", "piece", "status"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\n", b"X-Header: value\r\n" * 3000, None),
        (b"HTTP/1.1 101 Switching Protocols\r\nX-Header: ", b"x" * 65536, None),
        (b"HTTP/1.1 401 No\r\nContent-Length: 200000000\r\n\r\n", BODY.encode() * 5000, 401),
    ],
    ids=["endless headers", "long line", "body"],
)
def test_f3_at_most_64_kib_are_read(
    start: bytes, piece: bytes, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 MB on offer, in headers, in one line, or behind a refusal; and they cost no memory."""
    read = [0]
    receive = Wire._receive

    def counted(self: Wire, target: memoryview) -> int:
        count = receive(self, target)
        read[0] += count
        return count

    monkeypatch.setattr(Wire, "_receive", counted)
    with Listener(flooding(start, piece, 200_000_000)) as listener:
        for attempt in range(2):
            before, read[0] = resident(), 0
            with within(OPEN_TIMEOUT), pytest.raises(HandshakeRejected) as caught:
                dial_to(options_for(listener.port, open_timeout=OPEN_TIMEOUT))
            assert caught.value.status == status
            assert BODY not in str(caught.value) + repr(caught.value)
            assert 0 < read[0] <= 64 * 1024
            if attempt:  # the first one warms up
                assert resident() - before < 4 * MIB


def answering(*lines: str) -> Callable[[Peer], None]:
    """Return a script that answers the request with these header lines and a body."""

    def script(peer: Peer) -> None:
        peer.read_request()
        key = peer.headers()["sec-websocket-key"]
        text = "\r\n".join([*lines, "", BODY]).replace("{accept}", accept_for(key))
        peer.send(text.encode("latin-1"))
        peer.drain()

    return script


SWITCHING = ("HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade")


@pytest.mark.parametrize(
    ("status", "lines"),
    [
        (401, ["HTTP/1.1 401 No"]),
        (403, ["HTTP/1.1 403 No"]),
        (404, ["HTTP/1.1 404 No"]),
        (426, ["HTTP/1.1 426 No"]),
        (301, ["HTTP/1.1 301 Moved", "Location: /elsewhere"]),
        (307, ["HTTP/1.1 307 Moved", "Location: ws://127.0.0.1:1/wove"]),
        (101, [*SWITCHING, "Sec-WebSocket-Accept: bm90IHRoZSBrZXkgaXQgd2FzLg=="]),
        (101, [*SWITCHING, "Sec-WebSocket-Accept: {accept}", "Sec-WebSocket-Extensions: permessage-deflate"]),
    ],
    ids=["401", "403", "404", "426", "301", "307", "wrong accept", "extension"],
)
def test_f4_f6_f7_a_final_answer_is_not_asked_for_twice(status: int, lines: list[str]) -> None:
    """Every run hears it at once, also those that have time left; no second dial, no body in the text."""
    with Listener(answering(*lines)) as listener:
        with WebSocketExecutor(f"ws://127.0.0.1:{listener.port}/wove", delivery_timeout=2.0) as pool:
            futures = [pool.submit(task), pool.with_options(delivery_timeout=None).submit(task)]
            for future in futures:
                error = future.exception(WAIT)
                assert isinstance(error, HandshakeRejected), error
                assert error.status == status
                assert isinstance(error, AuthenticationRejected) == (status in (401, 403))
                assert isinstance(error, PermissionError) == (status in (401, 403))
                assert BODY not in str(error) + repr(error)
            link = link_of(pool)
            assert link.state is LinkState.FATAL
            assert link.stats()["dials"] == listener.accepted == 1


class Reluctant(ScriptedWorker):
    """A worker that refuses its first caller with *answer*."""

    def __init__(self, answer: Callable[[Peer], None]) -> None:
        super().__init__()
        self.called_at: list[float] = []
        self._answer = answer

    def _serve(self, peer: Peer) -> None:
        self.called_at.append(time.monotonic())
        if len(self.called_at) == 1:
            self._answer(peer)
        else:
            super()._serve(peer)


@pytest.mark.parametrize("status", [429, 503])
def test_f5_queued_runs_wait_as_long_as_the_worker_asks(status: int) -> None:
    """No dial before Retry-After has passed; who has no time left ends at the deadline, the others run."""
    refusal = answering(f"HTTP/1.1 {status} Busy", "Retry-After: 1")
    with Reluctant(refusal) as worker, WebSocketExecutor(worker.url) as pool:
        patient = [pool.with_options(delivery_timeout=WAIT).submit(task) for _ in range(3)]
        with pytest.raises(DeliveryTimeout):
            pool.with_options(delivery_timeout=0.4).submit(task).result(WAIT)
        connection = worker.connection()
        connection.commands(3)
        connection.say(*[result(future.run_id, number) for number, future in enumerate(patient)])
        assert [future.result(WAIT) for future in patient] == [0, 1, 2]
        first, second = worker.called_at
        assert second - first >= 1.0
        assert len(connection.commands(3)) == 3


def hang_up(connection: Connection, code: int) -> None:
    """Close as a worker that is about to restart."""
    connection.say_bytes(frame(CLOSE, struct.pack("!H", code)))


@pytest.mark.parametrize("code", [1012, 1013])
def test_f5_a_worker_that_restarts(code: int) -> None:
    """Runs that may be delivered again wait out the pause before the next dial; the others hear the code."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, reconnect_initial_delay=0.5) as pool:
        lost = pool.submit(task)
        again = pool.with_options(delivery_orphan_policy="requeue", delivery_timeout=WAIT).submit(task)
        connection = worker.connection()
        connection.commands(2)
        closed_at = time.monotonic()
        hang_up(connection, code)
        with pytest.raises(ConnectionLost) as caught:
            lost.result(WAIT)
        assert caught.value.close_code == code
        second = worker.connection()
        assert time.monotonic() - closed_at >= 0.5 * 0.8
        [command] = second.commands(1)
        assert (command["run_id"], command["attempt"]) == (again.run_id, 2)
        second.say(result(again.run_id, "here"))
        assert again.result(WAIT) == "here"
        assert connection.close_code == code
        assert worker.accepted == 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_f6_a_redirect_from_wss_to_ws(status: int) -> None:
    """Refused; nobody connects to the place it names, with or without TLS."""
    ca, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with Listener(lambda peer: peer.sock.recv(1)) as elsewhere, ca.cert_pem.tempfile() as file:
        location = f"Location: ws://127.0.0.1:{elsewhere.port}/wove"
        with Listener(answering(f"HTTP/1.1 {status} Moved", location), context=context) as listener:
            options = options_for(
                listener.port, scheme="wss", ca_file=file, headers={"X-Api-Key": "planted-secret"}
            )
            with pytest.raises(HandshakeRejected, match="not followed") as caught:
                dial_to(options)
        assert caught.value.status == status
        assert elsewhere.accepted == 0
