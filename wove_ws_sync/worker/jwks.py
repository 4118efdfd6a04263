"""The public keys with which tokens are verified: a JWKS (RFC 7517), from a file or over HTTPS.

Owns: reading it again when it may have changed, the limits on that, and which key fits a token.
Never: uses a private or symmetric key, reads or connects on the thread that asks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import itertools
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .._address import WebAddress, web_address
from .._leash import Leash
from .._version import __version__
from ..security import is_local_host, is_loopback_address

__all__ = ["ASYMMETRIC", "KeySet", "KeySource"]

_logger = logging.getLogger("wove_ws_sync.worker")
_numbers = itertools.count(1)

_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_BY_CURVE = {
    ("EC", "P-256"): frozenset({"ES256"}),
    ("EC", "P-384"): frozenset({"ES384"}),
    ("EC", "P-521"): frozenset({"ES512"}),
    ("OKP", "Ed25519"): frozenset({"EdDSA"}),
    ("OKP", "Ed448"): frozenset({"EdDSA"}),
}
#: The algorithms for which a public key is enough to verify.
ASYMMETRIC = _RSA.union(*_BY_CURVE.values())

_MAX_BYTES = 256 * 1024
_MAX_KEYS = 100
_LEAST_RSA_BITS = 2048
#: How long one download may take, in seconds.
_TIMEOUT = 5.0
#: After so many seconds the URL is asked again, after so many at the earliest, and for so many at most
#: keys are used while it cannot be reached.
_MAX_AGE = 300.0
_PAUSE = 10.0
_LONGEST_USE = 3600.0
#: A file is looked at so often, in seconds, and at once for a key that is unknown.
_LOOK_EVERY = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Key:
    """A public key and the algorithms that it may be used with."""

    kid: str | None
    algorithms: frozenset[str]
    material: Any


class KeySet:
    """The usable keys of one document. Raises ValueError if it has none. Immutable."""

    def __init__(self, document: bytes) -> None:
        try:
            parsed = json.loads(document)
        except (ValueError, RecursionError):
            parsed = None
        entries = parsed.get("keys") if isinstance(parsed, dict) else None
        if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
            raise ValueError(f"it is not a JWKS with up to {_MAX_KEYS} keys")
        self._keys = [key for key in map(_read_key, entries) if key is not None]
        if not self._keys:
            raise ValueError("it has no public key for signatures of the types RSA, EC or OKP")

    def knows(self, kid: str | None) -> bool:
        """Tell whether there is a key called *kid*."""
        return any(key.kid == kid for key in self._keys)

    def find(self, kid: str | None, algorithm: str) -> list[Any]:
        """Return the keys that a token may be signed with; without *kid* only if there is no choice."""
        fitting = [key for key in self._keys if algorithm in key.algorithms]
        if kid is None:
            return [key.material for key in fitting] if len(fitting) == 1 else []
        return [key.material for key in fitting if key.kid == kid]


def _read_key(entry: Any) -> _Key | None:
    """Return the key that *entry* is; None if it is not for verifying, or not understood."""
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or "d" in entry:
        return None
    kid, uses, kind = entry.get("kid"), entry.get("key_ops", ["verify"]), entry.get("kty")
    if not isinstance(kid, str | None) or not isinstance(uses, list) or "verify" not in uses:
        return None
    algorithms = _RSA if kind == "RSA" else _BY_CURVE.get((str(kind), str(entry.get("crv"))), frozenset())
    if entry.get("alg") is not None:
        algorithms &= {str(entry["alg"])}
    if not algorithms:
        return None
    from jwt import PyJWK  # worker.tokens says what to install

    try:
        material = PyJWK.from_dict(entry, min(algorithms)).key
    except Exception:  # of PyJWT or of cryptography; one odd key spoils no other
        return None
    if kind == "RSA" and material.key_size < _LEAST_RSA_BITS:
        return None
    return _Key(kid, algorithms, material)


class KeySource:
    """The keys at *source*, a path or a URL. Thread-safe.

    Raises ValueError for a URL that is not https (but http on this machine), and for a file that
    cannot be used; a URL is not asked yet. *now* is there for tests.
    """

    def __init__(
        self, source: str, ca_file: str | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._ca_file = ca_file
        self._now = now
        self._lock = threading.Lock()  # guards all below; a leaf
        self._set: KeySet | None = None
        self._read_at = self._asked_at = float("-inf")
        self._under_way: concurrent.futures.Future[None] | None = None
        self._stamp: tuple[int, ...] = ()
        self._address: WebAddress | None = None
        if source.partition("://")[0].lower() in ("http", "https"):
            self._address = web_address("security.jwks", source)
            if not self._address.secure and not is_local_host(self._address.host):
                raise ValueError("security.jwks must be an https:// URL or the path of a file.")
        else:
            self._set = self._read_file()
            self._read_at = self._asked_at = now()

    def current(self) -> KeySet | None:
        """Return the keys as they are known; None if there are none, or they are too old."""
        with self._lock:
            old = self._address is not None and self._now() > self._read_at + _LONGEST_USE
            return None if old else self._set

    def due(self, kid: str | None) -> bool:
        """Tell whether to :meth:`refresh` before judging a token that names the key *kid*."""
        with self._lock:
            known = self._set is not None and (kid is None or self._set.knows(kid))
            since = self._now() - self._asked_at
            if self._address is None:
                return not known or since >= _LOOK_EVERY
            if self._under_way is not None:
                return not known
            age = self._now() - self._read_at
            return since >= _PAUSE and (not known or age >= _MAX_AGE)

    def refresh(self) -> concurrent.futures.Future[None]:
        """Begin to read the keys again, in a thread; return what is done then, whatever came of it."""
        with self._lock:
            if self._under_way is not None:
                return self._under_way
            future: concurrent.futures.Future[None] = concurrent.futures.Future()
            future.set_running_or_notify_cancel()  # whoever does not wait any more cancels nothing
            self._under_way = future
        thread = threading.Thread(target=self._refresh, name=f"wove-ws-keys-{next(_numbers)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._settle(future, None)
        return future

    def _refresh(self) -> None:
        future, found = self._under_way, None
        assert future is not None
        try:
            found = self._download() if self._address is not None else self._changed_file()
        except Exception as exc:
            why = str(exc) if type(exc) is ValueError else getattr(exc, "strerror", None)
            said = why or type(exc).__name__
            _logger.warning("The keys of the tokens cannot be read: %s.", said)
        self._settle(future, found)

    def _settle(self, future: concurrent.futures.Future[None], found: KeySet | None) -> None:
        with self._lock:
            self._asked_at = self._now()
            if found is not None:
                self._set, self._read_at = found, self._asked_at
            self._under_way = None
        future.set_result(None)

    # -- files ---------------------------------------------------------------------

    def _changed_file(self) -> KeySet | None:
        """Return the keys if the file is another than before."""
        return None if _stamp(os.stat(self._source)) == self._stamp else self._read_file()

    def _read_file(self) -> KeySet:
        try:
            with open(self._source, "rb") as stream:
                stamp, document = _stamp(os.fstat(stream.fileno())), stream.read(_MAX_BYTES + 1)
        except OSError as exc:
            raise ValueError(f"the file {self._source!r} cannot be read: {exc.strerror}") from None
        keys = _checked(document, f"the file {self._source!r}")
        self._stamp = stamp
        return keys

    # -- URLs ----------------------------------------------------------------------

    def _download(self) -> KeySet:
        assert self._address is not None
        leash = Leash()
        limit = threading.Timer(_TIMEOUT, leash.cut)
        limit.daemon = True
        limit.start()
        try:
            return _checked(_get(self._address, self._ca_file, leash), f"the answer of {self._address.place}")
        finally:
            limit.cancel()
            leash.release()


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


def _checked(document: bytes, name: str) -> KeySet:
    if len(document) > _MAX_BYTES:
        raise ValueError(f"{name} is longer than {_MAX_BYTES} bytes")
    try:
        return KeySet(document)
    except ValueError as exc:
        raise ValueError(f"{name} cannot be used: {exc}") from None


def _get(address: WebAddress, ca_file: str | None, leash: Leash) -> bytes:
    """Return at most a byte more than is allowed. No proxy is asked and no redirect followed."""
    headers: Mapping[str, str] = {
        "Accept": "application/jwk-set+json, application/json",
        "User-Agent": f"wove_ws_sync/{__version__}",
    }
    kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=_TIMEOUT)
    try:
        connection.sock = socket.create_connection((address.host, address.port), _TIMEOUT)
        leash.hold(connection.sock)
        if address.secure:
            context = ssl.create_default_context(cafile=ca_file)
            connection.sock = context.wrap_socket(connection.sock, server_hostname=address.host)
        elif not is_loopback_address(connection.sock.getpeername()[0]):
            raise ValueError(f"{address.place} is on another machine, which needs https://")
        connection.request("GET", address.target, headers=dict(headers))
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{address.place} answered HTTP {response.status}")
        return response.read(_MAX_BYTES + 1)
    except http.client.HTTPException as exc:
        raise ValueError(f"{address.place} did not answer properly ({type(exc).__name__})") from None
    finally:
        connection.close()
