"""Exit, Ctrl-C, collection and fork: each in a process of its own that must end by itself, in silence."""

from __future__ import annotations

import contextlib
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from script_host import EXIT, QUIET, Mute, Proxy, Script, scripts

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


# -- the interpreter's exit --------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        """
        pool = executor()
        futures = [pool.submit(forever) for _ in range(20)]
        wait_running(*futures)
        """,
        """
        def main():
            pool = executor()
            pool.submit(forever)
            wait_running(pool.submit(forever))
        main()
        """,
        """
        pool = executor()
        futures = [pool.submit(forever) for _ in range(20)]  # and no time to dial
        """,
        """
        pool = executor(delivery_max_in_flight=1, delivery_orphan_policy="detach")
        futures = [pool.submit(nap, 1.0) for _ in range(20)]
        """,
        """
        pool = executor()
        wait_running(pool.submit(forever))
        sys.exit(0)
        """,
        """
        pool = executor()
        future = pool.submit(forever)
        future.add_done_callback(lambda future: future.cancelled() or os._exit(3))
        wait_running(future)
        """,
        """
        def leave():
            pool = executor()
            wait_running(pool.submit(forever))
            sys.exit(4)
        thread = threading.Thread(target=leave)
        thread.start()
        """,
        """
        def wait():
            assert executor().submit(nap, 1.5).result() == 1.5
            say("waited")
        for _ in range(3):
            threading.Thread(target=wait).start()
        """,
        """
        pool = executor()
        def wait():
            pool.submit(forever).result()
        for _ in range(3):
            threading.Thread(target=wait, daemon=True).start()
        while len(pool._core.pending) < 3:
            time.sleep(0.01)
        wait_running(*pool._core.pending)
        """,
        """
        ex = SyncWebSocketEnvironmentExecutor()
        ex.start(environment_name="e", environment_config=CONFIG, run_config={})
        ex.send({"type": "run_task", "run_id": "r", "task_id": "t", "callable": forever, "args": {}})
        threading.Thread(target=lambda: [ex.recv() for _ in range(9)], daemon=True).start()
        """,
        """
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
        with weave() as w:
            w.do(environment="w")(lambda: 1)
        pool = executor()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            threads.submit(lambda: pool.submit(nap, 0.5).result()).result()
        """,
        """
        import atexit
        pool = executor()
        late = pool.submit(nap, 0.1)
        future = pool.submit(forever)
        wait_running(future)
        def ask():
            try:
                future.result(30)
            except concurrent.futures.CancelledError:
                pass
        atexit._clear  # ours was registered first, so this one runs before it
        atexit.register(lambda: future.cancel() and ask())
        """,
    ],
    ids=[
        "pending",
        "collected",
        "not dialled",
        "in line",
        "sys.exit",
        "callback",
        "exit in a thread",
        "waiting threads",
        "waiting daemons",
        "sync executor",
        "after a weave",
        "atexit",
    ],
)
def test_f36_exit_with_runs_on_their_way(script: Callable[..., Script], code: str) -> None:
    """No hang, no word on stderr, exit code 0, whatever was left open."""
    out, err, status = script(code).end()
    assert (err, status) == ("", 0)
    assert out.count("waited") in (0, 3)


def test_f36_exit_is_prompt(script: Callable[..., Script]) -> None:
    """A live peer answers the goodbye at once."""
    running = script("""
        pool = executor()
        wait_running(pool.submit(forever))
        say("done")
    """)
    running.expect("done")
    assert running.end(within=EXIT)[1:] == ("", 0)


def test_f36_exit_while_the_peer_stands_still(script: Callable[..., Script]) -> None:
    """close_timeout later at the most."""
    with LoopbackWorker() as stopped:
        running = script(
            """
            pools = [executor(idle_timeout=60.0 + n) for n in range(3)]
            wait_running(*[pool.submit(forever) for pool in pools])
            say("running")
            input()
            say("done")
            """,
            target=stopped,
        )
        running.expect("running")
        assert stopped.pid is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            running.tell()
            running.expect("done")
            assert running.end(within=EXIT)[1:] == ("", 0)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


def test_f36_exit_during_a_dial(script: Callable[..., Script]) -> None:
    """Nobody waits for a handshake that is never answered."""
    mute = Mute()
    try:
        running = script(
            """
            pool = executor(open_timeout=40.0)
            pool.submit(add, 1, 2)
            while "DIALING" not in repr(pool):
                time.sleep(0.01)
            say("done")
            """,
            target=mute,
        )
        running.expect("done")
        assert running.end(within=EXIT)[1:] == ("", 0)
    finally:
        mute.close()


def test_f36_os_exit(script: Callable[..., Script], worker: LoopbackWorker) -> None:
    """It is immediate, and the worker drops the runs of a host that is gone."""
    running = script("""
        pool = executor()
        wait_running(pool.submit(forever))
        say("done")
        os._exit(7)
    """)
    running.expect("done")
    assert running.end(within=EXIT) == ("", "", 7)


def test_nothing_starts_before_the_first_use(script: Callable[..., Script]) -> None:
    """No thread at import, none for an executor that is only made; it warns of nothing."""
    code = """
        pools = [executor(), SyncWebSocketEnvironmentExecutor(), AsyncWebSocketEnvironmentExecutor()]
        assert threads() == [] and threading.active_count() == 1
        del pools
        gc.collect()
    """
    assert script(code, flags=("-X", "dev", "-W", "error")).end() == ("", "", 0)


# -- Ctrl-C ---------------------------------------------------------------------------------


def test_f35_ctrl_c_during_result(script: Callable[..., Script]) -> None:
    """KeyboardInterrupt comes at once, three times; run and executor go on."""
    running = script("""
        pool = executor()
        future = pool.submit(nap, 3.0)
        for _ in range(3):
            try:
                say("waiting")
                future.result()
            except KeyboardInterrupt:
                say("interrupted")
        say(future.result(), pool.submit(add, 1, 2).result(), pool._core.session.link.stats()["dials"])
        pool.shutdown()
    """)
    for _ in range(3):
        running.expect("waiting")
        time.sleep(0.2)
        started = time.monotonic()
        running.interrupt()
        running.expect("interrupted")
        assert time.monotonic() - started < 2.0
    assert running.end() == ("3.0 3 1\n", "", 0)


def test_f35_ctrl_c_that_nobody_catches(script: Callable[..., Script]) -> None:
    """One traceback, the user's own, and a prompt end."""
    running = script("""
        pool = executor()
        future = pool.submit(forever)
        say("waiting")
        future.result()
    """)
    running.expect("waiting")
    time.sleep(0.2)
    running.interrupt()
    out, err, status = running.end(within=EXIT)
    assert err.count("Traceback") == 1 and err.endswith("KeyboardInterrupt\n"), err
    assert (out, status) == ("", -signal.SIGINT)


def test_f35_ctrl_c_during_a_weave(script: Callable[..., Script]) -> None:
    """It ends the weave; the next one works."""
    running = script("""
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
        try:
            say("waiting")
            with weave() as w:
                w.do(environment="w")(forever)
        except KeyboardInterrupt:
            say("interrupted")
        with weave() as w:
            w.do(environment="w")(lambda: 5)
        say(list(w.result))
    """)
    running.expect("waiting")
    time.sleep(1.0)
    running.interrupt()
    running.expect("interrupted")
    out, err, status = running.end()
    assert (err, status) == ("", 0)
    assert "5" in out


def test_f35_ctrl_c_during_a_blocked_submit(script: Callable[..., Script]) -> None:
    """submit() that waits for a peer which does not read ends at once, and the executor stays usable."""
    with LoopbackWorker() as stopped:
        running = script(
            """
            pool = executor()
            say(pool.submit(add, 1, 1).result())
            input()
            try:
                pool.submit(len, b"x" * 30_000_000)
            except KeyboardInterrupt:
                say("interrupted", len(pool._core.pending))
            input()
            say(pool.submit(add, 2, 2).result())
            pool.shutdown()
            """,
            target=stopped,
        )
        running.expect("2")
        assert stopped.pid is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            running.tell()
            time.sleep(1.0)
            running.interrupt()
            running.expect("interrupted 0")
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        running.tell()
        assert running.end() == ("4\n", "", 0)


# -- collection -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        """
        pool = executor()
        pool.submit(add, 1, 2).result()
        del pool
        """,
        """
        view = executor().with_options(delivery_timeout=20.0)
        gc.collect()
        view.submit(add, 1, 2).result()
        pool = executor()
        pool.submit(add, 1, 2).result()
        other, _ = pool.with_options(delivery_timeout=20.0), pool.shutdown()
        del pool
        gc.collect()
        view.submit(add, 1, 2).result()
        del view
        """,
        """
        pool = executor()
        pool.me = [pool]
        future = pool.submit(nap, 0.3)
        del pool
        gc.collect()
        future.result()
        """,
        """
        pool = executor()
        pool.submit(nap, 0.3)
        pool.submit(add, 1, 2).result()
        threading.Thread(target=lambda: globals().pop("pool") and None).start()
        """,
        """
        ex = SyncWebSocketEnvironmentExecutor()
        ex.start(environment_name="e", environment_config=CONFIG, run_config={})
        del ex
        """,
    ],
    ids=["executor", "view", "cycle", "in a thread", "sync executor"],
)
def test_f37_a_dropped_executor_warns_once(script: Callable[..., Script], code: str) -> None:
    """One ResourceWarning, none about a socket, and no thread a second after its last run."""
    code = textwrap.dedent(code) + textwrap.dedent("""
        gc.collect()
        ends_at = time.monotonic() + 4.0  # a second, on a machine that is busy
        while threads():
            assert time.monotonic() < ends_at, threads()
            time.sleep(0.01)
        gc.collect()
    """)
    out, err, status = script(code, flags=("-X", "dev")).end()
    assert (out, status) == ("", 0), err
    assert err.count("ResourceWarning: unclosed") == 1, err
    assert "socket" not in err and "Traceback" not in err, err


def test_f37_what_is_closed_warns_of_nothing(script: Callable[..., Script]) -> None:
    """Under -X dev and -W error no socket, loop or executor is left unclosed."""
    code = """
        with executor() as pool:
            pool.submit(add, 1, 2).result()
            lost = pool.submit(forever)
            wait_running(lost)
            lost.cancel()
        ex = SyncWebSocketEnvironmentExecutor()
        ex.start(environment_name="e", environment_config=CONFIG, run_config={})
        ex.stop()
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
        with weave() as w:
            w.do(environment="w")(lambda: 1)
        with WebSocketExecutor("ws://127.0.0.1:1/") as nobody:
            assert isinstance(nobody.submit(add, 1, 2).exception(), ConnectionRefusedError)
        gc.collect()
        say("done")
    """
    running = script(code, flags=("-X", "dev", "-W", "error"))
    running.expect("done")
    out, err, status = running.end(within=EXIT)
    assert (out, status) == ("", 0), err
    assert not [word for word in ("Warning", "Traceback", "unclosed") if word in err], err


# -- fork -------------------------------------------------------------------------------------


FORK = """
    import functools
    if ARGS:
        CONFIG["ca_file"] = ARGS[0]
    executor = functools.partial(executor, ping_interval=60.0)
    gate = sys.argv[0] + ".gate"
    def hold(gate):
        import os, time
        while not os.path.exists(gate):
            time.sleep(0.01)
        return 4.0
    pool = executor()
    assert pool.submit(add, 1, 1).result() == 2
    done = pool.submit(add, 1, 2)
    concurrent.futures.wait([done])
    runs = [pool.submit(hold, gate) for _ in range(3)]
    wait_running(*runs)
    asked = threading.Thread(target=lambda: runs[0].result())
    asked.start()
    ex = SyncWebSocketEnvironmentExecutor()
    ex.start(environment_name="e", environment_config={**CONFIG, "ping_interval": 60.0}, run_config={})
    while pool._core.session.link._connection._ack_at is not None:
        time.sleep(0.01)
    say("before")
    input()
    child = os.fork()
    if child == 0:
        for future in [*runs, done]:
            for ask in (future.result, future.exception, future.cancel):
                try:
                    ask()
                except ForkedError as exc:
                    assert future.run_id in str(exc)
                else:
                    raise AssertionError("an inherited future must not answer")
        assert concurrent.futures.wait(runs, 5.0).done == set(runs)
        for use in (ex.recv, lambda: ex.send({"type": "shutdown"})):
            try:
                use()
            except ForkedError:
                pass
            else:
                raise AssertionError("an inherited session must not work")
        gc.collect()
        say("asked")
        sys.stdin.readline()
        started = time.monotonic()
        inherited = pool.submit(add, 3, 4)
        assert inherited.result(30) == 7
        with executor(idle_timeout=30.0) as own:
            assert own.submit(add, 5, 6).result(30) == 11
        ex.start(environment_name="e", environment_config=CONFIG, run_config={})
        ex.stop()
        assert time.monotonic() - started < 5.0
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
        with weave() as w:
            w.do(environment="w")(lambda: 1)
        pool.shutdown()
        say("worked")
        sys.exit(5)
    _, status = os.waitpid(child, 0)
    say("child", os.waitstatus_to_exitcode(status))
    input()
    open(gate, "w").close()
    assert [future.result() for future in runs] == [4.0] * 3
    assert done.result() == 3
    assert pool.submit(add, 1, 1).result() == 2
    assert pool._core.session.link.stats()["dials"] == 1
    ex.stop()
    pool.shutdown()
"""


def settled(proxy: Proxy) -> int:
    """Return how much the first connection has sent, once the proxy has read what is under way."""
    sent, pause = -1, threading.Event()
    while sent != proxy.sent[0]:
        sent = proxy.sent[0]
        pause.wait(0.5)
    return sent


@pytest.mark.parametrize("tls", [False, True], ids=["ws", "wss"])
def test_f33_a_forked_child_leaves_its_parents_connection_alone(
    script: Callable[..., Script], worker: LoopbackWorker, tls: bool
) -> None:
    """Not a byte on it; its work goes over a connection of its own; the parent's runs finish."""
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(LoopbackWorker(workers=8, tls=True)) if tls else worker
        proxy = stack.enter_context(Proxy(target))
        args = (target.ca_file,) if target.ca_file else ()
        running = script(FORK, *args, target=proxy, flags=QUIET)
        running.expect("before")
        before = settled(proxy)
        running.tell()
        running.expect("asked")
        assert proxy.sent == [before]
        running.tell()
        running.expect("worked", "child 5")
        assert len(proxy.sent) > 1
        assert proxy.sent[0] == before
        running.tell()
        assert running.end() == ("", "", 0)


def test_f33_multiprocessing_by_fork(script: Callable[..., Script]) -> None:
    """Children of a pool use the inherited executor, each over a connection of its own."""
    code = """
        pool = executor()
        future = pool.submit(nap, 1.0)
        wait_running(future)

        def use(number):
            return pool.submit(add, number, number).result(30), pool._core.session.link.stats()["dials"]

        context = multiprocessing.get_context("fork")
        with context.Pool(3) as processes:
            assert processes.map(use, range(12), chunksize=1) == [(2 * n, 1) for n in range(12)]
        process = context.Process(target=use, args=(1,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert future.result() == 1.0
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


def test_f45_multiprocessing_by_spawn(script: Callable[..., Script]) -> None:
    """A spawned child starts from nothing and makes its own executor."""
    code = """
        def use(number):
            with executor() as pool:
                return pool.submit(operator.mul, number, 2).result(30)

        if __name__ == "__main__":
            with executor() as pool:
                assert pool.submit(add, 1, 1).result() == 2
                with multiprocessing.get_context("spawn").Pool(2) as processes:
                    assert processes.map(use, range(4)) == [0, 2, 4, 6]
                assert pool.submit(add, 1, 1).result() == 2
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


def test_f34_a_fork_while_every_lock_is_held(script: Callable[..., Script]) -> None:
    """The child has fresh locks, whoever held the old ones: all faces work, and it ends."""
    code = """
        pool = executor()
        future = pool.submit(nap, 2.0)
        wait_running(future)
        ex = SyncWebSocketEnvironmentExecutor()
        ex.start(environment_name="e", environment_config=CONFIG, run_config={})
        link = pool._core.session.link
        connection = link._connection
        wire = connection.transport._wire
        locks = [
            wove_ws_sync.session._links_lock, wove_ws_sync.plugin._lock, pool._core.lock, ex._lock,
            link._state_lock, connection._write_lock, connection.waker._descriptor_lock,
            connection.transport._outbox._lock, wire._descriptor_lock, wire._tls_lock,
            future._condition, future._decoding,
        ]
        held, over = threading.Event(), threading.Event()

        def hold():
            for lock in locks:
                lock.acquire()
            held.set()
            over.wait()
            for lock in locks:
                lock.release()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        child = os.fork()
        if child == 0:
            try:
                future.result()
            except ForkedError:
                assert future.done()
            ex.start(environment_name="e", environment_config=CONFIG, run_config={})
            ex.stop()
            assert pool.submit(add, 1, 2).result() == 3
            wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
            with weave() as w:
                w.do(environment="w")(lambda: 1)
            pool.shutdown()
            del future, link, connection, wire, locks
            gc.collect()
            sys.exit(0)
        status = os.waitpid(child, 0)[1]
        over.set()
        holder.join()
        assert status == 0, status
        assert future.result() == 2.0
        ex.stop()
        pool.shutdown()
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)


def test_f33_a_fork_while_nobody_is_connected(script: Callable[..., Script]) -> None:
    """Executors made and configured before the fork, used in three children: pre-forking servers do so."""
    code = """
        pool = executor()
        wove_ws_sync.config(environments={"w": {"executor": "websocket", "executor_config": CONFIG}})
        children = []
        for number in range(3):
            child = os.fork()
            if child == 0:
                with weave() as w:
                    @w.do(range(5), environment="w")
                    def double(item):
                        return 2 * item
                assert w.result.double == [0, 2, 4, 6, 8]
                assert pool.submit(add, 1, number).result() == 1 + number
                sys.exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert threads() == []
    """
    assert script(code, flags=QUIET).end() == ("", "", 0)
