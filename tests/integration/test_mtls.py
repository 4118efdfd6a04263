"""Host and worker service with certificates on both sides, as the command ``certs`` makes them."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import WAIT, link_of, until
from service_thread import fetch
from tls_memory import client_context, write_pair, write_set
from ws_peer import Listener, Peer, dial_to, dialled, frame, options_for

from wove_ws_sync import SyncWebSocketEnvironmentExecutor, WebSocketExecutor
from wove_ws_sync._certificates import Authority, Certificate
from wove_ws_sync.cli import main
from wove_ws_sync.testing import LoopbackWorker, close_links

AUTHORITY, ANOTHER = Authority.make(), Authority.make()
WRONG_PIN = "sha256//" + "A" * 43 + "="


def service(folder: Path, *args: str, client_ca: bool = True) -> LoopbackWorker:
    """Return a worker service, not started, with the files in *folder*."""
    tls = ["--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key")]
    if client_ca:
        tls += ["--tls-client-ca", str(folder / "ca.pem")]
    return LoopbackWorker(workers=2, args=[*tls, *args])


def host(
    worker: LoopbackWorker, folder: Path, *, certificate: str = "client", **config: Any
) -> dict[str, Any]:
    """Return an executor_config for *worker* with the files in *folder*; "" is no client certificate."""
    config = {**worker.config, "ca_file": str(folder / "ca.pem"), **config}
    if certificate:
        config["client_cert_file"] = str(folder / f"{certificate}.pem")
        config["client_key_file"] = str(folder / f"{certificate}.key")
    return config


def run(config: dict[str, Any]) -> int:
    """Have the worker say its process id, over a connection of its own."""
    try:
        with WebSocketExecutor(**config) as pool:
            return pool.submit(os.getpid).result(WAIT)
    finally:
        close_links()


def refused(config: dict[str, Any]) -> ssl.SSLError:
    """Return the error of a connection that one of the two sides does not accept."""
    executor = SyncWebSocketEnvironmentExecutor()
    with pytest.raises(ssl.SSLError) as caught:
        executor.start(environment_name="e", environment_config=config, run_config={})
    return caught.value


def port_of(worker: LoopbackWorker) -> int:
    return int(worker.url.rpartition(":")[2].partition("/")[0])


@contextlib.contextmanager
def tls_to(worker: LoopbackWorker, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """Do a TLS handshake with the worker service and nothing else."""
    with (
        socket.create_connection(("127.0.0.1", port_of(worker)), WAIT) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        yield tls


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``certs`` makes, of an authority that nobody else has."""
    folder = tmp_path_factory.mktemp("made") / "tls"
    assert main(["certs", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def worker(made: Path) -> Iterator[LoopbackWorker]:
    """A worker service that asks hosts for a certificate."""
    with service(made) as running:
        yield running


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Files of an authority that this worker service does not know."""
    return write_set(tmp_path / "foreign", ANOTHER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that a test changes."""
    return write_set(tmp_path / "tls", AUTHORITY)


# -- who gets in ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_both_sides_show_a_certificate(name: str, worker: LoopbackWorker, made: Path) -> None:
    """The files of ``certs``, as they are, for the names that they are for."""
    url = worker.url.replace("127.0.0.1", name)
    assert run(host(worker, made, url=url)) == worker.pid


def test_f40_no_client_certificate(worker: LoopbackWorker, made: Path) -> None:
    """The error says what the worker service may want; no run got there."""
    error = refused(host(worker, made, certificate=""))
    assert not isinstance(error, ssl.SSLCertVerificationError)
    assert "client certificate" in str(error)


def test_f40_a_client_certificate_of_a_foreign_authority(
    worker: LoopbackWorker, made: Path, foreign: Path
) -> None:
    """It is refused by the worker service, although the host trusts that."""
    assert "client certificate" in str(refused(host(worker, foreign, ca_file=str(made / "ca.pem"))))


def test_f40_the_certificate_of_the_worker_is_no_client(worker: LoopbackWorker, made: Path) -> None:
    """Whoever has the worker's key only cannot send it runs."""
    assert "client certificate" in str(refused(host(worker, made, certificate="server")))


def test_f40_a_host_cannot_pass_for_the_worker(made: Path) -> None:
    """A host's certificate, of the same authority, is refused where a worker's is expected."""
    with LoopbackWorker(
        args=["--tls-cert", str(made / "client.pem"), "--tls-key", str(made / "client.key")]
    ) as running:
        error = refused(host(running, made))
    assert isinstance(error, ssl.SSLCertVerificationError) and "purpose" in str(error)


def test_f40_a_worker_that_has_expired(folder: Path) -> None:
    """The host refuses it, and the worker's own log has said so since its start."""
    write_pair(folder, "server", AUTHORITY.server(["127.0.0.1"], -0.01))
    with service(folder) as running:
        error = refused(host(running, folder))
        until(lambda: "has expired: hosts refuse it" in running.log)
    assert isinstance(error, ssl.SSLCertVerificationError) and "expired" in str(error)


def test_f40_a_host_that_has_expired(folder: Path) -> None:
    """The worker service refuses it."""
    write_pair(folder, "client", AUTHORITY.client("a host", -0.01))
    with service(folder) as running:
        assert "client certificate" in str(refused(host(running, folder)))


def test_a_worker_that_expires_soon(folder: Path) -> None:
    """A warning at the start, and the moment among the metrics."""
    write_pair(folder, "server", AUTHORITY.server(["127.0.0.1"], 3))
    with service(folder, client_ca=False) as running:
        until(lambda: "ends in 3.0 days: renew it" in running.log)
        text = fetch(port_of(running), "/metrics", context=client_context(folder / "ca.pem")).text
    [line] = [line for line in text.splitlines() if line.startswith("wove_ws_certificate_expiry_")]
    name, value = line.split()
    assert name == "wove_ws_certificate_expiry_timestamp_seconds"
    assert float(value) == Certificate((folder / "server.pem").read_bytes()).ends.timestamp()


# -- versions -----------------------------------------------------------------------------------


def test_f40_a_host_with_tls_1_2_only(worker: LoopbackWorker, made: Path) -> None:
    """A worker service with --tls-min-version 1.3 refuses it, and serves others; by default it may come."""
    context = client_context(made / "ca.pem", (made / "client.pem", made / "client.key"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with tls_to(worker, context) as tls:
        assert tls.version() == "TLSv1.2"
    with service(made, "--tls-min-version", "1.3") as running:
        # The event loop of the worker ends the connection without the alert that would say why.
        with pytest.raises((ssl.SSLError, ConnectionResetError)), tls_to(running, context):
            pass
        assert run(host(running, made, tls_min_version="1.3")) == running.pid


def listening(folder: Path, version: ssl.TLSVersion, script: Any) -> Listener:
    """Return a server of that version of TLS at most."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    return Listener(script, context=context)


def hello(peer: Peer) -> None:
    """Accept the upgrade, say hello, wait for the end."""
    peer.upgrade().send(frame(1, b"hello"))
    peer.drain()


def test_f40_a_worker_with_tls_1_2_only(folder: Path) -> None:
    """A host with tls_min_version="1.3" refuses it; by default it is good enough."""
    config = {"scheme": "wss", "ca_file": str(folder / "ca.pem")}
    with listening(folder, ssl.TLSVersion.TLSv1_2, hello) as listener:
        with pytest.raises(ssl.SSLError, match=f":{listener.port} failed") as caught:
            dial_to(options_for(listener.port, tls_min_version="1.3", **config))
        assert not isinstance(caught.value, ssl.SSLCertVerificationError)
        with dialled(options_for(listener.port, **config)) as transport:
            assert transport.recv() == b"hello"


def test_a_version_needs_certificates() -> None:
    """--tls-min-version without a certificate would protect nothing: exit code 2."""
    command = [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--tls-min-version", "1.3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--tls-min-version needs --tls-cert" in done.stderr


# -- pins -----------------------------------------------------------------------------------------


def pin(folder: Path, name: str = "server") -> str:
    return Certificate((folder / f"{name}.pem").read_bytes()).pin


def test_a_pinned_key(worker: LoopbackWorker, made: Path) -> None:
    """One of several, as for a change of keys."""
    assert run(host(worker, made, pinned_keys=[WRONG_PIN, pin(made)])) == worker.pid


def test_a_key_that_is_not_pinned(folder: Path) -> None:
    """Refused in spite of its authority, before a request with credentials leaves; the error has the pin."""
    requests: list[bytes] = []
    config = {"ca_file": str(folder / "ca.pem"), "security": {"secret": "planted-secret-0123"}}
    # Neither the CA's key nor that of another certificate will do.
    pins = [WRONG_PIN, pin(folder, "ca"), pin(folder, "client")]
    with listening(
        folder, ssl.TLSVersion.TLSv1_3, lambda peer: requests.append(peer.sock.recv(1))
    ) as listener:
        for insecure in (False, True):
            with pytest.raises(ssl.SSLCertVerificationError) as caught:
                dial_to(
                    options_for(listener.port, scheme="wss", pinned_keys=pins, insecure=insecure, **config)
                )
            assert f"127.0.0.1:{listener.port} was refused: its key is {pin(folder)}, " in str(caught.value)
            assert "planted" not in str(caught.value)
    assert set(requests) <= {b""}


def test_a_wrong_pin_is_final(worker: LoopbackWorker, made: Path) -> None:
    """Nobody dials again behind it, as for any certificate that is refused."""
    config = host(worker, made, pinned_keys=WRONG_PIN)
    with WebSocketExecutor(**config) as pool:
        with pytest.raises(ssl.SSLCertVerificationError, match="pinned_keys"):
            pool.submit(os.getpid).result(WAIT)
        assert link_of(pool).stats()["dials"] == 1


def test_a_pin_adds_to_the_authority(worker: LoopbackWorker, made: Path, foreign: Path) -> None:
    """The right key in a certificate that nobody vouches for is refused, unless that is not asked for."""
    config = host(worker, made, ca_file=str(foreign / "ca.pem"), pinned_keys=pin(made))
    error = refused(config)
    assert isinstance(error, ssl.SSLCertVerificationError) and "its key is" not in str(error)
    assert run({**config, "insecure": True}) == worker.pid


def test_a_pin_makes_a_self_signed_certificate_trustworthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """insecure=True with a pin accepts that key, whatever the name, and no other."""
    own = Authority.make()
    write_pair(tmp_path, "server", own.pair)
    with service(tmp_path, client_ca=False) as running:
        config = {**running.config, "insecure": True, "pinned_keys": pin(tmp_path)}
        assert run(config) == running.pid
        assert "is not verified, only its key is (pinned_keys)" in caplog.text
        assert "its key is" in str(refused({**config, "pinned_keys": WRONG_PIN}))


# -- renewal --------------------------------------------------------------------------------------


def serial(worker: LoopbackWorker, folder: Path) -> Any:
    """Return the serial number of the certificate that the worker service shows now."""
    with tls_to(worker, client_context(folder / "ca.pem")) as tls:
        return (tls.getpeercert() or {})["serialNumber"]


@pytest.mark.parametrize("new_keys", [False, True])
def test_f40_renewed_by_the_command(new_keys: bool, tmp_path: Path) -> None:
    """Both certificates are replaced under a connection: it goes on, and the next has the new ones."""
    folder = tmp_path / "tls"
    assert main(["certs", str(folder), "--days", "1"]) == 0
    old_pin = pin(folder)
    with service(folder) as running, WebSocketExecutor(**host(running, folder)) as pool:
        assert pool.submit(os.getpid).result(WAIT) == running.pid
        before = serial(running, folder)
        assert main(["certs", str(folder), "--renew", *(["--new-keys"] if new_keys else [])]) == 0
        assert serial(running, folder) != before
        assert pool.submit(os.getpid).result(WAIT) == running.pid
        assert link_of(pool).stats()["dials"] == 1
        config = host(running, folder, pinned_keys=old_pin)
        if new_keys:
            assert pin(folder) in str(refused(config))
        else:
            assert run(config) == running.pid
        assert "were read anew" in running.log and "cannot be used" not in running.log


def test_f40_a_renewed_authority_on_both_sides(folder: Path, foreign: Path) -> None:
    """All files are replaced by those of another authority, on both sides: the next dial has all of them."""
    with service(folder) as running:
        config = host(running, folder)
        assert run(config) == running.pid
        for path in foreign.iterdir():
            os.replace(path, folder / path.name)
        assert run(config) == running.pid
        old = write_set(folder / "old", AUTHORITY)
        assert "client certificate" in str(refused(host(running, old, ca_file=str(folder / "ca.pem"))))


def test_f40_files_that_were_spoilt(folder: Path) -> None:
    """The worker service goes on with what it has, says so once, and takes the next ones that are right."""
    with service(folder) as running:
        config, good = host(running, folder), (folder / "server.pem").read_bytes()
        # At one stroke: the service looks at the files as it starts, and a half written one is another fault.
        spoilt = folder / "spoilt.pem"
        spoilt.write_text("nonsense")
        spoilt.replace(folder / "server.pem")
        for _ in range(2):
            assert run(config) == running.pid
        until(lambda: "cannot be used" in running.log)
        assert running.log.count("cannot be used") == 1
        (folder / "server.pem").write_bytes(good)
        assert run(config) == running.pid
        until(lambda: "were read anew" in running.log)
