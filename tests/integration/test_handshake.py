"""The opening handshake: every answer a server may give ends in one clear error, in time."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import websocket
import wove
from ws_peer import (
    PATIENCE,
    TEXT,
    FullBacklog,
    Listener,
    Peer,
    accept_for,
    dial_to,
    dialled,
    frame,
    options_for,
)

from wove_ws_sync import AuthenticationRejected, HandshakeRejected, security
from wove_ws_sync._wire import Wire
from wove_ws_sync.timing import Clock
from wove_ws_sync.transport import dial

SECRET = "planted-secret-0123456789"
BODY = "planted-body"
OPEN_TIMEOUT = 1.0
# How long a refusal may take on a busy machine; a deadline may be missed by as much.
SLACK = 3.0


def answering(*lines: str, body: bytes = b"") -> Callable[[Peer], None]:
    """Return a script that answers the request with these header lines."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        peer.drain()

    return script


def accepting(
    *, drop: str = "", accept: Callable[[str], str] = accept_for, extra: str = ""
) -> Callable[[Peer], None]:
    """Return a script that sends a 101 without line *drop*, with another accept key or an *extra* line."""

    def script(peer: Peer) -> None:
        peer.read_request()
        lines = {
            "upgrade": "Upgrade: websocket",
            "connection": "Connection: Upgrade",
            "accept": f"Sec-WebSocket-Accept: {accept(peer.headers()['sec-websocket-key'])}",
            "extra": extra,
        }
        lines.pop(drop, None)
        text = "\r\n".join(["HTTP/1.1 101 Switching Protocols", *filter(None, lines.values()), "", ""])
        peer.send(text.encode())
        peer.drain()

    return script


def refused(script: Callable[[Peer], Any], **config: Any) -> BaseException:
    """Dial a server that plays *script*; return the error, checked to come in time and to leak nothing."""
    config = {"security": {"type": "signed", "secret": SECRET}, "open_timeout": OPEN_TIMEOUT, **config}
    with Listener(script) as listener:
        options = options_for(listener.port, headers={"X-Canary": SECRET}, **config)
        started = time.monotonic()
        with pytest.raises((OSError, ValueError)) as caught:
            dial_to(options)
        assert time.monotonic() - started < OPEN_TIMEOUT + SLACK
        error = caught.value
        assert listener.accepted == 1
        shown = repr(error) + str(error) + repr(error.__cause__) + str(error.__cause__)
        assert SECRET not in shown
        assert BODY not in shown
        assert len(shown) < 2000
        if not isinstance(error, TimeoutError):  # Wove's text, word for word
            assert f"127.0.0.1:{listener.port}" in str(error)
    return error


@pytest.mark.parametrize("status", [401, 403])
def test_f4_authentication_rejected(status: int) -> None:
    """401 and 403 are AuthenticationRejected, and a PermissionError, without the body in the text."""
    error = refused(answering(f"HTTP/1.1 {status} No", "Content-Length: 12", body=BODY.encode()))
    assert isinstance(error, AuthenticationRejected)
    assert isinstance(error, PermissionError)
    assert error.status == status


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (200, "wove-ws-sync check"),
        (404, "path of executor_config.url"),
        (426, "wove-ws-sync check"),
        (429, "try again later"),
        (500, "wove-ws-sync check"),
        (502, "check that it runs"),
        (503, "try again later"),
        (504, "check that it runs"),
    ],
)
def test_f4_f5_rejected(status: int, remedy: str) -> None:
    """Any other status is HandshakeRejected with that status, and says what to do."""
    error = refused(answering(f"HTTP/1.1 {status} {BODY}", "Content-Length: 12", body=BODY.encode()))
    assert type(error) is HandshakeRejected
    assert (error.status, error.retry_after) == (status, None)
    assert remedy in str(error)


def in_twenty_seconds() -> str:
    """Return an HTTP date."""
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20), usegmt=True
    )


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7.0, 7.0),
        ("0", 0.0, 0.0),
        ("86400", 60.0, 60.0),
        ("9" * 5000, 60.0, 60.0),
        (in_twenty_seconds, 15.0, 20.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0, 0.0),
        ("soon", None, None),
        ("-3", None, None),
    ],
)
def test_f5_retry_after(value: Any, low: float | None, high: float | None) -> None:
    """Retry-After is seconds or an HTTP date, and at most a minute."""
    text = value() if callable(value) else value
    error = refused(answering("HTTP/1.1 503 Busy", f"Retry-After: {text}"))
    assert isinstance(error, HandshakeRejected)
    if low is None or high is None:
        assert error.retry_after is None
    else:
        assert error.retry_after is not None
        assert low <= error.retry_after <= high


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_f6_redirect_is_not_followed(status: int) -> None:
    """A redirect, to the same host or another, is refused; nobody else hears from us."""
    with Listener(lambda peer: peer.sock.recv(1)) as elsewhere:
        for location in (f"ws://127.0.0.1:{elsewhere.port}/wove", "/other", "ws://worker.invalid/wove"):
            lines = (f"HTTP/1.1 {status} Moved", f"Location: {location}", "Content-Length: 0")
            error = refused(answering(*lines))
            assert type(error) is HandshakeRejected
            assert error.status == status
            assert "not followed" in str(error)
        assert elsewhere.accepted == 0


def test_f1_no_answer() -> None:
    """A server that says nothing is a TimeoutError with Wove's text."""
    error = refused(lambda peer: peer.drain())
    assert type(error) is TimeoutError
    assert str(error) == "timed out during opening handshake"


def trickling(text: bytes) -> Callable[[Peer], None]:
    """Return a script that sends one byte every 200 ms."""

    def script(peer: Peer) -> None:
        peer.read_request()
        pause = threading.Event()
        with contextlib.suppress(OSError):
            for byte in text:
                peer.send(bytes([byte]))
                pause.wait(0.2)

    return script


def test_f2_slow_answer() -> None:
    """One byte every 200 ms does not move the deadline."""
    error = refused(trickling(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"))
    assert type(error) is TimeoutError


def test_f2_f4_slow_body() -> None:
    """The body of a refusal is not waited for."""
    slow = trickling(b"x" * 20)

    def script(peer: Peer) -> None:
        peer.send(b"HTTP/1.1 401 No\r\nContent-Length: 1000\r\n\r\n")
        slow(peer)

    error = refused(script)
    assert isinstance(error, AuthenticationRejected)


def flooding(start: bytes, piece: bytes, total: int) -> Callable[[Peer], None]:
    """Return a script that sends *piece* again and again."""

    def script(peer: Peer) -> None:
        peer.read_request()
        with contextlib.suppress(OSError):
            peer.send(start)
            for _ in range(total // len(piece)):
                peer.send(piece)
        peer.drain()

    return script


@pytest.mark.parametrize(
    "script",
    [
        flooding(b"HTTP/1.1 101 Switching Protocols\r\n", b"X-Header: value\r\n" * 1000, 3_000_000),
        flooding(b"HTTP/1.1 101 Switching Protocols\r\nX-Header: ", b"x" * 65536, 3_000_000),
        flooding(b"", b"\x15\x03\x01\x00\x02", 50),
        flooding(b"SSH-2.0-OpenSSH_9.6\r\n", b"\0", 1),
        answering("HTTP/1.1 abc", "X: y"),
        answering("HTTP/1.1 101 Switching Protocols", "no colon"),
    ],
    ids=["endless headers", "long line", "binary", "another protocol", "status", "header"],
)
def test_f3_not_http(script: Callable[[Peer], None]) -> None:
    """What is not an HTTP response head, or has no end, is HandshakeRejected without a status."""
    error = refused(script)
    assert type(error) is HandshakeRejected
    assert error.status is None


def test_f3_huge_body_is_not_read() -> None:
    """A refusal with 200 MB of body costs no memory and no time."""
    start = b"HTTP/1.1 401 No\r\nContent-Length: 200000000\r\n\r\n"
    tracemalloc.start()
    try:
        error = refused(flooding(start, BODY.encode() * 5000, 200_000_000))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert isinstance(error, AuthenticationRejected)


@pytest.mark.parametrize(
    "script",
    [
        accepting(accept=lambda key: accept_for("bm90IHRoZSBrZXkgaXQgd2FzLg==")),
        accepting(accept=lambda key: accept_for(key).swapcase()),
        accepting(drop="accept"),
        accepting(drop="upgrade"),
        accepting(drop="connection"),
        accepting(drop="upgrade", extra="Upgrade: h2c"),
        accepting(extra="Sec-WebSocket-Extensions: permessage-deflate"),
        accepting(extra="Sec-WebSocket-Protocol: wove"),
    ],
    ids=[
        "wrong accept", "wrong case", "no accept", "no upgrade", "no connection", "other upgrade",
        "extension", "subprotocol",
    ],
)  # fmt: skip
def test_f7_invalid_upgrade(script: Callable[[Peer], None]) -> None:
    """A 101 that is no valid answer to this request is HandshakeRejected with status 101."""
    error = refused(script)
    assert type(error) is HandshakeRejected
    assert error.status == 101


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 101 Switching"], ids=["at once", "in the middle"])
@pytest.mark.parametrize("rst", [False, True], ids=["fin", "rst"])
def test_closed_during_handshake(start: bytes, rst: bool) -> None:
    """A server that hangs up is a ConnectionError: perhaps it expects TLS, or does not."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(start)
        if rst:
            peer.reset()

    error = refused(script)
    assert isinstance(error, ConnectionError)
    assert not isinstance(error, HandshakeRejected)
    assert "port and scheme" in str(error)


def test_refused() -> None:
    """A port where nobody listens is a ConnectionRefusedError that names host and port, and what to do."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(ConnectionRefusedError, match=rf"127\.0\.0\.1:{port}: .*Check that"):
            dial_to(options_for(port))


def test_f1_no_syn_answer() -> None:
    """An address that does not answer at all is a TimeoutError at open_timeout."""
    with FullBacklog() as hole:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out during opening handshake"):
            dial_to(options_for(hole.address[1], open_timeout=0.5))
        assert 0.4 < time.monotonic() - started < 0.5 + SLACK


Resolver = Callable[..., list[Any]]


def resolving_to(*addresses: tuple[str, int]) -> Resolver:
    """Return a getaddrinfo that knows one name."""
    stream = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    return lambda host, port, **hints: [(*stream, address) for address in addresses]


def test_f39_second_address_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address of a name drops everything, the second refuses, the third answers: connected."""
    with (
        FullBacklog() as hole,
        socket.socket() as deaf,
        Listener(lambda peer: peer.upgrade().drain()) as listener,
    ):
        deaf.bind(("127.0.0.1", 0))
        addresses = (hole.address, deaf.getsockname(), ("127.0.0.1", listener.port))
        monkeypatch.setattr(socket, "getaddrinfo", resolving_to(*addresses))
        with dialled(options_for(listener.port, host="localhost", open_timeout=3.0)):
            assert listener.accepted == 1


def test_f39_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that does not resolve is a socket.gaierror that names it."""

    def unknown(host: str, port: int, **hints: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(socket.gaierror, match="localhost:81") as caught:
        dial_to(options_for(81, host="localhost"))
    assert caught.value.errno == socket.EAI_NONAME


def test_f39_stalled_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that hangs does not move the deadline."""
    release = threading.Event()

    def stalled(host: str, port: int, **hints: Any) -> list[Any]:
        release.wait(PATIENCE)
        raise socket.gaierror(socket.EAI_AGAIN, "late")

    monkeypatch.setattr(socket, "getaddrinfo", stalled)
    started = time.monotonic()
    try:
        with pytest.raises(TimeoutError, match="timed out during opening handshake"):
            dial_to(options_for(81, host="localhost", open_timeout=0.3))
        assert time.monotonic() - started < 0.3 + SLACK
    finally:
        release.set()


def test_local_name_must_be_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name exempt from TLS as a local one that leads elsewhere is refused before a byte is sent."""
    monkeypatch.setattr(Wire, "peer_address", lambda self: "192.0.2.7")
    with Listener(lambda peer: peer.sock.recv(1)) as listener:
        with pytest.raises(ValueError, match="uses an insecure network transport"):
            dial_to(options_for(listener.port, host="localhost"))
        assert listener.result() == b""
        with pytest.raises(OSError, match=r"closed|reset"):  # insecure=True: nobody minds
            dial_to(options_for(listener.port, host="localhost", insecure=True))


@pytest.mark.parametrize("target", ["/", "/a/b;v=1", "/a;b?x=1;2&y", "/%C3%A9?q=%20", "//double"])
@pytest.mark.parametrize("offer", [{}, {"seal": "off", "worker_auth": "off"}], ids=["proof", "no proof"])
def test_request_is_exact(target: str, offer: dict[str, str]) -> None:
    """The target that was signed is the one that is sent, headers arrive as given, and no others."""
    peers: list[Peer] = []
    with Listener(lambda peer: peers.append(peer.upgrade())) as listener:
        options = options_for(
            listener.port,
            target=target,
            security={"type": "signed", "secret": SECRET},
            headers={"X-Mine": "caf\xe9", "User-Agent": "me"},
            **offer,
        )
        with dialled(options):
            listener.result()
        request, headers = peers[0].request.decode("latin-1"), peers[0].headers()
    assert request.split("\r\n")[0] == f"GET {options.target} HTTP/1.1"
    assert options.target == target
    verifier = wove.NetworkExecutorSecurity(mode="signed", secret=SECRET)
    verifier.verify_headers(headers=headers, transport="websocket", target=target, body=b"")
    assert headers["x-mine"] == "caf\xe9"
    assert headers["user-agent"] == "me"
    assert headers["host"] == f"127.0.0.1:{options.port}"
    assert headers["upgrade"] == "websocket"
    assert headers["connection"] == "Upgrade"
    assert headers["sec-websocket-version"] == "13"
    assert headers["x-wove-sync"] == ("1" if offer else "1; f=seal")
    assert headers["x-wove-max-message"] == str(options.max_message_bytes)
    names = [line.partition(":")[0].lower() for line in request.split("\r\n")[1:]]
    assert len(names) == len(set(names))
    signature = {"x-wove-key", "x-wove-timestamp", "x-wove-nonce", "x-wove-signature"}
    ours = {"x-wove-sync", "x-wove-max-message", "x-mine", "user-agent"}
    ours |= set() if offer else {"x-wove-host-nonce", "x-wove-host-proof"}
    upgrade = {"host", "upgrade", "connection", "sec-websocket-key", "sec-websocket-version"}
    assert set(names) == signature | ours | upgrade


def test_no_cookie_of_another_connection() -> None:
    """The library's process-wide cookie jar neither reaches the worker nor is filled by it."""
    jar = websocket._handshake.CookieJar
    jar.set("session=planted; Domain=127.0.0.1")
    jar.set("session=planted; Domain=invalid")
    kept = dict(jar.jar)
    try:
        peers: list[Peer] = []
        answer = "Set-Cookie: a=b; Domain=127.0.0.1"
        with Listener(lambda peer: peers.append(peer.upgrade(answer))) as listener:
            for _ in range(2):
                with dialled(options_for(listener.port)):
                    pass
            listener.result()
        assert "cookie" not in peers[0].request.decode().lower()
        assert jar.jar == kept
    finally:
        jar.jar.clear()


def test_f43_trace_shows_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """With the library's trace on, neither a header of ours nor its signature is logged."""
    logger = websocket._logging._logger
    with Listener(lambda peer: peer.upgrade().drain()) as listener:
        security = {"type": "bearer", "token": SECRET}
        options = options_for(listener.port, headers={"X-Canary": SECRET}, security=security)
        try:
            websocket.enableTrace(True)
            logger.addHandler(caplog.handler)
            with dialled(options):
                pass
        finally:
            websocket.enableTrace(False)
            logger.handlers.clear()
    assert "Sec-WebSocket-Key" in caplog.text
    assert SECRET not in caplog.text


def test_header_with_a_line_break_is_not_sent() -> None:
    """A value that would become two headers is refused, whoever made it."""
    with Listener(lambda peer: peer.sock.recv(1)) as listener:
        options = options_for(listener.port)
        with pytest.raises(ValueError, match="X-A"):
            dial(options, {"X-A": "v\r\nX-Injected: yes"}, clock=Clock())
        assert listener.result() == b""


def test_answer_of_a_worker() -> None:
    """Its extensions (those offered), message limit and name are read; a foreign worker has none of them."""
    name = "0123456789abcdef" * 2
    answers: dict[tuple[str, ...], tuple[frozenset[str] | None, int | None, str]] = {
        (): (None, None, ""),
        ("X-Wove-Sync: 1", "X-Wove-Max-Message: 1048576"): (frozenset(), 1048576, ""),
        ("x-wove-sync: 1; f=resume, ack,seal", "X-Wove-Max-Message: -1", f"X-Wove-Worker: {name}"): (
            frozenset({"resume", "ack"}),
            None,
            name,
        ),
        ("X-Wove-Sync: 1; f=resume,ack", "X-Wove-Worker: nobody"): (frozenset({"ack"}), None, ""),
        ("X-Wove-Sync: 2", f"X-Wove-Max-Message: {'9' * 5000}"): (None, None, ""),
        ("Server: caf\xe9", "X-Wove-Sync: 1;", "X-Wove-Max-Message: many"): (frozenset(), None, ""),
    }
    for lines, expected in answers.items():

        def script(peer: Peer, lines: tuple[str, ...] = lines) -> None:
            peer.upgrade(*lines).drain()

        with Listener(script) as listener:
            options = options_for(listener.port)
            headers = {**security.handshake_headers(options), "X-Wove-Sync": "1; f=resume,ack,drain"}
            transport = dial(options, headers, clock=Clock())
            try:
                assert (transport.features, transport.peer_max_message_bytes, transport.worker) == expected
            finally:
                transport.abort()
                transport.dispose()


def test_frames_right_behind_the_answer() -> None:
    """Messages that arrive in the same packet as the 101 are not lost."""
    behind = frame(TEXT, b"one") + frame(TEXT, b"t", fin=False) + frame(0, b"wo")
    with (
        Listener(lambda peer: peer.upgrade(behind=behind).drain()) as listener,
        dialled(options_for(listener.port)) as transport,
    ):
        assert [bytes(transport.recv()), bytes(transport.recv())] == [b"one", b"two"]


def test_f43_environment_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked."""
    with Listener(lambda peer: None) as proxy, Listener(lambda peer: peer.upgrade().drain()) as listener:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        with dialled(options_for(listener.port)):
            assert listener.accepted == 1
        assert proxy.accepted == 0


def relay(peer: Peer, port: int, answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> str:
    """Play an HTTP CONNECT proxy; return the request."""
    request = peer.read_request()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as onward:
        peer.send(answer)

        def back() -> None:
            with contextlib.suppress(OSError):
                while data := onward.recv(65536):
                    peer.send(data)

        thread = threading.Thread(target=back)
        thread.start()
        with contextlib.suppress(OSError):
            while data := peer.sock.recv(65536):
                onward.sendall(data)
        with contextlib.suppress(OSError):
            onward.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)
    return request


def test_proxy() -> None:
    """The configured proxy is asked to CONNECT, with its credentials, and gets no header of ours."""
    with (
        Listener(lambda peer: peer.upgrade().send(frame(TEXT, b"hello"))) as listener,
        Listener(lambda peer: relay(peer, listener.port)) as proxy,
    ):
        options = options_for(
            listener.port, proxy=f"http://me:{SECRET}%40@127.0.0.1:{proxy.port}", headers={"X-Canary": "mine"}
        )
        with dialled(options) as transport:
            assert transport.recv() == b"hello"
        request = proxy.result()
    assert request.split("\r\n")[0] == f"CONNECT 127.0.0.1:{listener.port} HTTP/1.1"
    assert "Proxy-Authorization: Basic bWU6cGxhbnRlZC1zZWNyZXQtMDEyMzQ1Njc4OUA=" in request
    assert "X-Canary" not in request


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (answering("HTTP/1.1 407 Proxy Authentication Required", body=BODY.encode()), ConnectionError),
        (answering("HTTP/1.1 502 Bad Gateway"), ConnectionError),
        (flooding(b"HTTP/1.1 200 OK\r\n", b"X-Header: value\r\n" * 1000, 3_000_000), ConnectionError),
        (flooding(b"nonsense\r\n\r\n", b"\0", 1), ConnectionError),
        (lambda peer: peer.read_request() and None, ConnectionError),
        (lambda peer: peer.drain(), TimeoutError),
    ],
    ids=["407", "502", "endless headers", "not HTTP", "closed", "silent"],
)
def test_proxy_that_refuses(script: Callable[[Peer], None], kind: type[OSError]) -> None:
    """A proxy that refuses, hangs or talks nonsense is one clear error in time, without its credentials."""
    with Listener(script) as proxy:
        account = f"http://me:{SECRET}@127.0.0.1:{proxy.port}"
        options = options_for(9, proxy=account, open_timeout=OPEN_TIMEOUT)
        started = time.monotonic()
        with pytest.raises(kind) as caught:
            dial_to(options)
        assert time.monotonic() - started < OPEN_TIMEOUT + SLACK
        assert not isinstance(caught.value, HandshakeRejected)
        assert SECRET not in str(caught.value) + repr(caught.value)
        assert BODY not in str(caught.value)
