"""The garbage collector may strike in any thread, under any lock (F37)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from script_host import Script, scripts

from wove_ws_sync.testing import LoopbackWorker

DEV = ("-X", "dev")


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


ENDED = """
gc.collect()
ends_at = time.monotonic() + 5.0  # a second, on a machine that is busy
while threads():
    assert time.monotonic() < ends_at, threads()
    time.sleep(0.01)
    gc.collect()  # a run that was on its way kept its executor until now
"""


def check(ended: tuple[str, str, int]) -> None:
    """One warning, about the executor, and nothing else on stderr."""
    out, err, status = ended
    assert (out, status) == ("", 0), err
    assert err.count("ResourceWarning: unclosed <") == 1 and err.count("unclosed") <= 2, err
    assert "Traceback" not in err and "Exception ignored" not in err, err


@pytest.mark.parametrize("what", ["futures", "sync", "map"])
def test_f37_a_cycle_is_collected_while_every_lock_is_held(script: Callable[..., Script], what: str) -> None:
    """The collector strikes in a thread that holds all locks: the finalizers need none of them."""
    code = f"""
        what = {what!r}
        gc.disable()
        keeper = executor()  # so that the link outlives the collection, and its locks are in use
        keeper.submit(add, 1, 1).result()
        lost = executor()
        ex = SyncWebSocketEnvironmentExecutor()
        if what == "futures":
            lost.me = [lost, lost.submit(nap, 0.3)]
        elif what == "sync":
            ex.start(environment_name="e", environment_config=CONFIG, run_config={{}})
            ex.me = ex
        else:
            results = lost.map(nap, [0.3] * 9)
            assert next(results) == 0.3
            cycle = [results]
            cycle.append(cycle)
        future = keeper.submit(nap, 0.5)
        link = keeper._core.session.link
        connection = link._connection
        transport = connection.transport
        locks = [
            wove_ws_sync.session._links_lock, wove_ws_sync.plugin._lock, keeper._core.lock, lost._core.lock,
            ex._lock, connection._write_lock, link._state_lock, connection.waker._descriptor_lock,
            transport._outbox._lock, transport._wire._descriptor_lock, transport._wire._tls_lock,
            future._condition,
        ]
        for lock in locks:
            lock.acquire()
        results = cycle = lost = ex = None
        found = gc.collect()
        for lock in reversed(locks):
            lock.release()
        assert found
        assert future.result() == 0.5
        keeper.shutdown()
        wove_ws_sync.session.close_links()
        """
    check(script(textwrap.dedent(code) + ENDED, flags=DEV).end())


@pytest.mark.parametrize(
    "drop",
    [
        "box.clear()",
        """
thread = threading.Thread(target=box.clear)
thread.start()
thread.join()
        """,
        """
future = box["pool"].submit(nap, 0.2)
future.add_done_callback(lambda future: box.clear())
future.result()
        """,
        """
future = box["pool"].with_options(delivery_timeout=0.2).submit(forever)
future.add_done_callback(lambda future: box.clear())
assert isinstance(future.exception(), DeliveryTimeout)
        """,
        """
async def leave():
    box.clear()
asyncio.run(leave())
        """,
        """
signal.signal(signal.SIGUSR1, lambda *_: box.clear())
os.kill(os.getpid(), signal.SIGUSR1)
        """,
    ],
    ids=["main", "thread", "reader", "watchdog", "loop", "signal handler"],
)
def test_f37_the_last_reference_goes_in_any_thread(script: Callable[..., Script], drop: str) -> None:
    """Reader and watchdog too: one warning, and the threads end."""
    code = """
box = {"pool": executor()}
assert box["pool"].submit(add, 1, 1).result() == 2
ends_at = time.monotonic() + 20
DROP
while box:
    assert time.monotonic() < ends_at
    time.sleep(0.01)
future = None
    """.replace("DROP", drop.strip())
    check(script(code + ENDED, flags=DEV).end())


def test_f37_collections_in_every_thread_while_executors_come_and_go(script: Callable[..., Script]) -> None:
    """Four threads make, use and drop executors in cycles, with a collector that strikes all the time."""
    code = """
        gc.set_threshold(1)
        warnings.simplefilter("always")  # also of what looks the same
        wrong = []

        def churn(number):
            for count in range(25):
                pool = executor(idle_timeout=30.0 + number % 2)
                pool.me = pool
                pool.submit(nap, 0.01)
                lazy = pool.map(abs, range(4))
                if next(lazy) != 0 or pool.submit(add, number, count).result() != number + count:
                    wrong.append((number, count))

        churning = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
        for thread in churning:
            thread.start()
        for thread in churning:
            thread.join()
        gc.set_threshold(700)
        assert wrong == []
        lazy = pool = None
    """
    out, err, status = script(textwrap.dedent(code) + ENDED, flags=DEV).end()
    assert (out, status) == ("", 0), err
    assert err.count("ResourceWarning: unclosed") == 100, err
    assert "Traceback" not in err and "Exception ignored" not in err, err
