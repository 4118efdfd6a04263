"""Who may open a connection to the worker service.

Owns: the check of a handshake by ``wove.NetworkExecutorSecurity``, the memory of used
nonces, the rule where a service may listen. Never: sees a frame, logs a secret.
"""

from __future__ import annotations

import base64
import heapq
import hmac
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import wove

from ..security import is_local_host

__all__ = ["MIN_SECRET_BYTES", "Authenticator", "check_listening", "is_foreign_page"]

_SIGNED = ("X-Wove-Key", "X-Wove-Timestamp", "X-Wove-Nonce", "X-Wove-Signature")
_TIMESTAMP_DIGITS = 15

#: More handshakes than this within the clock skew are refused: forgetting one would allow its replay.
_MAX_NONCES = 262_144

#: A shorter secret is accepted with a warning.
MIN_SECRET_BYTES = 16


class Authenticator:
    """Verify handshakes against one security config (the value of ``--security``). Thread-safe.

    Raises what ``wove.NetworkExecutorSecurity.from_config`` raises for a wrong config
    (RuntimeError for a missing environment variable), ValueError for an empty secret.
    """

    def __init__(self, config: Any) -> None:
        self._security = wove.NetworkExecutorSecurity.from_config(config)
        if self.mode == "signed" and not self._security.secret:
            raise ValueError("The secret of the worker service is empty; set one of at least 16 bytes.")
        skew = self._security.clock_skew_seconds
        if self.mode == "signed" and not (math.isfinite(skew) and skew > 0):
            raise ValueError(f"security.clock_skew_seconds must be a number above 0, not {skew!r}.")
        # Wove's own memory of nonces is searched from end to end at every handshake.
        self._remember = self._security.remember_nonces
        self._security.remember_nonces = False
        self._lock = threading.Lock()  # guards the nonces
        self._nonces: set[str] = set()
        self._expiry: list[tuple[float, str]] = []

    @property
    def mode(self) -> str:
        """Return "none", "signed" or "bearer"."""
        return str(self._security.mode)

    @property
    def weak(self) -> bool:
        """Tell whether the secret is shorter than it should be."""
        return self.mode == "signed" and len(self._security.secret) < MIN_SECRET_BYTES

    def verify(self, get_all: Callable[[str], Sequence[str]], target: str) -> None:
        """Accept the handshake for *target* or raise PermissionError, whatever the headers hold.

        *get_all* returns every value of a header. The error says why; it is for the
        worker's log, never for the peer.
        """
        if self.mode == "none":
            return
        names = _SIGNED if self.mode == "signed" else ("Authorization",)
        headers = {name: self._only(get_all(name), name) for name in names}
        timestamp = headers.get("X-Wove-Timestamp", "0")
        if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= _TIMESTAMP_DIGITS):
            raise PermissionError("The timestamp is not a number of seconds.")
        try:
            self._security.verify_headers(headers=headers, transport="websocket", target=target, body=b"")
        except PermissionError as exc:
            raise self._explained(exc, float(timestamp)) from None
        except Exception as exc:  # compare_digest and encode() refuse some strings that headers can hold
            raise PermissionError(f"The credentials are malformed ({type(exc).__name__}).") from None
        if self.mode == "signed" and self._remember:
            self._use_nonce(headers["X-Wove-Nonce"], float(timestamp))

    def key_id(self, get_all: Callable[[str], Sequence[str]]) -> str:
        """Return the key id of a handshake that was accepted; "" where secrets have no names."""
        return get_all("X-Wove-Key")[0] if self.mode == "signed" else ""

    def knows_secret(self, authorizations: Sequence[str]) -> bool:
        """Tell whether an Authorization header holds the secret itself, as of a browser or Prometheus.

        As ``Bearer``, or as the password of ``Basic`` with any name. For reading only: hosts
        with a signing secret never send it.
        """
        secret = str(self._security.token).encode() if self.mode == "bearer" else self._security.secret
        if self.mode == "none" or len(authorizations) != 1:
            return False
        scheme, _, given = authorizations[0].strip().partition(" ")
        if scheme.lower() == "bearer":
            password = given.strip().encode("utf-8", "surrogateescape")
        elif scheme.lower() == "basic":
            try:
                password = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        else:
            return False
        return hmac.compare_digest(password, secret)

    @staticmethod
    def _only(values: Sequence[str], name: str) -> str:
        if len(values) != 1:
            raise PermissionError(f"The header {name} is {'repeated' if values else 'missing'}.")
        return values[0]

    def _explained(self, exc: PermissionError, timestamp: float) -> PermissionError:
        difference = time.time() - timestamp
        if self.mode == "signed" and abs(difference) > self._security.clock_skew_seconds:
            return PermissionError(f"The host's clock differs by {difference:.0f} s, or this is a replay.")
        return exc

    def _use_nonce(self, nonce: str, timestamp: float) -> None:
        now = time.time()
        with self._lock:
            while self._expiry and self._expiry[0][0] < now:
                self._nonces.discard(heapq.heappop(self._expiry)[1])
            if nonce in self._nonces:
                raise PermissionError("Replayed Wove network executor signature.")
            if len(self._nonces) >= _MAX_NONCES:
                raise PermissionError("Too many handshakes within the clock skew.")
            self._nonces.add(nonce)
            heapq.heappush(self._expiry, (timestamp + self._security.clock_skew_seconds, nonce))


def is_foreign_page(origins: Sequence[str]) -> bool:
    """Tell whether a browser makes this request for a page that is not of this machine.

    Browsers let any page connect anywhere and always send Origin; on a service without
    authentication such a page could run code. Hosts need not send it.
    """
    return any(not is_local_host(_hostname(origin)) for origin in origins)


def _hostname(origin: str) -> str:
    try:
        return urllib.parse.urlsplit(origin).hostname or ""
    except ValueError:
        return ""


def check_listening(host: str, *, tls: bool, authenticated: bool, insecure: bool) -> None:
    """Raise ValueError if a service on *host* could be used by strangers of other machines."""
    if insecure or is_local_host(host) or (tls and authenticated):
        return
    missing = [name for name, there in (("TLS", tls), ("security", authenticated)) if not there]
    raise ValueError(
        f"Refusing to listen on {host!r}, which other machines can reach, without {' and '.join(missing)}: "
        "give --tls-cert and --tls-key and --security env:VARIABLE, listen on 127.0.0.1, "
        "or set --insecure for development."
    )
