"""``wove-ws-sync worker --reload``: start the service anew when code changes. For development.

Owns: the process of the service, one after the other on the same port, and what becomes of signals.
Never: runs a task or imports code of the user; a process that is started anew has all of it fresh.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._worker_config import Settled

__all__ = ["serve_reloading"]

_logger = logging.getLogger("wove_ws_sync.worker")
#: What runs when code changes may take this long to end, in seconds; it is stopped then.
_GRACE = 2.0
#: The exit code of a service that could not have its port. It was free for others between two services.
_NO_PORT = 10
#: How often, in milliseconds, to see whether the service is still there.
_LOOK_INTERVAL = 500


def serve_reloading(settled: Settled) -> int:
    """Serve until a signal; return the exit code of the last service."""
    try:
        import watchfiles  # noqa: F401 - a missing one is to be told before anything begins
    except ImportError:
        line = 'pip install "wove_ws_sync[reload]"'
        message = f"--reload needs the package 'watchfiles', which is not installed: {line}"
        print(f"wove-ws-sync worker: {message}", file=sys.stderr)
        return 1
    directories = settled.options.reload_dir or [os.getcwd()]
    if missing := next((name for name in directories if not Path(name).is_dir()), None):
        message = settled.blame(f"--reload-dir: there is no directory {missing!r}.")
        print(f"wove-ws-sync worker: {message}", file=sys.stderr)
        return 2
    return _Supervisor(settled, directories).run()


class _Supervisor:
    """Has one service at a time. All methods are called from the main thread, also by signals."""

    def __init__(self, settled: Settled, directories: list[str]) -> None:
        import watchfiles

        options = settled.options
        self._directories = directories
        self._roots = [os.path.abspath(directory) for directory in directories]
        self._is_python = watchfiles.PythonFilter()
        self._until_stdin_closes: bool = options.until_stdin_closes
        self._stopping = threading.Event()
        self._service: _Service | None = None
        self._flags = [*settled.to_flags(), "--no-reload", "--until-stdin-closes"]
        names = settled.variables()
        self._environment = {name: text for name, text in os.environ.items() if name not in names}
        # A file that changes twice within a second would look the same to what is kept compiled.
        self._environment["PYTHONDONTWRITEBYTECODE"] = "1"

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if self._until_stdin_closes:
            threading.Thread(target=self._read_stdin, name="wove-ws-stdin-0", daemon=True).start()
        changes = self._watch()
        next(changes)  # from here on no change is missed
        url = self._start()
        if not url:
            return self._last_code()
        print(url, flush=True)
        told = False
        for changed in changes:
            if changed and not self._stopping.is_set():
                self._reload(changed)
                told = False
            elif not told and not self._stopping.is_set() and self._has_ended():
                told = not self._try_again()
        return self._last_code()

    def _watch(self) -> Iterator[set[str]]:
        """Yield the files that changed, often none; end with the order to stop."""
        import watchfiles

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # we tell what changed
        for changes in watchfiles.watch(
            *self._directories,
            watch_filter=self._is_code,
            stop_event=self._stopping,
            rust_timeout=_LOOK_INTERVAL,
            yield_on_timeout=True,
            raise_interrupt=False,
        ):
            yield {path for _, path in changes}

    def _is_code(self, change: Any, path: str) -> bool:
        """Tell whether a change counts; what the directories above ours are called does not matter."""
        path = os.path.abspath(path)
        inside = [root for root in self._roots if path.startswith(root + os.sep)]
        return self._is_python(change, os.path.relpath(path, max(inside, key=len)) if inside else path)

    def _start(self) -> str:
        """Start a service and return its URL once it is ready, "" if it ended before."""
        self._service = _Service(self._flags, self._environment)
        if self._stopping.is_set():  # the signal found none
            self._service.process.terminate()
        url = self._service.url()
        if url:
            port = url.partition("://")[2].partition("/")[0].rpartition(":")[2]
            self._flags = [
                *(flag for flag in self._flags if not flag.startswith("--port=")),
                f"--port={port}",
            ]
        return url

    def _reload(self, changed: set[str]) -> None:
        names = ", ".join(sorted(os.path.basename(path) for path in changed)[:3])
        _logger.info("Starting anew, for a change of %s.", names)
        assert self._service is not None
        self._service.end(_GRACE)
        if not self._stopping.is_set():
            self._start()

    def _try_again(self) -> bool:
        """Start the service again if somebody else has its port for a moment; tell the end of any other."""
        code = self._last_code()
        if code == _NO_PORT:
            self._start()
            return True
        _logger.error("The service ended with %d; it is started when code changes.", code)
        return False

    def _has_ended(self) -> bool:
        return self._service is not None and self._service.process.poll() is not None

    def _last_code(self) -> int:
        assert self._service is not None
        code = self._service.process.wait()
        self._service.close()
        if code < 0:  # a signal came before the service could obey it, or somebody killed it
            return 0 if self._stopping.is_set() else 1
        return code

    def _on_signal(self, number: int, frame: Any) -> None:
        """Pass the order on: the service drains, or stops."""
        self._stopping.set()
        if self._service is not None:
            self._service.process.send_signal(number)

    def _read_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGINT)


class _Service:
    """A process that serves, and ends when this one does, however that ends."""

    def __init__(self, flags: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "wove_ws_sync", "worker", *flags]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
        self._url = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="wove-ws-reload-0", daemon=True)
        self._reader.start()

    def url(self) -> str:
        """Wait until the service is ready, or gone; return its URL or ""."""
        self._ready.wait()
        return self._url

    def end(self, grace: float) -> None:
        """Have it drain for *grace* seconds, then stop it; wait until it is gone."""
        for _ in range(2):  # a second SIGTERM is the order to stop at once
            self.process.terminate()
            try:
                self.process.wait(grace)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            self.process.kill()
            self.process.wait()
        self.close()

    def close(self) -> None:
        """Let go of the pipes of a process that is gone."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join(1.0)  # a child of a task may hold the pipe

    def _read(self) -> None:
        """Take the URL, and pass on what tasks print."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self._url = stream.readline().decode().strip()
            self._ready.set()
            while chunk := stream.read1(65536):  # type: ignore[attr-defined]
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
