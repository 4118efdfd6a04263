"""A worker service that says exactly what a test tells it, and faces that ask it for something.

``ScriptedWorker`` accepts our handshake, keeps every command it got and answers nothing on
its own but pings and close frames. The faces give our public ways of running something one
shape, so that a test can be run on each. ``sing`` is what a pickle calls that must not be
loaded, or only in a certain thread.
"""

from __future__ import annotations

import abc
import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from typing import Any

import cloudpickle
from ws_peer import CLOSE, PATIENCE, PING, PONG, TEXT, Listener, Peer, frame

from wove_ws_sync import (
    AsyncWebSocketEnvironmentExecutor,
    SyncWebSocketEnvironmentExecutor,
    WebSocketExecutor,
)
from wove_ws_sync.link import Link

# Who loaded which canary, in order: (tag, thread id).
SONGS: list[tuple[str, int]] = []


def sing(tag: str) -> str:
    """Note that a pickle was loaded, and where."""
    SONGS.append((tag, threading.get_ident()))
    return tag


class Canary:
    """A value whose pickle says when it is loaded."""

    def __init__(self, tag: str) -> None:
        self.tag = tag

    def __reduce__(self) -> Any:
        return sing, (self.tag,)


def pickled(value: Any) -> str:
    """Return what a worker puts into a ``*_pickle`` field."""
    return base64.b64encode(cloudpickle.dumps(value)).decode("ascii")


def result(run_id: str, value: Any = None) -> dict[str, Any]:
    """Return a ``task_result`` event."""
    return {"type": "task_result", "run_id": run_id, "task_id": "task", "result_pickle": pickled(value)}


class Connection:
    """One connection of a host; everything may be called from any thread."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._changed = threading.Condition()
        self._commands: list[dict[str, Any]] = []
        self._writing = threading.Lock()
        self.close_code: int | None = None
        self.ended = threading.Event()

    def say(self, *messages: Any) -> None:
        """Send each of *messages* as one text message: a JSON value, or bytes as they are."""
        data = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in messages]
        self.say_bytes(b"".join(frame(TEXT, item) for item in data))

    def say_bytes(self, data: bytes) -> None:
        """Send *data* as it is."""
        with self._writing:
            self._peer.send(data)

    def commands(self, count: int, kind: str = "run_task") -> list[dict[str, Any]]:
        """Return the commands of *kind* so far, once there are *count*."""

        def found() -> list[dict[str, Any]]:
            return [command for command in self._commands if command["type"] == kind]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count, PATIENCE):
                raise TimeoutError(f"{len(found())} {kind} of {count} came; {self._commands}")
            return found()

    def serve(self) -> None:
        """Read until the host ends the connection."""
        message = b""
        try:
            while True:
                opcode, fin, payload = self._peer.recv_frame()
                if opcode == PING:
                    self.say_bytes(frame(PONG, payload))
                elif opcode == CLOSE:
                    self.close_code = int.from_bytes(payload[:2], "big") if payload else None
                    self.say_bytes(frame(CLOSE, payload[:2]))
                elif opcode != PONG:
                    message += payload
                    if fin:
                        self._take(json.loads(message))
                        message = b""
        except OSError:
            pass
        finally:
            self.ended.set()

    def _take(self, command: dict[str, Any]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()


class ScriptedWorker:
    """A context manager: a listener on loopback whose connections do what a test says.

    A *foreign* one does not answer our header, as a worker of another make; *features* are
    the extensions that another one agrees to.
    """

    def __init__(self, *, foreign: bool = False, features: str = "") -> None:
        agreed = f"; f={features}" if features else ""
        self._headers = () if foreign else (f"X-Wove-Sync: 1{agreed}",)
        self._connections: SimpleQueue[Connection] = SimpleQueue()
        self._listener = Listener(self._serve)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"ws://127.0.0.1:{self._listener.port}/wove"

    @property
    def accepted(self) -> int:
        """Return how many connections there were."""
        return self._listener.accepted

    def connection(self) -> Connection:
        """Return the next connection that a host made."""
        return self._connections.get(timeout=PATIENCE)

    def _serve(self, peer: Peer) -> None:
        peer.upgrade(*self._headers)
        connection = Connection(peer)
        self._connections.put(connection)
        connection.serve()

    def __enter__(self) -> ScriptedWorker:
        self._listener.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._listener.__exit__(*exc_info)


class Face(abc.ABC):
    """One of our ways to run something; ``outcome`` returns a value or raises what a user gets."""

    @abc.abstractmethod
    def submit(self, **delivery: Any) -> str:
        """Send a run and return its id."""

    @abc.abstractmethod
    def outcome(self, run_id: str) -> Any:
        """Return the result of the run, or raise its error."""

    @property
    @abc.abstractmethod
    def link(self) -> Link:
        """Return the link in use."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the link."""


def task() -> None:
    """Be run by nobody: a scripted worker only pretends."""


def run_frame(run_id: str, **fields: Any) -> dict[str, Any]:
    """Return a ``run_task`` frame as Wove makes it."""
    return {"type": "run_task", "run_id": run_id, "task_id": "task", "callable": task, "args": {}, **fields}


class FuturesFace(Face):
    """``WebSocketExecutor``."""

    def __init__(self, url: str, **config: Any) -> None:
        self.pool = WebSocketExecutor(url, **config)
        self.futures: dict[str, Any] = {}

    def submit(self, **delivery: Any) -> str:
        future = self.pool.with_options(**delivery).submit(task)
        self.futures[future.run_id] = future
        return future.run_id

    def outcome(self, run_id: str) -> Any:
        return self.futures[run_id].result(PATIENCE)

    @property
    def link(self) -> Link:
        session = self.pool._core.session
        assert session is not None
        return session.link

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        for future in self.futures.values():
            future.cancel()


class SyncFace(Face):
    """``SyncWebSocketEnvironmentExecutor``; the thread that asks receives for all."""

    def __init__(self, url: str, **config: Any) -> None:
        self.executor = SyncWebSocketEnvironmentExecutor()
        self.config = {"url": url, **config}
        self.executor.start(environment_name="env", environment_config=self.config, run_config={})
        self.terminal: dict[str, dict[str, Any]] = {}
        self.count = 0

    def submit(self, **delivery: Any) -> str:
        self.count += 1
        run_id = f"run-{self.count}"
        self.executor.send(run_frame(run_id, delivery=delivery))
        return run_id

    def outcome(self, run_id: str) -> Any:
        while run_id not in self.terminal:
            event = self.executor.recv(PATIENCE)
            if event["type"] in ("task_result", "task_error", "task_cancelled"):
                assert event["run_id"] not in self.terminal, "a run ended twice"
                self.terminal[event["run_id"]] = event
        return _outcome(self.terminal[run_id])

    @property
    def link(self) -> Link:
        session = self.executor._session
        assert session is not None
        return session.link

    def close(self) -> None:
        self.executor.stop()


class ShimFace(Face):
    """``AsyncWebSocketEnvironmentExecutor``, driven as Wove does, in a loop of its own thread."""

    def __init__(self, url: str, **config: Any) -> None:
        self.executor = AsyncWebSocketEnvironmentExecutor()
        self.config = {"url": url, **config}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="shim-loop")
        self.thread.start()
        self.terminal: dict[str, dict[str, Any]] = {}
        self.count = 0
        self.call(self.executor.start(environment_name="env", environment_config=self.config, run_config={}))

    def call(self, coroutine: Any) -> Any:
        """Run *coroutine* in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def submit(self, **delivery: Any) -> str:
        self.count += 1
        run_id = f"run-{self.count}"
        self.call(self.executor.send(run_frame(run_id, delivery=delivery)))
        return run_id

    def outcome(self, run_id: str) -> Any:
        while run_id not in self.terminal:
            event = self.call(self.executor.recv())
            if event["type"] in ("task_result", "task_error", "task_cancelled"):
                assert event["run_id"] not in self.terminal, "a run ended twice"
                self.terminal[event["run_id"]] = event
        return _outcome(self.terminal[run_id])

    @property
    def link(self) -> Link:
        return self.executor._groups[0].session.link

    def close(self) -> None:
        self.call(self.executor.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()


def _outcome(event: dict[str, Any]) -> Any:
    if event["type"] == "task_cancelled":
        raise asyncio.CancelledError
    if event["type"] == "task_error":
        raise event["exception"]
    return event["result"]


FACES: dict[str, Callable[..., Face]] = {"futures": FuturesFace, "sync": SyncFace, "shim": ShimFace}


@contextlib.contextmanager
def face_on(
    kind: str, runs: int, *, foreign: bool = False, delivery: Mapping[str, Any] | None = None
) -> Iterator[tuple[Face, Connection, list[str], ScriptedWorker]]:
    """Give a face of *kind* with that many *runs* in flight, the connection they came by, and their ids."""
    with ScriptedWorker(foreign=foreign) as worker:
        face = FACES[kind](worker.url)
        try:
            ids = [face.submit(**(delivery or {})) for _ in range(runs)]
            connection = worker.connection()
            connection.commands(runs)
            yield face, connection, ids, worker
        finally:
            face.close()
