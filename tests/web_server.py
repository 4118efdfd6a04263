"""Web servers that tests start, and what they hold: processes, connections, threads, descriptors."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fault_helpers import search_path
from script_host import PATIENCE

from wove_ws_sync.testing import LoopbackWorker

__all__ = ["UWSGI", "WebServer", "connections", "holdings", "hosts", "metric", "surroundings"]

UWSGI = Path(sys.executable).with_name("uwsgi")
_ESTABLISHED = "01"


class WebServer:
    """A server in a process group of its own; ``FD`` in its command and *files* is a socket that listens.

    It hears of *worker* by the variables of :func:`surroundings`. What it says is in :attr:`log`.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        worker: LoopbackWorker,
        variables: Mapping[str, str] | None = None,
        files: Sequence[str] = (),
    ) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        descriptor = str(self._listening.fileno())
        for path in map(folder.joinpath, files):
            if path.exists():
                path.write_text(path.read_text("utf-8").replace("FD", descriptor), encoding="utf-8")
        self._log = folder / f"server-{self.address[1]}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [part.replace("FD", descriptor) for part in command],
                cwd=folder,
                pass_fds=[self._listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**surroundings(worker, folder), **(variables or {})},
            )
        # The server has it now: who connects while none of its processes is there must be refused.
        self._listening.close()

    def __enter__(self) -> WebServer:
        return self

    @property
    def log(self) -> str:
        """Return what the server wrote so far."""
        return self._log.read_text("utf-8", "replace")

    def ask(self, path: str = "/") -> dict[str, Any]:
        """Return the JSON that the server answers with; the server may still be starting."""
        connection = http.client.HTTPConnection(*self.address, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Connection": "close"})
            response = connection.getresponse()
            body = response.read().decode()
        assert response.status == 200, (response.status, body, self.log)
        answer: dict[str, Any] = json.loads(body)
        return answer

    def ask_all(self, paths: Iterable[str], *, at_once: int = 8) -> list[dict[str, Any]]:
        """Ask for each of the paths, *at_once* at the same time; return the answers in their order."""
        with ThreadPoolExecutor(at_once, thread_name_prefix="asking") as pool:
            return list(pool.map(self.ask, paths))

    def reload(self) -> None:
        """Ask for a graceful reload, as an administrator does after a change."""
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> tuple[int, str]:
        """End it as an administrator does; return its exit code and what it logged."""
        self.process.terminate()
        return self.process.wait(PATIENCE), self.log

    def pids(self) -> set[int]:
        """Return the processes of the server, the master too."""
        found = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(ProcessLookupError):
                    if os.getpgid(int(entry.name)) == self.process.pid:
                        found.add(int(entry.name))
        return found

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def surroundings(worker: LoopbackWorker, folder: Path) -> dict[str, str]:
    """Return the environment of a program that uses *worker*, and keeps its things in *folder*."""
    found = {**os.environ, "HOME": str(folder), "PYTHONPATH": search_path()}
    found |= {"WORKER_URL": worker.url, "WORKER_SECRET": (worker.security or {})["secret"]}
    if worker.ca_file is not None:
        # The first is for this package, the second what Wove's own executor trusts.
        found |= {"WORKER_CA": worker.ca_file, "SSL_CERT_FILE": worker.ca_file}
    return found


def hosts(worker: LoopbackWorker) -> tuple[int, int]:
    """Return how many hosts a worker service has now, and how many connections it ever had."""
    return int(metric(worker, "wove_ws_hosts_connected")), int(metric(worker, "wove_ws_connections_total"))


def metric(worker: LoopbackWorker, name: str) -> float:
    """Return what a worker service counts under a name."""
    lines = _read(worker, "/metrics").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def _read(worker: LoopbackWorker, path: str) -> str:
    scheme, _, rest = worker.url.partition("://")
    base = f"{'https' if scheme == 'wss' else 'http'}://{rest.partition('/')[0]}"
    context = None if worker.ca_file is None else ssl.create_default_context(cafile=worker.ca_file)
    with urllib.request.urlopen(base + path, timeout=PATIENCE, context=context) as response:
        return str(response.read().decode())


def connections(pids: Iterable[int], worker: LoopbackWorker) -> dict[str, list[int]]:
    """Return the sockets that lead to *worker*, each with those of *pids* that hold it. Linux only."""
    port = int(worker.url.rpartition(":")[2].partition("/")[0])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    far = f":{port:04X}"
    leading = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(far) and line[3] == _ESTABLISHED}
    found: dict[str, list[int]] = {}
    for pid in pids:
        for target in _descriptors(pid):
            if target in leading:
                found.setdefault(target, []).append(pid)
    return found


def holdings(pid: int) -> tuple[int, int]:
    """Return how many threads and how many descriptors a process has. Linux only."""
    return len(list(Path(f"/proc/{pid}/task").iterdir())), len(_descriptors(pid))


def _descriptors(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(FileNotFoundError, PermissionError):  # the process ends
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
    return found
