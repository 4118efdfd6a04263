"""A Django project with weaves in its views, under gunicorn and under its own development server."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import until
from script_host import PATIENCE
from web_server import WebServer, connections, holdings, hosts

from wove_ws_sync.testing import LoopbackWorker

pytest.importorskip("django")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "fd://FD", "--workers", "2", "--threads", "4"]
# Its own, the four that serve, reader and watchdog.
MOST_THREADS = 1 + 4 + 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "requests", [pytest.param(200, id="200"), pytest.param(2000, id="2000", marks=pytest.mark.soak)]
)
def test_weaves_in_views_of_two_processes_of_four_threads(tmp_path: Path, requests: int) -> None:
    """Over wss, signed and sealed: right answers, two connections, no more threads and descriptors."""
    pytest.importorskip("gunicorn")
    with (
        LoopbackWorker(workers=8, tls=True, args=["--require-seal"]) as worker,
        WebServer(tmp_path, [*GUNICORN, "web_site"], worker) as server,
    ):
        pids: set[int] = set()

        def ask(numbers: range) -> None:
            for number, answer in zip(
                numbers, server.ask_all([f"/weave/{number}" for number in numbers]), strict=True
            ):
                assert answer["value"] == number**2 + number**3
                assert answer["dials"] == [1]
                pids.add(answer["pid"])

        while len(pids) < 2:
            ask(range(40))
        until(lambda: _at_rest(pids))
        descriptors = {pid: holdings(pid)[1] for pid in pids}
        ask(range(requests))
        assert hosts(worker) == (2, 2)
        assert sorted(connections(server.pids(), worker).values()) == sorted([pid] for pid in pids)
        until(lambda: _at_rest(pids))
        for pid in pids:
            until(lambda pid=pid: holdings(pid)[1] <= descriptors[pid])
        status, log = server.stop()
        until(lambda: hosts(worker)[0] == 0)
    assert status == 0 and "Traceback" not in log, log


def _at_rest(pids: set[int]) -> bool:
    return all(holdings(pid)[0] <= MOST_THREADS for pid in pids)


def test_runserver_reloads(tmp_path: Path) -> None:
    """When code changes, the process with the connection ends, and the next one has one of its own."""
    site = tmp_path / "manage.py"
    shutil.copy(Path(__file__).parent.parent / "web_site.py", site)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (
        LoopbackWorker() as worker,
        WebServer(tmp_path, [sys.executable, str(site), "runserver", address], worker) as server,
    ):
        pid = _answering(address, "first")
        assert hosts(worker) == (1, 1)
        assert list(connections(server.pids(), worker).values()) == [[pid]]
        site.write_text(site.read_text("utf-8").replace('VERSION = "first"', 'VERSION = "second"'), "utf-8")
        other = _answering(address, "second")
        until(lambda: hosts(worker)[0] == 1)
        assert other != pid and hosts(worker) == (1, 2)
        assert list(connections(server.pids(), worker).values()) == [[other]]


def _answering(address: str, version: str) -> int:
    """Have this version of the project run a weave, once it answers; return its process.

    Nothing else runs one: a process that ends would dial again for it. Such a process may refuse, hang up or
    stop within an answer, whose body is empty then.
    """

    def ask(path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(address, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

    def is_there() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            return bool(ask("/about")["version"] == version)
        return False

    until(is_there)
    answer = ask("/weave/3")
    assert (answer["value"], answer["version"], answer["dials"]) == (36, version, [1])
    return int(answer["pid"])
