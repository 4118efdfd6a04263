"""The worker service: a WebSocket server that runs tasks for hosts.

Owns: the listening socket, who gets in, start and stop.
Never: parses a frame before the handshake is authenticated, never executes user code on
its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Sequence
from types import TracebackType
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from .. import _telemetry, payloads
from .._seal import sealed_size
from ..security import is_local_host
from . import logs, telemetry
from .access import ReaderRule
from .auth import MIN_SECRET_BYTES, Authenticator, check_listening
from .connection import CLOSE_TIMEOUT, DEFAULT_MAX_IN_FLIGHT, HostConnection
from .dispatcher import Dispatcher
from .doorkeeper import Doorkeeper
from .engines import Engine, make_engine
from .entrance import Entrance, about, peer_of
from .greeting import SMALLEST_LIMIT
from .nonces import NonceStore, make_nonce_store
from .pages import Pages
from .registry import Registry
from .sockets import Sockets
from .status import StatusView

__all__ = ["WorkerService"]

_logger = logging.getLogger("wove_ws_sync.worker")
# websockets writes headers, and so credentials, at DEBUG level: never let it.
_wire_logger = logging.getLogger("wove_ws_sync.worker.wire")
_wire_logger.setLevel(logging.WARNING)

_DEFAULT_MAX_MESSAGE = 256 * 1024 * 1024
_DEFAULT_MAX_KEPT = 512 * 1024 * 1024
_DEFAULT_MAX_QUEUE = 100_000
_DEFAULT_DEDUPE_WINDOW = 300.0
_PING_INTERVAL = 20.0
#: More than the minute for which a host may be suspended without losing its connection.
_PING_TIMEOUT = 75.0
_READ_BYTES = 64 * 1024


class WorkerService:
    """Serve hosts on one port. Use it from one event loop; ``async with`` starts and stops it.

    ``host``, ``port`` (0 takes a free one) and ``path`` say where to listen. ``security``
    is Wove's executor_config value: ``"env:VARIABLE"``, a dictionary, or None for no
    authentication. ``engine`` is a name or an Engine, ``workers`` the number of its slots
    (default: CPUs + 4, at most 32). ``ssl_context`` makes it wss. ``max_message_bytes``
    (default 256 MiB) is the largest message accepted from a host, ``max_kept_bytes`` (default
    512 MiB) what the results of a host may take that have not arrived there, the newest not
    counted, ``max_queue`` (default 100,000) how many runs of all hosts may wait to begin,
    ``max_in_flight`` (default 10,000) how many runs of a host may be under way before reading from it
    pauses, ``dedupe_window`` (default 300 s) how long a result is given out again for its
    ``delivery_idempotency_key``. ``nonce_store`` says where used nonces are remembered, as ``--nonce-store``
    does, or is a store.
    ``require_seal`` refuses hosts whose messages are not sealed.
    ``insecure`` allows to listen beyond loopback without TLS and security. ``registry`` names
    modules: then only what their ``__all__`` lists is called, by name, and nothing is unpickled.
    ``otel`` traces tasks with OpenTelemetry, as ``--otel`` does; "": only if this process called
    ``wove_ws_sync.otel.instrument()``.
    ``counters`` tells what was refused, ignored or dropped, by reason.

    Raises ValueError or TypeError for wrong arguments and RuntimeError for a secret that
    is missing from the environment; ``start()`` raises OSError if the port is taken.
    Both raise NonceStoreError for a nonce store that cannot be used.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        path: str = "/wove",
        security: Any = None,
        engine: str | Engine = "threads",
        workers: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        max_message_bytes: int = _DEFAULT_MAX_MESSAGE,
        max_kept_bytes: int = _DEFAULT_MAX_KEPT,
        max_queue: int = _DEFAULT_MAX_QUEUE,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
        dedupe_window: float = _DEFAULT_DEDUPE_WINDOW,
        nonce_store: str | NonceStore = "memory",
        require_seal: bool = False,
        insecure: bool = False,
        registry: Sequence[str] = (),
        otel: str = "",
    ) -> None:
        if not path.startswith("/") or not path.isascii() or not path.isprintable() or set(path) & set("?# "):
            raise ValueError(f"path must be the path of a URL, such as /wove, not {path!r}.")
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {port}.")
        if max_message_bytes < SMALLEST_LIMIT:
            least = f"at least {SMALLEST_LIMIT}"
            raise ValueError(f"max_message_bytes must be {least}, not {max_message_bytes}.")
        if max_kept_bytes < 1:
            raise ValueError(f"max_kept_bytes must be above 0, not {max_kept_bytes}.")
        if max_queue < 1:
            raise ValueError(f"max_queue must be above 0, not {max_queue}.")
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight must be above 0, not {max_in_flight}.")
        if not 0 <= dedupe_window < math.inf:
            raise ValueError(f"dedupe_window must be a number of seconds from 0 on, not {dedupe_window}.")
        nonces = make_nonce_store(nonce_store) if isinstance(nonce_store, str) else nonce_store
        self._auth = Authenticator(security, nonces)
        authenticated = self._auth.mode != "none"
        if require_seal and self._auth.mode not in ("signed", "ed25519"):
            raise ValueError("require_seal needs keys: set security to 'env:VARIABLE', the hosts' secret.")
        check_listening(host, tls=ssl_context is not None, authenticated=authenticated, insecure=insecure)
        payloads.encode_value(None)  # a missing cloudpickle shall be told now and not by every run
        self._host = host
        self._port = port
        self._path = path
        self._ssl_context = ssl_context
        self._max_message_bytes = max_message_bytes
        self._max_kept_bytes = max_kept_bytes
        self._max_queue = max_queue
        self._dedupe_window = dedupe_window
        self._max_in_flight = max_in_flight
        self._insecure = insecure
        self._registry = Registry(registry) if registry else None
        self._otel = telemetry.check_setup(otel) if otel else _telemetry.worker
        self._engine = make_engine(engine, workers) if isinstance(engine, str) else engine
        self._server: Server | None = None
        self._sockets = Sockets()
        self._dispatcher: Dispatcher | None = None
        self._pages: Pages | None = None
        self._ended = asyncio.Event()
        self._is_draining = False
        self.counters: Counter[str] = Counter()
        self._doorkeeper = Doorkeeper(self._auth, nonces, self.counters)
        self._entrance = Entrance(
            self._auth,
            self._doorkeeper,
            self.counters,
            path=path,
            worker_id=secrets.token_hex(16),
            max_message_bytes=max_message_bytes,
            cancels=self._engine.cancels,
            insecure=insecure,
            require_seal=require_seal,
        )

    def __repr__(self) -> str:
        state = "stopped" if self._server is None else "draining" if self._is_draining else "serving"
        return f"<WorkerService {self.url} {state} engine={self._engine.name} workers={self._engine.workers}>"

    @property
    def url(self) -> str:
        """Return where hosts connect to, with the real port once it is listening."""
        host = f"[{self._host}]" if ":" in self._host else self._host or "0.0.0.0"
        return f"{'ws' if self._ssl_context is None else 'wss'}://{host}:{self._port}{self._path}"

    async def __aenter__(self) -> WorkerService:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises OSError if the address cannot be had, RuntimeError when called again."""
        if self._dispatcher is not None:
            raise RuntimeError("A WorkerService starts once; make another one.")
        self._dispatcher = Dispatcher(
            asyncio.get_running_loop(),
            self._engine,
            self.counters,
            max_kept_bytes=self._max_kept_bytes,
            max_queue=self._max_queue,
            dedupe_window=self._dedupe_window,
            registry=self._registry,
            otel=self._otel,
        )
        if self._otel:
            telemetry.prepare(self._otel)
        try:
            await self._doorkeeper.open()
            self._engine.start()
            self._server = await self._listen()
        except BaseException:
            self._doorkeeper.close()
            self._engine.close(0.0)
            raise
        logs.install()
        self._warn()
        how_many = f"{self._engine.workers} " if self._engine.workers else ""
        _logger.info("Listening on %s with %s%s.", self.url, how_many, self._engine.name)
        if self._registry is not None:
            modules = ", ".join(self._registry.modules)
            _logger.info("Only what %s lists is called, by name: %d in all.", modules, self._registry.count)
        _logger.info("Its status page is %s.", f"http{self.url[2:].removesuffix(self._path)}/")

    async def _listen(self) -> Server:
        server = await serve(
            self._serve_host,
            self._host or None,
            self._port,
            process_request=self._answer,
            process_response=self._entrance.greet,
            server_header=None,
            compression=None,
            max_size=sealed_size(self._max_message_bytes),
            max_queue=1024,
            write_limit=256 * 1024,
            ping_interval=_PING_INTERVAL,
            ping_timeout=_PING_TIMEOUT,
            close_timeout=CLOSE_TIMEOUT,
            logger=_wire_logger,
            ssl=self._ssl_context,
        )
        addresses = [sock.getsockname() for sock in server.sockets]
        strange = [address[0] for address in addresses if not is_local_host(address[0])]
        if strange and is_local_host(self._host) and not self._insecure:
            server.close()  # a hosts file can give the name localhost to any address
            await server.wait_closed()
            raise ValueError(f"{self._host!r} is {strange[0]} on this machine; listen on 127.0.0.1.")
        self._port = addresses[0][1]
        self._sockets.listen(server.sockets)
        self._pages = self._make_pages(local=not strange)
        return server

    def _release_pages(self) -> None:
        if self._pages is not None:
            self._pages.release()

    def _make_pages(self, *, local: bool) -> Pages:
        assert self._dispatcher is not None
        loop, context = asyncio.get_running_loop(), self._ssl_context
        view = StatusView(loop, self._dispatcher, self._engine, self.counters, context)
        return Pages(view, ReaderRule(self._auth, local=local, tls=context is not None))

    def _warn(self) -> None:
        if self._auth.mode == "none":
            who = "user of this machine" if is_local_host(self._host) else "machine that reaches this port"
            _logger.warning("No security is configured: every %s can run code here.", who)
        # An SSLContext of the user's may have been told by SSLKEYLOGFILE; that of the command is not.
        if self._ssl_context is not None and self._ssl_context.keylog_filename:
            _logger.warning("SSLKEYLOGFILE is set: the TLS keys of every connection are written to a file.")
        if self._auth.weak:
            _logger.warning("The secret is shorter than %d bytes and may be guessed.", MIN_SECRET_BYTES)

    async def serve_forever(self) -> None:
        """Serve until this coroutine is cancelled, or until the end of ``stop()`` or ``drain()``.

        Starts first if need be.
        """
        if self._server is None:
            await self.start()
        try:
            await self._ended.wait()
        finally:
            await self.stop()

    async def drain(self, timeout: float = 30.0) -> bool:
        """Listen no more, finish the runs that there are, then ``stop()``; return what that returns.

        Hosts that know of draining are told; a ``run_task`` from now on is refused. After
        *timeout* seconds the runs that are left end with an error of the kind
        ``WorkerStopping``. It ends earlier when no run is alive and every end of one has
        arrived. When this coroutine is cancelled, ``stop()`` is still to be called.
        Raises RuntimeError if the service is not started, or is draining already.
        """
        if self._server is None or self._dispatcher is None or self._is_draining:
            raise RuntimeError("A WorkerService can be drained once, after its start.")
        self._is_draining = True
        self._server.close(close_connections=False)
        self._release_pages()
        _logger.info("Draining for up to %g s: %d runs of %d hosts.", timeout, *self._dispatcher.counts())
        given_up = await self._dispatcher.drain(timeout)
        _logger.info("Drained: %d runs were given up.", given_up)
        return await self.stop()

    async def stop(self, timeout: float = 1.0) -> bool:
        """Stop accepting, close connections with 1001, end the engine.

        Runs in flight are dropped: coroutines are cancelled, results of synchronous tasks
        lost. Returns False if a task still occupies a thread *timeout* seconds later.
        Calling it again is harmless.
        """
        server, self._server = self._server, None
        if server is None or self._dispatcher is None:
            return await asyncio.to_thread(self._engine.close, timeout)
        try:
            server.close(close_connections=False)  # those in their handshake are refused by it
            self._release_pages()
            await self._dispatcher.close()
            # A peer in the middle of its handshake is not waited for.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(server.wait_closed()), CLOSE_TIMEOUT + 0.5)
            logs.uninstall()
            self._doorkeeper.close()
            clean = await asyncio.to_thread(self._engine.close, timeout)
        finally:
            self._ended.set()
        _logger.info("Stopped.")
        return clean

    def _answer(
        self, connection: ServerConnection, request: Request
    ) -> Response | Awaitable[Response | None] | None:
        """Answer plain HTTP, and whoever may not connect, before a byte of any frame is looked at."""
        self._sockets.add(connection)
        if self._pages is not None and self._pages.serves(request):
            return self._pages.answer(connection, request)
        return self._entrance.admit(connection, request)

    async def _serve_host(self, connection: ServerConnection) -> None:
        assert self._dispatcher is not None
        _set_user_timeout(connection)
        # asyncio makes a buffer of this size for each read, and 256 KiB cost a system call or two more.
        connection.transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        guest = await self._entrance.guest(connection)
        if guest is None:
            return
        host = HostConnection(
            connection, guest.channel, guest.greeting, self.counters, max_in_flight=self._max_in_flight
        )
        self.counters["connections"] += 1
        peer = peer_of(connection)
        _logger.info("Host %s connected.", peer, extra=about("connect", peer))
        await self._dispatcher.serve(host, guest.key_id)
        code = connection.close_code
        _logger.info("Host %s is gone (close code %s).", peer, code, extra=about("lose", peer))


def _set_user_timeout(connection: ServerConnection) -> None:
    """Bound how long sent bytes may stay unacknowledged: keepalive pings wait behind a full buffer."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    sock = connection.transport.get_extra_info("socket")
    if option is not None and sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, int((_PING_INTERVAL + _PING_TIMEOUT) * 1000))
