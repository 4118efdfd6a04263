"""What a service answers to plain HTTP requests on its port.

Owns: the paths, their answers and their headers. Never: sees a frame, answers a
WebSocket handshake, waits longer than a moment.

================ ============================================= =====================
path             answer                                        who may read it
================ ============================================= =====================
``/healthz``     200 as long as the loop of the service runs   everybody
``/readyz``      200 while new runs are taken, 503 otherwise   everybody
``/metrics``     for Prometheus                                see ``ReaderRule``
``/status.json`` the facts behind the status page              see ``ReaderRule``
``/``            the status page                               see ``ReaderRule``
================ ============================================= =====================
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import json
import logging
import re
from collections.abc import Awaitable, Callable

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from .access import ReaderRule
from .metrics import MISSING, make_exposition
from .status import StatusView

__all__ = ["Pages"]

_logger = logging.getLogger("wove_ws_sync.worker")

_PROBES = frozenset({"/healthz", "/readyz"})
_PATHS = _PROBES | {"/", "/status.json", "/metrics"}
_TEXT = "text/plain; charset=utf-8"
#: How long the status may be held back, in seconds, for a page that asks for that. A service that
#: begins to drain takes no new connection, and could not be asked then what it does.
_HOLD = 1.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
_STATUS = {
    401: "The secret of the service is needed, as the password with any name, or as a bearer token.\n",
    403: "This is shown to this machine, to who has the secret of the service, and over TLS only.\n",
}


class Pages:
    """Answer for one service, whose *rule* says who may read what *view* shows."""

    def __init__(self, view: StatusView, rule: ReaderRule) -> None:
        self._view = view
        self._rule = rule
        self._page, self._policy = _load_page()
        self._news = asyncio.Event()
        self._expose: Callable[[str], tuple[str, bytes]] | None = None

    def serves(self, request: Request) -> bool:
        """Tell whether this is a plain request for one of these paths."""
        return "Upgrade" not in request.headers and request.path.partition("?")[0] in _PATHS

    def release(self) -> None:
        """Hold no answer back from now on, as the next one may never be asked for."""
        self._news.set()

    def answer(self, connection: ServerConnection, request: Request) -> Response | Awaitable[Response]:
        """Return the answer. Nothing in it is meant for another site, nor to be kept."""
        method = getattr(request, "method", "GET")  # older versions of websockets read no other
        path, _, query = request.path.partition("?")
        if method not in ("GET", "HEAD"):
            return _response(connection, 405, _TEXT, b"405 Method Not Allowed\n", Allow="GET, HEAD")
        if path not in _PROBES and (refused := self._refuse(connection, request, path)) is not None:
            return refused
        if method == "GET" and path == "/status.json" and query == "hold" and not self._news.is_set():
            return self._hold(connection)
        response = self._make(connection, path, request)
        if method == "HEAD":
            response.body = b""
        return response

    def _refuse(self, connection: ServerConnection, request: Request, path: str) -> Response | None:
        address = connection.remote_address
        peer = address[0] if isinstance(address, tuple) else ""
        status = self._rule.status(request.headers.get_all, peer)
        if status == 200:
            return None
        self._view.counters["refused_reader"] += 1
        _logger.info("Refused %s the page %s with %d.", peer, path, status)
        response = _response(connection, status, _TEXT, _STATUS[status].encode())
        if status == 401:
            response.headers["WWW-Authenticate"] = 'Basic realm="wove-ws-sync worker", charset="UTF-8"'
        return response

    def _make(self, connection: ServerConnection, path: str, request: Request) -> Response:
        if path == "/healthz":
            return _response(connection, 200, _TEXT, b"ok\n")
        if path == "/readyz":
            refusal = self._view.refusal
            return _response(connection, 503 if refusal else 200, _TEXT, f"{refusal or 'ready'}\n".encode())
        if path == "/metrics":
            return self._metrics(connection, request.headers)
        if path == "/status.json":
            return self._status(connection)
        response = _response(connection, 200, "text/html; charset=utf-8", self._page)
        del response.headers["Content-Security-Policy"]
        response.headers["Content-Security-Policy"] = self._policy
        response.headers["X-Frame-Options"] = "DENY"
        return response

    async def _hold(self, connection: ServerConnection) -> Response:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), _HOLD)
        return self._status(connection)

    def _status(self, connection: ServerConnection) -> Response:
        document = json.dumps(self._view.document(), separators=(",", ":"), default=str)
        return _response(connection, 200, "application/json", document.encode())

    def _metrics(self, connection: ServerConnection, headers: Headers) -> Response:
        if self._expose is None:
            try:
                self._expose = make_exposition(self._view)
            except ImportError:
                return _response(connection, 501, _TEXT, MISSING.encode())
        content_type, body = self._expose(", ".join(headers.get_all("Accept")))
        return _response(connection, 200, content_type, body)


def _response(
    connection: ServerConnection, status: int, content_type: str, body: bytes, **headers: str
) -> Response:
    response = connection.respond(status, "")
    response.body = body
    del response.headers["Content-Length"], response.headers["Content-Type"]
    response.headers.update({"Content-Length": str(len(body)), "Content-Type": content_type})
    response.headers.update({**_HEADERS, **headers})
    return response


def _load_page() -> tuple[bytes, str]:
    """Return the page and the policy that allows it its own style and script, and nothing else."""
    page = importlib.resources.files(__package__).joinpath("status.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"style-src {_hash_of(page, b'style')}",
        f"script-src {_hash_of(page, b'script')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return page, "; ".join(policy)


def _hash_of(page: bytes, tag: bytes) -> str:
    [content] = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
