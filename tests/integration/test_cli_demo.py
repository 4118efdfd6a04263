"""``wove-ws-sync demo`` as a user runs it: one command, all six events, exit code 0."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wove.environment
import wove.runtime

from wove_ws_sync.cli import demo, main

EVENTS = {"task_started", "heartbeat", "log", "task_result", "task_error", "task_cancelled"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wove_ws_sync", "demo", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)


def test_timeline_for_people() -> None:
    """Every event by name, in aligned columns without colours for a pipe, and a summary, within 30 s."""
    begun = time.monotonic()
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - begun < 30.0
    shown = [line for line in done.stdout.splitlines() if len(line.split()) > 2 and line.split()[1] in EVENTS]
    moments, kinds, runs = zip(*(line.split()[:3] for line in shown), strict=True)
    assert set(kinds) == EVENTS
    assert [float(moment) for moment in moments] == sorted(float(moment) for moment in moments)
    assert len({line.index(kind) for line, kind in zip(shown, kinds, strict=True)}) == 1
    assert len({line.index(name) for line, name in zip(shown, runs, strict=True)}) == 1
    assert "\x1b" not in done.stdout
    assert "INFO 2 of 3 seconds done" in done.stdout
    assert "One connection, 9 runs" in done.stdout
    assert "traceback ends: json.decoder.JSONDecodeError: " in done.stdout


def test_one_object_a_line_for_machines() -> None:
    """--json prints events and nothing else; each run starts and ends once, the failures by name."""
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["type"] for event in events} == EVENTS
    assert all({"t", "type", "run_id", "task_id"} <= event.keys() for event in events)
    ends: dict[str, list[str]] = {}
    for event in events:
        if event["type"].startswith("task_"):
            ends.setdefault(event["run_id"], []).append(event["type"])
    assert {kinds[0] for kinds in ends.values()} == {"task_started"}
    assert sorted(kinds[1:] for kinds in ends.values()) == [
        ["task_cancelled"],
        ["task_error"],
        *[["task_result"]] * 7,
    ]
    names = {event["type"]: event["task_id"] for event in events}
    assert (names["task_error"], names["task_cancelled"]) == ("price", "endless")
    logs = [event["message"] for event in events if event["type"] == "log"]
    assert logs == [f"{second} of 3 seconds done" for second in (1, 2, 3)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_on_a_terminal(no_color: str, coloured: bool) -> None:
    """Colours need a terminal and the absence of NO_COLOR."""
    leader, follower = os.openpty()
    env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    command = [sys.executable, "-m", "wove_ws_sync", "demo"]
    with subprocess.Popen(command, stdout=follower, env=env) as process:
        os.close(follower)
        output = b""
        while chunk := _read(leader):
            output += chunk
        assert process.wait(60) == 0
    os.close(leader)
    assert (b"\x1b[31mtask_error" in output) is coloured


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux: the other end was closed
        return b""


def test_reader_that_has_seen_enough() -> None:
    """When the other end of the pipe goes away the demo ends in silence."""
    command = [sys.executable, "-m", "wove_ws_sync", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_a_worker_that_does_not_start(tmp_path: Path) -> None:
    """The reason is told, nothing is left hanging, and the exit code is 1."""
    broken = tmp_path / "websockets"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('this websockets is broken')\n")
    done = run(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 1
    assert "wove-ws-sync demo: RuntimeError: The loopback worker was not ready" in done.stderr
    assert "this websockets is broken" in done.stderr


def test_an_outcome_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo checks itself: exit code 1, a line that says what is wrong, and nothing left patched."""
    monkeypatch.setattr(demo, "_EVENTS", ("task_started", "task_paused"))
    loggers = [logging.getLogger(f"wove_ws_sync.{name}") for name in ("host", "task")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    build = wove.environment.build_executor_from_name
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "wove-ws-sync demo: no task_paused event arrived\n"
    assert [(logger.level, list(logger.handlers)) for logger in loggers] == before
    assert wove.environment.build_executor_from_name is build
    assert "demo_workers" not in wove.runtime.runtime.environments
