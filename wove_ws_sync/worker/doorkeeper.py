"""The moment in which a handshake is verified.

Owns: in which thread that happens, and what is answered and logged when it fails. Never: knows what
makes a handshake valid; the authenticator does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from websockets.asyncio.server import ServerConnection
from websockets.http11 import Request, Response

from .auth import Admission, Authenticator
from .nonces import NonceStore, NonceStoreError
from .not_ready import NotReady

__all__ = ["Doorkeeper"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: Threads for a store that blocks, and how many handshakes may wait for one of them.
_THREADS, _MAX_WAITING = 4, 256
#: A store, or keys of tokens, that fail are told this often, in seconds.
_PAUSE = 10.0
#: How long the keys of tokens are waited for, in seconds.
_KEYS_TIMEOUT = 6.0


#: What is done about a valid handshake; it may be refused for another reason.
Welcome = Callable[[ServerConnection, Request, Admission], Response | None]


class Doorkeeper:
    """Verify handshakes with *auth*, in threads if *nonces*, which it uses, blocks. Use it from one loop."""

    def __init__(self, auth: Authenticator, nonces: NonceStore, counters: Counter[str]) -> None:
        self._auth = auth
        self._nonces = nonces
        self._counters = counters
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._told_at = -math.inf
        self._untold = 0

    async def open(self) -> None:
        """Open the store. Raises NonceStoreError."""
        if self._auth.mode == "none":
            return
        if self._nonces.blocks:
            self._threads = ThreadPoolExecutor(_THREADS, "wove-ws-nonces")
            await asyncio.get_running_loop().run_in_executor(self._threads, self._nonces.open)
        else:
            self._nonces.open()

    def close(self) -> None:
        """Close the store, once what waits for it is done. Does not block, and is idempotent."""
        threads, self._threads = self._threads, None
        if threads is None:
            self._nonces.close()
        else:
            threads.submit(self._nonces.close)
            threads.shutdown(wait=False)

    def admit(
        self, connection: ServerConnection, request: Request, welcome: Welcome
    ) -> Response | Awaitable[Response | None] | None:
        """Return the refusal of a handshake that is not valid, or else what *welcome* does."""
        keys = self._auth.prepare(request.headers)
        if keys is not None or (self._nonces.blocks and self._auth.mode != "none"):
            return self._admit_later(connection, request, welcome, keys)
        try:
            admission = self._auth.verify(request.headers, request.path)
        except (PermissionError, NotReady) as exc:
            return self._refuse(connection, exc)
        return welcome(connection, request, admission)

    async def _admit_later(
        self, connection: ServerConnection, request: Request, welcome: Welcome, keys: Future[None] | None
    ) -> Response | None:
        self._waiting += 1
        try:
            if keys is not None:
                with contextlib.suppress(TimeoutError):  # those at hand may do
                    await asyncio.wait_for(asyncio.wrap_future(keys), _KEYS_TIMEOUT)
            admission = await self._verify(request)
        except (PermissionError, NotReady) as exc:
            return self._refuse(connection, exc)
        finally:
            self._waiting -= 1
        return welcome(connection, request, admission)

    async def _verify(self, request: Request) -> Admission:
        if not self._nonces.blocks:
            return self._auth.verify(request.headers, request.path)
        if self._threads is None or self._waiting > _MAX_WAITING:
            raise NonceStoreError("Too many handshakes wait for the nonce store.")
        verify, loop = self._auth.verify, asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, verify, request.headers, request.path)

    def _refuse(self, connection: ServerConnection, exc: PermissionError | NotReady) -> Response:
        address = connection.remote_address
        peer = f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a closed connection"
        if isinstance(exc, NotReady):
            self._counters["nonce_store" if isinstance(exc, NonceStoreError) else "not_ready"] += 1
            self._tell(peer, exc)
            # Not the host's fault: after a 401 it would give up.
            response = connection.respond(503, "503 Service Unavailable\n")
            response.headers["Retry-After"] = str(math.ceil(exc.retry_after))
            return response
        self._counters["unauthorized"] += 1
        extra = {"action": "refuse", "peer": peer}
        _logger.warning("Refused %s with 401: %s", peer, exc, extra=extra)
        return connection.respond(401, "401 Unauthorized\n")

    def _tell(self, peer: str, exc: NotReady) -> None:
        now = time.monotonic()
        if now - self._told_at < _PAUSE:
            self._untold += 1
            return
        also = f" ({self._untold} more since the last such line)" if self._untold else ""
        self._told_at, self._untold = now, 0
        extra = {"action": "refuse", "peer": peer}
        _logger.error("Refused %s with 503: %s%s", peer, exc, also, extra=extra)
