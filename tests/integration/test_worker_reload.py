"""``wove-ws-sync worker --reload``: the same address before and after code changes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from fault_helpers import search_path, until

from wove_ws_sync import WebSocketExecutor

pytest.importorskip("watchfiles")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PATIENCE = 60.0


def ask() -> Any:
    import answers_of_a_user  # type: ignore[import-not-found]

    return answers_of_a_user.answer()


def say() -> None:
    print("a task prints", flush=True)


def write(directory: Path, answer: object) -> None:
    """Replace the module as an editor does: at once."""
    fresh = directory / "fresh"
    fresh.write_text(f"def answer():\n    return {answer!r}\n", encoding="utf-8")
    fresh.replace(directory / "answers_of_a_user.py")


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Read stderr up to a line with *text*, and return that."""
    assert process.stderr is not None
    seen = []
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        for line in process.stderr:
            seen.append(line)
            if text in line:
                return line
    finally:
        watchdog.cancel()
    pytest.fail(f"there is no {text!r} in:\n{''.join(seen)}")


def start(directory: Path, *arguments: str) -> Any:
    process: Any = subprocess.Popen(
        [sys.executable, "-m", "wove_ws_sync", "worker", "--port", "0", "--reload", *arguments],
        env={**os.environ, "PYTHONPATH": search_path()},
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.url = process.stdout.readline().rstrip("\n")
    return process


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """Below a directory whose name would be left out if it were inside the one that is watched."""
    directory = tmp_path / ".tox" / "user"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Any]:
    write(tmp_path, 1)
    process = start(tmp_path)
    try:
        assert process.url
        wait_for_line(process, "Listening on")
        yield process
    finally:
        process.kill()  # the service ends with it
        process.communicate()


def test_a_changed_module_gives_the_new_answer_at_the_same_address(worker: Any, tmp_path: Path) -> None:
    """One executor over two reloads; the URL is printed once, and what tasks print arrives."""
    with WebSocketExecutor(worker.url) as pool:
        assert pool.submit(ask).result(PATIENCE) == 1
        for answer in (2, 3):
            write(tmp_path, answer)
            wait_for_line(worker, "Listening on " + worker.url)
            assert pool.submit(ask).result(PATIENCE) == answer
        pool.submit(say).result(PATIENCE)
    worker.terminate()
    output, errors = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0 and output == "a task prints\n"
    assert "Traceback" not in errors


def test_other_files_change_nothing(worker: Any, tmp_path: Path) -> None:
    """Only *.py counts: the first change that is told is that of the module."""
    (tmp_path / "notes.txt").write_text("news", encoding="utf-8")
    write(tmp_path, 2)
    line = wait_for_line(worker, "Starting anew")
    assert line.rstrip().endswith("for a change of answers_of_a_user.py.")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_service(worker: Any, tmp_path: Path, number: int) -> None:
    """SIGTERM lets a run end, SIGINT does not; the exit code is that of the service."""
    gate, begun = tmp_path / "gate", tmp_path / "begun"

    def occupy(gate: str, begun: str) -> str:
        import pathlib
        import threading

        pathlib.Path(begun).touch()
        while not pathlib.Path(gate).exists():
            threading.Event().wait(0.01)
        return "done"

    with WebSocketExecutor(worker.url) as pool:
        run = pool.submit(occupy, str(gate), str(begun))
        until(begun.exists)
        worker.send_signal(number)
        if number == signal.SIGTERM:
            wait_for_line(worker, "Draining")
            gate.touch()
            assert run.result(PATIENCE) == "done"
        assert worker.wait(PATIENCE) == 0
        gate.touch()
        run.cancel()


def test_a_service_that_cannot_start_is_started_with_the_next_change(tmp_path: Path) -> None:
    """A mistake in the engine's module ends the service, not the command."""
    engine = tmp_path / "engine_of_a_user.py"
    good = (
        "from concurrent.futures import ThreadPoolExecutor\ndef make():\n    return ThreadPoolExecutor(2)\n"
    )
    engine.write_text(good, encoding="utf-8")
    process = start(tmp_path, "--engine", "engine_of_a_user:make")
    try:
        wait_for_line(process, "Listening on")
        engine.write_text("import nothing_like_this\n", encoding="utf-8")
        wait_for_line(process, "The service ended with 2")
        engine.write_text(good, encoding="utf-8")
        wait_for_line(process, "Listening on " + process.url)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_service_that_never_was_there_ends_the_command_with_its_code(tmp_path: Path) -> None:
    """There is nothing to wait for: what is wrong is the command line."""
    process = start(tmp_path, "--path", "wove")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and process.url == "" and "path must be" in errors


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """One line, exit code 2."""
    process = start(tmp_path, "--reload-dir", "nowhere")
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2 and "'nowhere'" in errors and "Traceback" not in errors


def test_a_missing_library_is_named_with_its_install_line(tmp_path: Path) -> None:
    """Exit code 1."""
    program = (
        "import sys; sys.modules['watchfiles'] = None; from wove_ws_sync.cli import main; "
        "sys.exit(main(['worker', '--port', '0', '--reload']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and 'pip install "wove_ws_sync[reload]"' in done.stderr


def test_the_service_ends_when_the_command_is_killed(worker: Any) -> None:
    """Nobody is left at the port."""
    with WebSocketExecutor(worker.url) as pool:
        pid = pool.submit(os.getpid).result(PATIENCE)
    assert pid != worker.pid
    worker.kill()
    worker.communicate(timeout=PATIENCE)  # stderr is the service's, too: its end is the end of both


def test_a_port_that_somebody_has_for_a_moment_is_had_again(worker: Any, tmp_path: Path) -> None:
    """Between the end of one service and the start of the next it is free for everybody."""
    port = int(worker.url.rpartition(":")[2].partition("/")[0])
    attempts = itertools.count()
    with socket.socket() as sock:

        def takes_it() -> bool:
            if next(attempts) % 500 == 0:  # the next service was faster: have it started once more
                write(tmp_path, 2)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                sock.listen()
                return True
            return False

        until(takes_it)
        wait_for_line(worker, "cannot listen on")
    wait_for_line(worker, f"Listening on {worker.url}")
    with WebSocketExecutor(worker.url) as pool:
        assert pool.submit(ask).result(PATIENCE) == 2
