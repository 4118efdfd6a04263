"""WebSocketExecutor and RunFuture keep the promises of concurrent.futures, against a real worker."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import operator
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fault_helpers import link_of, until, within
from scripted_worker import ScriptedWorker

from wove_ws_sync import (
    DeliveryCancelled,
    DeliveryTimeout,
    ExecutorClosed,
    RunFuture,
    SyncWebSocketEnvironmentExecutor,
    WebSocketExecutor,
)
from wove_ws_sync.frames import MAX_ID, TERMINAL_EVENTS
from wove_ws_sync.link import LinkState
from wove_ws_sync.testing import LoopbackWorker, close_links

WAIT = 30.0


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """One worker process for the module."""
    with LoopbackWorker(workers=8) as running:
        yield running


@pytest.fixture
def pool(worker: LoopbackWorker) -> Iterator[WebSocketExecutor]:
    """An executor on that worker."""
    with WebSocketExecutor(worker.url, security=worker.security) as executor:
        yield executor


@pytest.fixture
def gate(tmp_path: Any) -> Iterator[Callable[[], str]]:
    """Files that tasks wait for: a task holds until the test opens its gate, or ends."""
    made: list[str] = []

    def new() -> str:
        made.append(str(tmp_path / f"gate{len(made)}"))
        return made[-1]

    yield new
    for path in made:
        open_gate(path)


def open_gate(path: str) -> None:
    with open(path, "w"):
        pass


def hold(path: str) -> str:
    """Wait in the worker until the file is there."""
    for _ in range(6000):
        if os.path.exists(path):
            return "opened"
        time.sleep(0.01)
    raise TimeoutError("nobody opened the gate")


def fail_behind(path: str) -> None:
    hold(path)
    raise ValueError("as it shall")


def capture(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return args, kwargs


def mul(x: int, y: int) -> int:
    return x * y


class Dummy:
    """A value that can be watched by a weak reference."""


def wait_running(future: RunFuture[Any]) -> None:
    for _ in range(int(WAIT * 100)):
        if future.running():
            return
        threading.Event().wait(0.01)
    raise TimeoutError("the run did not start")


def test_submit(pool: WebSocketExecutor) -> None:
    """Positional and keyword arguments arrive as they were given, whatever their names."""
    assert pool.submit(pow, 2, 8).result(WAIT) == 256
    result = pool.submit(capture, 1, self=2, fn=3, timeout=4).result(WAIT)
    assert result == ((1,), {"self": 2, "fn": 3, "timeout": 4})


def test_submit_wants_a_function(pool: WebSocketExecutor) -> None:
    """As in the standard library, the function is positional."""
    with pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pool.submit(fn=capture, arg=1)  # type: ignore[call-arg]


def test_map(pool: WebSocketExecutor) -> None:
    """Results come in order, with several iterables, chunks and a bounded buffer."""
    expected = list(map(pow, range(10), range(10)))
    assert list(pool.map(pow, range(10), range(10))) == expected
    assert list(pool.map(pow, range(10), range(10), chunksize=3)) == expected
    assert list(pool.map(pow, range(10), range(10), buffersize=2)) == expected
    assert list(pool.map(pow, range(10), range(10), chunksize=3, buffersize=1)) == expected
    assert list(pool.map(pow, [], [])) == []


def test_map_checks_its_numbers(pool: WebSocketExecutor) -> None:
    """Bad sizes are refused before anything is sent."""
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="chunksize"):
            pool.map(abs, [1], chunksize=wrong)
        with pytest.raises(ValueError, match="buffersize"):
            pool.map(abs, [1], buffersize=wrong)
    with pytest.raises(TypeError, match="buffersize"):
        pool.map(abs, [1], buffersize="2")  # type: ignore[arg-type]


def test_what_cannot_be_called_is_refused_at_once(pool: WebSocketExecutor) -> None:
    """Whatever else is given, and before anything is sent."""
    for call in (pool.submit, pool.map):
        for more in ([], [[1]]):
            with pytest.raises(TypeError, match="fn must be callable, not int"):
                call(5, *more)  # type: ignore[operator]
    with pytest.raises(TypeError, match="fn must be callable, not int"):
        pool.map(5, [1], chunksize=2)  # type: ignore[arg-type]


def test_map_with_a_buffer_takes_no_more_than_it_may(pool: WebSocketExecutor) -> None:
    """An endless iterable is fine, and at most buffersize items are ahead of the consumer."""
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield len(taken)

    results = pool.map(abs, numbers(), buffersize=4)
    assert len(taken) == 4
    assert next(results) == 1
    assert len(taken) == 5
    results.close()  # type: ignore[attr-defined]


def test_map_raises_where_it_failed(pool: WebSocketExecutor) -> None:
    """The results before the failure come first."""
    results = pool.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert next(results) == (0, 1)
    assert next(results) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_timeout_counts_from_the_call(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """What did not come in time is a TimeoutError; the rest is cancelled."""
    path = gate()
    done = gate()
    open_gate(done)
    results = pool.map(hold, [done, path], timeout=1.0)
    assert next(results) == "opened"
    with pytest.raises(TimeoutError):
        next(results)


def test_shutdown_waits_for_done_callbacks(pool: WebSocketExecutor) -> None:
    """As the standard library's does: behind a with block, what callbacks collect is complete."""
    collected: list[int] = []
    pause = threading.Event()

    def collect(future: RunFuture[int]) -> None:
        pause.wait(0.2)
        collected.append(future.result())

    with pool:
        for number in range(3):
            pool.submit(mul, number, 2).add_done_callback(collect)
    assert sorted(collected) == [0, 2, 4]


def test_a_done_callback_may_shut_down(worker: LoopbackWorker, gate: Callable[[], str]) -> None:
    """In a thread that cancels, too: it waits for no callback that it is in itself."""
    pool = WebSocketExecutor(worker.url, security=worker.security, delivery_cancel_mode="best_effort")
    future = pool.submit(hold, gate())
    future.add_done_callback(lambda _: pool.shutdown())
    assert future.cancel()
    assert not pool._core.pending


def test_a_time_limit_leaves_submit(pool: WebSocketExecutor) -> None:
    """What a signal handler raises comes out of submit(), and nobody waits for that future."""

    class TimeLimit(Exception):
        pass

    class Slow:
        def __reduce__(self) -> Any:
            signal.raise_signal(signal.SIGALRM)
            return int, ()

    def strike(number: int, frame: object) -> None:
        raise TimeLimit

    handler = signal.signal(signal.SIGALRM, strike)
    try:
        with pytest.raises(TimeLimit):
            pool.submit(abs, Slow())
    finally:
        signal.signal(signal.SIGALRM, handler)
    pool.shutdown()


def test_ctrl_c_in_submit_ends_the_wait_of_a_shutdown(worker: LoopbackWorker) -> None:
    """Another thread may be waiting already for the run that was never sent."""
    pool = WebSocketExecutor(worker.url, security=worker.security)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        waiting: list[concurrent.futures.Future[None]] = []

        class Interrupted:
            def __reduce__(self) -> Any:
                waiting.append(threads.submit(pool.shutdown))
                until(lambda: pool._core.closed)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pool.submit(abs, Interrupted())
        waiting[0].result(WAIT)


def test_map_does_not_wait_for_the_answer_to_its_cancellations() -> None:
    """Nobody has the futures: the timeout is the timeout, however long a worker takes to say anything."""
    with ScriptedWorker() as worker:
        with WebSocketExecutor(
            worker.url, delivery_cancel_mode="require_ack", cancel_ack_timeout=WAIT
        ) as pool:
            results = pool.map(mul, [1, 2], [3, 4], timeout=0.2)
            connection = worker.connection()
            runs = connection.commands(2)
            with within(0.2), pytest.raises(TimeoutError):
                next(results)
            connection.commands(2, "cancel_task")
            connection.say(*({"type": "task_cancelled", "run_id": run["run_id"]} for run in runs))


def test_exceptions_are_raised_as_themselves(pool: WebSocketExecutor) -> None:
    """With the worker's traceback as the cause."""
    future = pool.submit(operator.truediv, 1, 0)
    with pytest.raises(ZeroDivisionError) as caught:
        future.result(WAIT)
    assert "ZeroDivisionError" in str(caught.value.__cause__)
    assert isinstance(future.exception(), ZeroDivisionError)


def test_wait_and_as_completed(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """The module's functions know our futures."""
    path = gate()
    slow = pool.submit(hold, path)
    quick = pool.submit(mul, 6, 7)
    done, not_done = concurrent.futures.wait([slow, quick], WAIT, concurrent.futures.FIRST_COMPLETED)
    assert (done, not_done) == ({quick}, {slow})
    with pytest.raises(TimeoutError):
        list(concurrent.futures.as_completed([slow, quick], timeout=0.05))
    open_gate(path)
    assert set(concurrent.futures.as_completed([slow, quick], WAIT)) == {slow, quick}
    failed = pool.submit(mul, None, None)  # type: ignore[arg-type]
    done, _ = concurrent.futures.wait([failed], WAIT, concurrent.futures.FIRST_EXCEPTION)
    assert done == {failed}


def test_wait_returns_at_the_first_exception(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """An error of the task's is one, though it is not unpickled yet."""
    path, begun = gate(), gate()
    slow, failing = pool.submit(hold, path), pool.submit(fail_behind, begun)
    threading.Timer(0.1, open_gate, [begun]).start()
    done, not_done = concurrent.futures.wait([slow, failing], WAIT, concurrent.futures.FIRST_EXCEPTION)
    assert (done, not_done) == ({failing}, {slow})
    open_gate(path)


def test_callbacks_of_two_executors_may_shut_each_other_down(worker: LoopbackWorker) -> None:
    """In a done-callback nothing is waited for, whoever's it is."""
    config = {"url": worker.url, "security": worker.security}
    pools = [WebSocketExecutor(**config, close_timeout=limit) for limit in (2.0, 2.5)]  # two links
    both = threading.Barrier(2)
    through: list[int] = []

    def shut_down(other: int) -> None:
        both.wait(WAIT)
        pools[other].shutdown()
        through.append(other)

    for number in range(2):
        future = pools[number].submit(mul, 2, 3)
        future.add_done_callback(lambda _, other=1 - number: shut_down(other))
    until(lambda: len(through) == 2)
    for pool in pools:
        pool.shutdown()


def test_running_and_callbacks(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """running() turns true at the worker's word; a callback may submit more work."""
    path = gate()
    future = pool.submit(hold, path)
    wait_running(future)
    chained: list[Any] = []
    called = threading.Event()

    def then(ended: Any) -> None:
        chained.append(ended.result())
        chained.append(pool.submit(mul, 2, 3))
        called.set()

    future.add_done_callback(then)
    open_gate(path)
    assert called.wait(WAIT)
    assert chained[0] == "opened" and chained[1].result(WAIT) == 6
    assert not future.running() and future.done()


def test_cancel_a_running_run(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """best_effort: at once, and waiters wake."""
    future = pool.submit(hold, gate())
    wait_running(future)
    assert future.cancel() and future.cancel() and future.cancelled() and future.done()
    with pytest.raises(concurrent.futures.CancelledError) as caught:
        future.result()
    assert isinstance(caught.value, DeliveryCancelled) and caught.value.run_id == future.run_id
    assert list(concurrent.futures.as_completed([future], 1.0)) == [future]


def test_cancel_with_acknowledgement(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """require_ack: a sync task cannot be stopped in its thread, so its result wins."""
    path = gate()
    view = pool.with_options(delivery_cancel_mode="require_ack")
    future = view.submit(hold, path)
    wait_running(future)
    threading.Timer(0.2, open_gate, [path]).start()
    assert future.cancel() is False
    assert future.result(WAIT) == "opened"


async def _sleep_long() -> None:
    import asyncio

    await asyncio.sleep(60)


def test_cancel_a_coroutine_is_acknowledged(pool: WebSocketExecutor) -> None:
    """A coroutine ends for real, and the future knows it."""
    future = pool.with_options(delivery_cancel_mode="require_ack").submit(_sleep_long)
    wait_running(future)
    assert future.cancel() is True
    with pytest.raises(DeliveryCancelled) as caught:
        future.result()
    assert caught.value.acknowledged is True


def test_delivery_timeout_of_a_view(pool: WebSocketExecutor, gate: Callable[[], str]) -> None:
    """with_options changes delivery on the same connection."""
    future = pool.with_options(delivery_timeout=0.2).submit(hold, gate())
    with pytest.raises(DeliveryTimeout, match=r"Delivery timeout exceeded for task 'hold' \(0\.2s\)"):
        future.result(WAIT)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "5", True])
def test_f30_bad_delivery_settings_are_refused(pool: WebSocketExecutor, wrong: Any) -> None:
    """Before anything is sent."""
    with pytest.raises((ValueError, TypeError), match="delivery_timeout"):
        pool.with_options(delivery_timeout=wrong)


def test_f31_what_cannot_be_pickled_fails_its_future_only(pool: WebSocketExecutor) -> None:
    """The link and the other runs go on, and the run leaves nothing behind."""
    future = pool.submit(len, threading.Lock())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        future.result(WAIT)
    assert pool.submit(mul, 2, 2).result(WAIT) == 4
    assert not pool._core.pending


def test_unpicklable_results_and_exceptions(pool: WebSocketExecutor) -> None:
    """Each is one clear error of that run."""
    with pytest.raises(RuntimeError, match="lock"):
        pool.submit(threading.Lock).result(WAIT)

    def fail() -> None:
        class Odd(Exception):
            def __reduce__(self) -> Any:
                raise TypeError("not me")

        raise Odd("what happened")

    with pytest.raises(RuntimeError, match="what happened"):
        pool.submit(fail).result(WAIT)


def test_the_result_is_unpickled_where_it_is_asked_for(pool: WebSocketExecutor) -> None:
    """Once, in the thread that calls result()."""

    def make() -> Any:
        class Where:
            def __reduce__(self) -> Any:
                return (eval, ("__import__('threading').get_ident()",))

        return Where()

    future = pool.submit(make)
    concurrent.futures.wait([future], WAIT)
    assert future.result() == threading.get_ident()


def test_free_references(pool: WebSocketExecutor) -> None:
    """What map yields, and what it was given, is not kept."""
    for value in pool.map(capture_dummy, range(10)):
        reference = weakref.ref(value)
        del value
        gc.collect()
        assert reference() is None
    argument = Dummy()
    reference = weakref.ref(argument)
    pool.submit(type, argument).result(WAIT)
    del argument
    gc.collect()
    assert reference() is None


def capture_dummy(number: int) -> Dummy:
    return Dummy()


def test_shutdown_waits_for_what_is_on_its_way(worker: LoopbackWorker, gate: Callable[[], str]) -> None:
    """wait=False returns at once and the runs still end; then nothing more is taken."""
    pool = WebSocketExecutor(worker.url, security=worker.security)
    path = gate()
    future = pool.submit(hold, path)
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(mul, 1, 1)
    with pytest.raises(ExecutorClosed):
        pool.map(abs, [1])
    open_gate(path)
    assert future.result(WAIT) == "opened"
    pool.shutdown()
    pool.shutdown(wait=False, cancel_futures=True)


def test_shutdown_cancels_what_has_not_started(worker: LoopbackWorker, gate: Callable[[], str]) -> None:
    """cancel_futures leaves the running one alone."""
    path = gate()
    with WebSocketExecutor(worker.url, security=worker.security, delivery_max_in_flight=1) as pool:
        running = pool.submit(hold, path)
        wait_running(running)
        waiting = [pool.submit(mul, 1, 1) for _ in range(5)]
        pool.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in waiting)
        open_gate(path)
    assert running.result(WAIT) == "opened"


def test_an_unclosed_executor_warns_and_its_runs_end(worker: LoopbackWorker) -> None:
    """ResourceWarning once; the futures that are held still get their results; the threads go."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool = WebSocketExecutor(worker.url, security=worker.security, max_message_bytes=1024 * 1024)
        future = pool.submit(mul, 3, 4)
        threads = [pool._core.session.link._undisposed[-1].watchdog]  # type: ignore[union-attr]
        del pool
        gc.collect()
        assert future.result(WAIT) == 12
    assert [str(item.category) for item in caught].count("<class 'ResourceWarning'>") == 1
    assert threads[0] is not None
    threads[0].join(5.0)
    assert not threads[0].is_alive()


def test_many_threads_share_one_connection(worker: LoopbackWorker, pool: WebSocketExecutor) -> None:
    """Sixteen threads, two executors, one link, right answers."""
    with WebSocketExecutor(worker.url, security=worker.security) as other:
        wrong: list[Any] = []

        def use(number: int) -> None:
            for index in range(50):
                executor = pool if index % 2 else other
                if executor.submit(mul, number, index).result(WAIT) != number * index:
                    wrong.append((number, index))

        threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert not wrong
        assert pool._core.session is not None and other._core.session is not None
        assert pool._core.session.link is other._core.session.link
        assert pool._core.session.link.stats()["dials"] == 1


def test_everything_from_woves_configuration(worker: LoopbackWorker) -> None:
    """environment= takes url, security and delivery settings from wove.config."""
    import wove

    wove.config(
        environments={
            "socket_workers": {
                "executor": "websocket",
                "executor_config": {"url": worker.url, "security": worker.security},
                "delivery_timeout": 17.0,
            }
        }
    )
    with WebSocketExecutor(environment="socket_workers") as pool:
        assert pool._delivery.delivery_timeout == 17.0
        assert pool.submit(mul, 5, 5).result(WAIT) == 25


def test_a_worker_that_is_not_there(worker: LoopbackWorker) -> None:
    """The future says so; submit does not raise. A run that waits until its deadline has it as cause."""
    with WebSocketExecutor("ws://127.0.0.1:1/wove") as pool:
        future = pool.submit(mul, 1, 1)
        with pytest.raises(ConnectionRefusedError):
            future.result(WAIT)
        patient = pool.with_options(delivery_timeout=0.3).submit(mul, 1, 1)
        with pytest.raises(DeliveryTimeout, match="Delivery timeout exceeded") as late:
            patient.result(WAIT)
        assert isinstance(late.value.__cause__, ConnectionRefusedError)
    close_links()


def test_a_callback_that_would_wait_for_ever_is_told(
    pool: WebSocketExecutor, gate: Callable[[], str]
) -> None:
    """result() of another run in a done-callback raises; shutdown() there does not wait."""
    path = gate()
    pending = pool.submit(hold, path)
    raised: list[BaseException] = []
    called = threading.Event()

    def wait_in_callback(ended: Any) -> None:
        try:
            pending.result()
        except RuntimeError as exc:
            raised.append(exc)
        pool.shutdown()
        called.set()

    pool.submit(mul, 1, 1).add_done_callback(wait_in_callback)
    assert called.wait(WAIT)
    assert "done-callback" in str(raised[0])
    open_gate(path)
    assert pending.result(WAIT) == "opened"


def test_asyncio_reads_our_futures(pool: WebSocketExecutor) -> None:
    """run_in_executor and wrap_future get values and exceptions, not what travels inside."""

    async def use() -> tuple[int, BaseException]:
        loop = asyncio.get_running_loop()
        length = await loop.run_in_executor(pool, len, b"abc")
        try:
            await asyncio.wrap_future(pool.submit(operator.truediv, 1, 0))
        except ZeroDivisionError as exc:
            return length, exc
        raise AssertionError("no error came")

    length, error = asyncio.run(use())
    assert length == 3
    assert isinstance(error, ZeroDivisionError)


def test_callbacks_of_a_cancelled_future_may_shut_down(
    pool: WebSocketExecutor, gate: Callable[[], str]
) -> None:
    """When they run, the future has ended for everybody."""
    future = pool.submit(hold, gate())
    wait_running(future)
    future.add_done_callback(lambda ended: pool.shutdown())
    assert future.cancel()
    assert concurrent.futures.wait([future], WAIT).done == {future}


def test_a_collected_map_takes_no_lock(worker: LoopbackWorker, gate: Callable[[], str]) -> None:
    """The rest of a forgotten iterator is cancelled by the watchdog: collection strikes under any lock."""
    with WebSocketExecutor(worker.url, security=worker.security) as pool:
        opened = gate()
        open_gate(opened)
        results = pool.map(hold, [opened, gate(), gate()])
        assert next(results) == "opened"
        rest = list(pool._core.pending)
        session = pool._core.session
        assert session is not None
        with session.link._state_lock:
            del results
            gc.collect()
        done, not_done = concurrent.futures.wait(rest, WAIT)
        assert not not_done
        assert all(future.cancelled() for future in done)


def test_links_of_settings_that_are_not_used_again_are_forgotten(worker: LoopbackWorker) -> None:
    """A header for each user, say, costs no memory once its connection has closed."""
    seen: list[weakref.ref[Any]] = []
    for user in "ab":
        with WebSocketExecutor(**worker.config, headers={"X-User": user}, idle_timeout=0.01) as pool:
            assert pool.submit(abs, -1).result(30) == 1
            seen.append(weakref.ref(link_of(pool)))
        del pool
        if user == "a":
            until(lambda: (link := seen[0]()) is None or link.state is LinkState.CLOSED)
    until(lambda: gc.collect() >= 0 and seen[0]() is None)


@pytest.fixture
def ex(worker: LoopbackWorker) -> Iterator[SyncWebSocketEnvironmentExecutor]:
    """The blocking executor on that worker."""
    executor = SyncWebSocketEnvironmentExecutor()
    start(executor, worker)
    yield executor
    executor.stop()


def start(executor: SyncWebSocketEnvironmentExecutor, worker: LoopbackWorker) -> None:
    config = {"url": worker.url, "security": worker.security}
    executor.start(environment_name="e", environment_config=config)


def frame(callable: Any, run_id: str = "r", **fields: Any) -> dict[str, Any]:
    return {"type": "run_task", "run_id": run_id, "task_id": "t", "callable": callable, "args": {}, **fields}


def test_ids_that_no_worker_service_takes_are_refused_here(
    ex: SyncWebSocketEnvironmentExecutor, pool: WebSocketExecutor
) -> None:
    """It could not even answer, and would not understand which runs to resume."""
    long = "x" * (MAX_ID + 1)
    with pytest.raises(ValueError, match=r"run_id.*has 4097 characters; use 4096 of them at most"):
        pool.attach(long).result(WAIT)
    for key in ("run_id", "task_id"):
        with pytest.raises(ValueError, match=f"{key}.*has 4097 characters"):
            ex.send({**frame(int), key: long})
    ex.send(frame(int, long[1:]))
    assert [ex.recv(WAIT)["type"] for _ in range(2)] == ["task_started", "task_result"]
    assert ex.link is not None and ex.link.stats()["runs"] == 0


def test_a_function_may_have_a_long_name(pool: WebSocketExecutor) -> None:
    """The id of its run begins with some of it."""

    def function() -> int:
        return 7

    function.__name__ = "f" * 5000
    future = pool.submit(function)
    assert future.run_id.startswith("f" * 1000 + ":") and future.result(WAIT) == 7


def test_an_executor_is_not_pickled(pool: WebSocketExecutor) -> None:
    with pytest.raises(TypeError, match=r"WebSocketExecutor is not pickled.*Make one where it is used"):
        pickle.dumps(pool)


class Struck(Exception):
    """What the signal handler of the next test raises."""


def strikes(value: int) -> int:
    """Is called by an unpickling: the signal comes in the midst of it."""
    signal.raise_signal(signal.SIGUSR1)
    return value


class Striking:
    """Is an integer when it is unpickled."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return strikes, (self.value,)


@pytest.fixture
def struck() -> Iterator[Callable[[bool], None]]:
    """Say whether the handler of SIGUSR1 raises."""
    raises = True

    def handle(number: int, frame: Any) -> None:
        if raises:
            raise Struck

    def switch(on: bool) -> None:
        nonlocal raises
        raises = on

    before = signal.signal(signal.SIGUSR1, handle)
    yield switch
    signal.signal(signal.SIGUSR1, before)


def test_f35_a_signal_during_the_unpickling_is_no_fault_of_the_payload(
    pool: WebSocketExecutor, struck: Callable[[bool], None]
) -> None:
    """A soft time limit comes out as itself, and the value can be asked for again."""
    future = pool.submit(Striking, 7)
    with pytest.raises(Struck):
        future.result(WAIT)
    struck(False)
    assert future.result(WAIT) == 7
    assert pool.link.stats()["decode_failures"] == 0


def test_f35_a_signal_during_recv_loses_no_event(
    ex: SyncWebSocketEnvironmentExecutor, struck: Callable[[bool], None]
) -> None:
    ex.send(frame(Striking, args={"value": 7}))
    assert ex.recv(WAIT)["type"] == "task_started"
    with pytest.raises(Struck):
        ex.recv(WAIT)
    struck(False)
    assert ex.recv(WAIT)["result"] == 7


def test_f35_a_signal_during_recv_after_stop_loses_no_event(
    ex: SyncWebSocketEnvironmentExecutor, struck: Callable[[bool], None]
) -> None:
    ex.send(frame(Striking, args={"value": 7}))
    link = ex.link
    assert link is not None
    until(lambda: link.stats()["runs"] == 0)
    ex.stop()
    assert ex.recv(WAIT)["type"] == "task_started"
    with pytest.raises(Struck):
        ex.recv(WAIT)
    struck(False)
    assert ex.recv(WAIT)["result"] == 7
    with pytest.raises(RuntimeError, match="not started"):
        ex.recv(WAIT)


@pytest.mark.parametrize("policy", ["fail", "cancel", "requeue", "detach"])
def test_the_ends_that_stop_brings_can_be_received(
    worker: LoopbackWorker, ex: SyncWebSocketEnvironmentExecutor, gate: Callable[[], str], policy: str
) -> None:
    """Each run has its one end; then the executor is what it was before ``start()``."""
    ids, path = {f"{policy}{number}" for number in range(5)}, gate()
    for run_id in ids:
        ex.send(frame(hold, run_id, args={"path": path}, delivery={"delivery_orphan_policy": policy}))
    assert {ex.recv(WAIT)["type"] for _ in ids} == {"task_started"}
    ex.stop()
    ends = [ex.recv(WAIT) for _ in ids]
    assert {end["run_id"] for end in ends} == ids and {end["type"] for end in ends} <= TERMINAL_EVENTS
    for _ in range(2):
        with pytest.raises(RuntimeError, match="websocket executor is not started"):
            ex.recv(WAIT)
    start(ex, worker)
    with pytest.raises(TimeoutError):
        ex.recv(0)


@pytest.mark.parametrize("wrong", [None, [], "run_task", frame(int, delivery=5)])
def test_what_is_no_frame_is_named(ex: SyncWebSocketEnvironmentExecutor, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a mapping, not int|is a mapping with a 'type', not"):
        ex.send(wrong)
