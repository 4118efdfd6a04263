"""Certificates of a local authority: made, issued, read.

Owns: the extensions, validity and keys (ECDSA on P-256) of what ``certs`` and ``LoopbackWorker`` use; all
of it passes the strict checks of Python 3.13. Never: reads or writes a file, stores a key with a password.
"""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from . import _pins

__all__ = ["Authority", "Certificate", "Pair"]

_AUTHORITY_DAYS = 3650
#: How long a certificate is valid already when it is made: clocks differ.
_BEFORE = datetime.timedelta(hours=1)
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)

_Extensions = Sequence[tuple[x509.ExtensionType, bool]]


class Pair(NamedTuple):
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


class Certificate:
    """Tell of a certificate, the first in *pem*. Raises ValueError if there is none."""

    def __init__(self, pem: bytes) -> None:
        self._certificate = x509.load_pem_x509_certificates(pem)[0]

    @property
    def subject(self) -> str:
        """Return the common name; "" if it has none."""
        found = self._certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(found[0].value) if found else ""

    @property
    def names(self) -> list[str]:
        """Return the host names and addresses that it is for."""
        try:
            found = self._certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except x509.ExtensionNotFound:
            return []
        return [str(name.value) for name in found.value]

    @property
    def ends(self) -> datetime.datetime:
        """Return the moment from which on it is not valid."""
        return self._certificate.not_valid_after_utc

    @property
    def pin(self) -> str:
        """Return the pin of its key."""
        return _pins.pin_of(self._certificate.public_bytes(serialization.Encoding.DER))


class Authority:
    """A certificate authority; *pair* is what :meth:`make` returned, read from its files or not.

    Raises ValueError or TypeError if that is no authority, or if the two do not belong together.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        self._key = _read_key(pair.key)
        if self._key.public_key() != self._certificate.public_key():
            raise ValueError("the key is not that of the certificate")
        if not _is_authority(self._certificate):
            raise ValueError("the certificate is not that of an authority")

    @classmethod
    def make(cls) -> Authority:
        """Make an authority, valid for ten years, with a name of its own."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"wove-ws-sync CA {secrets.token_hex(4)}")
        now = _now()
        extensions = (
            (x509.BasicConstraints(ca=True, path_length=0), True),
            (_usage("key_cert_sign", "crl_sign"), True),
        )
        ends = now + datetime.timedelta(days=_AUTHORITY_DAYS)
        certificate = _sign(name, key.public_key(), name, key, now, ends, extensions)
        return cls(Pair(certificate, _write_key(key)))

    def server(self, names: Sequence[str], days: float, key: bytes | None = None) -> Pair:
        """Issue a certificate for a server that is called *names*; with the *key*, or a new one."""
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        return self._issue("wove-ws-sync worker", days, key, (purpose, False), (alternatives, False))

    def client(self, name: str, days: float, key: bytes | None = None) -> Pair:
        """Issue a certificate for a client that is called *name*, 64 characters at most."""
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._issue(name, days, key, (purpose, False))

    def _issue(
        self, subject: str, days: float, pem: bytes | None, *special: tuple[x509.ExtensionType, bool]
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1()) if pem is None else _read_key(pem)
        now = _now()
        # It could not be verified for longer than its authority.
        ends = min(now + datetime.timedelta(days=days), self._certificate.not_valid_after_utc)
        extensions = (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage("digital_signature"), True),
            *special,
        )
        issuer = self._certificate.subject
        certificate = _sign(_name(subject), key.public_key(), issuer, self._key, now, ends, extensions)
        return Pair(certificate, pem or _write_key(key))


def _sign(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    ends: datetime.datetime,
    extensions: _Extensions,
) -> bytes:
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BEFORE,
        not_valid_after=ends,
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    for extension, critical in (*extensions, (identifier, False), (authority, False)):
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*chosen: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in chosen for name in _USAGES})


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _read_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not an elliptic curve's")
    return key


def _write_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
