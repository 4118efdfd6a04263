"""A host that speaks the wire protocol by hand, and tasks that wait for a file.

For tests of the worker service.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import cloudpickle
import wove
from websockets.sync.client import connect

# The worker cannot import this module: what tasks use of it travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

TERMINAL = {"task_result", "task_error", "task_cancelled"}
FOREIGN_LIMIT = 1024 * 1024 - 1
PATIENCE = 30.0


def pickled(value: Any) -> str:
    return base64.b64encode(cloudpickle.dumps(value)).decode()


def unpickled(text: str) -> Any:
    return cloudpickle.loads(base64.b64decode(text, validate=True))


def signed(worker: Any, target: str = "/wove") -> dict[str, str]:
    security = wove.NetworkExecutorSecurity.from_config(worker.security)
    return security.headers_for(transport="websocket", target=target, body=b"")


class RawHost:
    """A host that speaks the wire protocol by hand.

    *limit* makes it one of this package, *extensions* are those that it offers, *name* is
    its X-Wove-Host and *window* its X-Wove-Resume-Window.
    """

    def __init__(
        self,
        worker: Any,
        *,
        limit: int | None = None,
        extensions: str = "",
        name: str | None = None,
        window: float | str | None = None,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        own: dict[str, str] = {}
        if limit is not None:
            own = {"X-Wove-Sync": "1", "X-Wove-Max-Message": str(limit)}
        if extensions:
            own = {"X-Wove-Max-Message": str(256 * 1024 * 1024), **own}
            own["X-Wove-Sync"] = f"1; f={extensions}"
        if name is not None:
            own["X-Wove-Host"] = name
        if window is not None:
            own["X-Wove-Resume-Window"] = str(window)
        all_headers = {**(signed(worker) if headers is None else headers), **own}
        options = {"compression": None, "max_size": None, "proxy": None, **options}
        self._stack = contextlib.ExitStack()
        self.socket = self._stack.enter_context(
            connect(worker.url, additional_headers=all_headers, **options)
        )
        self.messages: list[bytes] = []
        self._events: collections.deque[dict[str, Any]] = collections.deque()
        # What wait() saw for other runs, by their id.
        self._passed: collections.defaultdict[str | None, collections.deque[dict[str, Any]]]
        self._passed = collections.defaultdict(collections.deque)

    @property
    def features(self) -> list[str]:
        """Return the extensions that the worker service answered with."""
        assert self.socket.response is not None
        _, _, used = self.socket.response.headers.get("X-Wove-Sync", "").partition("f=")
        return used.split(",") if used else []

    def __enter__(self) -> RawHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def cut(self) -> None:
        """Lose the connection without a goodbye."""
        self.socket.socket.shutdown(socket.SHUT_RDWR)

    def send(self, **frame: Any) -> None:
        self.socket.send(json.dumps(frame))

    def run(self, function: Any, run_id: str = "r", *, delivery: Any = None, **args: Any) -> None:
        self.send(
            type="run_task",
            run_id=run_id,
            task_id="task",
            callable_pickle=pickled(function),
            args_pickle=pickled(args),
            delivery=delivery or {},
        )

    def cancel(self, run_id: str = "r", **fields: Any) -> None:
        self.send(type="cancel_task", run_id=run_id, task_id="task", **fields)

    def event(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """Return the next event; TimeoutError if none comes."""
        while not self._events:
            message = self.socket.recv(timeout, decode=False)
            self.messages.append(message)
            decoded = json.loads(message)
            self._events.extend(decoded if isinstance(decoded, list) else [decoded])
        return self._events.popleft()

    def wait(self, run_id: str = "r", kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events of *run_id* up to its terminal one (or to one of *kind*).

        What comes for other runs meanwhile is for their own wait(), but for heartbeats. TimeoutError if
        the event does not come, whatever else does.
        """
        found = []
        for event in self._of(run_id):
            found.append(event)
            if event["type"] == kind or event["type"] in TERMINAL:
                break
        return found

    def _of(self, run_id: str) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + 3 * PATIENCE
        while True:
            if self._passed[run_id]:
                yield self._passed[run_id].popleft()
                continue
            event = self.event(min(PATIENCE, max(0.0, end - time.monotonic())))
            if event.get("run_id") == run_id:
                yield event
            elif event["type"] != "heartbeat":
                self._passed[event.get("run_id")].append(event)

    def notice(self, kind: str) -> dict[str, Any]:
        """Return the next frame, which must be a notice of that kind."""
        event = self.event()
        assert event["type"] == kind, str(explained(event))[:2000]
        return event

    def resume(self, *run_ids: str, more: bool | None = None) -> dict[str, list[str]]:
        """Send ``resume`` and return the lists of the answer that hold something."""
        self.send(type="resume", run_ids=run_ids, **({} if more is None else {"more": more}))
        state = self.notice("resume_state")
        assert set(state) == {"type", "alive", "finished", "unknown", "lost"}
        return {key: value for key, value in state.items() if key != "type" and value}

    def ack(self, *run_ids: str) -> None:
        """Acknowledge the ends of these runs."""
        self.send(type="event_ack", run_ids=run_ids)

    def is_quiet(self) -> bool:
        """Tell that nothing of earlier commands is on its way: a run of its own comes back first."""
        self.run(lambda: None, "quiet?")
        kinds = [self.event() for _ in range(2)]
        if "ack" in self.features:
            self.ack("quiet?")
        return {event.get("run_id") for event in kinds} == {"quiet?"}

    def result(self, run_id: str = "r") -> Any:
        last = self.wait(run_id)[-1]
        assert last["type"] == "task_result", explained(last)
        return unpickled(last["result_pickle"])

    def error(self, run_id: str = "r") -> dict[str, Any]:
        last = self.wait(run_id)[-1]
        assert last["type"] == "task_error", last
        error = unpickled(last["error_pickle"])
        assert set(error) == {"kind", "message", "traceback", "retryable", "source", "adapter"}
        assert error["adapter"] == "websocket"
        return {**error, "event": last}


def plain_error(event: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the plain error of a ``task_error`` that the service made, which must be of *kind*."""
    assert event["type"] == "task_error" and "error_pickle" not in event, explained(event)
    error: dict[str, Any] = event["error"]
    assert (error["kind"], error["source"], error["traceback"]) == (kind, "executor", "")
    return error


def explained(event: dict[str, Any]) -> Any:
    return unpickled(event["error_pickle"]) if "error_pickle" in event else event


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.01)


def block_until(path: str) -> None:
    """Hold the thread until *path* exists. Runs in the worker."""
    import pathlib
    import time

    while not pathlib.Path(path).exists():
        time.sleep(0.01)


def occupy(path: str) -> Callable[[], None]:
    """Return a task that writes *path*.running and returns once *path* exists."""

    def task() -> None:
        import pathlib
        import time

        pathlib.Path(path + ".running").touch()
        while not pathlib.Path(path).exists():
            time.sleep(0.01)

    return task
