"""``wove-ws-sync worker --reload``: a worker in a process of its own, started again when code changes.

Owns: that process, and the watch on the files. Never: serves a host itself. For development:
runs get a moment to end, then they are lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["serve_and_reload"]

# How long runs may take to end before the worker is started again, in seconds.
_GRACE = 3.0


def serve_and_reload(arguments: Sequence[str], folders: Sequence[str], say: Callable[[str], None]) -> int:
    """Run ``wove-ws-sync worker`` with *arguments*, again whenever a Python file in *folders* changes.

    The port stays the same. Returns the exit code of a worker that did not start the first time, or
    of the last one after a signal. Raises ModuleNotFoundError without ``watchfiles``.
    """
    from watchfiles import PythonFilter, watch

    child = _Child(arguments)
    over = threading.Event()

    def end(number: int, frame: Any) -> None:
        over.set()
        child.signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if not child.start():
        return child.wait(None)
    print(child.url, flush=True)
    for changes in watch(*folders, watch_filter=PythonFilter(), stop_event=over, raise_interrupt=False):
        if over.is_set():
            break
        say(f"{os.path.relpath(min(path for _, path in changes))} changed; starting again")
        child.stop()
        if not over.is_set() and not child.start():
            say("the worker did not start; waiting for the next change")
    return child.wait(None)


class _Child:
    """The worker process. Use it from one thread; ``signal`` from a signal handler as well."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self) -> bool:
        """Start the worker; return whether it got ready."""
        fixed = {"WOVE_WS_WORKER_RELOAD": "0"}
        port = ["--port", str(urllib.parse.urlsplit(self.url).port)] if self.url else []
        command = [sys.executable, "-m", "wove_ws_sync", "worker", *self._arguments, *port]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **fixed}
        )
        assert self._process.stdout is not None
        url = self._process.stdout.readline().strip()
        self.url = url or self.url
        return bool(url)

    def signal(self, number: int) -> None:
        """Pass a signal on."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def stop(self) -> None:
        """Have the worker end: in good order, or at once when that takes too long."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
            self.signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(_GRACE)
                return

    def wait(self, timeout: float | None) -> int:
        """Return the exit code of the worker."""
        assert self._process is not None
        code = self._process.wait(timeout)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code
