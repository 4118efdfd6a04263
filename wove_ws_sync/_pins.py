"""Pins: the public key that a worker service's certificate must have.

Owns: the form of a pin, which is curl's ``--pinnedpubkey`` (``sha256//`` and the base64 of the
SHA-256 of the SubjectPublicKeyInfo), and the pin of a certificate. Never: trusts a certificate,
imports a library: the bytes that are hashed are those of the certificate, not a key written anew.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

from ._checks import refusal

__all__ = ["check_pins", "pin_of"]

_PREFIX = "sha256//"
_SEQUENCE, _VERSION = 0x30, 0xA0
#: What stands between version and key in a certificate: serial number, algorithm, issuer, validity, subject.
_BEFORE_KEY = 5


def check_pins(label: str, value: Any, remedy: str) -> tuple[str, ...]:
    """Return the pins of *value* in one order: a text or several; ``;`` may stand between pins in one."""
    wanted = f"'{_PREFIX}' and 44 characters of base64, or a list of such texts"
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray):
        raise TypeError(refusal(label, wanted, value, remedy))
    pins: set[str] = set()
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(refusal(label, wanted, text, remedy))
        for pin in text.split(";"):
            if not _is_pin(pin.strip()):
                raise ValueError(refusal(label, wanted, pin, remedy))
            pins.add(pin.strip())
    if not pins:
        raise ValueError(refusal(label, wanted, value, remedy))
    return tuple(sorted(pins))


def _is_pin(text: str) -> bool:
    try:
        digest = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except ValueError:
        return False
    return text == _pin(digest) and len(digest) == hashlib.sha256().digest_size


def _pin(digest: bytes) -> str:
    return _PREFIX + base64.b64encode(digest).decode("ascii")


def pin_of(certificate: bytes) -> str:
    """Return the pin of a certificate (DER). Raises ValueError for what is no certificate. Thread-safe."""
    try:
        _, begin, _ = _element(certificate, 0, _SEQUENCE)
        _, at, _ = _element(certificate, begin, _SEQUENCE)
        tag, _, end = _element(certificate, at)
        if tag == _VERSION:
            at = end
        for _ in range(_BEFORE_KEY):
            at = _element(certificate, at)[2]
        end = _element(certificate, at, _SEQUENCE)[2]
    except IndexError:
        raise ValueError("not a certificate") from None
    return _pin(hashlib.sha256(certificate[at:end]).digest())


def _element(data: bytes, at: int, expected: int | None = None) -> tuple[int, int, int]:
    """Return the tag of the DER element at *at*, and where its content begins and ends."""
    tag, length, begin = data[at], data[at + 1], at + 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(data[at + 2 : begin], "big")
    end = begin + length
    if (expected is not None and tag != expected) or end > len(data):
        raise ValueError("not a certificate")
    return tag, begin, end
