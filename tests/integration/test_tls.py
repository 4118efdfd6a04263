"""TLS: who is trusted, what is refused, and both directions busy at once."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trustme
from ws_peer import (
    CLOSE,
    PATIENCE,
    TEXT,
    Listener,
    Peer,
    dial_to,
    dialled,
    frame,
    in_thread,
    options_for,
    text_of,
)

from wove_ws_sync import HandshakeRejected
from wove_ws_sync.transport import TransportClosed, WebSocketTransport

MIB = 1024 * 1024
DAY = datetime.timedelta(days=1)
OPEN_TIMEOUT = 1.0
SLACK = 3.0
SOAK_SECONDS = float(os.environ.get("WOVE_WS_SOAK_SECONDS", "3"))


class Authority:
    """A certificate authority whose files a test can name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.file = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str) -> trustme.LeafCert:
        """Return a certificate for *names*."""
        return self._ca.issue_cert(*names)

    def server(self, *names: str, verify: bool = False) -> ssl.SSLContext:
        """Return a server's settings with a certificate for *names*; *verify* asks clients for one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.issue(*names).configure_cert(context)
        if verify:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def pem(self, name: str, *names: str) -> tuple[str, str]:
        """Write a certificate and its key; return both paths."""
        leaf = self.issue(*names)
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        leaf.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return str(certificate), str(key)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that the clients of this module trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


def hello(peer: Peer) -> None:
    """Accept the upgrade, say hello, wait for the end."""
    peer.upgrade().send(frame(TEXT, b"hello"))
    peer.drain()


def refused(port: int, kind: type[BaseException], **config: Any) -> BaseException:
    """Dial over TLS; return the error, which must come in time and name host and port."""
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        dial_to(options_for(port, scheme="wss", open_timeout=OPEN_TIMEOUT, **config))
    assert time.monotonic() - started < OPEN_TIMEOUT + SLACK
    if kind is not TimeoutError:
        assert f":{port}" in str(caught.value)
    return caught.value


# -- trust ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_trusted(authority: Authority, host: str) -> None:
    """A certificate of the configured authority for this name or address is accepted."""
    with (
        Listener(hello, context=authority.server("127.0.0.1", "localhost")) as listener,
        dialled(options_for(listener.port, scheme="wss", host=host, ca_file=authority.file)) as transport,
    ):
        assert transport.recv() == b"hello"


def test_f40_untrusted(authority: Authority) -> None:
    """A certificate of an unknown authority is an SSLCertVerificationError, and no request is sent."""
    requests: list[bytes] = []
    context = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.issue_cert("127.0.0.1").configure_cert(server)
    with Listener(lambda peer: requests.append(peer.sock.recv(1)), context=server) as listener:
        for config in ({"ca_file": authority.file}, {}):
            error = refused(listener.port, ssl.SSLCertVerificationError, **config)
            assert isinstance(error, ssl.SSLCertVerificationError)
            assert error.verify_code
            assert "certificate" in str(error) and "executor_config.ca_file" in str(error)
    assert requests == []


def test_f40_wrong_name(authority: Authority) -> None:
    """A certificate for another name is refused; server_hostname says which name is right."""
    with Listener(hello, context=authority.server("worker.example")) as listener:
        error = refused(listener.port, ssl.SSLCertVerificationError, ca_file=authority.file)
        assert "mismatch" in str(error)
        options = options_for(
            listener.port, scheme="wss", ca_file=authority.file, server_hostname="worker.example"
        )
        with dialled(options) as transport:
            assert transport.recv() == b"hello"


def test_f40_expired() -> None:
    """A certificate that has expired is refused, and the error says so."""
    ca, server = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    ca.issue_cert("127.0.0.1", not_before=past, not_after=past + DAY).configure_cert(server)
    with Listener(hello, context=server) as listener, ca.cert_pem.tempfile() as file:
        error = refused(listener.port, ssl.SSLCertVerificationError, ca_file=file)
        assert "expired" in str(error)


def test_insecure(caplog: pytest.LogCaptureFixture) -> None:
    """insecure=True verifies nothing, and says so in the log at each dial."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("elsewhere.example").configure_cert(server)
    with Listener(hello, context=server) as listener:
        options = options_for(listener.port, scheme="wss", insecure=True)
        for _ in range(2):
            with dialled(options) as transport:
                assert transport.recv() == b"hello"
    warned = [record for record in caplog.records if record.name == "wove_ws_sync.host"]
    assert [record.levelno for record in warned] == [logging.WARNING] * 2
    assert "not verified" in warned[0].getMessage()


def test_f43_key_log_is_announced(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SSLKEYLOGFILE in the environment, which gives the session away, is named in the log."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    with (
        Listener(hello, context=authority.server("127.0.0.1")) as listener,
        dialled(options_for(listener.port, scheme="wss", ca_file=authority.file)),
    ):
        assert "SSLKEYLOGFILE" in caplog.text


def test_f40_authority_file_is_read_at_each_dial(authority: Authority, tmp_path: Path) -> None:
    """A rotated ca_file is picked up by the next dial."""
    rotated = tmp_path / "rotated.pem"
    trustme.CA().cert_pem.write_to_path(str(rotated))
    with Listener(hello, context=authority.server("127.0.0.1")) as listener:
        options = options_for(listener.port, scheme="wss", ca_file=str(rotated))
        with pytest.raises(ssl.SSLCertVerificationError):
            dial_to(options)
        rotated.write_bytes(Path(authority.file).read_bytes())
        with dialled(options) as transport:
            assert transport.recv() == b"hello"


# -- client certificates ---------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_f40_client_certificate(authority: Authority, version: ssl.TLSVersion) -> None:
    """A worker that asks for a client certificate accepts ours; without one the error names the cause."""
    context = authority.server("127.0.0.1", verify=True)
    context.maximum_version = version
    certificate, key = authority.pem("client", "client.example")
    with Listener(hello, context=context) as listener:
        config: dict[str, Any] = {"scheme": "wss", "ca_file": authority.file}
        options = options_for(listener.port, client_cert_file=certificate, client_key_file=key, **config)
        with dialled(options) as transport:
            assert transport.recv() == b"hello"
    with Listener(hello, context=context) as listener:
        error = refused(listener.port, ssl.SSLError, ca_file=authority.file)
        assert not isinstance(error, ssl.SSLCertVerificationError)
        if version is ssl.TLSVersion.TLSv1_3:
            assert "client certificate" in str(error)


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    """A missing or malformed file, or a key with a password, is an error that names it; nobody is asked."""
    certificate, key = authority.pem("locked", "client.example")
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked, nonsense = tmp_path / "locked.key", tmp_path / "nonsense.pem"
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    nonsense.write_text("nonsense")
    missing = str(tmp_path / "missing.pem")
    cases: list[tuple[dict[str, Any], type[OSError], str]] = [
        ({"ca_file": missing}, FileNotFoundError, "ca_file"),
        ({"ca_file": str(nonsense)}, ssl.SSLError, "ca_file"),
        ({"client_cert_file": missing}, FileNotFoundError, "client_cert_file"),
        ({"client_cert_file": str(nonsense)}, ssl.SSLError, "client_cert_file"),
        ({"client_cert_file": certificate, "client_key_file": str(locked)}, ssl.SSLError, "client_cert_file"),
    ]
    for config, kind, named in cases:
        with pytest.raises(kind, match=f"executor_config.{named}"):
            dial_to(options_for(1, scheme="wss", **config))


# -- broken servers ----------------------------------------------------------------------


def test_f40_old_tls(authority: Authority) -> None:
    """A server that knows TLS 1.1 only is refused."""
    context = authority.server("127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with Listener(hello, context=context) as listener:
        refused(listener.port, ssl.SSLError, ca_file=authority.file)


def test_plain_server() -> None:
    """A server without TLS behind a wss:// URL is an SSLError."""
    with Listener(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as listener:
        assert "WRONG_VERSION_NUMBER" in str(refused(listener.port, ssl.SSLError))


def test_tls_server_behind_ws(authority: Authority) -> None:
    """A TLS server behind a ws:// URL is not mistaken for a worker."""
    context = authority.server("127.0.0.1")
    with Listener(hello, context=context) as listener, pytest.raises(ConnectionError):
        dial_to(options_for(listener.port, open_timeout=OPEN_TIMEOUT))


@pytest.mark.parametrize("start", [b"", b"\x16\x03\x03"], ids=["silent", "in the middle"])
def test_f1_no_answer(start: bytes) -> None:
    """A TLS handshake that does not end is a TimeoutError at open_timeout."""

    def script(peer: Peer) -> None:
        peer.send(start)
        peer.drain()

    with Listener(script) as listener:
        error = refused(listener.port, TimeoutError)
        assert str(error) == "timed out during opening handshake"


def test_closed_during_tls_handshake() -> None:
    """A server that hangs up at once is a ConnectionError."""
    with Listener(lambda peer: peer.sock.recv(1)) as listener:
        refused(listener.port, ConnectionError)


def test_closed_after_tls_handshake(authority: Authority) -> None:
    """A server that hangs up right after the TLS handshake may have refused our certificate: it is said."""
    with Listener(lambda peer: peer.read_request(), context=authority.server("127.0.0.1")) as listener:
        error = refused(listener.port, ssl.SSLError, ca_file=authority.file)
        assert "client certificate" in str(error)


def test_f2_slow_answer_inside_tls(authority: Authority) -> None:
    """One byte of the answer every 200 ms does not move the deadline, nor does silence."""

    def script(peer: Peer) -> None:
        peer.read_request()
        pause = threading.Event()
        with contextlib.suppress(OSError):
            for byte in b"HTTP/1.1 101 Switching Protocols":
                peer.send(bytes([byte]))
                pause.wait(0.2)

    with Listener(script, context=authority.server("127.0.0.1")) as listener:
        refused(listener.port, TimeoutError, ca_file=authority.file)


def test_rejected_inside_tls(authority: Authority) -> None:
    """An HTTP refusal keeps its meaning inside TLS."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.send(b"HTTP/1.1 404 No\r\nContent-Length: 100000000\r\n\r\nplanted-body")
        peer.drain()

    with Listener(script, context=authority.server("127.0.0.1")) as listener:
        error = refused(listener.port, HandshakeRejected, ca_file=authority.file)
        assert isinstance(error, HandshakeRejected)
        assert error.status == 404


def test_tls_through_a_proxy(authority: Authority) -> None:
    """Through CONNECT the certificate checked is the worker's, and the proxy sees no request of ours."""
    seen = bytearray()

    def proxy_script(peer: Peer) -> None:
        peer.read_request()
        with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENCE) as onward:
            peer.send(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n")
            thread = threading.Thread(target=copy, args=(onward, peer.sock, bytearray()))
            thread.start()
            copy(peer.sock, onward, seen)
            thread.join(PATIENCE)

    with (
        Listener(hello, context=authority.server("127.0.0.1")) as listener,
        Listener(proxy_script) as proxy,
    ):
        options = options_for(
            listener.port, scheme="wss", ca_file=authority.file, proxy=f"http://127.0.0.1:{proxy.port}"
        )
        with dialled(options) as transport:
            assert transport.recv() == b"hello"
        proxy.result()
        assert seen
        assert b"GET" not in seen


def copy(source: socket.socket, target: socket.socket, seen: bytearray) -> None:
    """Pass bytes on until either side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            seen += data
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


# -- messages ------------------------------------------------------------------------------


@contextlib.contextmanager
def tls_pair(authority: Authority, script: Any) -> Iterator[tuple[WebSocketTransport, Listener]]:
    """Dial a TLS server that accepts the upgrade and then plays *script*."""
    with (
        Listener(lambda peer: script(peer.upgrade()), context=authority.server("127.0.0.1")) as listener,
        dialled(options_for(listener.port, scheme="wss", ca_file=authority.file)) as transport,
    ):
        yield transport, listener


@pytest.mark.parametrize("size", [0, 1, 16384, 65536, MIB + 1, 64 * MIB])
def test_message_both_ways(authority: Authority, size: int) -> None:
    """A message of any size passes TLS both ways, byte for byte."""
    data = text_of(size)

    def script(peer: Peer) -> None:
        peer.send(frame(TEXT, peer.recv_message()))
        peer.drain()

    with tls_pair(authority, script) as (transport, _):
        sending = in_thread(transport.pump, transport.post(data), PATIENCE)
        assert transport.recv() == data
        assert sending.result(PATIENCE)


def test_close_code_inside_tls(authority: Authority) -> None:
    """The close code is kept, with and without a TLS goodbye behind it."""
    for goodbye in (True, False):

        def script(peer: Peer, goodbye: bool = goodbye) -> None:
            peer.send(frame(CLOSE, b"\x03\xf4"))
            assert isinstance(peer.sock, ssl.SSLSocket)
            with contextlib.suppress(OSError):
                if goodbye:
                    peer.sock.unwrap()
                else:
                    peer.sock.close()

        with tls_pair(authority, script) as (transport, _):
            with pytest.raises(TransportClosed) as caught:
                transport.recv()
            assert caught.value.close_code == 1012


def test_peer_that_stops_reading(authority: Authority) -> None:
    """On TLS too pump() keeps its deadline, a later one goes on, and abort() wakes everybody."""
    read = threading.Event()
    data = text_of(32 * MIB)

    def script(peer: Peer) -> bytes:
        read.wait(PATIENCE)
        message = peer.recv_message()
        read.clear()
        return message

    with tls_pair(authority, script) as (transport, listener):
        parcel = transport.post(data)
        started = time.monotonic()
        assert not transport.pump(parcel, 0.3)
        assert time.monotonic() - started < SLACK
        read.set()
        assert transport.pump(parcel, PATIENCE)
        assert listener.result() == data


def test_abort_inside_tls(authority: Authority) -> None:
    """abort() wakes a blocked reader and a blocked writer, and what is left to send is still encrypted."""
    release = threading.Event()

    def script(peer: Peer) -> None:
        release.wait(PATIENCE)

    with tls_pair(authority, script) as (transport, _):
        try:
            reading = in_thread(transport.recv)
            writing = in_thread(transport.pump, transport.post(b"x" * 64 * MIB), None)
            pause = threading.Event()
            while not transport._wire.pending:
                pause.wait(0.005)
            transport.abort()
            for future in (reading, writing):
                with pytest.raises(TransportClosed):
                    future.result(PATIENCE)
            assert b"x" * 100 not in bytes(transport._wire._tail)
        finally:
            release.set()


# -- both directions at once ---------------------------------------------------------------


SERVER = Path(__file__).with_name("duplex_server.py")


def duplex() -> ModuleType:
    """Return the server's module, for its payloads."""
    spec = importlib.util.spec_from_file_location("duplex_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def duplex_server(authority: Authority) -> Iterator[int]:
    """Run the server in a process of its own; yield its port."""
    command = [sys.executable, str(SERVER), *authority.pem("duplex", "127.0.0.1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.timeout(SOAK_SECONDS + 110)
def test_f41_full_duplex(authority: Authority) -> None:
    """16 threads send while the server sends and changes its TLS keys: nothing lost, torn or out of order."""
    payload = duplex().payload
    stop = threading.Event()
    with (
        duplex_server(authority) as port,
        dialled(options_for(port, scheme="wss", ca_file=authority.file)) as transport,
    ):
        write_lock = threading.Lock()

        def talk(sender: int) -> int:
            count = 0
            while not stop.is_set():
                parcel = transport.post(b"%d %d " % (sender, count) + payload(sender, count))
                with write_lock:
                    assert transport.pump(parcel, PATIENCE)
                count += 1
            return count

        def listen() -> tuple[int, bytes]:
            count = 0
            while True:
                message = bytes(transport.recv())
                if message.startswith((b"total", b"wrong")):
                    return count, message
                number, _, rest = message.partition(b" ")
                assert int(number) == count
                assert rest == payload(99, count)
                count += 1

        talking = [in_thread(talk, sender) for sender in range(16)]
        listening = in_thread(listen)
        stop.wait(SOAK_SECONDS)
        stop.set()
        total = sum(future.result(PATIENCE) for future in talking)
        with write_lock:
            assert transport.pump(transport.post(b"end"), PATIENCE)
        received, verdict = listening.result(PATIENCE)
        word, *numbers = verdict.split()
        assert word == b"total", verdict
        messages, updates = map(int, numbers)
        assert messages == total > 100
        assert received > 100
        assert updates >= received // 20 > 4
