"""A wall clock that jumps by an hour, on either side: timers go by another clock, signatures do not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fault_helpers import WAIT, link_of, search_path, until

from wove_ws_sync import AuthenticationRejected, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker

# Where libfaketime is not installed: what Python code sees of the wall clock.
SITE = """
import os, time
_time, _time_ns, _file = time.time, time.time_ns, os.environ["CLOCK_FILE"]
def _offset():
    with open(_file) as file:
        return float(file.read() or 0)
time.time = lambda: _time() + _offset()
time.time_ns = lambda: _time_ns() + int(_offset() * 1e9)
"""


class WallClock:
    """A wall clock that jumps for the processes that get ``env``; their monotonic clock does not."""

    def __init__(self, folder: Path, search_path: str) -> None:
        self._file = folder / "clock"
        library = _libfaketime()
        self._fake = library is not None
        self.set(0.0)
        if library is not None:
            self.env = {
                "LD_PRELOAD": library,
                "FAKETIME_TIMESTAMP_FILE": str(self._file),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        else:
            (folder / "sitecustomize.py").write_text(SITE, "utf-8")
            self.env = {"CLOCK_FILE": str(self._file), "PYTHONPATH": f"{folder}:{search_path}"}

    def set(self, seconds: float) -> None:
        """Let the wall clock differ by *seconds* from now on."""
        text = f"{seconds:+.0f}s" if self._fake else str(seconds)
        replacement = self._file.with_suffix(".new")
        replacement.write_text(text, "ascii")
        replacement.replace(self._file)


def _libfaketime() -> str | None:
    command = shutil.which("faketime")
    if command is None:
        return None
    found = list((Path(command).parents[1] / "lib").glob("**/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    """A wall clock of the test's own."""
    folder = tmp_path / "clock"
    folder.mkdir()
    return WallClock(folder, search_path())


def nap(seconds: float) -> float:
    threading.Event().wait(seconds)  # libfaketime breaks time.sleep()
    return seconds


@pytest.mark.parametrize("hours", [1, -1])
def test_f32_the_workers_clock_jumps(clock: WallClock, hours: int) -> None:
    """Heartbeats and results go on; a new handshake is refused, and the worker's log says by how much."""
    jump = hours * 3600.0
    with LoopbackWorker(workers=4, env=clock.env) as worker:
        watched = {"delivery_heartbeat_seconds": 1.5, "delivery_timeout": WAIT}
        with WebSocketExecutor(**worker.config, **watched) as pool:
            assert abs(pool.submit(time.time).result(WAIT) - time.time()) < 60
            future = pool.submit(nap, 2.0)
            until(future.running)
            clock.set(jump)
            assert future.result(WAIT) == 2.0
            assert abs(pool.submit(time.time).result(WAIT) - time.time() - jump) < 60
            assert link_of(pool).stats()["dials"] == 1
            with WebSocketExecutor(**worker.config, idle_timeout=1.0) as other:
                error = other.submit(nap, 0.0).exception(WAIT)
        assert isinstance(error, AuthenticationRejected) and error.status == 401
        until(lambda: "clock differs by" in worker.log)
        [line] = [line for line in worker.log.splitlines() if "clock differs by" in line]
        assert abs(int(line.partition("differs by ")[2].partition(" s")[0]) - jump) < 60


HOST = """
    import sys, time
    from wove_ws_sync import AuthenticationRejected, WebSocketExecutor

    url, secret = sys.argv[1:]
    config = {"url": url, "security": {"type": "signed", "secret": secret}}
    watched = {"delivery_heartbeat_seconds": 1.5, "delivery_timeout": 20.0}

    def nap(seconds):
        import threading
        threading.Event().wait(seconds)  # libfaketime breaks time.sleep()
        return seconds

    with WebSocketExecutor(**config, **watched, ping_interval=1.0, pong_timeout=5.0) as pool:
        future = pool.submit(nap, 2.0)
        while not future.running():
            nap(0.01)
        before = time.time()
        print("running", flush=True)
        sys.stdin.readline()
        print("jumped", abs(time.time() - before) > 3000)
        started = time.monotonic()
        print(future.result(30.0))
        try:
            pool.with_options(delivery_timeout=0.5).submit(nap, 1.5).result(30.0)
        except TimeoutError:
            print("deadline", 0.4 < time.monotonic() - started < 12.0)
        print("dials", pool._core.session.link.stats()["dials"])
        with WebSocketExecutor(**config, idle_timeout=1.0) as other:
            error = other.submit(nap, 0.0).exception(30.0)
            print(isinstance(error, AuthenticationRejected), error.status)
"""


@pytest.mark.parametrize("hours", [1, -1])
def test_f32_the_hosts_clock_jumps(clock: WallClock, hours: int) -> None:
    """No deadline, heartbeat or ping notices; a new handshake is refused, and the worker's log says why."""
    with LoopbackWorker(workers=4) as worker:
        secret = (worker.security or {})["secret"]
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOST), worker.url, secret],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": search_path(), **clock.env},
        ) as host:
            try:
                assert host.stdout is not None
                assert host.stdout.readline() == "running\n"
                clock.set(hours * 3600.0)
                out, err = host.communicate("\n", timeout=WAIT)
            finally:
                host.kill()
        assert (err, host.returncode) == ("", 0)
        assert out.splitlines() == ["jumped True", "2.0", "deadline True", "dials 1", "True 401"]
        assert "clock differs by" in worker.log
