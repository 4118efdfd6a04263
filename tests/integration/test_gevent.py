"""Under gevent's monkey patch threads are greenlets, and everything holds that holds for threads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import until
from script_host import Script, scripts
from web_server import WebServer, hosts, metric

from wove_ws_sync.testing import LoopbackWorker

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")

PATCHED = "from gevent import monkey; monkey.patch_all()"
GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "fd://FD", "--worker-class", "gevent", "web_app"]


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    with LoopbackWorker(workers=16) as running:
        yield running


@pytest.fixture
def script(worker: LoopbackWorker, tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Start scripts; what still runs at the end is killed."""
    with scripts(worker, tmp_path) as start:
        yield start


def test_requests_of_one_process_wait_for_each_other_on_the_worker(
    tmp_path: Path, worker: LoopbackWorker
) -> None:
    """Sixteen views of one thread have their runs on the worker at the same moment, over one connection."""
    pytest.importorskip("gunicorn")
    with WebServer(tmp_path, GUNICORN, worker) as server:
        before = hosts(worker)[1]
        answers = server.ask_all(["/meet/16"] * 16, at_once=16)
        assert [answer.get("value") for answer in answers] == [16] * 16, (answers, server.log)
        assert {(answer["pid"], answer["green"]) for answer in answers} == {(answers[0]["pid"], True)}
        assert hosts(worker) == (1, before + 1)
        status, log = server.stop()
    assert status == 0 and "Traceback" not in log, log
    until(lambda: hosts(worker)[0] == 0)


def test_two_weaves_in_one_thread_cannot_run_at_once_and_the_executor_can(
    tmp_path: Path, worker: LoopbackWorker
) -> None:
    """The second of two weaves is refused by asyncio; a run of the executor at the same time is not."""
    pytest.importorskip("gunicorn")
    gate = tmp_path / "gate"
    with WebServer(tmp_path, GUNICORN, worker) as server:
        answers: list[dict[str, Any]] = []
        first = threading.Thread(target=lambda: answers.append(server.ask(f"/weave_for{gate}")))
        first.start()
        until(lambda: metric(worker, "wove_ws_runs_running") == 1)
        second, run = server.ask("/weave/3"), server.ask("/run/3")
        gate.touch()
        first.join()
    assert "asyncio.run() cannot be called from a running event loop" in second["error"]
    assert (run["value"], answers[0]["value"]) == (9, True)
    until(lambda: hosts(worker)[0] == 0)


SURFACE = """
    CONFIG["ca_file"] = ARGS[0]

    def work(number):
        with executor() as pool:  # all of them share one link
            running = pool.submit(forever)
            wait_running(running)
            assert list(pool.map(add, range(20), [number] * 20)) == [number + n for n in range(20)]
            runs = [pool.submit(add, number, n) for n in range(20)]
            done = {future.result() for future in concurrent.futures.as_completed(runs, 30)}
            assert done == {number + n for n in range(20)}
            assert len(pool.submit(bytes, 4 << 20).result(30)) == 4 << 20
            called = threading.Event()
            runs[0].add_done_callback(lambda future: called.set())
            assert called.wait(30)
            late = pool.with_options(delivery_timeout=0.5).submit(forever)
            assert isinstance(late.exception(30), DeliveryTimeout)
            assert running.cancel() and running.cancelled()
            links.add(pool.link)
            order.append(number)

    import gevent
    links, order = set(), []
    gevent.joinall([gevent.spawn(work, number) for number in range(10)], raise_error=True, timeout=45)
    assert sorted(order) == list(range(10)), order
    assert len(links) == 1 and links.pop().stats()["dials"] == 1
"""


def test_ten_greenlets_do_all_an_executor_can(tmp_path: Path) -> None:
    """map, as_completed, large results, callbacks, deadlines and cancellation, of greenlets over one wss."""
    with LoopbackWorker(workers=32, tls=True) as running, scripts(running, tmp_path) as script:
        assert script(SURFACE, str(running.ca_file), first=PATCHED).end() == ("", "", 0)


def test_a_patch_that_comes_too_late_is_one_clear_error(script: Callable[..., Script]) -> None:
    """Whoever patches after the import is told where the patch belongs, and nothing is started."""
    code = """
        warnings.simplefilter("ignore")
        from gevent import monkey
        pool = executor()
        monkey.patch_all()
        try:
            pool.submit(add, 1, 1)
        except RuntimeError as exc:
            assert "gevent.monkey.patch_all()" in str(exc), exc
        else:
            raise AssertionError("it must say so")
        assert threads() == []
    """
    assert script(code).end() == ("", "", 0)


def test_a_patch_that_leaves_threads_alone_changes_nothing(script: Callable[..., Script]) -> None:
    """Without ``thread`` in the patch, threads stay threads, whenever it comes."""
    code = """
        warnings.simplefilter("ignore")
        from gevent import monkey
        with executor() as pool:
            monkey.patch_all(thread=False, socket=False, ssl=False, select=False, queue=False)
            assert pool.submit(add, 1, 1).result() == 2
    """
    assert script(code).end() == ("", "", 0)


HOLDS = [
    ["test_futures.py"],
    *(
        pytest.param([name], marks=pytest.mark.soak)
        for name in (
            "test_detach.py",
            "test_events.py",
            "test_large.py",
            "test_lifecycle.py",
            "test_progress.py",
            "test_tls.py",
            "test_transport.py",
        )
    ),
]


OTHERWISE = (
    # The text of an error of pickle names gevent's lock there.
    "test_futures.py::test_unpicklable_results_and_exceptions",
    # Ten weaves at once, which asyncio does not have in one thread.
    "test_events.py::test_a_spoilt_task_hurts_its_own_weave",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("files", HOLDS, ids=lambda files: files[0])
def test_what_holds_for_threads_holds_for_greenlets(tmp_path: Path, files: list[str]) -> None:
    """The tests of the package itself pass in a process that gevent patched."""
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{PATCHED}; import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
            *("-q", "-p", "no:cacheprovider", "-c", str(here.parent.parent / "setup.cfg")),
            *("--basetemp", str(tmp_path / "inner")),
            *(f"--deselect=tests/integration/{test}" for test in OTHERWISE),
            *(str(here / name) for name in files),
        ],
        cwd=here.parent.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]
