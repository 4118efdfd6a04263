"""Nonces on a Redis server, for worker services on several machines.

Owns: the only import of redis-py, the time that a check may take. Never: shows the URL, which may
hold a password; tries again, as the answer to a first try may only have been lost.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from typing import Any, NoReturn

from .nonces import NonceStoreError, mark_of

__all__ = ["RedisNonces"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: How long connecting and each answer may take, in seconds; the handshake has ten.
_TIMEOUT = 1.5
#: By how much the clocks of the services that share a server may differ, in seconds.
_CLOCKS = 60.0
_PREFIX = "wove-ws-sync:nonce:"


class RedisNonces:
    """Remember nonces on the server of *url*: ``redis://HOST:PORT/DB``, or ``redis:env:VARIABLE`` for the
    environment variable that holds it, with a password if need be.

    Raises NonceStoreError for a variable that is not set, for what redis-py does not take as a URL,
    and without redis-py. It refuses to be pickled.
    """

    blocks = True

    def __init__(self, url: str) -> None:
        redis = _redis()
        retry = importlib.import_module("redis.retry").Retry(_no_backoff(), 0)
        try:
            # redis-py opens no connection here.
            self._client = redis.Redis.from_url(
                _address(url), socket_timeout=_TIMEOUT, socket_connect_timeout=_TIMEOUT, retry=retry
            )
        except (ValueError, TypeError) as exc:
            fault = type(exc).__name__
        else:
            fault = ""
        if fault:  # its text and its traceback may hold the password
            raise NonceStoreError(f"The Redis URL of the nonce store cannot be used ({fault}; not shown).")
        self._failures: tuple[type[Exception], ...] = (redis.RedisError, OSError)

    def __repr__(self) -> str:
        return f"<RedisNonces {self._place()}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("RedisNonces may hold a password and is not pickled.")

    def _place(self) -> str:
        known = self._client.connection_pool.connection_kwargs
        return str(known.get("path") or f"{known.get('host', 'localhost')}:{known.get('port', 6379)}")

    def open(self) -> None:
        """Ask the server how it is. Raises NonceStoreError if there is no answer."""
        memory = self._ask("info", "memory")
        policy = memory.get("maxmemory_policy", "noeviction") if isinstance(memory, dict) else "noeviction"
        if policy != "noeviction":
            _logger.warning(
                "The Redis server %s may forget nonces, which allows replays: its maxmemory-policy is %s, "
                "and not noeviction.",
                self._place(),
                policy,
            )

    def use(self, key: str, nonce: str, now: float, expires: float) -> bool:
        """Remember *nonce*; return False if the server knew it. Raises NonceStoreError."""
        milliseconds = math.ceil((max(expires - now, 0.0) + _CLOCKS) * 1000)
        name = _PREFIX + mark_of(key, nonce).hex()
        return bool(self._ask("set", name, b"1", nx=True, px=milliseconds))

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._client.close()

    def _ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        fault = ""
        try:
            return getattr(self._client, command)(*arguments, **options)
        except self._failures as exc:
            fault = type(exc).__name__
        raise NonceStoreError(f"The Redis server {self._place()} of the nonces gave no answer ({fault}).")


def _redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ModuleNotFoundError:
        raise NonceStoreError(
            'The nonce store needs the package redis, which is missing: pip install "wove_ws_sync[redis]"'
        ) from None


def _no_backoff() -> Any:
    return importlib.import_module("redis.backoff").NoBackoff()


def _address(url: str) -> str:
    if not url.startswith("redis:env:"):
        return url
    variable = url.removeprefix("redis:env:")
    address = os.environ.get(variable)
    if not address:
        raise NonceStoreError(f"The environment variable {variable!r} of the nonce store is not set.")
    return address
