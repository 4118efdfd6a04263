"""What a host and a worker service know each other by: shared secrets, and pairs of Ed25519 keys.

Owns: where they are read from, and that they are neither shown nor pickled. Never: keeps one
longer than its holder lives, puts one into an error. ``cryptography`` is imported for key pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import wove

__all__ = ["Key", "KeyPair", "SharedKey", "private_key", "public_key", "read_secret"]

#: A file with a secret or a key is no larger.
_MAX_FILE_BYTES = 64 * 1024


class Key(Protocol):
    """Who one side is to the other: it proves this side, and checks what the other one proves."""

    id: str

    @property
    def secret(self) -> bytes:
        """Return what both sides know and nobody else; b"" if there is nothing like that."""

    def sign(self, text: bytes) -> bytes:
        """Return what shows that this side has the key."""

    def verify(self, text: bytes, signature: bytes) -> bool:
        """Tell whether the other side has signed *text*. Never raises."""


class _Holder:
    """Neither shown, nor copied, nor pickled."""

    __slots__ = ("id",)

    def __init__(self, key_id: str) -> None:
        self.id = key_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a secret and is not pickled.")


class SharedKey(_Holder):
    """A secret of both sides, and its name."""

    __slots__ = ("_secret",)

    def __init__(self, key_id: str, secret: bytes) -> None:
        super().__init__(key_id)
        self._secret = secret

    @property
    def secret(self) -> bytes:
        """Return the secret."""
        return self._secret

    def sign(self, text: bytes) -> bytes:
        """Return the HMAC-SHA256 of *text*."""
        return hmac.digest(self._secret, text, hashlib.sha256)

    def verify(self, text: bytes, signature: bytes) -> bool:
        """Tell whether *signature* is that of *text*, in constant time."""
        return hmac.compare_digest(self.sign(text), signature)

    def security(self, clock_skew_seconds: float = 300.0) -> wove.NetworkExecutorSecurity:
        """Return what signs and verifies Wove's own headers with this key."""
        return wove.NetworkExecutorSecurity(
            mode="signed",
            secret=self._secret,
            key=self.id,
            clock_skew_seconds=clock_skew_seconds,
            remember_nonces=False,
        )


class KeyPair(_Holder):
    """This side's private key, and the public key of the other side."""

    __slots__ = ("_private", "_public")

    secret = b""

    def __init__(self, key_id: str, private: Any, public: Any) -> None:
        super().__init__(key_id)
        self._private = private
        self._public = public

    def sign(self, text: bytes) -> bytes:
        """Return the Ed25519 signature of *text*."""
        signature: bytes = self._private.sign(text)
        return signature

    def verify(self, text: bytes, signature: bytes) -> bool:
        """Tell whether *signature* is that of *text* by the other side."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._public.verify(signature, text)
        except InvalidSignature:
            return False
        return True


def read_secret(entry: Mapping[str, Any], label: str) -> bytes:
    """Return the secret that *entry* holds as ``secret``, or names as ``secret_env`` or ``secret_file``.

    White space at the end of a file does not belong to it. Raises RuntimeError if it is not there,
    ValueError if it is empty or no text; *label* names the entry.
    """
    if entry.get("secret") is not None:
        secret = entry["secret"]
    elif entry.get("secret_env"):
        name = str(entry["secret_env"])
        secret = os.environ.get(name)
        if not secret:
            raise RuntimeError(f"network executor security secret environment variable '{name}' is not set.")
    elif entry.get("secret_file"):
        secret = _read(str(entry["secret_file"]), f"{label}.secret_file").rstrip()
    else:
        raise ValueError(f"{label} must have one of secret, secret_env and secret_file.")
    try:
        octets = secret if isinstance(secret, bytes) else str(secret).encode("utf-8")
    except UnicodeEncodeError:  # the error carries the secret that it could not encode
        octets = None
    if octets is None:
        raise ValueError(f"{label} has a secret that is not valid Unicode; use plain text.")
    if not octets:
        raise ValueError(
            f"{label} has an empty secret; set 16 random bytes or more, "
            "for example from secrets.token_urlsafe(32), best as security='env:VARIABLE'."
        )
    return octets


def private_key(path: str, label: str) -> Any:
    """Return the Ed25519 private key in the PEM file *path*.

    Raises RuntimeError if it cannot be read, ValueError if there is no such key in it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem, key = _read(path, label), None
    with contextlib.suppress(ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        key = load_pem_private_key(pem, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(
            f"{label} {path!r} holds no Ed25519 private key in PEM without a passphrase; "
            "openssl genpkey -algorithm ed25519 makes one."
        )
    return key


def public_key(path: str, label: str) -> Any:
    """Return the Ed25519 public key in the PEM file *path*; raises as :func:`private_key`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem, key = _read(path, label), None
    with contextlib.suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(
            f"{label} {path!r} holds no Ed25519 public key in PEM; "
            "openssl pkey -in PRIVATE -pubout writes that of a private key."
        )
    return key


def _read(path: str, label: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no path"
        raise RuntimeError(f"{label} {path!r} cannot be read: {reason}.") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{label} {path!r} is larger than a key, {_MAX_FILE_BYTES} bytes.")
    return content
