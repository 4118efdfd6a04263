"""Who may open a connection to the worker service.

Owns: the check of a handshake by ``wove.NetworkExecutorSecurity`` and of the host's proof, the
rule where a service may listen. Never: sees a frame, logs a secret, remembers a nonce itself.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import hmac
import secrets
import time
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from .._keys import Key, SharedKey
from .._proof import HOST_NONCE, HOST_PROOF, BadProof, WorkerProof
from .._secrets import Headers
from ..security import is_local_host
from .keyring import Keyring
from .nonces import MAX_NONCE, MemoryNonces, NonceStore

__all__ = ["MIN_SECRET_BYTES", "Admission", "Authenticator", "check_listening", "is_foreign_page"]

_STAMP = ("X-Wove-Key", "X-Wove-Timestamp", "X-Wove-Nonce")
_SIGNATURE = "X-Wove-Signature"
_NOBODY = SharedKey("", secrets.token_bytes(32))
_TIMESTAMP_DIGITS = 15

#: A shorter secret is accepted with a warning.
MIN_SECRET_BYTES = 16


class Fields(Protocol):
    """The headers of a request, as websockets has them."""

    def get_all(self, key: str) -> list[str]: ...
    def raw_items(self) -> Iterable[tuple[str, str]]: ...


class Admission(NamedTuple):
    """Who was let in, and the proof, if the host gave one.

    ``key_id`` is that of the secret, or the owner of the token; "" where secrets have no names.
    """

    key_id: str
    proof: WorkerProof | None = None


class Authenticator:
    """Verify handshakes against one security config (the value of ``--security``). Thread-safe.

    *nonces* is where used nonces are remembered, in this process by default. It refuses to be pickled.

    Raises what ``wove.NetworkExecutorSecurity.from_config`` raises for a wrong config
    (RuntimeError for a missing environment variable), ValueError for an empty secret.
    """

    def __init__(self, config: Any, nonces: NonceStore | None = None) -> None:
        self._keyring = Keyring(config)
        self._nonces = MemoryNonces() if nonces is None else nonces

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("Authenticator holds a secret and is not pickled.")

    @property
    def mode(self) -> str:
        """Return "none", "signed", "bearer", "ed25519" or "jwt"."""
        return self._keyring.keys().mode

    @property
    def weak(self) -> bool:
        """Tell whether a secret is shorter than it should be."""
        keys = self._keyring.keys()
        return keys.mode == "signed" and any(len(secret) < MIN_SECRET_BYTES for secret in keys.secrets)

    def verify(self, headers: Fields, target: str) -> Admission:
        """Accept the handshake for *target* or raise PermissionError, whatever the headers hold.

        The error says why; it is for the worker's log, never for the peer. Raises NotReady if it cannot
        be told whether this is a replay, or by which keys a token is signed; waits for the nonce store
        if that ``blocks``.
        """
        keys = self._keyring.keys()
        if keys.mode == "none":
            return Admission("")
        if keys.verifier is not None:
            return Admission(keys.verifier.verify(headers.get_all))
        if keys.mode == "bearer":
            given = _octets(_only(headers, "Authorization"))
            if not hmac.compare_digest(given, b"Bearer " + keys.token):
                raise PermissionError("Invalid Wove network executor bearer token.")
            return Admission("")
        signed = Headers({name: _only(headers, name) for name in _STAMP})
        timestamp = signed["X-Wove-Timestamp"]
        if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= _TIMESTAMP_DIGITS):
            raise PermissionError("The timestamp is not a number of seconds.")
        difference = time.time() - float(timestamp)
        if abs(difference) > keys.skew:
            raise PermissionError(f"The host's clock differs by {difference:.0f} s, or this is a replay.")
        candidates = keys.by_id.get(signed["X-Wove-Key"], [])
        proofs = headers.get_all(HOST_PROOF) or headers.get_all(HOST_NONCE)
        if keys.mode == "signed" and (headers.get_all(_SIGNATURE) or not proofs):
            signed[_SIGNATURE] = _only(headers, _SIGNATURE)
            candidates = [_signer(candidates, signed, keys.skew, target)]
        if keys.mode == "signed" and not proofs:
            key, proof = candidates[0], None
        else:
            key, proof = _prover(candidates, headers, target)
        if keys.remembers:
            self._use_nonce(key, signed["X-Wove-Nonce"], float(timestamp) + keys.skew)
        return Admission(key.id, proof)

    def prepare(self, headers: Fields) -> concurrent.futures.Future[None] | None:
        """Return what to wait for before ``verify()``, bounded in time; None if nothing. Never blocks."""
        verifier = self._keyring.keys().verifier
        return None if verifier is None else verifier.refresh(headers.get_all)

    def knows_secret(self, authorizations: Sequence[str]) -> bool:
        """Tell whether an Authorization header holds the secret itself, as of a browser or Prometheus.

        As ``Bearer``, or as the password of ``Basic`` with any name. For reading only: hosts
        with a signing secret never send it.
        """
        if (verifier := self._keyring.keys().verifier) is not None:
            return verifier.accepts(authorizations)
        if len(authorizations) != 1:
            return False
        scheme, _, given = authorizations[0].strip().partition(" ")
        if scheme.lower() == "bearer":
            password = _octets(given.strip())
        elif scheme.lower() == "basic":
            try:
                password = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return False
        else:
            return False
        known = [hmac.compare_digest(password, secret) for secret in self._keyring.keys().secrets]
        return any(known)

    def _use_nonce(self, key: Key, nonce: str, expires: float) -> None:
        if len(nonce) > MAX_NONCE:
            raise PermissionError(f"The nonce is longer than {MAX_NONCE} characters.")
        # Not by its id, which Wove does not sign: a secret may have two.
        name = hmac.digest(key.secret, b"nonces", "sha256").hex() if key.secret else key.id
        if not self._nonces.use(name, nonce, time.time(), expires):
            raise PermissionError("Replayed Wove network executor signature.")


def _octets(text: str) -> bytes:
    """Return the bytes that came as *text*; b"" for what no bytes come as."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return b""


def _only(headers: Fields, name: str) -> str:
    values = headers.get_all(name)
    if len(values) != 1:
        raise PermissionError(f"The header {name} is {'repeated' if values else 'missing'}.")
    return values[0]


def _signer(keys: list[Key], signed: dict[str, str], skew: float, target: str) -> Key:
    """Return the key that made Wove's signature; raise PermissionError if none of *keys* did."""
    for key in keys or [_NOBODY]:  # a name that nobody has takes as long as a wrong signature
        assert isinstance(key, SharedKey)
        security = key.security(skew)
        with contextlib.suppress(PermissionError):
            try:
                security.verify_headers(headers=signed, transport="websocket", target=target, body=b"")
            except (TypeError, ValueError) as exc:  # some strings that headers can hold have no signature
                raise PermissionError(f"The credentials are malformed ({type(exc).__name__}).") from None
            return key
    raise PermissionError(f"Invalid Wove network executor {'signature' if keys else 'key'}.")


def _prover(keys: list[Key], headers: Fields, target: str) -> tuple[Key, WorkerProof]:
    """Return the key of the host's proof, and the proof. Raises PermissionError for none or a wrong one."""
    proofs = headers.get_all(HOST_PROOF)
    if len(proofs) != 1:
        raise PermissionError("The host's proof is missing or repeated.")
    fault = "nobody has its key id"
    for key in keys or [_NOBODY]:
        try:
            return key, WorkerProof(key, target, headers.raw_items(), proofs[0].strip(" \t"))
        except BadProof as exc:
            fault = str(exc) if keys else fault
    raise PermissionError(f"The handshake was changed on its way, or is by another key: {fault}.")


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
