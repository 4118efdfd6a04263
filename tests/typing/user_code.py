"""What a user writes, as the user's type checker sees it; read by mypy, never run."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from typing import Any, assert_type

import wove

import wove_ws_sync
from wove_ws_sync.progress import track
from wove_ws_sync.testing import LoopbackWorker

__all__ = ["blocking", "context", "environments", "errors", "futures", "worker"]


def double(number: int, *, times: int = 1) -> int:
    return number * times


def futures() -> None:
    with wove_ws_sync.WebSocketExecutor(
        "ws://127.0.0.1:8765/wove", security="env:WOVE_WORKER_SECRET", delivery_heartbeat_seconds=15.0
    ) as pool:
        standard: concurrent.futures.Executor = pool
        future = pool.submit(double, 1, times=2)
        assert_type(future, wove_ws_sync.RunFuture[int])
        assert_type(future.result(timeout=1.0), int)
        assert_type(future.exception(), BaseException | None)
        assert_type(future.cancel(), bool)
        assert_type(future.run_id, str)
        assert_type(pool.map(double, [1, 2], timeout=3.0, chunksize=1, buffersize=None), Iterator[int])
        hasty = pool.with_options(delivery_timeout=5.0)
        assert_type(hasty, wove_ws_sync.WebSocketExecutor)
        assert_type(pool.submit(wove_ws_sync.named("resize"), "a.png"), wove_ws_sync.RunFuture[Any])
        concurrent.futures.wait([future, hasty.submit(double, 2)])
        standard.shutdown(wait=True, cancel_futures=True)
    wove_ws_sync.WebSocketExecutor(environment="socket_workers").shutdown()


def context() -> None:
    run = wove_ws_sync.current_run()
    assert_type(run, wove_ws_sync.CurrentRun)
    assert_type(wove_ws_sync.current_run(None), wove_ws_sync.CurrentRun | None)
    assert_type(run.run_id, str)
    assert_type(run.cancelled(), bool)
    run.heartbeat()
    run.progress(1)
    run.progress(0.5, 2, "half of it")
    events: list[dict[str, Any]] = []
    with wove_ws_sync.WebSocketExecutor(
        "ws://127.0.0.1:8765/wove", on_event=events.append, context_vars=["myapp.context:request_id"]
    ) as pool:
        future = pool.submit(double, 1)
        assert_type(future.progress, wove_ws_sync.Progress | None)
        future.add_progress_callback(lambda each: print(each.progress))
        assert_type(track([future], total=1, description="doubling"), Iterator[wove_ws_sync.RunFuture[int]])
    wove_ws_sync.SyncWebSocketEnvironmentExecutor(progress=True)


def blocking() -> dict[str, Any]:
    executor = wove_ws_sync.SyncWebSocketEnvironmentExecutor()
    executor.start(environment_name="workers", environment_config={"url": "ws://127.0.0.1:1"}, run_config={})
    frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable": double, "args": {"number": 1}}
    executor.send(frame)
    event = executor.recv(timeout=1.0)
    assert_type(event, dict[str, Any])
    executor.stop()
    return event


def environments() -> None:
    wove_ws_sync.install()
    wove_ws_sync.config(
        default_environment="workers",
        environments={"workers": {"executor": "websocket", "executor_config": {"url": "ws://127.0.0.1:1"}}},
    )
    executor: wove.EnvironmentExecutor = wove_ws_sync.AsyncWebSocketEnvironmentExecutor()
    wove_ws_sync.config(environments={"workers": {"executor": executor}})
    wove_ws_sync.uninstall()


def errors(future: wove_ws_sync.RunFuture[int]) -> None:
    try:
        future.result()
    except wove_ws_sync.ConnectionLost as error:
        orphaned: wove.DeliveryOrphanedError = error
        assert_type(error.run_id, str | None)
        assert_type(error.close_code, int | None)
        assert_type(error.reason, str)
        assert_type(error.attempt, int)
        assert_type(error.maybe_executed, bool)
        del orphaned
    except wove_ws_sync.HandshakeRejected as error:
        assert_type(error.status, int | None)
        assert_type(error.retry_after, float | None)
    except wove_ws_sync.DeliveryTimeout as error:
        timed_out: TimeoutError = error
        assert_type(error.cancel_acknowledged, bool)
        del timed_out
    except wove_ws_sync.DeliveryCancelled as error:
        assert_type(error.acknowledged, bool)


def worker() -> str:
    with LoopbackWorker() as service:
        assert_type(service.url, str)
        assert_type(service.pid, int | None)
        wove_ws_sync.WebSocketExecutor(service.url, security=service.security).shutdown()
        service.stop()
        service.kill()
        return service.url
