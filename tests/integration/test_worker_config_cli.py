"""Configuration, log format and exit codes of ``wove-ws-sync worker``, as a real process has them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from fault_helpers import search_path, until

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE = 60.0
SECRET = "correct-horse-battery-staple"
COMMAND = [sys.executable, "-m", "wove_ws_sync", "worker"]


def environment(**extra: str) -> dict[str, str]:
    ours = {name: text for name, text in os.environ.items() if not name.startswith("WOVE_WS_WORKER_")}
    return {**ours, "PYTHONPATH": search_path(), **extra}


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def refused(*arguments: str, **extra: str) -> tuple[int, str]:
    """Return the exit code and the one line that a refusal prints, which holds no secret."""
    done = run(*arguments, **extra)
    assert done.stdout == "" and SECRET not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("wove-ws-sync worker: "), done.stderr
    return done.returncode, lines[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker.toml"


def serve(*arguments: str, **extra: str) -> tuple[str, list[str]]:
    """Run a service up to its URL and stop it; return the URL and the lines of its log."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        process.terminate()
        errors = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0, errors
        return url, errors.splitlines()
    finally:
        process.kill()
        process.communicate()


class TestConfiguration:
    """Flag, environment, file, default."""

    def test_the_service_does_what_the_strongest_source_says(self, file: Path) -> None:
        """Path from the flag, threads from the environment, port and log level from the file."""
        file.write_text('port = 0\npath = "/file"\nworkers = 2\nlog_level = "info"\n', encoding="utf-8")
        extra = {"WOVE_WS_WORKER_CONFIG": str(file), "WOVE_WS_WORKER_WORKERS": "3"}
        url, lines = serve("--path", "/flag", **extra, WOVE_WS_WORKER_PATH="/environment")
        assert url.startswith("ws://127.0.0.1:") and url.endswith("/flag") and ":8765/" not in url
        assert any(line.endswith(f"Listening on {url} with 3 threads.") for line in lines)

    def test_what_is_printed_can_be_fed_back(self, file: Path) -> None:
        """--print-config serves nobody and exits 0; fed back it prints the same values."""
        extra = {"WOVE_WS_WORKER_MAX_KEPT_BYTES": "12345", "WOVE_WS_WORKER_SECURITY": "env:WOVE_TEST_SECRET"}
        first = run("--print-config", "--port", "0", **extra, WOVE_TEST_SECRET=SECRET)
        assert first.returncode == 0 and first.stderr == "" and SECRET not in first.stdout
        values = tomllib.loads(first.stdout)
        assert values["security"] == "env:WOVE_TEST_SECRET" and values["max_kept_bytes"] == 12345
        assert "port = 0  # flag --port\n" in first.stdout
        assert "max_kept_bytes = 12345  # WOVE_WS_WORKER_MAX_KEPT_BYTES\n" in first.stdout
        file.write_text(first.stdout, encoding="utf-8")
        again = run("--config", str(file), "--print-config")
        assert again.returncode == 0 and tomllib.loads(again.stdout) == values
        assert f"port = 0  # {file}\n" in again.stdout

    def test_an_unknown_key(self, file: Path) -> None:
        """The nearest known one is named, also for --print-config."""
        file.write_text("max_kept_byte = 5\n", encoding="utf-8")
        for more in ([], ["--print-config"]):
            code, line = refused("--config", str(file), *more)
            assert code == 2 and f"{file}: " in line and "nearest is 'max_kept_bytes'" in line

    def test_a_literal_secret_is_never_shown(self, file: Path) -> None:
        """In file and environment, also for --print-config."""
        file.write_text(f'security = "{SECRET}"\n', encoding="utf-8")
        for more in ([], ["--print-config"]):
            code, line = refused("--config", str(file), *more)
            assert code == 2 and f"{file}: security: " in line and "'env:VARIABLE'" in line
            code, line = refused(*more, WOVE_WS_WORKER_SECURITY=SECRET)
            assert code == 2 and "WOVE_WS_WORKER_SECURITY: " in line
        done = run("--security", SECRET)
        assert done.returncode == 2 and SECRET not in done.stderr + done.stdout

    def test_what_the_service_refuses_is_blamed_on_its_source(self, file: Path) -> None:
        """A value that only the service itself can judge."""
        code, line = refused(WOVE_WS_WORKER_PATH="wove")
        assert code == 2 and "path must be" in line and "(path is from WOVE_WS_WORKER_PATH.)" in line
        file.write_text('tls_cert = "chain.pem"\n', encoding="utf-8")
        code, line = refused("--config", str(file))
        assert code == 2 and "go together" in line and f"(tls_cert is from {file}.)" in line

    def test_a_variable_that_is_no_option_is_warned_about(self) -> None:
        """Its name is told, its value is not."""
        _, lines = serve("--port", "0", WOVE_WS_WORKER_PROT=SECRET)
        [line] = [line for line in lines if "WOVE_WS_WORKER_PROT " in line]
        assert "WARNING" in line and "WOVE_WS_WORKER_PORT" in line
        assert SECRET not in "".join(lines)

    def test_a_loopback_worker_is_not_touched_by_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who tests on a machine with a configured service gets the worker of the test."""
        monkeypatch.setenv("WOVE_WS_WORKER_HOST", "192.0.2.1")
        with LoopbackWorker() as worker:
            assert worker.url.startswith("ws://127.0.0.1:")


class TestExitCodes:
    """Each thing that a deployment gets wrong has a code of its own."""

    def test_the_port_cannot_be_had(self) -> None:
        """It is taken."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            code, line = refused(WOVE_WS_WORKER_PORT=str(taken.getsockname()[1]))
        assert code == 10 and "cannot listen on 127.0.0.1:" in line

    @pytest.mark.parametrize(("secret", "state"), [(None, "is not set"), ("", "is empty")])
    def test_the_secret_is_missing(self, secret: str | None, state: str) -> None:
        """The variable is absent, or empty."""
        extra = {} if secret is None else {"WOVE_TEST_SECRET": secret}
        code, line = refused("--port", "0", WOVE_WS_WORKER_SECURITY="env:WOVE_TEST_SECRET", **extra)
        assert code == 11 and f"'WOVE_TEST_SECRET' {state}" in line
        assert "security is from WOVE_WS_WORKER_SECURITY" in line

    def test_the_certificate_files_cannot_be_used(self, tmp_path: Path) -> None:
        """They are not there."""
        absent = str(tmp_path / "absent.pem")
        code, line = refused("--tls-cert", absent, "--tls-key", absent)
        assert code == 12 and absent in line

    def test_the_engine_cannot_be_had(self) -> None:
        """No scheduler answers."""
        code, line = refused("--port", "0", "--engine", "dask:tcp://127.0.0.1:1")
        assert code == 13 and "No Dask scheduler answers" in line

    def test_wrong_usage_and_wrong_configuration_are_2(self, tmp_path: Path) -> None:
        """Whatever says it."""
        assert run("--port", "x").returncode == 2
        assert refused(WOVE_WS_WORKER_PORT="x")[0] == 2
        assert refused("--config", str(tmp_path / "absent.toml"))[0] == 2

    def test_the_codes_are_in_the_help(self) -> None:
        """So that nobody has to look them up elsewhere."""
        words = " ".join(run("--help").stdout.split())
        for code, meaning in (
            (10, "the port"),
            (11, "the secret"),
            (12, "the certificate"),
            (13, "the engine"),
        ):
            assert f"{code} {meaning}" in words


def log_and_fail() -> None:
    import logging

    logging.getLogger("of.a.task").error("it went\nwrong", exc_info=ValueError("lost"))


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_the_log_is_one_json_object_a_line(engine: str) -> None:
    """That of the service and that of tasks, wherever these run; connections say of whom."""
    arguments = ["--log-format", "json", "--engine", engine]
    with LoopbackWorker(workers=1, args=arguments) as worker:
        with WebSocketExecutor(**worker.config) as pool:
            pool.submit(log_and_fail).result(PATIENCE)
        until(lambda: "it went" in worker.log)
        output = worker.log
    records: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert all({"ts", "level", "logger", "message"} <= set(record) for record in records)
    [connected] = [record for record in records if record.get("action") == "connect"]
    assert connected["logger"] == "wove_ws_sync.worker" and connected["peer"].startswith("127.0.0.1:")
    [failed] = [record for record in records if record["logger"] == "of.a.task"]
    assert failed["message"] == "it went\nwrong" and failed["level"] == "error"
    assert failed["exc"].endswith("ValueError: lost")
    assert worker.security is None or worker.security["secret"] not in output
