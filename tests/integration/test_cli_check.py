"""``wove-ws-sync check``: every way it can go, against real servers, in text and in JSON."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from fault_proxy import FaultProxy
from raw_host import occupy, wait_until
from scripted_worker import pickled
from ws_peer import PING, PONG, TEXT, FullBacklog, Listener, Peer, frame

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.cli import main
from wove_ws_sync.testing import LoopbackWorker

STEPS = ["options", "name", "tcp", "proxy", "tls", "handshake", "extensions", "roundtrip", "run", "clock"]
BRIDGE = Path(__file__).with_name("stdio_bridge.py")
DAY = datetime.timedelta(days=1)
SECRET = "planted-secret-0123456789"
# For what answers: only a failing test waits so long. For what does not, every test does.
LONG, SHORT = ("--timeout", "30"), ("--timeout", "1")
COMMAND = [sys.executable, "-m", "wove_ws_sync", "check"]


class Result:
    """What one call said, as text and as JSON."""

    def __init__(self, code: int, text: str, document: dict[str, Any]) -> None:
        self.code, self.text, self.document = code, text, document
        self.steps = {step["name"]: step for step in document["steps"]}

    def of(self, status: str) -> list[str]:
        """Return the names of the steps with that status."""
        return [name for name, step in self.steps.items() if step["status"] == status]

    @property
    def failure(self) -> dict[str, Any]:
        """Return the one step that failed, checked to have cause and remedy, and the rest to be skipped."""
        [name] = self.of("fail")
        step: dict[str, Any] = self.steps[name]
        assert step["detail"] and step["remedy"]
        behind = STEPS[STEPS.index(name) + 1 :]
        assert {self.steps[later]["status"] for later in behind if later != "clock"} <= {"skip"}
        return step


Check = Callable[..., Result]


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run the command twice, with --json and without, and see that both tell the same."""
    monkeypatch.setenv("WOVE_TEST_SECRET", SECRET)

    def call(url: str, *arguments: str, secret: str | None = None) -> Result:
        if secret is not None:
            monkeypatch.setenv("WOVE_TEST_SECRET", secret)
            arguments = ("--security", "env:WOVE_TEST_SECRET", *arguments)
        capfd.readouterr()
        code = main(["check", url, *arguments])
        text, errors = capfd.readouterr()
        assert errors == ""
        json_code = main(["check", url, *arguments, "--json"])
        output, errors = capfd.readouterr()
        assert errors == ""
        document = json.loads(output)
        assert json_code == document["exit_code"] == code
        assert document["ok"] is (code == 0)
        assert [step["name"] for step in document["steps"]] == STEPS
        keys = {"name", "status", "detail", "remedy", "seconds", "facts"}
        assert all(set(step) == keys for step in document["steps"])
        lines = [line.split()[:2] for line in text.splitlines() if "->" not in line]
        assert [name for _, name in lines] == STEPS
        assert [word.lower() for word, _ in lines] == [step["status"] for step in document["steps"]]
        assert text.count("->") == sum(bool(step["remedy"]) for step in document["steps"])
        assert SECRET not in text + output
        return Result(code, text, document)

    return call


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """A worker service, one process for the module."""
    with LoopbackWorker(workers=8) as running:
        yield running


def secret_of(worker: LoopbackWorker) -> str:
    """Return the worker's secret."""
    assert worker.security is not None
    return worker.security["secret"]


class Authority:
    """A certificate authority, and real worker services with certificates of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, trustme.CA()
        self.file = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.file)

    def pem(self, name: str, *names: str, **validity: Any) -> tuple[str, str]:
        """Write a certificate and its key; return both paths."""
        leaf = self.ca.issue_cert(*names, **validity)
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        leaf.private_key_pem.write_to_path(str(key))
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        return str(certificate), str(key)

    def worker(self, *names: str, args: tuple[str, ...] = (), **validity: Any) -> LoopbackWorker:
        """Return a worker service, not started, with a certificate for *names*."""
        certificate, key = self.pem("server", *(names or ("localhost", "127.0.0.1")), **validity)
        return LoopbackWorker(workers=2, args=["--tls-cert", certificate, "--tls-key", key, *args])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority of this test."""
    return Authority(tmp_path)


def now() -> datetime.datetime:
    """Return the time of day."""
    return datetime.datetime.now(datetime.UTC)


# -- all is well -------------------------------------------------------------------------


def test_all_is_well(worker: LoopbackWorker, check: Check) -> None:
    """Every step is ok, with its figures, and the exit code is 0."""
    done = check(worker.url, *LONG, secret=secret_of(worker))
    assert done.code == 0
    assert done.of("skip") == ["proxy", "tls"]
    assert done.of("ok") == [name for name in STEPS if name not in ("proxy", "tls")]
    assert done.document["url"] == worker.url
    steps = done.steps
    assert steps["name"]["facts"]["addresses"] == ["127.0.0.1"]
    assert steps["extensions"]["facts"]["features"] == ["ack", "drain", "json", "progress", "resume", "seal"]
    assert steps["extensions"]["facts"]["other_headers"] == []
    assert steps["handshake"]["facts"]["worker_proved"] is True
    assert steps["extensions"]["facts"]["max_message_bytes"] == 256 * 1024 * 1024
    assert len(steps["extensions"]["facts"]["worker"]) == 32
    assert steps["extensions"]["facts"]["cancels"] == ["coroutines", "queued"]
    assert 0.0 < steps["roundtrip"]["facts"]["min_seconds"] <= steps["roundtrip"]["facts"]["median_seconds"]
    assert steps["run"]["facts"]["warm_seconds"] > 0.0
    assert steps["clock"]["facts"]["source"] == "run"
    assert steps["clock"]["facts"]["limit_seconds"] == 300.0
    assert secret_of(worker) not in done.text + json.dumps(done.document)


def test_a_name_of_this_machine(worker: LoopbackWorker, check: Check) -> None:
    """The addresses of a name are listed."""
    done = check(worker.url.replace("127.0.0.1", "localhost"), *LONG, secret=secret_of(worker))
    assert done.code == 0
    assert "127.0.0.1" in done.steps["name"]["facts"]["addresses"]
    assert "localhost is " in done.steps["name"]["detail"]


def test_as_a_process() -> None:
    """The installed command does the same; its --help has the exit codes."""
    with LoopbackWorker() as worker:
        env = {**os.environ, "WOVE_TEST_SECRET": secret_of(worker)}
        arguments = [worker.url, "--security", "env:WOVE_TEST_SECRET", *LONG]
        done = subprocess.run([*COMMAND, *arguments], env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-2].startswith("ok    run")
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=False).stdout
    for code in (0, 2, 10, 11, 12, 13, 14, 15, 16):
        assert f"\n  {code:<4}" in shown


def test_a_foreign_worker(check: Check) -> None:
    """Wove's own worker behind a plain WebSocket: a warning that it has no extensions, and a real run."""
    process = subprocess.Popen([sys.executable, str(BRIDGE)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        done = check(process.stdout.readline().strip(), *LONG)
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
    assert done.code == 0
    assert done.of("warn") == ["extensions"]
    assert done.steps["extensions"]["facts"]["foreign"] is True
    assert done.steps["run"]["status"] == "ok"


# -- options, names, TCP -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "arguments", "text"),
    [
        ("http://127.0.0.1/wove", (), "ws:// or wss://"),
        (f"ws://me:{SECRET}@127.0.0.1/wove", (), "user name or password"),
        ("ws://worker.example/wove", (), "Use TLS"),
        ("wss://worker.example/wove", (), "requires executor_config.security"),
        ("ws://127.0.0.1/wove", ("--ca-file", "ca.pem"), "needs TLS"),
        ("ws://127.0.0.1/wove", ("--security", SECRET), "'env:VARIABLE'"),
        ("ws://127.0.0.1/wove", ("--security", "env:WOVE_TEST_NOT_SET"), "WOVE_TEST_NOT_SET"),
        ("ws://127.0.0.1/wove", ("--security", "bearer-env:WOVE_TEST_NOT_SET"), "WOVE_TEST_NOT_SET"),
        ("ws://127.0.0.1/wove", ("--header", SECRET), "'Name: value'"),
        ("ws://127.0.0.1/wove", ("--header", f"Host: {SECRET}"), "Host"),
        ("ws://127.0.0.1/wove", ("--proxy", f"socks://me:{SECRET}@127.0.0.1:1"), "http://host:port"),
        ("wss://127.0.0.1/wove", ("--insecure", "--ca-file", "/not/there.pem"), "/not/there.pem"),
        ("wss://127.0.0.1/wove", ("--insecure", "--ca-file", __file__), "not a usable PEM file"),
    ],
)
def test_wrong_options(url: str, arguments: tuple[str, ...], text: str, check: Check) -> None:
    """What an executor would refuse is exit code 2 with the reason; nothing is tried, no secret is shown."""
    done = check(url, *arguments)
    assert done.code == 2
    assert text in done.failure["detail"]
    assert done.of("skip") == STEPS[1:]
    assert done.document["url"] is None


def test_surplus_arguments_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A header that was not quoted is wrong usage, and what is in it stays unsaid."""
    assert main(["check", "ws://127.0.0.1/", "--header", "Authorization:", "Bearer", SECRET]) == 2
    errors = capsys.readouterr().err
    assert "--header 'Name: value'" in errors
    assert SECRET not in errors


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "soon"])
def test_wrong_timeout(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a number above 0."""
    assert main(["check", "ws://127.0.0.1/", f"--timeout={timeout}"]) == 2
    assert "--timeout" in capsys.readouterr().err


def test_an_unresolvable_name(check: Check) -> None:
    """Exit code 10."""
    done = check("wss://worker.invalid/wove", "--insecure", *LONG)
    assert done.code == 10
    assert "worker.invalid" in done.failure["detail"]
    assert done.of("ok") == ["options"]


def test_a_closed_port(check: Check) -> None:
    """Exit code 11, and that nothing listens there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # not listening
        port = held.getsockname()[1]
        done = check(f"ws://127.0.0.1:{port}/wove", *LONG)
    assert done.code == 11
    assert f"127.0.0.1:{port} refused" in done.failure["detail"]
    assert done.failure["name"] == "tcp"


def test_a_port_that_drops_packets(check: Check) -> None:
    """Exit code 11 when the time is over."""
    with FullBacklog() as dead:
        done = check(f"ws://127.0.0.1:{dead.address[1]}/wove", *SHORT)
    assert done.code == 11
    assert "within 1 s" in done.failure["detail"]


# -- proxies -----------------------------------------------------------------------------


def test_a_proxy(worker: LoopbackWorker, check: Check) -> None:
    """Through an HTTP proxy all is well, and its password is not shown."""
    port = int(worker.url.split(":")[2].split("/")[0])
    with Listener(lambda peer: relay(peer, port)) as proxy:
        account = f"http://me:{SECRET}%40@127.0.0.1:{proxy.port}"
        done = check(worker.url, "--proxy", account, *LONG, secret=secret_of(worker))
        assert proxy.accepted == 4  # the dial and the run, in text and in JSON
    assert done.code == 0
    assert done.steps["proxy"]["status"] == "ok"


def relay(peer: Peer, port: int) -> None:
    """Play an HTTP CONNECT proxy."""
    peer.read_request()
    with socket.create_connection(("127.0.0.1", port)) as onward:
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        back = threading.Thread(target=copy, args=(onward, peer.sock))
        back.start()
        copy(peer.sock, onward)
        back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until the end, and pass that on."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "user and password"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "does not allow this target"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "does not reach the worker"),
        (b"HTTP/1.1 400 Bad\r\n\r\n", "allows CONNECT"),
        (b"SSH-2.0\r\n\r\n", "allows CONNECT"),
        (b"", "allows CONNECT"),
    ],
)
def test_a_proxy_that_refuses(answer: bytes, text: str, check: Check) -> None:
    """Exit code 11 at the step proxy, each with its remedy."""

    def refuse(peer: Peer) -> None:
        peer.read_request()
        peer.send(answer)

    with Listener(refuse) as proxy:
        account = f"http://me:{SECRET}@127.0.0.1:{proxy.port}"
        done = check("ws://127.0.0.1:9/wove", "--proxy", account, *LONG)
    assert done.code == 11
    assert done.failure["name"] == "proxy"
    assert text in done.failure["remedy"]


# -- TLS ---------------------------------------------------------------------------------


def test_tls(authority: Authority, check: Check) -> None:
    """Version, names, issuer and the days that are left."""
    with authority.worker(not_after=now() + 90.5 * DAY) as worker:
        done = check(worker.url, "--ca-file", authority.file, *LONG, secret=secret_of(worker))
    assert done.code == 0
    assert done.of("warn") == []
    facts = done.steps["tls"]["facts"]
    assert facts["version"] in ("TLSv1.2", "TLSv1.3")
    assert set(facts["names"]) == {"localhost", "127.0.0.1"}
    assert facts["issuer"].startswith("trustme") or facts["issuer"]
    assert 89.0 < facts["days_left"] < 91.0
    assert "expires in 90 days" in done.text


def test_a_certificate_that_expires_soon(authority: Authority, check: Check) -> None:
    """A warning below 14 days; the exit code is 0."""
    with authority.worker(not_after=now() + 13 * DAY) as worker:
        done = check(worker.url, "--ca-file", authority.file, *LONG, secret=secret_of(worker))
    assert done.code == 0
    assert done.of("warn") == ["tls"]
    assert "Renew" in done.steps["tls"]["remedy"]


@pytest.mark.parametrize(
    ("names", "validity", "text"),
    [
        ((), {"not_before": -20, "not_after": -3}, "expired 3 days ago"),
        ((), {"not_before": 5, "not_after": 90}, "not valid yet"),
        (("worker.example",), {}, "not for 127.0.0.1: it is for worker.example"),
    ],
    ids=["expired", "not yet valid", "wrong name"],
)
def test_a_wrong_certificate(
    names: tuple[str, ...], validity: dict[str, int], text: str, authority: Authority, check: Check
) -> None:
    """Exit code 12, with what is wrong; the certificate that was refused is described."""
    moments = {key: now() + days * DAY for key, days in validity.items()}
    with authority.worker(*names, **moments) as worker:
        done = check(worker.url, "--ca-file", authority.file, *LONG, secret=secret_of(worker))
    assert done.code == 12
    assert done.failure["name"] == "tls"
    assert text in done.failure["detail"]
    assert done.failure["facts"]["names"] == list(names or ("localhost", "127.0.0.1"))


def test_an_unknown_authority(authority: Authority, tmp_path: Path, check: Check) -> None:
    """Exit code 12 and --ca-file as the remedy; --insecure goes on with a warning."""
    with authority.worker() as worker:
        done = check(worker.url, *LONG, secret=secret_of(worker))
        assert done.code == 12
        assert "not known here" in done.failure["detail"]
        assert "--ca-file" in done.failure["remedy"]
        done = check(worker.url, "--insecure", *LONG, secret=secret_of(worker))
        assert done.code == 0
        assert done.of("warn") == ["tls"]
        assert "127.0.0.1" in done.steps["tls"]["facts"]["names"]


def test_a_self_signed_certificate(tmp_path: Path, check: Check) -> None:
    """Exit code 12, and what it is; given as --ca-file it is trusted."""
    key, certificate = tmp_path / "self.key", tmp_path / "self.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "90", "-subj", "/CN=self",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    arguments = ["--tls-cert", str(certificate), "--tls-key", str(key)]
    with LoopbackWorker(workers=2, args=arguments) as worker:
        done = check(worker.url, *LONG, secret=secret_of(worker))
        assert done.code == 12
        assert "self-signed" in done.failure["detail"]
        assert check(worker.url, "--ca-file", str(certificate), *LONG, secret=secret_of(worker)).code == 0


def test_a_pinned_key(authority: Authority, check: Check) -> None:
    """The step shows the pin; with it all is well, unverified or not; another one is exit code 12."""
    with authority.worker() as worker:
        secret = secret_of(worker)
        found = check(worker.url, "--ca-file", authority.file, *LONG, secret=secret)
        pin = found.steps["tls"]["facts"]["pin"]
        assert f"key {pin}" in found.steps["tls"]["detail"]
        for trust in (("--ca-file", authority.file), ("--insecure",)):
            arguments = [*trust, "--tls-min-version", "1.3", "--pinned-key"]
            done = check(worker.url, *arguments, pin, *LONG, secret=secret)
            assert (done.code, done.of("warn")) == (0, [])
            assert f"key {pin}, which is pinned" in done.steps["tls"]["detail"]
            done = check(worker.url, *arguments, f"sha256//{'A' * 43}=", *LONG, secret=secret)
            assert done.code == 12
            assert f"its key is {pin}" in done.failure["detail"]
            assert "--pinned-key" in done.failure["remedy"]
            assert done.failure["facts"]["pin"] == pin
        assert check(worker.url, "--ca-file", authority.file, "--pinned-key", "x", secret=secret).code == 2


def test_a_client_certificate_is_demanded(authority: Authority, tmp_path: Path, check: Check) -> None:
    """Without one, or with one of another authority, exit code 12; with the right one all is well."""
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    with authority.worker(args=("--tls-client-ca", authority.file)) as worker:

        def with_client(*files: str) -> Result:
            arguments = [
                f"--client-{kind}-file={file}" for kind, file in zip(("cert", "key"), files, strict=False)
            ]
            return check(worker.url, "--ca-file", authority.file, *arguments, *LONG, secret=secret_of(worker))

        none, strange = with_client(), with_client(*other.pem("client", "host.example"))
        right = with_client(*authority.pem("client", "host.example"))
    assert none.code == 12
    assert none.failure["name"] == "tls"
    assert "--client-cert-file" in none.failure["remedy"]
    assert strange.code == 12
    assert "client certificate" in strange.failure["detail"] + strange.failure["remedy"]
    assert right.code == 0


def test_a_plain_text_port(check: Check) -> None:
    """wss:// to a server that answers in plain text is exit code 12; the remedy says so."""
    with Listener(lambda peer: peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as listener:
        done = check(f"wss://127.0.0.1:{listener.port}/wove", "--insecure", *LONG)
    assert done.code == 12
    assert "plain text port" in done.failure["detail"]


def test_plain_text_to_a_tls_port(authority: Authority, check: Check) -> None:
    """ws:// to a port with TLS is exit code 13; the remedy is wss://."""
    with authority.worker() as worker:
        done = check(worker.url.replace("wss:", "ws:"), *LONG, secret=secret_of(worker))
    assert done.code == 13
    assert "wss://" in done.failure["remedy"]


# -- handshake and authentication ----------------------------------------------------------


def test_a_wrong_secret(worker: LoopbackWorker, check: Check) -> None:
    """Exit code 14; secret and clock are the causes to look at, and the clock is compared."""
    done = check(worker.url, *LONG, secret="another-secret-0123456789")
    assert done.code == 14
    assert "secret" in done.failure["remedy"] and "clock" in done.failure["remedy"]
    assert done.steps["clock"]["status"] == "ok"
    assert done.steps["clock"]["facts"]["source"] == "date"
    assert "another-secret" not in done.text + json.dumps(done.document)


def test_no_secret(worker: LoopbackWorker, check: Check) -> None:
    """Exit code 14 and --security as the remedy."""
    done = check(worker.url, *LONG)
    assert done.code == 14
    assert "--security" in done.failure["remedy"]


def test_a_wrong_path(worker: LoopbackWorker, check: Check) -> None:
    """Our worker answers 404: exit code 13."""
    done = check(worker.url + "/other", *LONG, secret=secret_of(worker))
    assert done.code == 13
    assert "path" in done.failure["remedy"]
    assert done.failure["facts"]["http_status"] == 404


def test_a_plain_http_server(check: Check, tmp_path: Path) -> None:
    """It answers 200 and does not upgrade: not a websocket server, exit code 13."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            done = check(f"ws://127.0.0.1:{server.server_port}/", *LONG)
        finally:
            server.shutdown()
            thread.join()
    assert done.code == 13
    assert "not a websocket server" in done.failure["detail"]
    assert done.steps["clock"]["facts"]["source"] == "date"


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (301, 13, "final address"),
        (401, 14, "secret"),
        (403, 14, "may do there"),
        (404, 13, "path"),
        (426, 13, "Upgrade"),
        (500, 13, "log"),
        (502, 13, "reverse proxy does not reach"),
        (503, 13, "stopping or starting"),
        (504, 13, "no answer"),
        (418, 13, "worker service"),
    ],
)
def test_a_refusal(status: int, code: int, text: str, check: Check) -> None:
    """Each status has its exit code and its remedy."""

    def refuse(peer: Peer) -> None:
        peer.read_request()
        peer.send(f"HTTP/1.1 {status} {SECRET}\r\nX-Echo: {SECRET}\r\n\r\n{SECRET}".encode())

    with Listener(refuse) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *LONG, secret=SECRET)
    assert done.code == code
    assert text in done.failure["remedy"]
    assert done.failure["facts"]["http_status"] == status
    assert done.steps["clock"]["status"] == "skip"


def test_a_server_that_says_nothing(check: Check) -> None:
    """The deadline is kept: exit code 13 over TCP, 12 where TLS is expected."""
    with Listener(lambda peer: peer.drain()) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *SHORT)
        assert done.code == 13
        assert "within 1 s" in done.failure["detail"]
        done = check(f"wss://127.0.0.1:{listener.port}/wove", "--insecure", *SHORT)
        assert done.code == 12


# -- clocks --------------------------------------------------------------------------------


def dated(status: str, offset: float) -> Callable[[Peer], None]:
    """Return a script that answers *status* with a clock that is *offset* seconds ahead."""

    def script(peer: Peer) -> None:
        peer.read_request()
        date = email.utils.format_datetime(now() + datetime.timedelta(seconds=offset), usegmt=True)
        peer.send(f"HTTP/1.1 {status}\r\nDate: {date}\r\n\r\n".encode())

    return script


@pytest.mark.parametrize(
    ("offset", "status", "text"),
    [(1000, "warn", "This is why"), (-1000, "warn", "This is why"), (200, "warn", "NTP"), (100, "ok", "")],
)
def test_the_clock_of_a_worker_that_refuses(offset: float, status: str, text: str, check: Check) -> None:
    """On a 401 the Date header shows whether the clock is the cause; beyond half the limit is a warning."""
    with Listener(dated("401 Unauthorized", offset)) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *LONG, secret=SECRET)
    assert done.code == 14
    clock = done.steps["clock"]
    assert clock["status"] == status
    assert text in clock["remedy"]
    assert abs(clock["facts"]["ahead_seconds"] - offset) < 60.0
    assert ("ahead of" if offset > 0 else "behind") in clock["detail"]


def answering(value: Any, *headers: str) -> Callable[[Peer], None]:
    """Return the script of a worker that answers pings, and every run with *value*."""

    def script(peer: Peer) -> None:
        peer.upgrade(*headers)
        while True:
            opcode, _, payload = peer.recv_frame()
            if opcode == PING:
                peer.send(frame(PONG, payload))
            elif opcode == TEXT and (command := json.loads(payload))["type"] == "run_task":
                event = {"run_id": command["run_id"], "task_id": "t", **value()}
                peer.send(frame(TEXT, json.dumps(event).encode()))

    return script


def test_the_clock_of_a_run(check: Check) -> None:
    """What the run returns is compared; more than half the limit is a warning, with exit code 0."""

    def event() -> dict[str, Any]:
        return {"type": "task_result", "result_pickle": pickled(now().timestamp() + 200.0)}

    with Listener(answering(event, "X-Wove-Sync: 1", "X-Wove-Engine: threads")) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *LONG, secret=SECRET)
    assert done.code == 0
    assert done.of("warn") == ["clock"]
    assert done.steps["clock"]["facts"]["source"] == "run"
    assert abs(done.steps["clock"]["facts"]["ahead_seconds"] - 200.0) < 60.0
    assert done.steps["extensions"]["facts"]["other_headers"] == ["x-wove-engine"]


# -- round trips and runs --------------------------------------------------------------------


def test_pings_that_are_not_answered(check: Check) -> None:
    """Exit code 15."""
    with Listener(lambda peer: peer.upgrade().drain()) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *SHORT)
    assert done.code == 15
    assert "no pong" in done.steps["roundtrip"]["detail"]


def test_a_close_right_after_the_handshake(check: Check) -> None:
    """Exit code 15 with code and reason of the close frame, and what they stand for."""
    close = frame(8, (1008).to_bytes(2, "big") + b"not\x1b[31m you")
    with Listener(lambda peer: peer.upgrade(behind=close).drain()) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *SHORT)
    assert done.code == 15
    assert "1008" in done.steps["roundtrip"]["detail"]
    assert "--security" in done.steps["roundtrip"]["remedy"]
    assert "\x1b" not in done.text


def test_a_worker_that_is_busy(check: Check, tmp_path: Path) -> None:
    """With its only thread taken there is no result in time: exit code 16, and the clock by its date."""
    with LoopbackWorker(workers=1) as worker, WebSocketExecutor(**worker.config) as pool:
        busy = pool.submit(occupy(str(tmp_path / "go")))
        wait_until((tmp_path / "go.running").exists)
        done = check(worker.url, *SHORT, secret=secret_of(worker))
        (tmp_path / "go").touch()
        busy.result(30)
    assert done.code == 16
    assert "no result within 1 s" in done.failure["detail"]
    assert done.steps["clock"]["facts"]["source"] == "date"


def test_a_worker_that_dies_in_the_run(tmp_path: Path) -> None:
    """Killed while it has the run: exit code 16 at once, far from the deadline."""
    with (
        LoopbackWorker(workers=1) as worker,
        FaultProxy(worker.url) as proxy,
        WebSocketExecutor(**worker.config) as pool,
    ):
        busy = pool.submit(occupy(str(tmp_path / "go")))
        wait_until((tmp_path / "go.running").exists)
        env = {**os.environ, "WOVE_TEST_SECRET": secret_of(worker)}
        arguments = [proxy.url_for(worker.url), "--security", "env:WOVE_TEST_SECRET", "--timeout", "600"]
        with subprocess.Popen([*COMMAND, *arguments], env=env, stdout=subprocess.PIPE, text=True) as process:
            try:
                # Both connections shake hands; the second one then brings a run, which is longer than pings.
                proxy.wait_for(lambda: len(proxy.passages) > 1)
                proxy.wait_for(lambda: proxy.passed(1)[0] > proxy.passed(0)[0] + 100)
                worker.kill()
                rest = process.communicate(timeout=60)[0]
            finally:
                process.kill()
        busy.cancel()
    assert process.returncode == 16
    assert "FAIL  run" in rest and "connection" in rest
    assert "->" in rest


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"type": "task_error", "error": {"kind": "Full", "message": SECRET, "source": "executor"}}, "Full"),
        ({"type": "task_error", "exception_pickle": pickled(OSError(SECRET))}, "OSError"),
        ({"type": "task_result", "result_pickle": "bm9wZQ=="}, "unpickled"),
        ({"type": "task_result", "result": "later"}, "TypeError"),
    ],
)
def test_a_run_that_fails(event: dict[str, Any], text: str, check: Check) -> None:
    """Exit code 16 with the kind of the error; a worker that says our secret is not quoted."""
    with Listener(answering(lambda: event)) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *LONG, secret=SECRET)
    assert done.code == 16
    assert text in done.failure["detail"] + str(done.failure["facts"])


def test_a_connection_that_ends_in_the_run(check: Check) -> None:
    """Exit code 16 with the code of the close frame."""

    def script(peer: Peer) -> None:
        peer.upgrade()
        while True:
            opcode, _, payload = peer.recv_frame()
            if opcode == PING:
                peer.send(frame(PONG, payload))
            elif b"run_task" in payload:
                peer.send(frame(8, (1011).to_bytes(2, "big") + b"out of luck"))
                return

    with Listener(script) as listener:
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *LONG)
    assert done.code == 16
    assert "1011 (out of luck)" in done.failure["detail"]


# -- secrets -------------------------------------------------------------------------------


def test_no_secret_is_shown(check: Check) -> None:
    """Not by a worker that sends back all it got: headers, query, and the credentials of the proxy."""
    canaries = {name: f"canary-{name}-4711" for name in ("header", "cookie", "query", "proxy")}

    def echo(peer: Peer) -> None:
        if peer.read_request().startswith("CONNECT"):
            peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        said = " ".join([*canaries.values(), SECRET])
        peer.request = b""
        peer.upgrade("X-Wove-Sync: 1", f"X-Wove-Worker: {said}", f"X-Wove-More: {said}")
        while True:
            opcode, _, payload = peer.recv_frame()
            if opcode == PING:
                peer.send(frame(PONG, payload))
            elif b"run_task" in payload:
                command = json.loads(payload)
                error = {"kind": "Echo", "message": said, "source": "executor", "traceback": said}
                event = {"type": "task_error", "run_id": command["run_id"], "task_id": "t", "error": error}
                peer.send(frame(TEXT, json.dumps(event).encode()))

    with Listener(echo) as listener:
        done = check(
            f"ws://127.0.0.1:9/wove?token={canaries['query']}&plain",
            "--proxy", f"http://user:{canaries['proxy']}@127.0.0.1:{listener.port}",
            "--header", f"X-Token: {canaries['header']}",
            "--header", f"Cookie: session={canaries['cookie']}; theme=dark",
            *LONG, secret=SECRET,
        )  # fmt: skip
    assert done.code == 16
    assert "could not run it: Echo: ***" in done.text
    shown = done.text + json.dumps(done.document)
    assert not [name for name, value in canaries.items() if value in shown]
    assert done.document["url"] == "ws://127.0.0.1:9/wove?token=***&***"


def test_a_bearer_token(check: Check) -> None:
    """It is sent and not shown."""
    requests: list[str] = []

    def refuse(peer: Peer) -> None:
        requests.append(peer.read_request())
        peer.send(b"HTTP/1.1 401 Unauthorized\r\n\r\n")

    with Listener(refuse) as listener:
        arguments = ("--security", "bearer-env:WOVE_TEST_SECRET")
        done = check(f"ws://127.0.0.1:{listener.port}/wove", *arguments, *LONG)
    assert done.code == 14
    assert "token" in done.failure["remedy"]
    assert f"Authorization: Bearer {SECRET}" in requests[0]


def test_the_core_is_enough(authority: Authority) -> None:
    """Without the worker extra all steps are there."""
    without = "import sys; sys.modules.update(websockets=None)\n"
    without += "from wove_ws_sync.cli import main; sys.exit(main())"
    with authority.worker() as worker:
        env = {**os.environ, "WOVE_TEST_SECRET": secret_of(worker)}
        arguments = ["check", worker.url, "--security", "env:WOVE_TEST_SECRET", "--insecure", *LONG]
        done = subprocess.run(
            [sys.executable, "-c", without, *arguments], env=env, capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert "warn  tls         TLSv1.3, " in done.stdout
    assert "; the certificate is not verified" in done.stdout
    assert "ok    run" in done.stdout
