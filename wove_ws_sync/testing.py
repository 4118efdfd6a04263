"""What tests and first steps need: a real worker service on this machine.

Owns: the subprocess of a ``LoopbackWorker``, its secret and its certificates. Never:
imported by the rest of the package.
"""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ._memory import ManualClock, MemoryTransport
from .session import close_links

__all__ = ["LoopbackWorker", "ManualClock", "MemoryTransport", "close_links"]

_SECRET_VARIABLE = "WOVE_WS_LOOPBACK_SECRET"
_KEPT_LINES = 5000
#: What a service that is told to stop at once may take for that, in seconds.
_STOP_TIMEOUT = 5.0


class LoopbackWorker:
    """Run a worker service in a subprocess on a free loopback port; a context manager.

    The service has this process's ``sys.path``, so that functions of test modules can be
    imported there, and ends when this process does, however it ends. The end of the ``with``
    block stops it at once, whatever it runs; ``stop()`` lets it finish first.

    ``workers`` is the number of its task threads, ``security`` whether it asks for a
    (fresh, random) secret, ``tls`` whether it speaks wss with a throw-away certificate,
    ``max_message_bytes`` the largest message it accepts. ``args`` are further arguments of
    ``wove-ws-sync worker``, ``env`` further variables of its environment. ``start()``
    raises RuntimeError if it is not ready within ``start_timeout`` seconds.

    Use it from one thread at a time; the attributes may be read from any.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        security: bool = True,
        tls: bool = False,
        path: str = "/wove",
        max_message_bytes: int | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_timeout: float = 20.0,
    ) -> None:
        self._args = ["--path", path, *args]
        if workers is not None:
            self._args += ["--workers", str(workers)]
        if max_message_bytes is not None:
            self._args += ["--max-message-bytes", str(max_message_bytes)]
        self._env = dict(env or {})
        self._secret = secrets.token_urlsafe(32) if security else None
        if self._secret is not None:
            self._args += ["--security", f"env:{_SECRET_VARIABLE}"]
            self._env[_SECRET_VARIABLE] = self._secret
        self._tls = tls
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._output: _Output | None = None
        self._port = 0
        self.url = ""

    def __repr__(self) -> str:
        return f"<LoopbackWorker {self.url or 'not started'} pid={self.pid}>"

    def __enter__(self) -> LoopbackWorker:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_at_once()
        self._remove_certificates()

    @property
    def pid(self) -> int | None:
        """Return the process id of the service, None if it is not running."""
        return None if self._process is None else self._process.pid

    @property
    def security(self) -> dict[str, str] | None:
        """Return the value for ``executor_config["security"]``."""
        return None if self._secret is None else {"type": "signed", "secret": self._secret}

    @property
    def ca_file(self) -> str | None:
        """Return the path of the certificate authority to trust, None without TLS."""
        return None if self._directory is None else str(Path(self._directory.name) / "ca.pem")

    @property
    def config(self) -> dict[str, Any]:
        """Return an ``executor_config`` for this service."""
        config: dict[str, Any] = {"url": self.url}
        if self._secret is not None:
            config["security"] = self.security
        if self.ca_file is not None:
            config["ca_file"] = self.ca_file
        return config

    @property
    def log(self) -> str:
        """Return what the service wrote to stderr, its last 5,000 lines."""
        return "" if self._output is None else self._output.text()

    def start(self) -> LoopbackWorker:
        """Start the service and wait until it listens; return self."""
        if self._process is not None:
            raise RuntimeError("The loopback worker is running already.")
        if self._tls and self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="wove-ws-")
            _make_certificates(Path(self._directory.name))
        search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**_environment(), "PYTHONPATH": search_path, **self._env},
        )
        self._output = _Output(self._process, self._output)
        url = self._output.first_line(self._start_timeout)
        if not url:
            self.kill()
            self._remove_certificates()
            last = "\n".join(self.log.splitlines()[-20:])
            raise RuntimeError(f"The loopback worker was not ready in {self._start_timeout} s:\n{last}")
        self.url = url
        self._port = int(url.rpartition(":")[2].partition("/")[0])
        return self

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "wove_ws_sync", "worker", "--port", str(self._port)]
        command += ["--until-stdin-closes", *self._args]
        if self._directory is not None:
            folder = Path(self._directory.name)
            command += ["--tls-cert", str(folder / "server.pem"), "--tls-key", str(folder / "server.key")]
        return command

    def stop(self, timeout: float = 5.0) -> None:
        """End the service by SIGTERM, which lets it finish its runs, and by SIGKILL *timeout* seconds later.

        The service gives its runs ``--drain-timeout`` seconds, 30 unless ``args`` say otherwise.
        Harmless if it is not running.
        """
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            self._wait_or_kill(timeout)
        self._remove_certificates()

    def kill(self) -> None:
        """End the service by SIGKILL, as a crash does. Harmless if it is not running."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """Start the service again on the same port, with the same secret.

        One that runs is stopped first, and its runs with it, as by the end of the ``with`` block.
        """
        self._stop_at_once()
        self.start()

    def _stop_at_once(self) -> None:
        """End the service without waiting for its runs, as its stdin closes when this process ends."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._wait_or_kill(_STOP_TIMEOUT)

    def _wait_or_kill(self, timeout: float) -> None:
        assert self._process is not None
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reap()

    def _remove_certificates(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _reap(self) -> None:
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None and self._output is not None
        process.wait()
        process.stdin.close()
        self._output.close()


def _environment() -> dict[str, str]:
    """Return ours without the options of a worker service that is run from here for good."""
    return {name: text for name, text in os.environ.items() if not name.startswith("WOVE_WS_WORKER_")}


class _Output:
    """Read the two output pipes of a process, so that it never waits for us."""

    def __init__(self, process: subprocess.Popen[bytes], earlier: _Output | None) -> None:
        assert process.stdout is not None and process.stderr is not None
        self._lock = threading.Lock()  # guards _lines and _first
        self._lines: collections.deque[str] = collections.deque(maxlen=_KEPT_LINES)
        if earlier is not None:
            self._lines.extend(earlier._lines)
        self._first = ""
        self._ready = threading.Event()
        self._pipes = (process.stdout, process.stderr)
        self._threads = [
            threading.Thread(target=self._read, args=(pipe,), name=f"wove-ws-loopback-{number}", daemon=True)
            for number, pipe in enumerate(self._pipes)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: IO[bytes]) -> None:
        standard_output = pipe is self._pipes[0]
        for raw in iter(pipe.readline, b""):
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            with self._lock:
                if standard_output and not self._first:
                    self._first = line
                    self._ready.set()
                elif not standard_output:
                    self._lines.append(line)
        if standard_output:
            self._ready.set()

    def first_line(self, timeout: float) -> str:
        """Return the first line of stdout; "" if there is none within *timeout* seconds."""
        self._ready.wait(timeout)
        with self._lock:
            return self._first

    def text(self) -> str:
        """Return what came on stderr."""
        with self._lock:
            return "\n".join(self._lines)

    def close(self) -> None:
        """Wait for the end of both pipes; a grandchild may hold them open, so not for long."""
        for thread, pipe in zip(self._threads, self._pipes, strict=True):
            thread.join(2.0)
            if not thread.is_alive():
                pipe.close()


def _make_certificates(folder: Path) -> None:
    """Write ca.pem, server.pem and server.key for localhost, valid for a week."""
    from ._certificates import Authority

    authority = Authority.make()
    server = authority.server(["localhost", "127.0.0.1", "::1"], days=7.0)
    (folder / "ca.pem").write_bytes(authority.pair.certificate)
    (folder / "server.pem").write_bytes(server.certificate)
    key_file = folder / "server.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(server.key)
