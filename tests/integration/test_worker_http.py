"""Plain HTTP on the port of a worker service: probes, metrics, the status, and who may read them."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import trustme
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from raw_host import PATIENCE, RawHost, occupy, wait_until
from service_thread import Answer, ServiceThread, fetch
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import wove_ws_sync
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.worker.access import ReaderRule
from wove_ws_sync.worker.auth import Authenticator

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SECRET = "planted-Geheimnis-ß-0123456789"
SIGNED = {"type": "signed", "secret": SECRET}
TOKEN = "planted-token-0123456789"
PRIVATE = ("/", "/status.json", "/metrics")
PROBES = ("/healthz", "/readyz")


def basic(password: str, name: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def fail(text: str) -> None:
    raise ValueError(text)


@pytest.fixture
def service() -> Iterator[ServiceThread]:
    with ServiceThread() as running:
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "gate"
    yield path
    path.touch()


def port_of(worker: LoopbackWorker) -> int:
    return int(worker.url.rpartition(":")[2].partition("/")[0])


def status_of(service: ServiceThread) -> dict[str, Any]:
    answer = fetch(service.port, "/status.json")
    assert answer.status == 200
    return dict(json.loads(answer.body))


class TestProbes:
    """``/healthz`` and ``/readyz``."""

    def test_a_service_is_live_and_ready(self, service: ServiceThread) -> None:
        """Both answer in words, and nothing is to be kept."""
        assert fetch(service.port, "/healthz")[::2] == (200, b"ok\n")
        assert fetch(service.port, "/readyz")[::2] == (200, b"ready\n")
        assert fetch(service.port, "/healthz").headers["cache-control"] == "no-store"

    def test_a_probe_needs_no_secret_and_no_name(self) -> None:
        """Whoever asks by whatever name is answered, and learns nothing else."""
        with ServiceThread(security=SIGNED) as service:
            headers = {"Host": "worker.example", "Origin": "https://evil.example"}
            assert [fetch(service.port, path, headers).text for path in PROBES] == ["ok\n", "ready\n"]

    def test_head_has_no_body(self, service: ServiceThread) -> None:
        """But the length of that of GET."""
        try:
            answer = fetch(service.port, "/healthz", method="HEAD")
        except http.client.HTTPException:
            pytest.skip("this version of websockets reads nothing but GET")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "3")

    @pytest.mark.parametrize("method", ["POST", "DELETE"])
    def test_there_is_nothing_to_change(self, service: ServiceThread, method: str) -> None:
        """What is not read is refused, by older versions of websockets without an answer."""
        try:
            answer = fetch(service.port, "/status.json", method=method)
        except http.client.RemoteDisconnected:
            return
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")

    def test_a_draining_service_is_not_ready(self, service: ServiceThread, gate: Path) -> None:
        """Who is connected when it begins still hears 503; a new connection is not taken."""
        with RawHost(service) as host, socket.create_connection(("127.0.0.1", service.port)) as early:
            host.run(occupy(str(gate)))
            host.wait("r", "task_started")
            drained = service.drain()
            early.sendall(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            early.settimeout(PATIENCE)
            answer = b""
            while part := early.recv(4096):
                answer += part
            assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"\r\n\r\ndraining\n")
            with pytest.raises(OSError):
                fetch(service.port, "/readyz")
            gate.touch()
            assert drained.result(PATIENCE) is True

    def test_probes_work_over_tls(self) -> None:
        """On a wss service they are https."""
        with LoopbackWorker(tls=True) as worker:
            context = ssl.create_default_context(cafile=worker.ca_file)
            port = port_of(worker)
            assert fetch(port, "/healthz", host="localhost", context=context).text == "ok\n"
            answer = fetch(port, "/", host="localhost", context=context)
            assert answer.status == 200 and "<title>" in answer.text


class TestTheWire:
    """Hosts notice nothing of the pages."""

    @pytest.mark.parametrize("path", ["/", "/status.json", "/healthz"])
    def test_a_handshake_for_a_page_is_404(self, service: ServiceThread, path: str) -> None:
        """A host that mistook the path is told so as before."""
        with (
            pytest.raises(InvalidStatus, match="404"),
            connect(service.home.replace("http", "ws", 1).rstrip("/") + path, proxy=None),
        ):
            pass
        assert service.service.counters["wrong_path"] == 1

    @pytest.mark.parametrize("path", ["/", "/metrics"])
    def test_a_path_may_be_that_of_a_page(self, path: str) -> None:
        """Handshakes go to the hosts, plain requests to the page."""
        with ServiceThread(path=path) as service, RawHost(service) as host:
            host.run(lambda: 5)
            assert host.result() == 5
            assert fetch(service.port, path).status == 200

    def test_another_page_is_404(self, service: ServiceThread) -> None:
        """There is nothing else."""
        for path in ("/favicon.ico", "/status.html", "//", "/%2e%2e/healthz"):
            assert fetch(service.port, path).status == 404


class TestWhoMayRead:
    """The rule of the page and the metrics."""

    @pytest.mark.parametrize("path", PRIVATE)
    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "127.3.2.1"])
    def test_this_machine_reads(self, service: ServiceThread, path: str, name: str) -> None:
        """By any of its names, and without a secret."""
        assert fetch(service.port, path, {"Host": f"{name}:{service.port}"}).status == 200

    @pytest.mark.parametrize("path", PRIVATE)
    @pytest.mark.parametrize(
        "name", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "", "[", "0.0.0.0"]
    )
    def test_another_name_is_refused(self, service: ServiceThread, path: str, name: str) -> None:
        """A page of that name would read along after it was pointed at 127.0.0.1."""
        answer = fetch(service.port, path, {"Host": name})
        assert answer.status == 403
        assert "engine" not in answer.text and "www-authenticate" not in answer.headers
        assert service.service.counters["refused_reader"] == 1

    @pytest.mark.parametrize("headers", [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ])  # fmt: skip
    @pytest.mark.parametrize("path", PRIVATE)
    def test_a_page_of_another_site_is_refused(self, path: str, headers: dict[str, str]) -> None:
        """Also with the secret, which a browser adds by itself."""
        with ServiceThread(security=SIGNED) as service:
            assert fetch(service.port, path, headers).status == 403
            assert fetch(service.port, path, {**headers, **basic(SECRET)}).status == 403

    def test_a_link_may_lead_here(self, service: ServiceThread) -> None:
        """From another site, say a chat; and the page's own requests come from itself."""
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert fetch(service.port, "/", link).status == 200
        own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Origin": service.home.rstrip("/")}
        assert fetch(service.port, "/status.json", own).status == 200

    @pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"])
    def test_what_a_proxy_forwards_needs_the_secret(self, header: str) -> None:
        """The proxy is on this machine; who asks it is not."""
        with ServiceThread(security=SIGNED) as service:
            assert fetch(service.port, "/", {header: "192.0.2.7"}).status == 401
            assert fetch(service.port, "/", {header: "192.0.2.7", **basic(SECRET)}).status == 200
        with ServiceThread() as service:
            assert fetch(service.port, "/", {header: "192.0.2.7"}).status == 403

    def test_neither_log_nor_answer_has_a_secret(self, caplog: pytest.LogCaptureFixture) -> None:
        """Right or wrong."""
        caplog.set_level(logging.DEBUG)
        with ServiceThread(security=SIGNED) as service:
            answers = [
                fetch(service.port, path, {"X-Forwarded-For": "192.0.2.7", **headers})
                for path in PRIVATE
                for headers in (basic(SECRET), basic(SECRET + "x"), {"Authorization": f"Bearer {TOKEN}"})
            ]
        assert [answer.status for answer in answers] == [200, 401, 401] * 3
        told = caplog.text + "".join(answer.text + repr(answer.headers) for answer in answers)
        for secret in (
            SECRET,
            SECRET + "x",
            TOKEN,
            *(basic(each)["Authorization"][6:] for each in (SECRET,)),
        ):
            assert secret not in told


def listening_everywhere(security: Any, tls: ssl.SSLContext | None = None) -> ServiceThread:
    return ServiceThread(host="0.0.0.0", security=security, ssl_context=tls, insecure=tls is None)


class TestTheSecret:
    """A service that others can reach asks also this machine for the secret."""

    @pytest.mark.parametrize("path", PRIVATE)
    @pytest.mark.parametrize(
        ("security", "secret"), [(SIGNED, SECRET), ({"type": "bearer", "token": TOKEN}, TOKEN)]
    )
    def test_with_the_secret(self, path: str, security: Any, secret: str) -> None:
        """As a password of a browser, or as the bearer token of Prometheus; 401 with a challenge without."""
        with listening_everywhere(security) as service:
            bearer = {"Authorization": f"Bearer {secret}"}
            if secret.isascii():
                assert fetch(service.port, path, bearer).status == 200
            assert fetch(service.port, path, basic(secret)).status == 200
            assert fetch(service.port, path, {**basic(secret), "Host": "worker.example"}).status == 200
            wrong: list[dict[str, str]] = [
                {},
                basic(secret + "x"),
                basic(secret[:-1]),
                basic(""),
                {"Authorization": "Basic"},
                {"Authorization": "Basic !"},
                {"Authorization": "Basic ÿ"},
                {"Authorization": "Bearer "},
                {"Authorization": "Bearer wrong"},
                {"Authorization": f"Digest {basic(secret)['Authorization'][6:]}"},
            ]
            for headers in wrong:
                answer = fetch(service.port, path, headers)
                assert answer.status == 401, headers
                assert answer.headers["www-authenticate"].startswith("Basic realm=")
            assert service.service.counters["refused_reader"] == len(wrong)

    def test_without_security_nobody_reads(self) -> None:
        """There is no secret that could be asked for."""
        with listening_everywhere(None) as service:
            for headers in ({}, basic(""), {"Authorization": "Bearer None"}):
                assert {fetch(service.port, path, headers).status for path in PRIVATE} == {403}
            assert {fetch(service.port, path).status for path in PROBES} == {200}

    def test_over_tls(self, tmp_path: Path) -> None:
        """The same by https, as it is meant to be beyond loopback."""
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        with listening_everywhere(SIGNED, context) as service:
            asked = {"host": "localhost", "context": trusting}
            assert fetch(service.port, "/", **asked).status == 401
            assert fetch(service.port, "/", basic(SECRET), **asked).status == 200
            assert fetch(service.port, "/metrics", basic(SECRET + "x"), **asked).status == 401

    @pytest.mark.parametrize(("tls", "mode", "status"), [
        (False, "signed", 403),
        (True, "signed", 200),
        (False, "bearer", 200),
        (True, "bearer", 200),
        (True, "none", 403),
    ])  # fmt: skip
    def test_peers_elsewhere(self, tls: bool, mode: str, status: int) -> None:
        """A secret that hosts only sign with is neither asked for nor taken in the clear."""
        security = {"type": mode, "secret": SECRET, "token": TOKEN}
        rule = ReaderRule(Authenticator(security), local=False, tls=tls)
        given = {"Host": ["worker.example"], **{
            name: [value] for name, value in basic(TOKEN if mode == "bearer" else SECRET).items()
        }}  # fmt: skip
        assert rule.status(lambda name: given.get(name, []), "192.0.2.7") == status

    def test_a_peer_elsewhere_is_not_local(self) -> None:
        """However it got to a service that listens on loopback."""
        rule = ReaderRule(Authenticator(SIGNED), local=True, tls=True)
        given = {"Host": ["localhost"]}
        assert rule.status(lambda name: given.get(name, []), "127.0.0.1") == 200
        assert rule.status(lambda name: given.get(name, []), "192.0.2.7") == 401


def metrics_of(service: ServiceThread) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = fetch(service.port, "/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class TestMetrics:
    """What Prometheus reads."""

    def test_numbers_are_those_of_the_runs(self, service: ServiceThread, gate: Path) -> None:
        """Two run, one waits, and the ends count by outcome."""
        with RawHost(service) as host:
            host.run(lambda: 1, "ok")
            host.run(fail, "bad", text="no")
            assert host.result("ok") == 1
            host.wait("bad")
            for name in ("a", "b"):
                host.run(occupy(str(gate)), name)
                host.wait(name, "task_started")
            host.run(lambda: None, "queued")
            wait_until(lambda: status_of(service)["queued"] == 1)
            found = metrics_of(service)

            def value(name: str, **labels: str) -> float:
                return found[name, frozenset(labels.items())]

            assert value("wove_ws_hosts_connected") == 1
            assert value("wove_ws_runs_running") == 2
            assert value("wove_ws_runs_queued") == 1
            assert value("wove_ws_runs_accepted_total") == 5
            assert value("wove_ws_runs_ended_total", outcome="ok") == 1
            assert value("wove_ws_runs_ended_total", outcome="error") == 1
            assert value("wove_ws_run_seconds_count") == 2
            assert value("wove_ws_queue_wait_seconds_count") == 4
            assert value("wove_ws_run_seconds_bucket", le="+Inf") == 2
            assert value("wove_ws_ready") == 1 and value("wove_ws_draining") == 0
            assert value("wove_ws_received_bytes_total") > 1000 and value("wove_ws_sent_bytes_total") > 100
            host.cancel("queued")
            host.wait("queued")
            found = metrics_of(service)
            assert value("wove_ws_runs_ended_total", outcome="cancelled") == 1
        wait_until(lambda: metrics_of(service)["wove_ws_hosts_connected", frozenset()] == 0)
        found = metrics_of(service)
        assert value("wove_ws_runs_ended_total", outcome="abandoned") == 2
        assert value("wove_ws_received_bytes_total") > 1000  # of a connection that is gone

    def test_refusals_count_by_reason(self, service: ServiceThread) -> None:
        """The counters of the service, but for the connections, which are no incidents."""
        fetch(service.port, "/nowhere")
        with RawHost(service):
            found = metrics_of(service)
        assert found["wove_ws_incidents_total", frozenset({("reason", "wrong_path")})] == 1
        assert found["wove_ws_connections_total", frozenset()] == 1
        reasons = {dict(labels)["reason"] for name, labels in found if name == "wove_ws_incidents_total"}
        assert "connections" not in reasons

    def test_no_label_has_what_a_host_could_choose(self, service: ServiceThread) -> None:
        """Or a host could make as many series as it likes."""
        with RawHost(service) as host:
            host.run(lambda: 1, "chosen-run")
            host.result("chosen-run")
            fetch(service.port, "/chosen-path")
            names = {name for _, labels in metrics_of(service) for name, _ in labels}
            assert names == {"le", "outcome", "reason", "version", "engine", "python_version"}
            assert b"chosen" not in fetch(service.port, "/metrics").body

    def test_openmetrics_is_spoken(self, service: ServiceThread) -> None:
        """To who prefers it, as Prometheus does; the names say their units."""
        accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        answer = fetch(service.port, "/metrics", accept)
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        families = list(openmetrics(answer.text))
        assert all(family.name.startswith("wove_ws_") and family.documentation for family in families)

    def test_two_services_do_not_share_numbers(self, service: ServiceThread) -> None:
        """Each has a registry of its own, in one process as well."""
        with ServiceThread() as other, RawHost(other) as host:
            host.run(lambda: 1)
            host.result()
            name = ("wove_ws_runs_accepted_total", frozenset[tuple[str, str]]())
            assert (metrics_of(service)[name], metrics_of(other)[name]) == (0, 1)

    def test_without_the_package_it_is_501(self, tmp_path: Path) -> None:
        """With the line that installs it; everything else works."""
        (tmp_path / "prometheus_client.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'prometheus_client'\", name='prometheus_client')\n"
        )
        path = f"{tmp_path}:{Path(wove_ws_sync.__file__).parents[1]}"
        command = [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--until-stdin-closes"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": path}
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                port = int(process.stdout.readline().rpartition(b":")[2].partition(b"/")[0])
                answer = fetch(port, "/metrics")
                assert answer.status == 501
                assert 'pip install "wove_ws_sync[prometheus]"' in answer.text
                assert fetch(port, "/status.json").status == 200
            finally:
                process.stdin.close()


class TestStatus:
    """The facts behind the page."""

    def test_runs_and_hosts_are_shown(self, service: ServiceThread, gate: Path) -> None:
        """Those that run and wait, with their times; those that ended; who is connected."""
        with RawHost(service, limit=1 << 20) as host:
            for name in ("a", "b", "queued"):
                host.run(occupy(str(gate)), name)
            wait_until(lambda: status_of(service)["running"] == 2)
            found = status_of(service)
            waits = {run["id"]: run["running"] is None for run in found["live"]}
            assert waits == {"a": False, "b": False, "queued": True}
            assert found["live"][2]["id"] == "queued"
            assert (found["workers"], found["engine"], found["refusal"]) == (2, "threads", "")
            [shown] = found["host_list"]
            assert shown["peer"].startswith("127.0.0.1:") and shown["runs"] == 3 and shown["ours"] is True
            assert found["version"] == wove_ws_sync.__version__
            gate.touch()
            wait_until(lambda: status_of(service)["ended"]["ok"] == 3)
            found = status_of(service)
            assert {run["id"]: run["outcome"] for run in found["recent"]} == dict.fromkeys("ab", "ok") | {
                "queued": "ok"
            }
            assert sum(bin_.get("ok", 0) for bin_ in found["curves"]["ends"]) > 0
            assert found["p50"] > 0

    @pytest.mark.parametrize("engine", ["threads", "processes"])
    def test_an_error_is_shown_as_text(self, engine: str) -> None:
        """Kind, message and traceback, as its host gets them, wherever the task ran."""
        with LoopbackWorker(workers=1, args=["--engine", engine]) as worker, RawHost(worker) as host:
            host.run(lambda: 1, "fine")
            host.wait("fine")
            host.run(fail, text="<script>no</script>")
            host.wait("r")
            found = json.loads(fetch(port_of(worker), "/status.json").body)
        [error], ended = found["errors"], found["ended"]
        assert ended == {"ok": 1, "error": 1, "cancelled": 0, "abandoned": 0}
        assert (error["kind"], error["message"]) == ("ValueError", "<script>no</script>")
        assert "raise ValueError(text)" in error["traceback"] or "in fail" in error["traceback"]

    def test_progress_is_shown(self, service: ServiceThread, gate: Path) -> None:
        """Of the run that reported it."""
        with RawHost(service) as host:
            host.run(occupy(str(gate)))
            host.wait("r", "task_started")

            def report(statistics: Any) -> None:
                assert service.service._dispatcher is not None
                [run] = service.service._dispatcher._table.live_runs()
                statistics.progressed(run, 3, 12, "page 3", 0.0)

            service.statistics(report)
            [run] = status_of(service)["live"]
            assert (run["done"], run["total"], run["message"]) == (3, 12, "page 3")

    def test_a_held_request_hears_of_the_drain(self, service: ServiceThread, gate: Path) -> None:
        """It is answered at once when the drain begins, as it could not be asked again."""
        with RawHost(service) as host:
            host.run(occupy(str(gate)))
            host.wait("r", "task_started")
            answers: list[Answer] = []
            asked = threading.Event()

            def ask() -> None:
                with contextlib.suppress(OSError):
                    while not answers or json.loads(answers[-1].body)["refusal"] == "":
                        asked.set()
                        answers.append(fetch(service.port, "/status.json?hold"))

            thread = threading.Thread(target=ask)
            thread.start()
            assert asked.wait(PATIENCE)
            wait_until(lambda: answers)  # from now on there is a held one most of the time
            drained = service.drain()
            thread.join(PATIENCE)
            gate.touch()
            assert drained.result(PATIENCE) is True
            assert {answer.status for answer in answers} == {200}


def test_the_page_says_that_it_is_for_itself(service: ServiceThread) -> None:
    """No script but its own, no frame around it, nothing from elsewhere, nothing kept."""
    answer = fetch(service.port, "/")
    headers = answer.headers
    policy = dict(part.partition(" ")[::2] for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name in ("script-src", "style-src"):
        assert policy[name].startswith("'sha256-") and "unsafe" not in policy[name]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "access-control-allow-origin" not in headers


def test_the_page_refers_to_nothing_elsewhere(service: ServiceThread) -> None:
    """The only URLs in it are names of XML vocabularies."""
    text = fetch(service.port, "/").text
    text = text.replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in text and "https:" not in text and "//" not in text.replace("// ", "")
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text
    assert ' style="' not in text and " onclick" not in text
