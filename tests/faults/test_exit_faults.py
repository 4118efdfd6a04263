"""Signals that strike anywhere, and the end of an interpreter whose threads are busy (F35, F36)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from script_host import EXIT, Script, scripts

from wove_ws_sync.testing import LoopbackWorker


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=4) as running:
        yield running


@pytest.fixture
def script(worker: LoopbackWorker, tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Start scripts; what still runs at the end is killed."""
    with scripts(worker, tmp_path) as start:
        yield start


# -- signals ------------------------------------------------------------------------------


def test_f35_ctrl_c_during_shutdown(script: Callable[..., Script]) -> None:
    """KeyboardInterrupt comes at once out of shutdown(); the run goes on, and a second call waits for it."""
    running = script("""
        pool = executor()
        future = pool.submit(nap, 3.0)
        wait_running(future)
        try:
            say("waiting")
            pool.shutdown()
        except KeyboardInterrupt:
            say("interrupted")
        pool.shutdown()
        assert future.done()
        say(future.result())
    """)
    running.expect("waiting")
    started = time.monotonic()
    running.interrupt()
    running.expect("interrupted")
    assert time.monotonic() - started < 2.0
    assert running.end() == ("3.0\n", "", 0)


ALARMS = """
    import random
    signal.alarm(0)
    faulthandler.unregister(signal.SIGALRM)
    faulthandler.dump_traceback_later(50, exit=True)
    seed, points = int(ARGS[0]), int(ARGS[1])

    class Struck({"Exception": Exception, "BaseException": BaseException}[ARGS[2]]):
        pass

    def strike(number, frame):
        global struck
        if armed:  # or too late: the system gave the signal to a thread that had to wait for its turn
            struck += 1
            raise Struck

    def submit():
        futures.append(pool.submit(add, 1, 1))

    def ask():
        futures.append(pool.submit(add, 1, 1))
        assert futures[0].result(30) == 2

    def cancel():
        futures.append(narrow.submit(nap, 0.005))
        futures[0].cancel()

    def map_all():
        assert list(narrow.map(abs, range(6), timeout=30)) == list(range(6))

    def map_ahead():
        for _ in narrow.map(abs, iter(range(6)), timeout=30, buffersize=2):
            pass

    def settle(what):
        ends_at = time.monotonic() + 20
        while what():
            assert time.monotonic() < ends_at, (operation, what(), link)
            time.sleep(0.0005)

    chance = random.Random(seed)
    modes = {"delivery_cancel_mode": ("best_effort", "require_ack")[seed % 2]}
    pool = executor(**modes, cancel_ack_timeout=2.0, reconnect_initial_delay=0.01)
    narrow = pool.with_options(delivery_max_in_flight=2)
    pool.submit(add, 1, 1).result()
    link = pool._core.session.link
    operations = {submit: 0.0, ask: 0.0, cancel: 0.0, map_all: 0.0, map_ahead: 0.0}
    for operation in operations:
        for _ in range(5):
            futures, started = [], time.perf_counter()
            operation()
            operations[operation] = time.perf_counter() - started
            concurrent.futures.wait(futures)

    signal.signal(signal.SIGALRM, strike)
    armed, struck = False, 0
    while struck < points:
        operation = chance.choice(list(operations))
        before, futures = struck, []
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.2 * operations[operation]))
                operation()
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (Struck, ConnectionLost):  # half a message may have left; see below
            assert struck > before
        settle(lambda: [future for future in futures if not future.done()])
        for future in futures:
            try:
                future.result(0)
            except (Struck, concurrent.futures.CancelledError, ConnectionLost):
                assert struck > before or operation is cancel
        settle(lambda: link.stats()["runs"] or pool._core.pending)
        if struck > before:
            probes = [narrow.submit(add, 1, number) for number in range(3)]
            settle(lambda: [probe for probe in probes if not probe.done()])
            assert [probe.result() for probe in probes] == [1, 2, 3]
    pool.shutdown()
    say("unharmed")
"""


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", ["Exception", "BaseException"])
def test_f35_a_raising_alarm_at_random_points(script: Callable[..., Script], kind: str, seed: int) -> None:
    """300 times in submit, result, cancel and map: every future ends, no run and no slot is left behind.

    What the handler raises comes out of the call, or is the future's exception. If it strikes
    while a message leaves, the connection ends and its runs with it (ConnectionLost).
    """
    out, err, status = script(ALARMS, str(seed), "300", kind).end()
    # A strike in a callback of a weak reference can only be printed, by the interpreter.
    assert (out, status) == ("unharmed\n", 0), err[-3000:]


# -- the interpreter's exit ---------------------------------------------------------------


BUSY = """
    pool = executor()
    narrow = pool.with_options(delivery_max_in_flight=2)
    ex = SyncWebSocketEnvironmentExecutor()
    ex.start(environment_name="e", environment_config=CONFIG, run_config={})

    def ask():
        while True:
            pool.submit(add, 1, 1).result()

    def cancel():
        while True:
            narrow.submit(nap, 0.01).cancel()

    def map_all():
        while True:
            list(narrow.map(abs, range(9)))

    def send():
        count = 0
        while True:
            count += 1
            run = {"run_id": f"r{count}", "task_id": "t", "callable": add, "args": {"a": 1, "b": 1}}
            ex.send({"type": "run_task", **run})
            ex.recv()

    def drop():
        while True:
            executor().submit(add, 1, 1)

    def guarded(work):
        try:
            work()
        except BaseException as exc:
            # At the end a thread may be told so, in words of the contract.
            if not isinstance(exc, (concurrent.futures.CancelledError, RuntimeError, ConnectionError)):
                os._exit(9)

    for work in (ask, cancel, map_all, send, drop):
        threading.Thread(target=guarded, args=(work,), daemon=True).start()
    while pool._core.session.link.stats().get("events", 0) < 500:
        time.sleep(0.001)
"""


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit", "gc.collect()"])
def test_f36_exit_while_daemon_threads_are_busy(script: Callable[..., Script], end: str) -> None:
    """Threads inside submit, result, cancel, map, send and recv: no hang, not a word, exit code 0."""
    for _ in range(3):
        assert script(BUSY + f"\n    {end}\n").end() == ("", "", 0)


def test_f36_exit_while_a_thread_sends_to_a_peer_that_stands_still(script: Callable[..., Script]) -> None:
    """A daemon thread stuck in the middle of 30 MB does not keep the process."""
    with LoopbackWorker() as stopped:
        running = script(
            """
            pool = executor()
            assert pool.submit(add, 1, 1).result() == 2
            say("before")
            input()
            threading.Thread(target=lambda: pool.submit(len, b"x" * 30_000_000), daemon=True).start()
            link = pool._core.session.link
            while not link.stats()["runs"] or not link._connection._writer:
                time.sleep(0.01)
            say("done")
            """,
            target=stopped,
        )
        running.expect("before")
        assert stopped.pid is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            running.tell()
            running.expect("done")
            assert running.end(within=EXIT) == ("", "", 0)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)


def test_f36_sys_exit_in_a_thread_leaves_the_others_alone(script: Callable[..., Script]) -> None:
    """It ends that thread; runs of the main thread and of the ended one go on."""
    code = """
        pool = executor()
        left = []

        def leave():
            left.append(pool.submit(nap, 0.5))
            sys.exit(4)

        thread = threading.Thread(target=leave)
        thread.start()
        mine = pool.submit(nap, 0.2)
        thread.join()
        assert (mine.result(), left[0].result()) == (0.2, 0.5)
        pool.shutdown()
    """
    assert script(code).end() == ("", "", 0)


def test_f36_an_uncaught_exception_prints_its_own_traceback_only(script: Callable[..., Script]) -> None:
    """Exit code 1 and one traceback, with runs on their way in daemon and other threads."""
    code = """
        pool = executor()
        def wait():
            try:
                pool.submit(forever).result()
            except concurrent.futures.CancelledError:
                pass
        threading.Thread(target=wait, daemon=True).start()
        other = threading.Thread(target=lambda: pool.submit(nap, 0.5).result())
        other.start()
        wait_running(pool.submit(forever))
        raise LookupError("mine")
    """
    out, err, status = script(code).end()
    assert (out, status) == ("", 1)
    assert err.count("Traceback") == 1 and err.endswith("LookupError: mine\n"), err
