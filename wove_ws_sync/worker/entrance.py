"""The way in: from a request for a WebSocket to a host that is known.

Owns: which requests are refused and how, what a host is answered, and its keys until it is served.
Never: looks into a frame before the host is known, knows a run; credentials are the authenticator's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import weakref
from collections import Counter
from collections.abc import Awaitable, Iterable
from typing import NamedTuple

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from .._seal import SealKeys
from ..frames import InvalidMessage
from .auth import Admission, Authenticator, is_foreign_page
from .channel import Channel
from .doorkeeper import Doorkeeper
from .greeting import Greeting

__all__ = ["Entrance", "Guest", "about", "peer_of"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: How long a host may take to show that it has the keys of its connection, in seconds.
_CONFIRM_TIMEOUT = 10.0


class Guest(NamedTuple):
    """A host that is known: by which key, how it introduced itself, and what its messages come over."""

    key_id: str
    greeting: Greeting
    channel: Channel


@dataclasses.dataclass
class _Admitted:
    """A host between its handshake and its service."""

    admission: Admission
    greeting: Greeting
    keys: SealKeys | None = None


class Entrance:
    """Let hosts in that ask for *path*. Use it from the service's loop.

    *cancels* says what the engine can stop. With *insecure* a web page may connect where there is no
    security, with *require_seal* no host that does not seal.
    """

    def __init__(
        self,
        auth: Authenticator,
        doorkeeper: Doorkeeper,
        counters: Counter[str],
        *,
        path: str,
        worker_id: str,
        max_message_bytes: int,
        cancels: Iterable[str],
        insecure: bool,
        require_seal: bool,
    ) -> None:
        self._auth = auth
        self._doorkeeper = doorkeeper
        self._counters = counters
        self._path = path
        self._worker_id = worker_id
        self._max_message_bytes = max_message_bytes
        self._cancels = cancels
        self._insecure = insecure
        self._require_seal = require_seal
        # By weak reference: a host may be gone before its handshake is done.
        self._admitted: weakref.WeakKeyDictionary[ServerConnection, _Admitted] = weakref.WeakKeyDictionary()

    def admit(
        self, connection: ServerConnection, request: Request
    ) -> Response | Awaitable[Response | None] | None:
        """Return the refusal of who may not connect, None or an awaitable of None for who may."""
        if request.path.partition("?")[0] != self._path:
            self._counters["wrong_path"] += 1
            peer = peer_of(connection)
            why = "it asked for another path"
            _logger.info("Refused %s with 404: %s.", peer, why, extra=about("refuse", peer))
            return connection.respond(404, "404 Not Found\n")
        unprotected = self._auth.mode == "none" and not self._insecure
        if unprotected and is_foreign_page(request.headers.get_all("Origin")):
            return self._forbid(connection, "foreign_page", "a web page must not run code here")
        return self._doorkeeper.admit(connection, request, self._welcome)

    def _welcome(
        self, connection: ServerConnection, request: Request, admission: Admission
    ) -> Response | None:
        """Note who was admitted; return the refusal of one that does not seal where that is required."""
        greeting = Greeting.read(request.headers.get_all, seals=admission.proof is not None)
        if (self._require_seal or self._auth.mode == "ed25519") and "seal" not in greeting.features:
            return self._forbid(connection, "not_sealed", "its messages would not be sealed")
        self._admitted[connection] = _Admitted(admission, greeting)
        return None

    def _forbid(self, connection: ServerConnection, reason: str, why: str) -> Response:
        self._counters[reason] += 1
        peer = peer_of(connection)
        _logger.warning("Refused %s with 403: %s.", peer, why, extra=about("refuse", peer))
        return connection.respond(403, "403 Forbidden\n")

    def greet(self, connection: ServerConnection, request: Request, response: Response) -> None:
        """Answer a host of this package in its own words; a foreign one never sees our headers."""
        if response.status_code != 101:
            return
        admitted = self._admitted[connection]
        proof = admitted.admission.proof
        headers = admitted.greeting.answer(self._worker_id, self._max_message_bytes, self._cancels)
        if headers and proof is not None:
            headers, keys = proof.answer(headers)
            admitted.keys = keys if "seal" in admitted.greeting.features else None
        response.headers.update(headers)

    async def guest(self, connection: ServerConnection) -> Guest | None:
        """Return the host of a connection once it has shown that it has its keys, None if it has not.

        Until then it is no host, and takes nobody's place.
        """
        admitted = self._admitted.pop(connection)
        channel = Channel(connection, self._max_message_bytes, admitted.keys)
        try:
            await asyncio.wait_for(channel.confirm(), _CONFIRM_TIMEOUT)
        except ConnectionClosed:
            return None
        except (InvalidMessage, TimeoutError) as exc:
            self._counters["unconfirmed"] += 1
            peer, why = peer_of(connection), str(exc) or "it sent nothing"
            _logger.warning("Refused %s with 1008: %s.", peer, why, extra=about("refuse", peer))
            await connection.close(1008, why[:120])
            return None
        return Guest(admitted.admission.key_id, admitted.greeting, channel)


def about(action: str, peer: str) -> dict[str, str]:
    """Return what a log record about a connection says apart from its text."""
    return {"action": action, "peer": peer}


def peer_of(connection: ServerConnection) -> str:
    """Return address and port of the other side."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "a closed connection"
