"""``wove-ws-sync worker`` as its user sees it, and LoopbackWorker, which starts it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import wove
from fault_helpers import search_path
from raw_host import RawHost, occupy, wait_until

from wove_ws_sync.cli import main
from wove_ws_sync.testing import LoopbackWorker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE = 30.0
COMMAND = [sys.executable, "-m", "wove_ws_sync"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": search_path(), **extra}


def run_command(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def started(
    *arguments: str, env: Mapping[str, str] | None = None, command: Sequence[str] = (*COMMAND, "worker")
) -> Iterator[subprocess.Popen[str]]:
    """Run a worker until the block ends; its first line is ``process.url``."""
    process: Any = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        env=environment(**(env or {})),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.url = process.stdout.readline().rstrip("\n")
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read stderr up to a line with *text*."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    pytest.fail(f"the worker ended without {text!r}")


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


@contextlib.contextmanager
def busy(url: str) -> Iterator[None]:
    """Have the worker execute a task that never ends."""
    from websockets.sync.client import connect

    def stuck() -> None:
        import threading

        threading.Event().wait()

    with connect(url, compression=None, proxy=None) as host:
        pickled = base64.b64encode(cloudpickle.dumps(stuck)).decode()
        host.send(json.dumps({"type": "run_task", "run_id": "r", "task_id": "t", "callable_pickle": pickled}))
        assert json.loads(host.recv(PATIENCE))["type"] == "task_started"
        yield


class TestStart:
    """From the command to the line with the URL."""

    def test_the_url_is_the_only_line_on_stdout(self) -> None:
        """--port 0 takes a free port; the line is there when the service accepts; logs go to stderr."""
        with started("--path", "/a/b") as process:
            match = re.fullmatch(r"ws://127\.0\.0\.1:(\d+)/a/b", process.url)
            assert match is not None
            socket.create_connection(("127.0.0.1", int(match[1])), timeout=PATIENCE).close()
            process.terminate()
            output, errors = process.communicate(timeout=PATIENCE)
            assert (process.returncode, output) == (0, "")
            assert "Listening on" in errors and "every user of this machine can run code here" in errors

    def test_ipv6_loopback(self) -> None:
        """The URL has brackets."""
        if not socket.has_ipv6:
            pytest.skip("no IPv6 on this machine")
        with started("--host", "::1") as process:
            if not process.url:
                pytest.skip("no IPv6 on this machine")
            assert re.fullmatch(r"ws://\[::1\]:\d+/wove", process.url)

    def test_a_short_secret_is_warned_about(self) -> None:
        """With a secret there is no warning about local users, with a short one another."""
        with started("--security", "env:WOVE_TEST_SECRET", env={"WOVE_TEST_SECRET": "short"}) as process:
            process.terminate()
            errors = process.communicate(timeout=PATIENCE)[1]
            assert "shorter than 16 bytes" in errors and "every user" not in errors

    def test_beyond_loopback_with_insecure(self) -> None:
        """--insecure allows it, with a warning."""
        with started("--host", "0.0.0.0", "--insecure") as process:
            assert process.url.startswith("ws://0.0.0.0:")
            process.terminate()
            assert "every machine" in process.communicate(timeout=PATIENCE)[1]

    def test_version_and_help_need_no_extra(self) -> None:
        """--version and --help work with the core alone; a command names what to install."""
        without = "import sys; sys.modules['websockets'] = None; from wove_ws_sync.cli import main; "
        for arguments, code, text in (
            (["--version"], 0, "wove-ws-sync "),
            (["--help"], 0, "worker"),
            (["worker", "--help"], 0, "--until-stdin-closes"),
            (["worker", "--port", "0"], 1, 'pip install "wove_ws_sync[worker]"'),
        ):
            done = subprocess.run(
                [sys.executable, "-c", f"{without} sys.exit(main({arguments!r}))"],
                env=environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert done.returncode == code, done.stderr
            assert text in (done.stdout if code == 0 else one_line(done.stderr))

    def test_the_module_and_the_function_are_the_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        """``python -m wove_ws_sync`` is ``main()``, whose result is the exit code."""
        done = run_command("--version")
        assert main(["--version"]) == 0
        assert done.returncode == 0 and done.stdout == capsys.readouterr().out
        assert main(["worker", "--port", "65536"]) == 2
        assert main([]) == 2
        assert main(["dance"]) == 2


class TestRefusals:
    """One clear line and an exit code: 2 for wrong usage, one of its own for each thing that is missing."""

    @pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.org"])
    def test_no_listening_beyond_loopback(self, host: str) -> None:
        """Without TLS and security it is refused before anything is opened."""
        done = run_command("worker", "--host", host, "--port", "0")
        assert done.returncode == 2 and done.stdout == ""
        assert "--tls-cert" in (line := one_line(done.stderr)) and "--insecure" in line

    def test_a_secret_alone_is_not_enough_beyond_loopback(self) -> None:
        """Without TLS the run's payloads would travel in clear."""
        arguments = ("worker", "--host", "0.0.0.0", "--security", "env:WOVE_TEST_SECRET")
        done = run_command(*arguments, WOVE_TEST_SECRET="x" * 32)
        assert done.returncode == 2 and "without TLS:" in one_line(done.stderr)

    def test_a_missing_secret(self) -> None:
        """The line names the variable."""
        done = run_command("worker", "--port", "0", "--security", "env:WOVE_NOT_SET")
        assert done.returncode == 11 and "'WOVE_NOT_SET' is not set" in one_line(done.stderr)

    def test_a_taken_port(self) -> None:
        """The line names the address and what to do."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            done = run_command("worker", "--port", port)
        assert done.returncode == 10
        assert f"127.0.0.1:{port}" in (line := one_line(done.stderr)) and "--port" in line

    def test_certificates_that_cannot_be_used(self, tmp_path: Path) -> None:
        """Absent, unreadable as PEM, or half given."""
        garbage = tmp_path / "garbage.pem"
        garbage.write_text("no certificate")
        absent = str(tmp_path / "absent.pem")
        for certificate in (str(garbage), absent):
            done = run_command("worker", "--tls-cert", certificate, "--tls-key", certificate)
            assert done.returncode == 12 and certificate in one_line(done.stderr)
        for half in ("--tls-cert", "--tls-key", "--tls-client-ca"):
            done = run_command("worker", half, absent)
            assert done.returncode == 2 and "--tls-key" in one_line(done.stderr)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--engine", "fibers"], "choose threads, processes, dask:ADDRESS or module:factory"),
            (["--engine", "dask:"], "needs the address of a scheduler"),
            (["--workers", "0"], "--workers"),
            (["--port", "70000"], "--port"),
            (["--drain-timeout", "-1"], "--drain-timeout"),
            (["--drain-timeout", "nan"], "--drain-timeout"),
            (["--path", "wove"], "path must be"),
            (["--path", "/wove?x"], "path must be"),
            (["--security", "secret"], "'env:VARIABLE'"),
            (["--max-message-bytes", "12"], "max_message_bytes"),
        ],
    )
    def test_wrong_usage(self, arguments: list[str], text: str) -> None:
        """The last line on stderr says what is wrong; the exit code is 2."""
        done = run_command("worker", *arguments)
        assert done.returncode == 2 and text in done.stderr.splitlines()[-1]


class TestTls:
    """--tls-cert, --tls-key, --tls-client-ca."""

    def test_client_certificates(self, tmp_path: Path) -> None:
        """With --tls-client-ca only a host with a certificate of that CA is heard."""
        import trustme
        from websockets.asyncio.client import connect  # two threads at one TLS socket would be unsafe
        from websockets.exceptions import WebSocketException

        async def greet(url: str, context: ssl.SSLContext) -> None:
            async with connect(url, ssl=context, proxy=None) as host:
                await asyncio.wait_for(await host.ping(), PATIENCE)

        authority, stranger = trustme.CA(), trustme.CA()
        server = authority.issue_cert("localhost", "127.0.0.1")
        files = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
        authority.cert_pem.write_to_path(files["ca"])
        server.cert_chain_pems[0].write_to_path(files["cert"])
        server.private_key_pem.write_to_path(files["key"])
        tls = ["--tls-cert", files["cert"], "--tls-key", files["key"], "--tls-client-ca", files["ca"]]
        with started("--host", "localhost", *tls) as process:
            assert process.url.startswith("wss://localhost:")
            for issuer, welcome in ((authority, True), (stranger, False), (None, False)):
                context = ssl.create_default_context(cafile=files["ca"])
                if issuer is not None:
                    issuer.issue_cert("host@example.org").configure_cert(context)
                try:
                    asyncio.run(greet(process.url, context))
                except (ssl.SSLError, ConnectionError, EOFError, WebSocketException):
                    assert not welcome
                else:
                    assert welcome
            process.terminate()
            assert "Traceback" not in process.communicate(timeout=PATIENCE)[1]


class TestStop:
    """It ends promptly and in order, whatever its tasks do."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_and_closes_connections_with_1001(self, number: int) -> None:
        """Exit code 0, no traceback."""
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        with started() as process, connect(process.url, proxy=None) as host:
            process.send_signal(number)
            with pytest.raises(ConnectionClosed) as caught:
                host.recv(PATIENCE)
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
            errors = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 0 and "Traceback" not in errors

    @pytest.mark.parametrize("how", ["SIGINT", "two SIGTERM", "no time to drain"])
    def test_a_task_that_never_ends_does_not_hold_it_up(self, how: str) -> None:
        """Exit code 0 within a few seconds; stderr says that a task was left."""
        arguments = ["--drain-timeout", "0"] if how == "no time to drain" else []
        with started(*arguments) as process, busy(process.url):
            begin = time.monotonic()
            process.send_signal(signal.SIGINT if how == "SIGINT" else signal.SIGTERM)
            if how == "two SIGTERM":
                wait_for_line(process, "Draining for up to 30 s: 1 runs of 1 hosts")
                process.terminate()
            errors = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 0 and time.monotonic() - begin < 10
            assert "still runs in its thread" in errors

    @pytest.mark.parametrize("how", ["SIGINT", "stdin"])
    def test_a_drain_can_be_cut_short(self, how: str) -> None:
        """By Ctrl-C, or by the end of stdin if that was asked for."""
        with started("--until-stdin-closes") as process, busy(process.url):
            process.terminate()
            wait_for_line(process, "Draining")
            if how == "SIGINT":
                process.send_signal(signal.SIGINT)
            else:
                process.stdin.close()
                process.stdin = None
            assert process.wait(PATIENCE) == 0

    def test_sigterm_lets_runs_end(self, tmp_path: Path) -> None:
        """The result arrives, then the process ends with 0; the log has the begin and the end of it."""
        gate = tmp_path / "gate"
        with started() as process:
            process.security = None
            with RawHost(process) as host:
                host.run(occupy(str(gate)))
                host.wait(kind="task_started")
                process.terminate()
                wait_for_line(process, "Draining")
                gate.touch()
                assert host.result() is None
                errors = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 0
            assert "Drained: 0 runs were given up" in errors and "Traceback" not in errors

    def test_a_peer_in_the_middle_of_its_handshake_does_not_hold_it_up(self) -> None:
        """Half a request is not waited for."""
        with started() as process:
            port = int(process.url.rpartition(":")[2].partition("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as half:
                half.sendall(b"GET /wove HTTP/1.1\r\n")
                begin = time.monotonic()
                process.terminate()
                errors = process.communicate(timeout=PATIENCE)[1]
                assert process.returncode == 0 and time.monotonic() - begin < 8
                assert "Traceback" not in errors

    def test_it_ends_with_stdin_if_asked_to(self) -> None:
        """--until-stdin-closes: EOF is a stop at once."""
        with started("--until-stdin-closes") as process, busy(process.url):
            assert process.stdin is not None
            process.stdin.close()
            process.stdin = None
            assert process.wait(PATIENCE) == 0

    def test_it_ends_with_its_parent(self) -> None:
        """A parent that is killed takes its LoopbackWorker along."""
        program = (
            "from wove_ws_sync.testing import LoopbackWorker; import os, sys\n"
            "worker = LoopbackWorker().start()\n"
            "print(worker.url, flush=True); sys.stdin.read()"
        )
        with started(command=(sys.executable, "-c", program)) as parent:
            port = int(parent.url.rpartition(":")[2].partition("/")[0])
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
            parent.kill()
            end = time.monotonic() + PATIENCE
            pause = threading.Event()
            while time.monotonic() < end:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
                except ConnectionRefusedError:
                    return
                pause.wait(0.05)
            pytest.fail("the worker outlived its parent")


def add_one(value: int) -> int:
    return value + 1


class TestLoopbackWorker:
    """The worker for tests and first steps."""

    def weave(self, worker: LoopbackWorker) -> int:
        settings = {"executor": "websocket", "executor_config": worker.config}
        wove.config(default_environment="loop", environments={"loop": settings})
        with wove.weave() as w:

            @w.do
            def answer() -> int:
                return add_one(41)

        result: int = w.result.answer
        return result

    def test_it_runs_tasks_and_leaves_nothing(self) -> None:
        """A process of its own with this one's modules; gone afterwards."""
        with LoopbackWorker(workers=2, path="/x", env={"WOVE_TEST": "seen"}) as worker:
            assert worker.pid is not None and worker.pid != os.getpid()
            assert worker.url.endswith("/x") and worker.security is not None
            assert self.weave(worker) == 42
            assert "2 threads" in worker.log
            pid = worker.pid
        assert worker.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        worker.stop()
        worker.kill()

    def test_stop_lets_runs_end(self, tmp_path: Path) -> None:
        """It is SIGTERM: the result of a run that takes its time still arrives."""
        gate = tmp_path / "gate"
        with LoopbackWorker() as worker, RawHost(worker) as host:
            host.run(occupy(str(gate)))
            host.wait(kind="task_started")
            stopper = threading.Thread(target=worker.stop, args=(PATIENCE,))
            stopper.start()
            wait_until(lambda: "Draining" in worker.log)
            gate.touch()
            assert host.result() is None
            stopper.join(PATIENCE)
            assert worker.pid is None and "Drained: 0 runs" in worker.log

    def test_stop_has_a_limit(self, tmp_path: Path) -> None:
        """SIGKILL ends a worker that is not done by then."""
        with LoopbackWorker() as worker, RawHost(worker) as host:
            host.run(occupy(str(tmp_path / "never")))
            host.wait(kind="task_started")
            worker.stop(timeout=0.2)
            assert worker.pid is None and "Drained" not in worker.log

    @pytest.mark.parametrize("again", [False, True])
    def test_its_block_does_not_wait_for_runs(self, tmp_path: Path, again: bool) -> None:
        """The end of it stops at once, and so does ``restart()``: nothing is drained, nobody is killed."""
        with LoopbackWorker() as worker, RawHost(worker) as host:
            host.run(occupy(str(tmp_path / "never")))
            host.wait(kind="task_started")
            if again:
                worker.restart()
        assert "Stopped." in worker.log and "Drain" not in worker.log

    def test_secrets_are_fresh_and_can_be_left_out(self) -> None:
        """Two workers never share one; without security there is none."""
        assert LoopbackWorker().security != LoopbackWorker().security
        with LoopbackWorker(security=False) as worker:
            assert worker.security is None and "security" not in worker.config
            assert self.weave(worker) == 42

    @pytest.mark.parametrize("how", ["kill", "stop", None])
    def test_it_restarts_on_its_port_with_its_secret(self, how: str | None) -> None:
        """After a crash, after an orderly stop, or while it runs."""
        with LoopbackWorker(tls=True) as worker:
            config, pid = worker.config, worker.pid
            if how == "kill":
                worker.kill()
            elif how == "stop":
                os.kill(worker.pid or 0, signal.SIGTERM)
            worker.restart()
            assert worker.config == config and worker.pid != pid
            assert worker.ca_file is not None and Path(worker.ca_file).exists()
        assert worker.ca_file is None

    def test_a_start_that_fails_says_why(self) -> None:
        """RuntimeError with the last lines of the worker; no process is left."""
        worker = LoopbackWorker(security=False, args=["--security", "env:WOVE_NOT_SET"])
        with pytest.raises(RuntimeError, match="WOVE_NOT_SET"):
            worker.start()
        assert worker.pid is None
        with pytest.raises(RuntimeError, match=r"in 0\.0 s"):
            LoopbackWorker(start_timeout=0.0).start()

    def test_output_of_tasks_does_not_block_the_worker(self) -> None:
        """What tasks print to stdout and stderr is read all the time; the log is bounded."""
        with LoopbackWorker(security=False) as worker:
            settings = {"executor": "websocket", "executor_config": worker.config}
            wove.config(default_environment="loop", environments={"loop": settings})
            with wove.weave() as w:

                @w.do
                def talk() -> str:
                    import sys

                    for _ in range(20_000):
                        print("x" * 50)
                        print("y" * 50, file=sys.stderr)
                    return "done"

            assert w.result.talk == "done"
            assert len(worker.log.splitlines()) <= 5000

    def test_it_starts_once(self) -> None:
        """start() while it runs is an error."""
        with LoopbackWorker() as worker, pytest.raises(RuntimeError, match="running already"):
            worker.start()
