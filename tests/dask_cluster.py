"""A real Dask cluster on loopback: a scheduler and worker processes, which can be killed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from types import TracebackType

from fault_helpers import search_path, until

__all__ = ["DaskCluster"]


class DaskCluster:
    """A context manager; ``address`` is the scheduler's."""

    def __init__(self, workers: int) -> None:
        self._size = workers
        self._workers: list[subprocess.Popen[bytes]] = []
        self._scheduler: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="dask-")
        self._port = 0
        self.address = ""

    def __enter__(self) -> DaskCluster:
        self._port = _free_port()
        self.address = f"tcp://127.0.0.1:{self._port}"
        self.begin()
        return self

    def begin(self) -> None:
        """Start the scheduler, at the same address each time, and as many workers as are missing."""
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--no-dashboard"]
        self._scheduler = self._start("scheduler", *options)
        until(lambda: _answers(self._port))
        self.restore()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        self._folder.cleanup()

    def end(self) -> None:
        """Kill the scheduler and all workers."""
        assert self._scheduler is not None
        for process in [*self._workers, self._scheduler]:
            process.kill()
            process.wait()

    @property
    def alive(self) -> int:
        """Return how many workers are running."""
        return sum(process.poll() is None for process in self._workers)

    def restore(self) -> None:
        """Start as many workers as are missing."""
        while self.alive < self._size:
            options = ["--nthreads", "2", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1"]
            folder = ["--local-directory", self._folder.name]
            self._workers.append(self._start("worker", self.address, *options, *folder))

    def kill_soon(self, delay: float) -> threading.Thread:
        """Have one worker killed in *delay* seconds; return the thread that does it."""
        victim = next(process for process in self._workers if process.poll() is None)

        def kill() -> None:
            victim.kill()
            victim.wait()

        timer = threading.Timer(delay, kill)
        timer.start()
        return timer

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": search_path()},
        )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True
