"""Web servers that fork: one connection for each process, shared with none, and gone with it."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import until
from web_server import UWSGI, WebServer, connections, hosts, metric

from wove_ws_sync.testing import LoopbackWorker

GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "fd://FD", "--workers", "2"]
UWSGI_COMMAND = [str(UWSGI), "--http-socket", "fd://FD", "--master", "--processes", "2", "--need-app"]
UWSGI_COMMAND += ["--home", sys.prefix, "--module", "web_app"]
UWSGI_COMMAND += ["--hook-master-start", "unix_signal:15 gracefully_kill_them_all"]
SERVERS = {
    "gunicorn, sync": [*GUNICORN, "web_app"],
    "gunicorn, gthread": [*GUNICORN, "--worker-class", "gthread", "--threads", "4", "web_app"],
    "gunicorn, gthread, preload": [*GUNICORN, "--threads", "4", "--preload", "web_app"],
    "gunicorn, gevent": [*GUNICORN, "--worker-class", "gevent", "web_app"],
    "gunicorn, gevent, preload": [*GUNICORN, "--worker-class", "gevent", "--preload", "web_app"],
    "uwsgi": UWSGI_COMMAND,
    "uwsgi, threads, lazy apps": [*UWSGI_COMMAND, "--threads", "4", "--lazy-apps"],
}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=16) as running:
        yield running


def need(name: str) -> None:
    """Skip a test whose server is not there."""
    if name.startswith("uwsgi") and not UWSGI.exists():
        pytest.skip("uwsgi is not installed")
    for module in ("gunicorn", "gevent"):
        if module in name and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def use_both(server: WebServer, way: str, *, besides: frozenset[int] = frozenset()) -> set[int]:
    """Send requests until two processes have answered that are none of *besides*; return them."""
    seen: set[int] = set()

    def asked() -> bool:
        for number, answer in enumerate(server.ask_all(f"/{way}/{number}" for number in range(8))):
            assert answer.get("value") == number * number, (answer, server.log)
            assert answer["links"] == [1] or answer["pid"] in besides, answer
            seen.add(answer["pid"])
        return len(seen - besides) == 2

    until(asked)
    return seen - besides


def one_each(server: WebServer, worker: LoopbackWorker, pids: set[int]) -> None:
    """Fail unless each of the processes holds one connection, and no other process of the server any."""
    found = connections(server.pids(), worker)
    assert sorted(found.values()) == sorted([pid] for pid in pids), (found, pids)


@pytest.mark.parametrize("name", SERVERS)
def test_one_connection_a_process_also_after_a_graceful_reload(
    tmp_path: Path, worker: LoopbackWorker, name: str
) -> None:
    """Two processes are two hosts of the worker, before and after a HUP, and none once the server ended.

    In a process the executor and all weaves share the connection; under gevent only the executor is used.
    """
    need(name)
    way = "run" if "gevent" in name else "both"
    assert hosts(worker)[0] == 0
    before = hosts(worker)[1]
    if name == "gunicorn, gevent, preload":
        (tmp_path / "gunicorn.conf.py").write_text("from gevent import monkey\nmonkey.patch_all()\n", "utf-8")
    with WebServer(tmp_path, SERVERS[name], worker) as server:
        first = use_both(server, way)
        assert hosts(worker) == (2, before + 2)
        one_each(server, worker, first)
        server.reload()
        second = use_both(server, way, besides=frozenset(first))
        until(lambda: not first & server.pids())
        until(lambda: hosts(worker)[0] == 2)
        assert hosts(worker) == (2, before + 4)
        one_each(server, worker, second)
        status, log = server.stop()
    assert status == 0 and "Traceback" not in log and "Exception ignored" not in log, log
    until(lambda: hosts(worker)[0] == 0)


@pytest.mark.parametrize(
    "name", ["gunicorn, gthread, preload", "gunicorn, gevent", "uwsgi, threads, lazy apps"]
)
def test_a_graceful_reload_waits_for_the_run_of_a_request(
    tmp_path: Path, worker: LoopbackWorker, name: str
) -> None:
    """A view that waits for its run when a HUP comes answers with the result, over the old connection."""
    need(name)
    gate = tmp_path / "gate"
    answers: list[dict[str, Any]] = []
    with WebServer(tmp_path, SERVERS[name], worker) as server:
        asking = threading.Thread(target=lambda: answers.append(server.ask(f"/wait_for{gate}")))
        asking.start()
        until(lambda: metric(worker, "wove_ws_runs_running") == 1)
        server.reload()
        until(lambda: "Handling signal: hup" in server.log or "racefully killing" in server.log)
        gate.touch()
        asking.join()
        assert answers[0].get("value") is True and answers[0]["links"] == [1], (answers, server.log)
        until(lambda: answers[0]["pid"] not in server.pids())
    until(lambda: hosts(worker)[0] == 0)
