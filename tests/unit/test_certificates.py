"""Certificates of a local authority: what is in them, who accepts them, and the pins of their keys."""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from tls_memory import client_context, handshake, write_set

from wove_ws_sync._certificates import Authority, Certificate, Pair
from wove_ws_sync._pins import pin_of
from wove_ws_sync.options import LinkOptions

AUTHORITY = Authority.make()
PIN = "sha256//" + base64.b64encode(bytes(32)).decode()
OTHER = "sha256//" + base64.b64encode(b"\xff" * 32).decode()


def parsed(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


def extension(pem: bytes, kind: type[Any]) -> Any:
    return parsed(pem).extensions.get_extension_for_class(kind)


# What is in them


def test_the_authority_may_sign_and_nothing_else() -> None:
    """It is critical that it is a CA with no other below it, and that its key signs certificates only."""
    pem = AUTHORITY.pair.certificate
    constraints, usage = extension(pem, x509.BasicConstraints), extension(pem, x509.KeyUsage)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert isinstance(parsed(pem).public_key(), ec.EllipticCurvePublicKey)
    assert Authority.make().pair != AUTHORITY.pair


@pytest.mark.parametrize("kind", ["server", "client"])
def test_leaves_are_for_one_purpose(kind: str) -> None:
    """A server's certificate is no client's, nor the reverse; neither may sign others."""
    pair = AUTHORITY.server(["a.example"], 9) if kind == "server" else AUTHORITY.client("a host", 9)
    pem, ca = pair.certificate, AUTHORITY.pair.certificate
    purpose = {
        "server": x509.oid.ExtendedKeyUsageOID.SERVER_AUTH,
        "client": x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert list(extension(pem, x509.ExtendedKeyUsage).value) == [purpose[kind]]
    assert extension(pem, x509.BasicConstraints).value.ca is False
    usage = extension(pem, x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign
    identifier = extension(ca, x509.SubjectKeyIdentifier).value.digest
    assert extension(pem, x509.AuthorityKeyIdentifier).value.key_identifier == identifier
    parsed(pem).verify_directly_issued_by(parsed(ca))


def test_names_and_addresses_of_a_server() -> None:
    """An address is one in the certificate too, or clients would not find it."""
    pem = AUTHORITY.server(["a.example", "127.0.0.1", "::1"], 9).certificate
    names = extension(pem, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert Certificate(pem).names == ["a.example", "127.0.0.1", "::1"]
    assert Certificate(AUTHORITY.client("a host", 9).certificate).subject == "a host"


def test_validity() -> None:
    """It begins an hour ago, as clocks differ, and never goes beyond that of the authority."""
    now = datetime.datetime.now(datetime.UTC)
    leaf = parsed(AUTHORITY.client("a host", 9).certificate)
    assert now - leaf.not_valid_before_utc > datetime.timedelta(minutes=59)
    assert abs(leaf.not_valid_after_utc - now - datetime.timedelta(days=9)) < datetime.timedelta(minutes=5)
    late = Certificate(AUTHORITY.client("a host", 9000).certificate)
    assert late.ends == Certificate(AUTHORITY.pair.certificate).ends


def test_a_key_can_stay() -> None:
    """Issued anew for the same key a certificate has the same pin, and another serial number."""
    first = AUTHORITY.server(["a.example"], 9)
    again, other = AUTHORITY.server(["a.example"], 9, first.key), AUTHORITY.server(["a.example"], 9)
    assert again.key == first.key and again.certificate != first.certificate
    assert Certificate(again.certificate).pin == Certificate(first.certificate).pin
    assert Certificate(other.certificate).pin != Certificate(first.certificate).pin


@pytest.mark.parametrize(
    "pair",
    [
        Pair(AUTHORITY.pair.certificate, AUTHORITY.server(["a.example"], 9).key),
        AUTHORITY.server(["a.example"], 9),
        Pair(b"nonsense", AUTHORITY.pair.key),
        Pair(AUTHORITY.pair.certificate, b"nonsense"),
    ],
    ids=["another's key", "no authority", "no certificate", "no key"],
)
def test_what_is_no_authority_is_refused(pair: Pair) -> None:
    """Certificates of something that nobody could verify are not made."""
    with pytest.raises(ValueError):
        Authority(pair)


# Who accepts them


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_both_sides_accept_each_other(name: str, version: ssl.TLSVersion, tmp_path: Path) -> None:
    """With certificates on both sides and the strict checks that are Python 3.13's default, on both."""
    folder = write_set(tmp_path, AUTHORITY)
    client = client_context(folder / "ca.pem", (folder / "client.pem", folder / "client.key"))
    client.maximum_version = version
    ends = handshake(client, strict_server(folder, "server"), name)
    assert ends.server.getpeercert(binary_form=True)
    assert ends.client.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]


def strict_server(folder: Path, pair: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{pair}.pem", folder / f"{pair}.key")
    context.load_verify_locations(folder / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.parametrize(("ours", "theirs"), [("client", "client"), ("server", "server")])
def test_a_certificate_for_the_other_side_is_refused(ours: str, theirs: str, tmp_path: Path) -> None:
    """A host that shows a server's certificate, and a server that shows a host's, get nowhere."""
    folder = write_set(tmp_path, AUTHORITY)
    client = client_context(folder / "ca.pem", (folder / f"{ours}.pem", folder / f"{ours}.key"))
    with pytest.raises(ssl.SSLError, match=r"(?i)unsuitable certificate purpose|unsupported certificate"):
        handshake(client, strict_server(folder, theirs))


# Pins


def self_signed(key: Any) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "a")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().issuer_name(name).subject_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ec.generate_private_key(ec.SECP256R1()),
        lambda: ec.generate_private_key(ec.SECP521R1()),
        lambda: rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate,
    ],
    ids=["P-256", "P-521", "RSA", "Ed25519"],
)
def test_a_pin_is_the_hash_of_the_public_key(make: Callable[[], Any]) -> None:
    """It is what curl and everybody else calculates of the key alone."""
    key = make()
    alone = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    expected = "sha256//" + base64.b64encode(hashlib.sha256(alone).digest()).decode()
    assert pin_of(self_signed(key)) == expected


def test_a_pin_is_that_of_openssl(tmp_path: Path) -> None:
    """Also for a kind of key that other libraries write in another form: RSA for PSS only."""
    key, certificate = tmp_path / "pss.key", tmp_path / "pss.pem"

    def openssl(*arguments: str | Path, stdin: bytes = b"") -> bytes:
        return subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, check=True).stdout

    openssl("genpkey", "-algorithm", "RSA-PSS", "-out", key)
    openssl("req", "-x509", "-key", key, "-out", certificate, "-subj", "/CN=a")
    public = openssl("x509", "-in", certificate, "-pubkey", "-noout")
    alone = openssl("pkey", "-pubin", "-outform", "DER", stdin=public)
    expected = "sha256//" + base64.b64encode(hashlib.sha256(alone).digest()).decode()
    assert pin_of(ssl.PEM_cert_to_DER_cert(certificate.read_text())) == expected


def test_half_a_certificate_has_no_pin() -> None:
    """Wherever it is cut off, and whatever its lengths claim, it is a ValueError."""
    whole = ssl.PEM_cert_to_DER_cert(AUTHORITY.pair.certificate.decode())
    for size in range(len(whole)):
        with pytest.raises(ValueError):
            pin_of(whole[:size])
    with pytest.raises(ValueError):
        pin_of(b"\x30\xff" + b"\xff" * 300)


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_have_a_pin_or_none(data: bytes) -> None:
    """Nothing but ValueError comes of bytes that are no certificate."""
    with contextlib.suppress(ValueError):
        assert len(pin_of(data)) == len(PIN)


def pinned(value: Any) -> tuple[str, ...] | None:
    return LinkOptions.from_config({"url": "wss://a.example", "pinned_keys": value}).pinned_keys


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (PIN, (PIN,)),
        ([PIN], (PIN,)),
        ((OTHER, PIN, PIN), (PIN, OTHER)),
        (f"{OTHER};{PIN}", (PIN, OTHER)),
        ([f"{OTHER}; {PIN}"], (PIN, OTHER)),
    ],
)
def test_pins_are_kept_in_one_order(given: Any, kept: tuple[str, ...] | None) -> None:
    """One or several, also as curl takes them; the same pins make the same options."""
    assert pinned(given) == (None if kept is None else tuple(sorted(kept)))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (5, TypeError),
        (PIN.encode(), TypeError),
        ([PIN, None], TypeError),
        ("", ValueError),
        ([], ValueError),
        (f"{PIN};", ValueError),
        (PIN.removeprefix("sha256//"), ValueError),
        (PIN.replace("sha256", "sha1"), ValueError),
        (PIN[:-1], ValueError),
        ("sha256//" + base64.b64encode(bytes(31)).decode(), ValueError),
        ("sha256//" + base64.b64encode(bytes(33)).decode(), ValueError),
        ("sha256//" + "A" * 42 + "B=", ValueError),
        ("sha256//" + "00" * 32, ValueError),
        ("sha256//" + "_" * 43 + "=", ValueError),
        ("sha256//" + "é" * 43 + "=", ValueError),
        ("/etc/pins.pem", ValueError),
    ],
)
def test_what_is_no_pin_is_refused(given: Any, kind: type[Exception]) -> None:
    """A pin that nothing could match, or a file as curl takes it too, is an error that says what a pin is."""
    with pytest.raises(
        kind, match=r"executor_config.pinned_keys must be 'sha256//' and 44 characters"
    ) as caught:
        pinned(given)
    assert type(caught.value) is kind


@pytest.mark.parametrize("config", [{"pinned_keys": PIN}, {"tls_min_version": "1.3"}])
def test_pins_and_versions_need_tls(config: dict[str, Any]) -> None:
    """On a ws:// URL they would protect nothing."""
    with pytest.raises(ValueError, match="needs TLS; use a wss:// URL"):
        LinkOptions.from_config({"url": "ws://localhost", **config})


@pytest.mark.parametrize("given", ["1.1", "TLSv1.3", "", 1.3])
def test_the_version_is_one_of_two(given: Any) -> None:
    """Nothing older than TLS 1.2, and no other spelling."""
    with pytest.raises(ValueError, match=r"executor_config.tls_min_version must be one of '1.2', '1.3'"):
        LinkOptions.from_config({"url": "wss://a.example", "tls_min_version": given})
    config = {"url": "wss://a.example", "tls_min_version": "1.3"}
    assert LinkOptions.from_config(config).tls_min_version == "1.3"
