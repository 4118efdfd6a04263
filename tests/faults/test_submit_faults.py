"""What goes wrong between submit() and the wire, and what cancelling gives in every case."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
import time
from typing import Any

import pytest
import wove
from fault_helpers import WAIT, link_of, python, until, within
from scripted_worker import (
    FACES,
    Connection,
    FuturesFace,
    ScriptedWorker,
    ShimFace,
    SyncFace,
    result,
    run_frame,
    task,
)

from wove_ws_sync import DeliveryCancelled, DeliveryTimeout, WebSocketExecutor

# -- F29: the table of docs/topics/delivery, cell by cell --------------------------------


def started(pool: WebSocketExecutor, worker: ScriptedWorker) -> tuple[Any, Connection]:
    """Return a run that the worker is executing, and the connection it came by."""
    future = pool.submit(task)
    connection = worker.connection()
    connection.commands(1)
    connection.say({"type": "task_started", "run_id": future.run_id})
    until(future.running)
    return future, connection


def settle(pool: WebSocketExecutor, connection: Connection) -> dict[str, int]:
    """Return the link's counters once everything said so far has been read."""
    last = pool.submit(task)
    connection.say(result(last.run_id, "last"))
    assert last.result(WAIT) == "last"
    return link_of(pool).stats()


def cancelled(future: Any) -> DeliveryCancelled:
    """Return what a cancelled future raises."""
    assert future.cancelled()
    with pytest.raises(DeliveryCancelled) as caught:
        future.result(WAIT)
    return caught.value


def answer(kind: str, run_id: str) -> dict[str, Any]:
    return result(run_id, "late") if kind == "task_result" else {"type": kind, "run_id": run_id}


@pytest.mark.parametrize("late", ["", "task_cancelled", "task_result", "lost"])
def test_f29_best_effort(late: str) -> None:
    """Cancelled at once, unacknowledged, whatever comes later; that is dropped and counted."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        future, connection = started(pool, worker)
        with within(0.0):
            assert future.cancel() is True
        assert cancelled(future).acknowledged is False
        [command] = connection.commands(1, "cancel_task")
        assert (command["run_id"], command["delivery_cancel_mode"]) == (future.run_id, "best_effort")
        if late == "lost":
            connection.say_bytes(b"\x83\0")  # no such opcode
            assert connection.ended.wait(WAIT)
        elif late:
            connection.say(answer(late, future.run_id))
            assert settle(pool, connection)["dropped_unknown_run"] == 1
        assert cancelled(future).acknowledged is False
        assert future.cancel() is True


def test_f29_best_effort_when_the_result_came_first() -> None:
    """Too late to cancel: the result stands."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url) as pool:
        future, connection = started(pool, worker)
        connection.say(result(future.run_id, "first"))
        until(future.done)
        assert future.cancel() is False
        assert future.result(WAIT) == "first"
        assert connection.commands(0, "cancel_task") == []


@pytest.mark.parametrize("late", ["", "task_cancelled", "task_result"])
def test_f29_require_ack_without_an_answer(late: str) -> None:
    """cancel() waits cancel_ack_timeout, then cancels unacknowledged; a late answer is dropped."""
    settings = {"cancel_ack_timeout": 0.5, "delivery_cancel_mode": "require_ack"}
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, **settings) as pool:
        future, connection = started(pool, worker)
        begun = time.monotonic()
        with within(0.5):
            assert future.cancel() is True
        assert time.monotonic() - begun >= 0.5
        assert cancelled(future).acknowledged is False
        if late:
            connection.say(answer(late, future.run_id))
            assert settle(pool, connection)["dropped_unknown_run"] == 1
        assert cancelled(future).acknowledged is False


@pytest.mark.parametrize("answered", ["task_cancelled", "task_result", "task_error", "lost"])
def test_f29_require_ack_with_an_answer(answered: str) -> None:
    """task_cancelled confirms; a result or an error that comes first stands; a loss confirms nothing."""
    settings = {"cancel_ack_timeout": WAIT, "delivery_cancel_mode": "require_ack"}
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, **settings) as pool:
        future, connection = started(pool, worker)
        with concurrent.futures.ThreadPoolExecutor(1) as thread, within(0.0):
            cancelling = thread.submit(future.cancel)
            connection.commands(1, "cancel_task")
            assert not future.done()
            if answered == "lost":
                connection.say_bytes(b"\x83\0")  # no such opcode
            else:
                connection.say(answer(answered, future.run_id))
            outcome = cancelling.result(WAIT)
        if answered in ("task_cancelled", "lost"):
            assert outcome is True
            assert cancelled(future).acknowledged is (answered == "task_cancelled")
        else:
            assert outcome is False
            assert not future.cancelled()
            if answered == "task_result":
                assert future.result(WAIT) == "late"
            else:
                assert "failed" in str(future.exception(WAIT))


@pytest.mark.parametrize("answered", ["", "task_cancelled", "task_result", "lost"])
def test_f29_require_ack_by_a_deadline(answered: str) -> None:
    """DeliveryTimeout in every case; it says whether the worker confirmed, or had a result after all."""
    settings = {"cancel_ack_timeout": WAIT if answered else 0.3, "delivery_cancel_mode": "require_ack"}
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, **settings) as pool:
        future = pool.with_options(delivery_timeout=0.3).submit(task)
        connection = worker.connection()
        connection.commands(1, "cancel_task")
        if answered == "lost":
            connection.say_bytes(b"\x83\0")  # no such opcode
        elif answered:
            connection.say(answer(answered, future.run_id))
        with pytest.raises(DeliveryTimeout, match="Delivery timeout exceeded") as caught:
            future.result(WAIT)
        assert caught.value.cancel_acknowledged is (answered == "task_cancelled")
        assert caught.value.late_result is (answered == "task_result")


# -- F30 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["delivery_timeout", "delivery_heartbeat_seconds"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        ("5", TypeError),
        (True, TypeError),
    ],
)
@pytest.mark.parametrize("face_kind", ["futures", "sync", "shim"])
def test_f30_what_is_no_span_of_time(face_kind: str, key: str, value: Any, kind: type[Exception]) -> None:
    """Refused where it is given, by name, and nothing is sent: neither a run nor a cancellation of it."""
    with ScriptedWorker() as worker:
        face = FACES[face_kind](worker.url)
        try:
            with pytest.raises(kind, match=key):
                face.submit(**{key: value})
            good = face.submit()
            connection = worker.connection()
            assert [command["run_id"] for command in connection.commands(1)] == [good]
            connection.say(result(good, "good"))
            assert face.outcome(good) == "good"
            assert len(connection.commands(0)) == 1
            assert connection.commands(0, "cancel_task") == []
            assert face.link.stats()["runs"] == 0
        finally:
            face.close()


class Slow:
    """An argument that takes its time to be pickled."""

    def __reduce__(self) -> Any:
        threading.Event().wait(0.3)
        return (int, ())


@pytest.mark.parametrize("face_kind", ["futures", "sync", "shim"])
def test_f11_the_deadline_counts_while_arguments_are_pickled(face_kind: str) -> None:
    """What is late before it could be sent is never sent."""
    with ScriptedWorker() as worker:
        face = FACES[face_kind](worker.url)
        slow = run_frame("slow", args={"x": Slow()}, delivery={"delivery_timeout": 0.1})
        try:
            if isinstance(face, FuturesFace):
                future = face.pool.with_options(delivery_timeout=0.1).submit(id, Slow())
                slow["run_id"], face.futures[future.run_id] = future.run_id, future
            elif isinstance(face, ShimFace):
                face.call(face.executor.send(slow))
            elif isinstance(face, SyncFace):
                face.executor.send(slow)
            with within(0.0), pytest.raises(wove.DeliveryTimeoutError):
                face.outcome(slow["run_id"])
            good = face.submit()
            connection = worker.connection()
            assert [command["run_id"] for command in connection.commands(1)] == [good]
            connection.say(result(good, "good"))
            assert face.outcome(good) == "good"
        finally:
            face.close()


# -- F31 -----------------------------------------------------------------------------------


class Refusing:
    """An argument whose pickling raises *error*."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class Interrupted(BaseException):
    """What a signal handler may raise."""


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        (threading.Lock(), TypeError),
        (Refusing(ZeroDivisionError("no")), ZeroDivisionError),
        (Refusing(MemoryError()), MemoryError),
        (Refusing(RecursionError()), pickle.PicklingError),
        (Refusing(Interrupted()), Interrupted),
    ],
    ids=["lock", "error", "no memory", "recursion", "interrupt"],
)
def test_f31_arguments_that_cannot_be_pickled(argument: Any, kind: type[BaseException]) -> None:
    """The caller hears it, nothing is sent, and the one slot is free for the next run."""
    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, delivery_max_in_flight=1) as pool:
        for _ in range(3):
            with pytest.raises(kind):
                pool.submit(id, argument).result(WAIT)
        good = pool.submit(task)
        connection = worker.connection()
        assert [command["run_id"] for command in connection.commands(1)] == [good.run_id]
        connection.say(result(good.run_id, "good"))
        assert good.result(WAIT) == "good"
        assert not pool._core.pending
        assert link_of(pool).stats()["runs"] == 0


HUGE = """
    import resource
    from scripted_worker import ScriptedWorker, result, task
    from wove_ws_sync import WebSocketExecutor

    with ScriptedWorker() as worker, WebSocketExecutor(worker.url, delivery_max_in_flight=1) as pool:
        first = pool.submit(task)
        connection = worker.connection()
        connection.commands(1)
        connection.say(result(first.run_id, "first"))
        first.result(30)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30) + (512 << 20),) * 2)
        huge = bytes(3 << 30)
        for _ in range(2):
            try:
                pool.submit(len, huge).result(30)
            except MemoryError:
                print("MemoryError")
        del huge
        good = pool.submit(task)
        connection.commands(2)
        connection.say(result(good.run_id, "good"))
        stats = pool._core.session.link.stats()
        print(good.result(30), stats["dials"], len(connection.commands(2)), len(pool._core.pending))
"""


def test_f31_three_gigabytes() -> None:
    """More than memory holds twice: MemoryError for that caller, nothing sent, and the slot is free."""
    assert python(HUGE) == ("MemoryError\nMemoryError\ngood 1 2 0\n", "", 0)
