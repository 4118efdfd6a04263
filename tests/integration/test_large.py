"""Large arguments and results: what may pass does, what may not hurts its own run only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from wove import weave
from wove.environment import EnvironmentExecutionError

import wove_ws_sync
from wove_ws_sync import WebSocketExecutor
from wove_ws_sync.link import Link
from wove_ws_sync.session import links
from wove_ws_sync.testing import LoopbackWorker

WAIT = 60.0
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def worker() -> Iterator[LoopbackWorker]:
    """A worker with the default limit."""
    with LoopbackWorker(workers=2) as running:
        yield running


@pytest.fixture(scope="module")
def narrow() -> Iterator[LoopbackWorker]:
    """A worker that takes messages of 2 MiB at most."""
    with LoopbackWorker(workers=2, max_message_bytes=2 * MIB) as running:
        yield running


def pattern(size: int) -> bytes:
    """Return *size* bytes in which a piece that is lost or moved shows."""
    piece = b"".join(number.to_bytes(4, "big") for number in range(65536))
    return (piece * (size // len(piece) + 1))[:size]


def turned(data: bytes) -> bytes:
    return data[::-1]


def sized(size: int) -> bytes:
    return b"x" * size


def the_link(worker: LoopbackWorker) -> Link:
    [link] = [link for link in links() if link.options.url == worker.url]
    return link


def test_64_mib_both_ways_through_a_future(worker: LoopbackWorker) -> None:
    """Argument and result arrive whole, over one connection."""
    data = pattern(64 * MIB)
    with WebSocketExecutor(worker.url, security=worker.security) as pool:
        assert pool.submit(turned, data).result(WAIT) == data[::-1]
        assert the_link(worker).stats()["dials"] == 1


def test_64_mib_both_ways_through_a_weave(worker: LoopbackWorker) -> None:
    """With a small task beside it that sees its heartbeats all the time."""
    data = pattern(64 * MIB)
    wove_ws_sync.config(
        environments={
            "socket_workers": {
                "executor": "websocket",
                "executor_config": {"url": worker.url, "security": worker.security},
            }
        }
    )
    with weave() as w:

        @w.do
        def argument() -> bytes:
            return data

        @w.do(environment="socket_workers", delivery_heartbeat_seconds=5.0)
        def large(argument: bytes) -> bytes:
            return argument[::-1]

        @w.do(environment="socket_workers", delivery_heartbeat_seconds=5.0)
        def small() -> str:
            return "small"

    assert w.result.large == data[::-1]
    assert w.result.small == "small"
    assert the_link(worker).stats()["dials"] == 1


@pytest.mark.parametrize("limited", ["host", "worker"])
def test_an_argument_over_the_limit(worker: LoopbackWorker, narrow: LoopbackWorker, limited: str) -> None:
    """One ValueError that names size, limit and remedy; nothing is sent, and the link lives."""
    target = worker if limited == "host" else narrow
    config = {"max_message_bytes": 2 * MIB} if limited == "host" else {}
    with WebSocketExecutor(target.url, security=target.security, **config) as pool:
        before = pool.submit(sized, 3)
        over = pool.submit(turned, bytes(2 * MIB))
        after = pool.submit(sized, 4)
        with pytest.raises(ValueError, match=rf"more than the {2 * MIB} bytes .* raise max_message_bytes"):
            over.result(WAIT)
        assert (before.result(WAIT), after.result(WAIT)) == (b"xxx", b"xxxx")
        assert pool.submit(turned, bytes(MIB)).result(WAIT) == bytes(MIB)
        link = the_link(target)
        assert link.stats()["dials"] == 1 and link.stats()["runs"] == 0


@pytest.mark.parametrize("limited", ["host", "worker"])
def test_f27_a_result_over_the_limit(worker: LoopbackWorker, narrow: LoopbackWorker, limited: str) -> None:
    """What this host does not take, our worker does not send: one clear error of that run.

    The limit of a worker is on what it takes: a larger result may leave it.
    """
    target = worker if limited == "host" else narrow
    config = {"max_message_bytes": 2 * MIB} if limited == "host" else {}
    with WebSocketExecutor(target.url, security=target.security, **config) as pool:
        before, over, after = (pool.submit(sized, size) for size in (3, 4 * MIB, 4))
        if limited == "host":
            with pytest.raises(EnvironmentExecutionError, match="max_message_bytes") as caught:
                over.result(WAIT)
            assert caught.value.payload["kind"] == "ResultTooLarge"
        else:
            assert len(over.result(WAIT)) == 4 * MIB
        assert (before.result(WAIT), after.result(WAIT)) == (b"xxx", b"xxxx")
        assert len(pool.submit(sized, MIB).result(WAIT)) == MIB
        link = the_link(target)
        assert link.stats()["dials"] == 1 and link.stats()["runs"] == 0


@pytest.mark.parametrize("limited", ["host", "worker"])
def test_over_the_limit_in_a_weave(worker: LoopbackWorker, narrow: LoopbackWorker, limited: str) -> None:
    """The weave with the large task fails with a clear error; the next one uses the same connection."""
    target = worker if limited == "host" else narrow
    config: dict[str, Any] = {"url": target.url, "security": target.security}
    if limited == "host":
        config["max_message_bytes"] = 2 * MIB
    wove_ws_sync.config(environments={"socket_workers": {"executor": "websocket", "executor_config": config}})

    def run(size: int) -> Any:
        data = bytes(size)
        with weave() as w:

            @w.do(environment="socket_workers")
            def task() -> int:
                return len(data)

        return w.result

    assert run(1).task == 1
    with pytest.raises(ValueError, match="raise max_message_bytes"):
        _ = run(4 * MIB).task
    assert run(MIB).task == MIB
    assert the_link(target).stats()["dials"] == 1


def test_an_exception_over_the_limit(worker: LoopbackWorker) -> None:
    """An exception that carries too much is one error of its run, too."""

    def fail() -> None:
        raise LookupError(bytes(4 * MIB))

    with WebSocketExecutor(worker.url, security=worker.security, max_message_bytes=2 * MIB) as pool:
        with pytest.raises((EnvironmentExecutionError, LookupError)) as caught:
            pool.submit(fail).result(WAIT)
        assert len(str(caught.value)) < 3 * MIB
        assert pool.submit(sized, 3).result(WAIT) == b"xxx"
        assert the_link(worker).stats()["dials"] == 1


def test_many_large_ones_at_once(worker: LoopbackWorker) -> None:
    """Eight arguments of 8 MiB from as many threads, with small runs between them."""
    data = [pattern(8 * MIB + number) for number in range(8)]
    with WebSocketExecutor(worker.url, security=worker.security, delivery_heartbeat_seconds=10.0) as pool:
        large = [pool.submit(turned, item) for item in data]
        small = [pool.submit(sized, size) for size in range(50)]
        assert [len(future.result(WAIT)) for future in small] == list(range(50))
        assert all(future.result(WAIT) == item[::-1] for future, item in zip(large, data, strict=True))
        assert the_link(worker).stats()["dials"] == 1
