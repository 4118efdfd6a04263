"""How host and worker service prove in the handshake that they know each other.

Owns: what each of the two signs, and the keys that seal what follows. Never: keeps a secret, sees
a message, decides what is done about a peer that proves nothing.

The host signs its request: the target, and its ``X-Wove-*`` headers. The worker service signs the
request as it arrived, and its own headers in the answer. (What WebSocket itself needs is not among
them: a gateway may have a handshake of its own with each side.)
So nothing that one said reaches the other changed or taken out without being noticed, and neither
signature fits any other connection: both cover a nonce of either side. The nonces are X25519 keys
made for this connection, so that a secret that gets known later opens nothing that was recorded.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from ._seal import SealKeys, derive_keys

if TYPE_CHECKING:
    from ._keys import Key

__all__ = ["HOST_NONCE", "HOST_PROOF", "BadProof", "HostProof", "WorkerProof"]

HOST_NONCE = "X-Wove-Host-Nonce"
HOST_PROOF = "X-Wove-Host-Proof"
_WORKER_NONCE = "X-Wove-Server-Nonce"
_WORKER_PROOF = "X-Wove-Server-Signature"
_VERSION = "v1="
_BASE64 = re.compile(r"[A-Za-z0-9_-]{1,128}")


class BadProof(ValueError):
    """The peer is not who it should be, or somebody in between changed what it said."""


class HostProof:
    """The host's part of one handshake. One thread."""

    def __init__(self, key: Key, target: str, headers: Mapping[str, str]) -> None:
        self._key = key
        self._ephemeral = X25519PrivateKey.generate()
        #: What is sent: *headers* with the nonce and the proof.
        self.headers = {**headers, HOST_NONCE: _encode(_public(self._ephemeral))}
        self._request = _request(target, self.headers.items())
        self.headers[HOST_PROOF] = _VERSION + _encode(key.sign(self._request))

    def judge(self, answer: Mapping[str, str]) -> SealKeys | None:
        """Check the proof in *answer*, the response headers with their names in lower case.

        Return the keys for what follows, None if the worker service proves nothing. Raises BadProof.
        """
        proof = answer.get(_WORKER_PROOF.lower())
        nonce = answer.get(_WORKER_NONCE.lower())
        if proof is None or nonce is None:
            return None
        transcript = _answer(self._request, self.headers[HOST_PROOF], answer.items())
        if not self._key.verify(transcript, _signature(proof)):
            raise BadProof("its signature is wrong")
        shared = _exchange(self._ephemeral, nonce)
        return derive_keys(shared + self._key.secret, transcript, of_host=True)


class WorkerProof:
    """The worker service's part of one handshake. Raises BadProof if the host's proof is wrong."""

    def __init__(self, key: Key, target: str, headers: Iterable[tuple[str, str]], proof: str) -> None:
        self._key = key
        self._proof = proof
        fields = [(name, value) for name, value in headers if name.lower() != HOST_PROOF.lower()]
        self._request = _request(target, fields)
        if not key.verify(self._request, _signature(proof)):
            raise BadProof("the proof of the host is wrong")
        nonces = [value.strip(" \t") for name, value in fields if name.lower() == HOST_NONCE.lower()]
        self._ephemeral = X25519PrivateKey.generate()
        self._shared = _exchange(self._ephemeral, nonces[0] if len(nonces) == 1 else "")

    def answer(self, headers: Mapping[str, str]) -> tuple[dict[str, str], SealKeys]:
        """Return *headers* of the response with this side's proof, and the keys for what follows."""
        answer = {**headers, _WORKER_NONCE: _encode(_public(self._ephemeral))}
        transcript = _answer(self._request, self._proof, answer.items())
        answer[_WORKER_PROOF] = _VERSION + _encode(self._key.sign(transcript))
        return answer, derive_keys(self._shared + self._key.secret, transcript, of_host=False)


def _request(target: str, headers: Iterable[tuple[str, str]]) -> bytes:
    return _text("wove-sync-v1-cli", target, *_ours(headers))


def _answer(request: bytes, proof: str, headers: Iterable[tuple[str, str]]) -> bytes:
    said = _ours((name, value) for name, value in headers if name.lower() != _WORKER_PROOF.lower())
    return _text("wove-sync-v1-srv", request, proof, *said)


def _ours(headers: Iterable[tuple[str, str]]) -> list[str]:
    """Return the headers of this package and of Wove in one order, whatever a proxy made of it."""
    fields = sorted((name.lower(), value.strip(" \t")) for name, value in headers)
    return [text for field in fields if field[0].startswith("x-wove-") for text in field]


def _text(*parts: str | bytes) -> bytes:
    """Return *parts* as one text that no other parts make."""
    texts = [part if isinstance(part, bytes) else part.encode("latin-1", "surrogateescape") for part in parts]
    return b"".join(len(part).to_bytes(4) + part for part in texts)


def _exchange(ephemeral: X25519PrivateKey, nonce: str) -> bytes:
    """Return what the two nonces have in common."""
    try:
        return ephemeral.exchange(X25519PublicKey.from_public_bytes(_decode(nonce)))
    except ValueError:  # of another length, or one with which the result is known to all
        raise BadProof("its nonce is no X25519 key") from None


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _signature(header: str) -> bytes:
    return _decode(header.removeprefix(_VERSION)) if header.startswith(_VERSION) else b""


def _encode(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).decode("ascii").rstrip("=")


def _decode(text: str) -> bytes:
    """Return what *text* encodes; b"" if it is malformed."""
    if not _BASE64.fullmatch(text):
        return b""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        return b""
