"""OAuth 2.0 over real sockets: a worker service that wants the token, an endpoint that is slow or endless."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import responses
import trustme
from service_thread import ServiceThread

from wove_ws_sync import AuthenticationRejected, WebSocketExecutor, _oauth2, errors, security
from wove_ws_sync._oauth2 import TokenSource
from wove_ws_sync._reconnect import is_final
from wove_ws_sync._security_config import SecurityConfig

TOKEN = "t0ken.cAnArY-abc_def"
CANARY = "cAnArY-5ecret-0123456789"
URL = "https://login.example/token"
OAUTH2 = {"type": "oauth2", "token_url": URL, "client_id": "billing", "client_secret": CANARY}
WAIT = 60.0


@pytest.fixture(autouse=True)
def no_sources() -> Iterator[None]:
    """No token of a test is there in another."""
    _oauth2._sources.clear()
    yield
    _oauth2._sources.clear()


def twice(value: int) -> int:
    return 2 * value


# A worker service


@pytest.fixture(scope="module")
def service() -> Iterator[ServiceThread]:
    """A worker service that knows one bearer token."""
    with ServiceThread(security={"type": "bearer", "token": TOKEN}) as running:
        yield running


@pytest.fixture
def endpoint() -> Iterator[responses.RequestsMock]:
    """A token endpoint that says what a test tells it to."""
    with responses.RequestsMock() as mock:
        yield mock


def grant(endpoint: responses.RequestsMock, token: str) -> None:
    document = {"access_token": token, "token_type": "Bearer", "expires_in": 3600}
    endpoint.upsert("POST", URL, json=document)


def test_a_run_with_a_token(service: ServiceThread, endpoint: responses.RequestsMock) -> None:
    """Two executors of the same credentials share link and token."""
    grant(endpoint, TOKEN)
    with (
        WebSocketExecutor(service.url, security=OAUTH2) as one,
        WebSocketExecutor(service.url, security=dict(reversed(OAUTH2.items()))) as other,
    ):
        assert one.submit(twice, 4).result(WAIT) == 8
        assert other.submit(twice, 5).result(WAIT) == 10
        assert one.link is not None and one.link == other.link
    assert len(endpoint.calls) == 1


def test_a_token_that_the_worker_refuses(service: ServiceThread, endpoint: responses.RequestsMock) -> None:
    """401 is final for who waits, and asks the endpoint nothing; the next dial fetches another token."""
    grant(endpoint, "an-old-one")
    refused = service.service.counters["unauthorized"]
    with WebSocketExecutor(service.url, security=OAUTH2) as pool:
        with pytest.raises(AuthenticationRejected) as caught:
            pool.submit(twice, 1).result(WAIT)
        assert caught.value.status == 401 and "an-old-one" not in str(caught.value)
        with pytest.raises(AuthenticationRejected):  # said without another dial
            pool.submit(twice, 1).result(WAIT)
        assert len(endpoint.calls) == 1
        assert service.service.counters["unauthorized"] == refused + 1
    grant(endpoint, TOKEN)
    # other options, so a link without a cool-down, and the same credentials
    with WebSocketExecutor(service.url, security=OAUTH2, ping_interval=9.0) as pool:
        assert pool.submit(twice, 3).result(WAIT) == 6
    assert len(endpoint.calls) == 2


def test_an_endpoint_that_refuses(service: ServiceThread, endpoint: responses.RequestsMock) -> None:
    """The run fails at once with the code of the refusal; the worker hears nothing."""
    endpoint.post(URL, json={"error": "invalid_client"}, status=401)
    refused = service.service.counters["unauthorized"]
    with WebSocketExecutor(service.url, security=OAUTH2) as pool:
        for _ in range(2):
            with pytest.raises(AuthenticationRejected, match=r"HTTP 401 \(invalid_client\)"):
                pool.submit(twice, 1).result(WAIT)
    assert len(endpoint.calls) == 1
    assert service.service.counters["unauthorized"] == refused


def test_an_endpoint_that_is_not_ready(service: ServiceThread, endpoint: responses.RequestsMock) -> None:
    """A run with time waits until there is a token."""
    endpoint.post(URL, status=503)
    endpoint.post(URL, status=503)
    endpoint.post(URL, json={"access_token": TOKEN, "token_type": "Bearer", "expires_in": 3600})
    with WebSocketExecutor(service.url, security=OAUTH2, delivery_timeout=WAIT) as pool:
        assert pool.submit(twice, 2).result(WAIT) == 4
    assert len(endpoint.calls) == 3


# An endpoint of our own


class Endpoint:
    """A server on loopback that does *serve* with each connection, until that returns or the test ends."""

    def __init__(self, serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> None:
        self._serve, self._context = serve, context
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.port}/token"
        self.ended = threading.Event()
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._accept, name="endpoint")
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(WAIT)
            with connection, contextlib.suppress(OSError):
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                try:
                    self._serve(connection)
                finally:
                    connection.close()
                    self.ended.set()

    def source(self, **changes: Any) -> TokenSource:
        options = security.link_options(
            {"url": "ws://localhost", "security": {**OAUTH2, "token_url": self.url, **changes}}
        )
        return security._tokens(options)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


def request_of(connection: socket.socket) -> bytes:
    """Return a request with its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(4096)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += connection.recv(4096)
    return head + b"\r\n\r\n" + body


def answer(document: Any, head: str = "") -> bytes:
    body = json.dumps(document).encode()
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


GRANT = {"access_token": TOKEN, "token_type": "bearer", "expires_in": 600}


def drip(connection: socket.socket, first: bytes, piece: bytes) -> None:
    """Send *piece* again and again, until the other side has had enough."""
    request_of(connection)
    connection.sendall(first)
    while True:
        connection.sendall(piece)
        readable, _, _ = select.select([connection], [], [], 0.05)
        if readable and not connection.recv(1):
            return


def flood(connection: socket.socket, first: bytes, piece: bytes) -> None:
    """Send *piece* as fast as it goes, until the other side has had enough."""
    request_of(connection)
    connection.sendall(first)
    while True:
        connection.sendall(piece)


def silence(connection: socket.socket) -> None:
    """Read until the other side has had enough."""
    while connection.recv(4096):
        pass


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

SLOW = {
    "says nothing": silence,
    "drips its status": lambda connection: drip(connection, b"HTTP/1.1 200 ", b"O"),
    "drips headers": lambda connection: drip(connection, HEAD + b"X: ", b"y"),
    "drips a body": lambda connection: drip(connection, HEAD + b"Content-Length: 60000\r\n\r\n", b" "),
    "drips a body without an end": lambda connection: drip(connection, HEAD + b"\r\n", b" "),
    "drips chunks": lambda connection: drip(connection, CHUNKED, b"1\r\n \r\n"),
}


@pytest.mark.parametrize("serve", [pytest.param(serve, id=name) for name, serve in SLOW.items()])
def test_a_slow_endpoint_costs_no_more_than_the_time_there_is(serve: Callable[..., None]) -> None:
    """However its bytes come: the fetch ends, its connection and its thread, too."""
    with Endpoint(serve) as endpoint:
        with pytest.raises(TimeoutError) as caught:
            endpoint.source().token(1.0)
        assert not is_final(caught.value)
        assert endpoint.ended.wait(WAIT)  # hung up on: drip() would never end by itself


def test_the_timeout_of_the_configuration_ends_it_earlier() -> None:
    """``timeout`` is a limit within open_timeout."""
    with Endpoint(silence) as endpoint:
        with pytest.raises(TimeoutError):
            endpoint.source(timeout=0.5).token(10 * WAIT)
        assert endpoint.ended.wait(WAIT)


def test_a_fetch_counts_against_open_timeout() -> None:
    """A link whose endpoint does not answer fails when its dial would."""
    with Endpoint(silence) as endpoint:
        oauth2 = {**OAUTH2, "token_url": endpoint.url}
        began = time.monotonic()
        with WebSocketExecutor("ws://127.0.0.1:9/wove", security=oauth2, open_timeout=0.5) as pool:
            with pytest.raises(TimeoutError):
                pool.submit(twice, 1).result(WAIT)
        assert time.monotonic() - began < WAIT
        assert endpoint.ended.wait(WAIT)


FLOODS = {
    "body": lambda connection: flood(connection, HEAD + b"\r\n", b" " * 65536),
    "chunks": lambda connection: flood(connection, CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "headers": lambda connection: flood(connection, HEAD, b"X: " + b"y" * 1000 + b"\r\n"),
    "one header": lambda connection: flood(connection, HEAD + b"X: ", b"y" * 65536),
}


@pytest.mark.parametrize("serve", [pytest.param(serve, id=name) for name, serve in FLOODS.items()])
def test_an_endless_answer_is_not_read(serve: Callable[..., None]) -> None:
    """What is too long ends the fetch long before its time is over."""
    with Endpoint(serve) as endpoint:
        with pytest.raises((ConnectionError, errors.HandshakeRejected)) as caught:
            endpoint.source().token(10 * WAIT)
        assert not isinstance(caught.value, TimeoutError)
        assert endpoint.ended.wait(WAIT)


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So are the passwords of a .netrc."""
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        seen.append(request_of(connection))
        connection.sendall(answer(GRANT))

    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login other password other\n", encoding="utf-8")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Endpoint(serve) as endpoint:
        for method in ("client_secret_basic", "client_secret_post"):
            assert endpoint.source(auth_method=method).token(WAIT) == TOKEN
    assert b"\r\nAuthorization: Basic YmlsbGluZzpj" in seen[0]
    assert b"Authorization" not in seen[1] and b"client_secret=" + CANARY.encode() in seen[1]


def test_a_redirect_is_not_followed() -> None:
    """Not even to the same place."""
    asked = []

    def serve(connection: socket.socket) -> None:
        asked.append(request_of(connection))
        connection.sendall(b"HTTP/1.1 307 Moved\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n")

    with Endpoint(serve) as endpoint, pytest.raises(AuthenticationRejected, match="not followed"):
        endpoint.source().token(WAIT)
    assert len(asked) == 1


def test_nobody_there() -> None:
    """A closed port is a ConnectionError that may pass."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/token"
        with pytest.raises(ConnectionError, match="Connection refused") as caught:
            TokenSource(SecurityConfig({**OAUTH2, "token_url": url}), None).token(WAIT)
    assert not is_final(caught.value)


def test_a_local_name_must_mean_this_machine() -> None:
    """Without TLS the secret is sent only to a peer with an address of this machine."""
    seen: list[bytes] = []
    with Endpoint(lambda connection: seen.append(connection.recv(1))) as endpoint:
        config = SecurityConfig({**OAUTH2, "token_url": endpoint.url})
        with pytest.raises(RuntimeError, match="address of another machine"):
            TokenSource(config, lambda address: False).token(WAIT)
        assert endpoint.ended.wait(WAIT)
    assert seen in ([], [b""])


def test_nothing_of_it_is_logged(service: ServiceThread, caplog: pytest.LogCaptureFixture) -> None:
    """At no level, by no library: not the secret, however it is written, nor the token."""

    def serve(connection: socket.socket) -> None:
        request_of(connection)
        connection.sendall(answer(GRANT))

    with caplog.at_level(logging.DEBUG), Endpoint(serve) as endpoint:
        with WebSocketExecutor(service.url, security={**OAUTH2, "token_url": endpoint.url}) as pool:
            assert pool.submit(twice, 8).result(WAIT) == 16
    assert "urllib3" in caplog.text and "connected to" in caplog.text
    for text in (CANARY, "YmlsbGluZzpj", TOKEN):
        assert text not in caplog.text


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """An authority that nobody trusts by default."""
    return trustme.CA()


def test_tls_to_the_endpoint(authority: trustme.CA, tmp_path: Path) -> None:
    """With ca_file; without it the certificate is refused, which is final, and nothing was sent."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        seen.append(request_of(connection))
        connection.sendall(answer(GRANT))

    with Endpoint(serve, context) as endpoint:
        with pytest.raises(ssl.SSLCertVerificationError) as caught:
            endpoint.source().token(WAIT)
        assert is_final(caught.value) and "certificate of the token endpoint" in str(caught.value)
        assert seen == []
        assert endpoint.source(ca_file=str(ca_file)).token(WAIT) == TOKEN
        (tmp_path / "no.pem").write_text("nothing", encoding="utf-8")
        for name in ("no.pem", "gone.pem"):
            with pytest.raises(RuntimeError, match=f"ca_file .*{name}"):
                endpoint.source(ca_file=str(tmp_path / name)).token(WAIT)


def test_a_slow_tls_handshake(authority: trustme.CA) -> None:
    """The time is over inside of TLS, too."""
    with Endpoint(silence) as endpoint:
        url = endpoint.url.replace("http:", "https:")
        with pytest.raises(TimeoutError):
            TokenSource(SecurityConfig({**OAUTH2, "token_url": url}), None).token(1.0)
        assert endpoint.ended.wait(WAIT)


def test_a_slow_answer_over_tls(authority: trustme.CA, tmp_path: Path) -> None:
    """A drip inside of TLS is hung up on as well."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    with Endpoint(SLOW["drips a body"], context) as endpoint:
        with pytest.raises(TimeoutError):
            endpoint.source(ca_file=str(ca_file)).token(2.0)
        assert endpoint.ended.wait(WAIT)
