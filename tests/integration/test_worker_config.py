"""Configuration, logs and reloading of ``wove-ws-sync worker``, as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import WAIT, until

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

COMMAND = [sys.executable, "-m", "wove_ws_sync", "worker"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **extra}


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


def test_print_config_says_where_each_value_is_from(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("workers = 3\n", "utf-8")
    done = run("--config", str(file), "--print-config", "--path", "/p", WOVE_WS_WORKER_PORT="123")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert f"workers = 3  # file {file}" in lines
    assert 'path = "/p"  # argument --path' in lines
    assert "port = 123  # environment variable WOVE_WS_WORKER_PORT" in lines
    again = tmp_path / "again.toml"
    again.write_text(done.stdout, "utf-8")
    repeated = run("--print-config", WOVE_WS_WORKER_CONFIG=str(again))
    assert [line.partition("  #")[0] for line in repeated.stdout.splitlines()] == [
        line.partition("  #")[0] for line in lines
    ]


@pytest.mark.parametrize("where", ["flag", "variable", "file"])
def test_a_secret_that_stands_where_its_name_should_is_not_shown(where: str, tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('security = "canary-4711"\n' if where == "file" else "", "utf-8")
    arguments = ["--config", str(file)] + (["--security", "canary-4711"] if where == "flag" else [])
    extra = {"WOVE_WS_WORKER_SECURITY": "canary-4711"} if where == "variable" else {}
    done = run(*arguments, **extra)
    assert done.returncode == 2 and "env:VARIABLE" in done.stderr
    assert "canary-4711" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_json_logs_are_one_object_a_line() -> None:
    """The service's own lines and those of tasks, a line break inside one included."""
    with LoopbackWorker(args=["--log-format", "json"]) as worker:
        with WebSocketExecutor(worker.url, security=worker.security) as pool:
            pool.submit(eval, "__import__('logging').getLogger('app').warning('two\\nlines')").result(WAIT)
        until(lambda: "two" in worker.log)
        lines = [json.loads(line) for line in worker.log.splitlines()]
    assert {"ts", "level", "logger", "message"} <= set(lines[0])
    assert any(line["logger"] == "app" and line["message"] == "two\nlines" for line in lines)
    assert all(line["ts"].endswith("Z") for line in lines)
    assert worker.security is not None and worker.security["secret"] not in worker.log


def test_json_logs_of_processes() -> None:
    with LoopbackWorker(workers=1, args=["--log-format", "json", "--engine", "processes"]) as worker:
        with WebSocketExecutor(worker.url, security=worker.security) as pool:
            pool.submit(eval, "__import__('logging').getLogger('app').warning('hello')").result(WAIT)
        until(lambda: '"app"' in worker.log)
        assert [json.loads(line)["message"] for line in worker.log.splitlines() if '"app"' in line] == [
            "hello"
        ]


@contextlib.contextmanager
def reloading(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run ``worker --reload`` in *folder*."""
    with (folder / "log").open("w") as log:
        process: Any = subprocess.Popen(
            [*COMMAND, "--port", "0", "--reload", *arguments],
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(WAIT)
        process.stdout.close()


def test_reload_brings_the_new_code_at_the_same_url(tmp_path: Path) -> None:
    """A connected host gets the new answer after the file has changed; the URL is told once."""
    pytest.importorskip("watchfiles")
    module, log = tmp_path / "answering.py", tmp_path / "log"
    module.write_text("def answer(): return 'old'\n", "utf-8")
    ask = "__import__('answering').answer()"
    with reloading(tmp_path) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with WebSocketExecutor(url, delivery_orphan_policy="requeue", delivery_timeout=WAIT) as pool:
            assert pool.submit(eval, ask).result(WAIT) == "old"
            module.write_text("def answer(): return 'brand new'\n", "utf-8")
            until(lambda: "answering.py changed; starting again" in log.read_text("utf-8"))
            until(lambda: pool.submit(eval, ask).result(WAIT) == "brand new")
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
        assert process.stdout.read() == ""


def test_reload_of_a_worker_that_cannot_start_ends_with_its_code(tmp_path: Path) -> None:
    pytest.importorskip("watchfiles")
    done = run("--reload", "--reload-dir", str(tmp_path), "--engine", "engine_tasks:make_broken")
    assert done.returncode == 6 and "the cluster is away" in done.stderr


def test_reload_without_its_package_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "watchfiles.py").write_text("raise ModuleNotFoundError('gone', name='watchfiles')\n", "utf-8")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = run("--reload", PYTHONPATH=path)
    assert done.returncode == 1 and 'pip install "wove_ws_sync[reload]"' in done.stderr
