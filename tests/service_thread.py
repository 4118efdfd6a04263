"""A worker service on an event loop in a thread of the test, and plain HTTP requests to it.

For tests of what a service shows of itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from raw_host import PATIENCE, wait_until

from wove_ws_sync.worker import WorkerService
from wove_ws_sync.worker.statistics import Statistics


class Answer(NamedTuple):
    """What came back. ``headers`` are by their names in small letters."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class ServiceThread:
    """A service with *options*; ``url`` is for hosts, ``home`` for browsers."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="service-under-test", daemon=True)
        self._thread.start()
        self.security = options.get("security")
        self.service = WorkerService(**{"port": 0, "workers": 2, **options})
        try:
            self.call(self.service.start())
        except BaseException:
            self.close()
            raise
        self.url = self.service.url
        parts = urllib.parse.urlsplit(self.url)
        self.home = f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc}/"
        self.port = int(parts.port or 0)

    def __enter__(self) -> ServiceThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def begin(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(coroutine).result(PATIENCE)

    def drain(self, timeout: float = PATIENCE) -> concurrent.futures.Future[Any]:
        """Begin to drain; return once no new run is taken."""
        future = self.begin(self.service.drain(timeout))
        wait_until(lambda: future.done() or "serving" not in repr(self.service))
        return future

    def statistics(self, look: Callable[[Statistics], Any]) -> Any:
        """Return what *look* makes of the numbers, on the loop that they belong to."""

        async def on_loop() -> Any:
            assert self.service._dispatcher is not None
            return look(self.service._dispatcher.statistics)

        return self.call(on_loop())

    def close(self) -> None:
        self.call(self.service.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE)
        self.loop.close()


def fetch(
    port: int,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
    host: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
) -> Answer:
    """Ask for *path*; ``headers`` may hold another Host."""
    if context is None:
        connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
    try:
        connection.putrequest(method, path, skip_host=any(name.lower() == "host" for name in headers or ()))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()
