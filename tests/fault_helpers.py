"""What the fault tests share: measures of this process, waits, and scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wove_ws_sync
from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.link import Link

# Only a failing test spends it, in seconds.
WAIT = 60.0
# What a machine under load may add to any deadline, in seconds.
GRACE = 5.0
MIB = 1024 * 1024


def search_path() -> str:
    """Return the PYTHONPATH with which any process imports what this one can, an editable install too."""
    found = [entry or os.getcwd() for entry in sys.path]
    return os.pathsep.join([*found, str(Path(wove_ws_sync.__file__).parents[1])])


def resident(pid: int | str = "self") -> int:
    """Return the bytes of a process, this one by default, that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    """Return how many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


def own_threads() -> list[str]:
    """Return the names of the threads of this process's links."""
    roles = ("wove-ws-reader-", "wove-ws-watchdog-", "wove-ws-resolver-")
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(roles))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer than *seconds* and the grace."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= seconds + GRACE, f"took {took:.1f} s, {seconds} s were allowed"


def until(condition: Callable[[], Any], timeout: float = WAIT) -> None:
    """Wait until another thread or process has made *condition* true."""
    ends_at, pause = time.monotonic() + timeout, threading.Event()
    while not condition():
        assert time.monotonic() < ends_at, "it did not come true"
        pause.wait(0.005)


def link_of(pool: WebSocketExecutor) -> Link:
    """Return the link that *pool* uses."""
    session = pool._core.session
    assert session is not None
    return session.link


def python(
    code: str,
    *args: str,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
    flags: Sequence[str] = (),
    timeout: float = WAIT,
) -> tuple[str, str, int]:
    """Run *code* in a Python process with this one's search path; return output, errors and exit code."""
    with subprocess.Popen(
        [*prefix, sys.executable, *flags, "-c", textwrap.dedent(code), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path(), **(env or {})},
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return out, err, process.returncode
