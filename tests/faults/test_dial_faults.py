"""A dial without descriptors or threads, or with new certificates: one clear error, and then it works.

Names and addresses that fail are tested in ``tests/integration/test_handshake.py``, certificates
that are refused in ``tests/integration/test_tls.py``.
"""

from __future__ import annotations

import logging
import os
import ssl
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from fault_helpers import WAIT, link_of, own_threads, python, search_path, until
from fault_proxy import FaultProxy
from scripted_worker import ScriptedWorker, result, task
from ws_peer import TEXT, Listener, Peer, dial_to, dialled, frame, options_for

from wove_ws_sync import ConnectionLost, SyncWebSocketEnvironmentExecutor, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker
from wove_ws_sync.transport import WebSocketTransport

DESCRIPTORS = """
    import errno, os, resource, sys, threading
    from wove_ws_sync import ConnectionLost, SyncWebSocketEnvironmentExecutor, WebSocketExecutor
    from wove_ws_sync.testing import close_links

    url, secret = sys.argv[1:]
    config = {"url": url, "security": {"type": "signed", "secret": secret}}
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    def fill(free):
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as exc:
            assert exc.errno == errno.EMFILE
        for _ in range(free):
            os.close(held.pop())
        return held

    def release(held):
        while held:
            os.close(held.pop())

    def threads():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("wove-ws-")]

    def outcome(call):
        try:
            return call()
        except OSError as exc:
            reason = exc.__cause__ if isinstance(exc, ConnectionLost) else exc
            assert reason.errno == errno.EMFILE, repr(exc)
            return "EMFILE"
"""


def the_rest(code: str) -> str:
    return textwrap.dedent(DESCRIPTORS) + textwrap.dedent(code)


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=4) as running:
        yield running


def secret_of(worker: LoopbackWorker) -> str:
    return (worker.security or {})["secret"]


def test_f38_no_descriptor_for_a_dial(worker: LoopbackWorker) -> None:
    """EMFILE wherever the dial meets it, for runs and for start(); nothing is left, and then it works."""
    code = the_rest("""
        with WebSocketExecutor(**config) as pool:  # what is imported on the way needs descriptors too
            assert pool.submit(len, b"1").result(30) == 1
        close_links()
        before = len(os.listdir("/proc/self/fd"))
        outcomes = []
        for free in range(8):
            held = fill(free)
            with WebSocketExecutor(**config) as pool:
                outcomes.append(outcome(lambda: pool.submit(len, b"123").result(30)))
                ex = SyncWebSocketEnvironmentExecutor()
                start = {"environment_name": "e", "environment_config": config, "run_config": {}}
                started = outcome(lambda: ex.start(**start))
                assert (started == "EMFILE") == (outcomes[-1] == "EMFILE"), (started, outcomes)
                release(held)
                assert pool.submit(len, b"12").result(30) == 2
                assert pool._core.session.link.stats()["runs"] == 0
                ex.stop()
            close_links()
            assert threads() == []
            assert len(os.listdir("/proc/self/fd")) == before
        print(outcomes[0], outcomes[-1], sorted(outcomes, key=str) == outcomes[::-1])
    """)
    out, err, status = python(code, worker.url, secret_of(worker))
    assert (out, err, status) == ("EMFILE 3 True\n", "", 0), out + err


def test_f38_no_descriptor_for_the_next_dial(worker: LoopbackWorker) -> None:
    """A run that was lost with its connection names the error, and the executor works again afterwards."""
    code = the_rest("""
        def nap(seconds):
            import time
            time.sleep(seconds)
            return seconds

        with WebSocketExecutor(**config, delivery_orphan_policy="requeue", resume_window=1.0) as pool:
            assert pool.submit(len, b"1").result(30) == 1
            future = pool.submit(nap, 0.5)
            while not future.running():
                threading.Event().wait(0.01)
            held = fill(0)
            print("full", flush=True)
            print(outcome(lambda: future.result(30)) in ("EMFILE", 0.5))
            release(held)
            print(pool.submit(len, b"12").result(30))
            assert pool._core.session.link.stats()["runs"] == 0
        close_links()
        assert threads() == []
    """)
    with FaultProxy(worker.url) as proxy:
        with subprocess.Popen(
            [sys.executable, "-c", code, proxy.url_for(worker.url), secret_of(worker)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path()},
        ) as host:
            try:
                assert host.stdout is not None
                assert host.stdout.readline() == "full\n"
                proxy.end_all()
                out, err = host.communicate(timeout=WAIT)
            finally:
                host.kill()
    assert (out, err, host.returncode) == ("True\n2\n", "", 0)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let the system refuse threads of a role, until told ""."""
    refused = [""]
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if refused[0] and self.name.startswith(f"wove-ws-{refused[0]}"):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    yield lambda role: refused.__setitem__(0, role)
    refused[0] = ""


@pytest.mark.parametrize("role", ["watchdog", "reader", "resolver"])
def test_f38_no_thread_for_a_dial(role: str, no_threads: Callable[[str], None]) -> None:
    """The system's error for runs and start(), none of them left waiting; then the next use dials."""
    with ScriptedWorker() as worker:
        url = worker.url.replace("127.0.0.1", "localhost")
        with WebSocketExecutor(url) as pool:
            no_threads(role)
            for future in [pool.submit(task) for _ in range(3)]:
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    future.result(WAIT)
            executor = SyncWebSocketEnvironmentExecutor()
            start: dict[str, Any] = {"environment_name": "e", "environment_config": {"url": url}}
            with pytest.raises(RuntimeError, match="can't start new thread"):
                executor.start(**start, run_config={})
            until(lambda: own_threads() == [])
            assert link_of(pool).stats()["runs"] == 0
            assert worker.accepted == 0
            no_threads("")
            good = pool.submit(task)
            worker.connection().say(result(good.run_id, "good"))
            assert good.result(WAIT) == "good"


@pytest.mark.parametrize("role", ["watchdog", "reader"])
def test_f38_no_thread_for_the_next_dial(role: str, no_threads: Callable[[str], None]) -> None:
    """Runs that were lost with their connection name the system's error; then the next use dials."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        waiting = pool.with_options(delivery_orphan_policy="requeue", delivery_timeout=WAIT).submit(task)
        connection = worker.connection()
        connection.commands(1)
        no_threads(role)
        connection.say_bytes(b"\x83\0")  # no such opcode: the host hangs up
        with pytest.raises(ConnectionLost) as caught:
            waiting.result(WAIT)
        assert "can't start new thread" in str(caught.value.__cause__)
        until(lambda: own_threads() == [])
        no_threads("")
        good = pool.submit(task)
        worker.connection().say(result(good.run_id, "good"))
        assert good.result(WAIT) == "good"


def echo(peer: Peer) -> None:
    """Accept the upgrade and say everything again, until the end."""
    peer.upgrade()
    try:
        while True:
            peer.send(frame(TEXT, peer.recv_message()))
    except OSError:
        return


def exchange(transport: WebSocketTransport, text: bytes) -> None:
    assert transport.pump(transport.post(text), WAIT)
    assert transport.recv() == text


def test_f40_certificates_rotated_under_a_live_connection(tmp_path: Path) -> None:
    """The live one goes on; the next dial is judged by the new files, whichever side was first."""
    old, new = trustme.CA(), trustme.CA()
    trusted = tmp_path / "ca.pem"
    trusted.write_bytes(old.cert_pem.bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.issue_cert("127.0.0.1").configure_cert(context)
    with Listener(echo, context=context) as listener:
        options = options_for(listener.port, scheme="wss", ca_file=str(trusted))
        with dialled(options) as first:
            exchange(first, b"before")
            new.issue_cert("127.0.0.1").configure_cert(context)
            exchange(first, b"the worker has a new certificate")
            with pytest.raises(ssl.SSLCertVerificationError):
                dial_to(options)
            trusted.write_bytes(new.cert_pem.bytes())
            with dialled(options) as second:
                exchange(second, b"after")
                exchange(first, b"both")


class Shouting(logging.Handler):
    """A handler that raises, as one on a full disk may."""

    def emit(self, record: logging.LogRecord) -> None:
        raise OSError(28, "No space left on device")


def test_f38_a_warning_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A dial that has something to warn of does not fail when the log does."""
    context, handler, logger = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Shouting(), logging.getLogger()
    trustme.CA().issue_cert("elsewhere.example").configure_cert(context)
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    with Listener(echo, context=context) as listener:
        logger.addHandler(handler)
        try:
            with dialled(options_for(listener.port, scheme="wss", insecure=True)) as transport:
                exchange(transport, b"hello")
        finally:
            logger.removeHandler(handler)
    assert "SSLKEYLOGFILE" in caplog.text and "not verified" in caplog.text
