"""Forks in flight: by Python, by servers, and in C where no hook of Python's runs (F33, F34, F45)."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_helpers import python, search_path, until, within
from script_host import PATIENCE, QUIET, Proxy, Script, scripts

from wove_ws_sync import ConnectionLost, WebSocketExecutor
from wove_ws_sync.testing import LoopbackWorker


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.fixture
def script(worker: LoopbackWorker, tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Start scripts; what still runs at the end is killed."""
    with scripts(worker, tmp_path) as start:
        yield start


# -- a thousand runs in flight ------------------------------------------------------------

IN_FLIGHT = """

async def wait_for(path, number):
    import asyncio, os
    while not os.path.exists(path):
        await asyncio.sleep(0.2)
    return number

gate = ARGS[0]
pool = executor(ping_interval=60.0)
runs = [pool.submit(wait_for, gate, number) for number in range(1000)]
wait_running(*runs)
say("before")
input()
CHILD
_, status = os.waitpid(child, 0)
say("child", os.waitstatus_to_exitcode(status))
input()
open(gate, "w").close()
assert [future.result(50) for future in runs] == list(range(1000))
assert pool._core.session.link.stats()["dials"] == 1
pool.shutdown()
"""

CHILDREN = {
    "exits": """
child = os.fork()
if child == 0:
    sys.exit(3)
""",
    "os._exit": """
child = os.fork()
if child == 0:
    os._exit(3)
""",
    "collects": """
child = os.fork()
if child == 0:
    del pool, runs
    gc.collect()
    os._exit(3)
""",
    "submits": """
child = os.fork()
if child == 0:
    assert pool.submit(add, 1, 2).result(30) == 3
    assert concurrent.futures.wait(runs, 30).done == set(runs)
    pool.shutdown()
    sys.exit(3)
""",
    "multiprocessing": """
def work():
    assert pool.submit(add, 1, 2).result(30) == 3
    os._exit(3)
process = multiprocessing.get_context("fork").Process(target=work)
process.start()
child = process.pid
""",
    "unseen, exits": """
child = unseen_fork()
if child == 0:
    gc.collect()
    os._exit(3)
""",
    "unseen, submits": """
child = unseen_fork()
if child == 0:
    assert pool.submit(add, 1, 2).result(30) == 3
    assert concurrent.futures.wait(runs, 30).done == set(runs)
    pool.shutdown()
    wove_ws_sync.session.close_links()
    os._exit(3)
""",
}


@pytest.mark.parametrize("how", CHILDREN)
def test_f33_a_thousand_runs_in_flight(
    script: Callable[..., Script], worker: LoopbackWorker, tmp_path: Path, how: str
) -> None:
    """Whatever the child does, it writes 0 bytes to the parent's socket; all of the parent's runs finish."""
    with Proxy(worker) as proxy:
        code = IN_FLIGHT.replace("CHILD", CHILDREN[how])
        running = script(code, str(tmp_path / "gate"), target=proxy, flags=QUIET)
        running.expect("before")
        before = proxy.sent[0]
        running.tell()
        running.expect("child 3")
        assert proxy.sent[0] == before
        assert len(proxy.sent) == (2 if "submits" in how or how == "multiprocessing" else 1)
        running.tell()
        assert running.end() == ("", "", 0)


IMPORTS = """
    import json, os, sys, threading, time
    from wove_ws_sync import ConnectionLost, DeliveryTimeout, WebSocketExecutor

    imported = []

    def note(event, args):
        if event == "import" and threading.current_thread().name.startswith("wove-ws-"):
            imported.append(args[0])

    pool = WebSocketExecutor(**json.loads(sys.argv[1]))
    sys.addaudithook(note)
    assert pool.submit(abs, -3).result(30) == 3
    try:
        pool.submit(len, 5).result(30)
    except TypeError:
        pool.with_options(delivery_timeout=0.1).submit(time.sleep, 1).exception(30)
        pool.submit(time.sleep, 1).cancel()
    pool.shutdown()
    print(imported)
"""


@pytest.mark.parametrize("kind", ["plain", "signed", "tls"])
def test_f33_the_threads_of_a_link_import_nothing(kind: str) -> None:
    """A process that is forked while they do could never import that module, and so never dial."""
    with LoopbackWorker(workers=2, security=kind != "plain", tls=kind == "tls") as running:
        out, err, status = python(IMPORTS, json.dumps(running.config))
    assert (out, err, status) == ("[]\n", "", 0)


def fork_and_stay() -> int:
    """Leave a process behind that does nothing; return its number."""
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        time.sleep(60.0)
        os._exit(0)
    return child


def test_f13_f33_a_process_that_a_task_forks_keeps_no_socket_of_the_service() -> None:
    """The host sees at once that the service is gone, and the port is free for the next one."""
    with LoopbackWorker(workers=2, env={"PYTHONWARNINGS": "ignore"}) as running:
        with WebSocketExecutor(**running.config, ping_interval=3600.0, resume_window=1.0) as pool:
            child = pool.submit(fork_and_stay).result(PATIENCE)
            try:
                held = pool.submit(time.sleep, 60.0)
                until(held.running)
                running.kill()
                with within(1.0), pytest.raises(ConnectionLost):
                    held.result(PATIENCE)
                running.start()
                assert pool.submit(abs, -3).result(PATIENCE) == 3
            finally:
                os.kill(child, signal.SIGKILL)


# -- forks that Python does not see -------------------------------------------------------

UNSEEN = """
    seen = []
    os.register_at_fork(after_in_child=lambda: seen.append(os.getpid()))

    def sockets():
        return [name for name in map(descriptor, os.listdir("/proc/self/fd")) if name.startswith("socket:")]

    def descriptor(number):
        try:
            return os.readlink("/proc/self/fd/" + number)
        except FileNotFoundError:
            return ""

    def must_fork(*uses):
        for use in uses:
            try:
                use()
            except ForkedError:
                continue
            raise AssertionError("what is the parent's must not work")

    def free():
        # What a first call may not meet in the child: the parent's locks, or its sockets.
        assert sockets() == [], sockets()

    pool = executor(ping_interval=60.0)
    done = pool.submit(add, 1, 1)
    assert done.result() == 2
    ex = SyncWebSocketEnvironmentExecutor()
    ex.start(environment_name="e", environment_config={**CONFIG, "ping_interval": 60.0}, run_config={})
    run = pool.submit(nap, 1.0)
    wait_running(run)
    session = pool._core.session
    link = session.link
    connection = link._connection
    wire = connection.transport._wire
    locks = [
        wove_ws_sync.session._links_lock, wove_ws_sync.plugin._lock, pool._core.lock, ex._lock,
        link._state_lock, connection._write_lock, connection.waker._descriptor_lock,
        connection.transport._outbox._lock, wire._descriptor_lock, wire._tls_lock,
        run._condition, run._decoding, done._condition,
    ]
    held, over = threading.Event(), threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        held.set()
        over.wait()
        for lock in reversed(locks):
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    child = unseen_fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(20)
            assert not seen
            del locks
            FIRST
            free()
            assert pool.submit(add, 2, 3).result(15) == 5
            must_fork(run.result, run.cancel, done.result, session.connect)
            assert run.done() and done.done() and "done" in repr(run)
            assert len(pool._core.session.link._table) == 0
            pool.shutdown()
            ex.stop()
            wove_ws_sync.session.close_links()
            status = 0
        except BaseException as exc:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    over.set()
    holder.join()
    assert status == 0, status
    assert run.result() == 1.0
    assert pool.submit(add, 1, 1).result() == 2 and link.stats()["dials"] == 1
    ex.stop()
    pool.shutdown()
"""

FIRST_CALLS = {
    "submit": "assert pool.submit(add, 1, 2).result(15) == 3; wove_ws_sync.session.close_links(); "
    "pool = executor()",
    "view": "pool.with_options(delivery_timeout=9.0).submit(add, 1, 2).result(15); "
    "wove_ws_sync.session.close_links(); pool = executor()",
    "map": "assert list(pool.map(abs, [-1, -2])) == [1, 2]; wove_ws_sync.session.close_links(); "
    "pool = executor()",
    "shutdown": "pool.shutdown(); pool = executor()",
    "repr": "repr(pool)",
    "result": "must_fork(run.result)",
    "cancel": "must_fork(run.cancel)",
    "done": "assert run.done()",
    "done before": "assert done.done()",
    "wait": "assert not concurrent.futures.wait([done, run], 15).not_done",
    "callback": "run.add_done_callback(lambda future: None)",
    "send": 'must_fork(lambda: ex.send({"type": "shutdown"}))',
    "recv": "must_fork(ex.recv)",
    "attach": 'must_fork(lambda: ex.attach("r"))',
    "stats": 'assert link.stats()["runs"] == 1',
    "stop": "ex.stop()",
    "start": 'ex.start(environment_name="e", environment_config=CONFIG, run_config={}); ex.stop(); '
    "wove_ws_sync.session.close_links()",
    "new executor": "executor()",
    "open_session": "wove_ws_sync.session.open_session(link.options)",
    "close_links": "wove_ws_sync.session.close_links()",
    "install": "wove_ws_sync.install(); wove_ws_sync.session.links()",
    "finalizer": "pool = None; gc.collect(); pool = executor()",
    "exit": "wove_ws_sync.session._close_at_exit(); wove_ws_sync.session._exiting = False",
    "threads": "use = [threading.Thread(target=run.exception_or_none) for _ in range(8)]; "
    "[thread.start() for thread in use]; [thread.join() for thread in use]",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("first", FIRST_CALLS)
def test_f33_whatever_a_child_of_an_unseen_fork_calls_first(
    script: Callable[..., Script], first: str
) -> None:
    """No hook ran and every lock of ours is held for ever: the call still closes the inherited sockets.

    After it all faces work as in any child, and the parent's run and connection go on.
    """
    call = FIRST_CALLS[first].replace("run.exception_or_none", "lambda: pool.submit(abs, -1).result(15)")
    if first == "threads":
        call += "; wove_ws_sync.session.close_links(); pool = executor()"
    assert script(UNSEEN.replace("FIRST", call), flags=QUIET).end() == ("", "", 0)


def test_f33_children_name_their_runs_apart(script: Callable[..., Script]) -> None:
    """The first id of each child of an unseen fork differs from those of its parent and its siblings."""
    code = """
        pool = executor()
        ids = []
        for _ in range(3):
            reading, writing = os.pipe()
            child = unseen_fork()
            if child == 0:
                try:
                    signal.alarm(20)
                    os.write(writing, pool.submit(add, 1, 1).run_id.encode())
                finally:
                    os._exit(0)
            os.close(writing)
            ids.append(os.read(reading, 1000))
            os.close(reading)
            assert os.waitpid(child, 0)[1] == 0
        ids.append(pool.submit(add, 1, 1).run_id.encode())
        assert len(set(ids)) == 4 and all(ids), ids
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


def test_f33_threads_of_a_child_forget_once(script: Callable[..., Script]) -> None:
    """Eight threads that find out at the same moment: one forgets, the others wait for it."""
    code = """
        from wove_ws_sync import _fork
        pool = executor()
        assert pool.submit(add, 1, 1).result() == 2
        calls = []

        @_fork.in_child
        def slow():
            calls.append(threading.get_ident())
            time.sleep(0.3)  # so that the others come meanwhile

        child = unseen_fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(20)
                sys.setswitchinterval(1e-5)
                together, results = threading.Barrier(8), []

                def use(number):
                    together.wait()
                    results.append(pool.submit(add, number, 1).result(15) == number + 1)

                using = [threading.Thread(target=use, args=(number,)) for number in range(8)]
                for thread in using:
                    thread.start()
                for thread in using:
                    thread.join()
                assert results == [True] * 8, results
                assert len(calls) == 1, calls
                assert pool._core.session.link.stats()["dials"] == 1
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


def test_f33_an_interrupted_forgetting_is_begun_anew(script: Callable[..., Script]) -> None:
    """An exception of a signal handler in the middle of it costs nothing but that call."""
    code = """
        from wove_ws_sync import _fork
        pool = executor()
        run = pool.submit(nap, 1.0)
        wait_running(run)
        strikes = []

        @_fork.in_child
        def strike():
            strikes.append(1)
            if len(strikes) == 1:
                raise KeyboardInterrupt

        child = unseen_fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(20)
                try:
                    pool.submit(add, 1, 2)
                except KeyboardInterrupt:
                    assert pool.submit(add, 1, 2).result(15) == 3
                    assert run.done() and len(strikes) == 2
                    status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert run.result() == 1.0
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


# -- many forks ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))  # 200 each, so that a busy machine is no reason to give up
def test_f34_a_thousand_forks_while_threads_submit(script: Callable[..., Script], part: int) -> None:
    """No child deadlocks, whichever lock was held at the moment of its fork; the parent loses nothing."""
    code = """
        pool = executor()
        pool.submit(add, 1, 1).result()
        over = threading.Event()
        wrong = []

        def submit(number):
            count = 0
            while not over.is_set():
                count += 1
                view = pool.with_options(delivery_timeout=40.0, delivery_max_in_flight=2 + number)
                if view.submit(add, number, count).result() != number + count:
                    wrong.append(number)

        submitting = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
        for thread in submitting:
            thread.start()
        for number in range(200):
            child = os.fork()
            if child == 0:
                try:
                    if number % 50 == 0:
                        assert pool.submit(add, 2, 3).result(15) == 5
                        pool.shutdown()
                    for future in list(pool._core.pending):
                        future.done()
                    repr(pool)
                except BaseException as exc:
                    print(repr(exc), file=sys.stderr, flush=True)
                    os._exit(1)
                if number % 10 == 1:
                    sys.exit(0)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert status == 0, number
        over.set()
        for thread in submitting:
            thread.join()
        assert wrong == []
        assert pool._core.session.link.stats()["dials"] == 1
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


# -- servers that fork --------------------------------------------------------------------

APP = """
import os, sys, threading, time
import wove_ws_sync

seen = []
os.register_at_fork(after_in_child=lambda: seen.append(os.getpid()))
pool = wove_ws_sync.WebSocketExecutor(
    os.environ["URL"], security={"type": "signed", "secret": os.environ["SECRET"]}, ping_interval=60.0
)
master = os.getpid()

if os.environ["EARLY"]:
    # It must not end here: the master would acknowledge that, and its bytes are counted.
    inherited = pool.submit(time.sleep, 600.0)
    while not inherited.running():
        time.sleep(0.01)
os.write(int(os.environ["LOADED"]), b"!")
os.read(int(os.environ["GO_ON"]), 1)

def application(environ, start_response):
    said = [str(os.getpid()), str(os.getpid() != master), str(bool(seen))]
    try:
        said.append(str([pool.submit(abs, -n).result(20) for n in range(9)] == list(range(9))))
        if os.environ["EARLY"]:
            try:
                inherited.result(20)
            except wove_ws_sync.ForkedError:
                said.append("ForkedError")
        said.append(str(pool._core.session.link.stats()["dials"]))
    except RuntimeError as exc:
        said.append(repr(exc))
    start_response("200 OK", [("Content-Type", "text/plain"), ("Connection", "close")])
    return [" ".join(said).encode()]
"""


class Server:
    """A pre-forking server in a process group of its own, with the application above."""

    def __init__(self, folder: Path, target: Any, command: list[str], *, early: bool) -> None:
        (folder / "app.py").write_text(APP, encoding="utf-8")
        self._listening = socket.create_server(("127.0.0.1", 0))
        descriptor = self._listening.fileno()
        self._loaded, loaded = os.pipe()
        go_on, self._go_on = os.pipe()
        self.process = subprocess.Popen(
            [part.replace("FD", str(descriptor)) for part in command],
            cwd=folder,
            pass_fds=[descriptor, loaded, go_on],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={
                **os.environ,
                "HOME": str(folder),
                "LOADED": str(loaded),
                "GO_ON": str(go_on),
                "PYTHONPATH": search_path(),
                "URL": target.url,
                "SECRET": (target.security or {})["secret"],
                "EARLY": "1" if early else "",
            },
        )
        os.close(loaded)
        os.close(go_on)

    def __enter__(self) -> Server:
        return self

    def loaded(self) -> None:
        """Wait until the application is imported, before any fork."""
        if os.read(self._loaded, 1) != b"!":
            raise AssertionError(self.process.communicate(timeout=PATIENCE)[0])

    def go_on(self) -> None:
        """Let it fork and serve."""
        os.write(self._go_on, b"!")

    def ask(self) -> str:
        """Return what the application answers; it may still be starting."""
        connection = http.client.HTTPConnection(*self._listening.getsockname(), timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            return connection.getresponse().read().decode()

    def stop(self) -> tuple[int, str]:
        """End it as an administrator does; return its exit code and what it logged."""
        self.process.terminate()
        log, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, log

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self._listening.close()
        os.close(self._loaded)
        os.close(self._go_on)


def serve_and_count(
    folder: Path, worker: LoopbackWorker, command: list[str], *, seen: bool, early: bool
) -> None:
    """Serve requests from both forked workers; *seen* tells whether Python's hooks ran there.

    One that has not answered yet may not hear that it is to end: uWSGI's prepares for signals last.
    """
    expected = ["True", str(seen), "True", *["ForkedError"] * early, "1"]
    answered: set[str] = set()
    with Proxy(worker) as proxy, Server(folder, proxy, command, early=early) as server:
        server.loaded()
        before = list(proxy.sent)
        server.go_on()
        with ThreadPoolExecutor(2) as asking:
            while len(answered) < 2:
                for answer in asking.map(lambda _: server.ask(), range(6)):
                    pid, *said = answer.split(" ")
                    assert said == expected
                    answered.add(pid)
        assert proxy.sent[: len(before)] == before
        assert len(proxy.sent) > len(before)
        status, log = server.stop()
    assert status == 0 and "Traceback" not in log and "Exception ignored" not in log, log


@pytest.mark.parametrize("early", [False, True], ids=["made before", "in use before"])
def test_f33_gunicorn_preload(tmp_path: Path, worker: LoopbackWorker, early: bool) -> None:
    """Two workers of a preloaded application use its executor; not a byte goes to the master's socket."""
    pytest.importorskip("gunicorn")
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "2", "--bind", "fd://FD", "app"]
    serve_and_count(tmp_path, worker, command, seen=True, early=early)


UWSGI = Path(sys.executable).with_name("uwsgi")


@pytest.mark.skipif(not UWSGI.exists(), reason="uwsgi is not installed")
@pytest.mark.parametrize("early", [False, True], ids=["made before", "in use before"])
@pytest.mark.parametrize("hooks", [False, True], ids=["no hooks", "hooks"])
def test_f33_uwsgi_without_lazy_apps(
    tmp_path: Path, worker: LoopbackWorker, hooks: bool, early: bool
) -> None:
    """Two workers that uWSGI forks in C, with Python's hooks and without, use the master's executor."""
    command = [str(UWSGI), "--http-socket", "fd://FD", "--master", "--processes", "2", "--need-app"]
    command += [
        "--enable-threads",
        "--home",
        sys.prefix,
        "--module",
        "app",
        "--die-on-term",
    ]
    command += ["--py-call-uwsgi-fork-hooks"] if hooks else []
    serve_and_count(tmp_path, worker, command, seen=hooks, early=early)


def test_f45_uwsgi_without_threads_is_one_clear_error(script: Callable[..., Script]) -> None:
    """Where uWSGI says that threads do not run, the first use names the remedy, and nothing is started."""
    code = """
        import types
        sys.modules["uwsgi"] = types.SimpleNamespace(has_threads=0, opt={}, version=b"2.0.26")
        pool = executor()
        ex = SyncWebSocketEnvironmentExecutor()
        for use in (
            lambda: pool.submit(add, 1, 1),
            lambda: ex.start(environment_name="e", environment_config=CONFIG, run_config={}),
        ):
            try:
                use()
            except RuntimeError as exc:
                assert "--enable-threads" in str(exc), exc
            else:
                raise AssertionError("it must say so")
        assert threads() == []
        sys.modules["uwsgi"].has_threads = 1
        assert pool.submit(add, 1, 1).result() == 2
        pool.shutdown()
    """
    assert script(code).end() == ("", "", 0)


GREEN = """
def work(name):
    with executor() as pool:
        for count in range(25):
            assert pool.submit(add, count, 1).result(20) == count + 1
            order.append(name)

order = []
"""


@pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed")
def test_f45_gevent(script: Callable[..., Script]) -> None:
    """Under gevent's monkey patch fifty runs of two greenlets come back, and the greenlets take turns."""
    code = (
        GREEN
        + """
import gevent
gevent.joinall([gevent.spawn(work, "a"), gevent.spawn(work, "b")], raise_error=True)
assert sorted(order) == ["a"] * 25 + ["b"] * 25 and order != sorted(order), order
"""
    )
    first = "from gevent import monkey; monkey.patch_all()"
    assert script(code, first=first).end() == ("", "", 0)


def test_f45_eventlet_is_one_clear_error(script: Callable[..., Script]) -> None:
    """Its monkey patch removes select.poll: the first use says so, and nothing is started."""
    code = """
        import select
        del select.poll
        try:
            executor().submit(add, 1, 1)
        except RuntimeError as exc:
            assert "eventlet" in str(exc), exc
        else:
            raise AssertionError("it must say so")
        assert threads() == []
    """
    assert script(code).end() == ("", "", 0)
