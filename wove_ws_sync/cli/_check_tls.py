"""What ``check`` says about TLS: the certificate that was shown, and why a handshake failed.

Owns: reading a certificate for people, causes and remedies. Never: trusts one; the connection
that fetches a refused certificate sends nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import ssl
import time
from typing import Any, NamedTuple

from .._pins import pin_of
from .._route import NOT_PINNED, connect, tls_context
from ..options import LinkOptions
from ..timing import Clock, Deadline
from ._check_report import Step

__all__ = ["failed", "passed"]

_WARN_DAYS = 14
_DAY = 86400.0
_FETCH_TIMEOUT = 5.0

# By the number of OpenSSL's verify error: what is wrong, and what to do.
_EXPIRED, _NOT_YET = 10, 9
_WRONG_NAME = (62, 64)
_SELF_SIGNED = (18, 19)
_NO_ISSUER = (2, 20, 21, 27)
# By a part of the reason OpenSSL gives. The first that fits counts.
_REASONS = (
    (
        ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"),
        "the other side does not speak TLS: it is a plain text port",
        "Use the port with TLS, give the worker --tls-cert and --tls-key, or use ws:// on loopback.",
    ),
    (
        ("CERTIFICATE_REQUIRED",),
        "the worker service demands a client certificate",
        "Give --client-cert-file and --client-key-file (executor_config.client_cert_file, client_key_file).",
    ),
    (
        ("ALERT_UNKNOWN_CA", "ALERT_BAD_CERTIFICATE", "ALERT_CERTIFICATE", "ALERT_UNSUPPORTED_CERTIFICATE"),
        "the worker service refused the client certificate",
        "Give a client certificate, not expired, of the CA that the worker's --tls-client-ca names.",
    ),
    (
        ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS", "NO_SHARED_CIPHER"),
        "there is no version of TLS that both sides accept",
        "Let both sides speak the same: the worker's --tls-min-version and the one here say what is too old, "
        "and without them TLS 1.2 is the oldest.",
    ),
    (
        ("UNRECOGNIZED_NAME", "HANDSHAKE_FAILURE"),
        "the other side refused the handshake",
        "Check the name in the URL or --server-hostname; it may also demand a client certificate "
        "(--client-cert-file) or have no key that fits its certificate.",
    ),
)


class _Certificate(NamedTuple):
    """What of a certificate is of interest; moments are seconds since the epoch."""

    names: list[str]
    issuer: str
    begins: float
    ends: float

    @property
    def days(self) -> float:
        return (self.ends - time.time()) / _DAY


def passed(tls: ssl.SSLObject, options: LinkOptions, seconds: float) -> Step:
    """Return the step for a TLS handshake that succeeded."""
    der = tls.getpeercert(binary_form=True)
    shown = _verified(tls.getpeercert()) or _unverified(der)
    cipher = tls.cipher()
    facts = {"version": tls.version(), "cipher": cipher[0] if cipher else None, **_facts(shown, der)}
    step = Step(
        name="tls",
        status="ok",
        seconds=seconds,
        detail=", ".join(filter(None, [str(tls.version()), _described(shown), _key(der)])),
        facts=facts,
    )
    if options.pinned_keys:
        step = dataclasses.replace(step, detail=f"{step.detail}, which is pinned")
    elif options.insecure:
        remedy = "Anybody could be on the other side: leave --insecure out and give --ca-file where needed."
        detail = f"{step.detail}; the certificate is not verified (--insecure)"
        return dataclasses.replace(step, status="warn", detail=detail, remedy=remedy)
    if shown is not None and shown.days < _WARN_DAYS:
        remedy = f"Renew the worker's certificate: it expires in {max(shown.days, 0.0):.1f} days."
        return dataclasses.replace(step, status="warn", remedy=remedy)
    return step


def failed(exc: OSError, options: LinkOptions, seconds: float) -> Step:
    """Return the step for a TLS handshake that failed with *exc*, as the dial raised it."""
    der = shown = None
    if isinstance(exc, ssl.SSLCertVerificationError):
        der = _fetched(options)
        shown = _unverified(der)
        cause, remedy = _refused(exc, options, shown)
    elif isinstance(exc, ssl.SSLError):
        cause, remedy = _broken(exc)
    else:
        cause = f"no TLS handshake within {options.open_timeout:g} s; is it a plain text port?"
        remedy = "Use a port with TLS, or ws:// on loopback; or it is stuck: --timeout waits longer."
    facts = {"error": str(exc.strerror or exc), **_facts(shown, der)}
    return Step(name="tls", status="fail", seconds=seconds, detail=cause, remedy=remedy, facts=facts)


def _refused(
    exc: ssl.SSLCertVerificationError, options: LinkOptions, shown: _Certificate | None
) -> tuple[str, str]:
    """Return why this side refused the certificate, and what to do."""
    code, name = exc.verify_code, options.server_hostname or options.host
    about = f" ({_described(shown)})" if shown else ""
    if code == _EXPIRED:
        since = f" {-shown.days:.0f} days ago" if shown and shown.days < 0 else ""
        cause = f"a certificate of the worker service expired{since}{about}"
        return (
            cause,
            "Renew it where the worker reads it (--tls-cert); or set this machine's clock, if that is wrong.",
        )
    if code == _NOT_YET:
        cause = f"the certificate of the worker service is not valid yet{about}"
        return cause, "Set the clock of this machine, or wait until it is valid."
    if code == NOT_PINNED:
        remedy = (
            "Look up the pin on the worker's machine (wove-ws-sync certs DIR --show). If it is this one, "
        )
        remedy += "give it with --pinned-key (executor_config.pinned_keys); if not, somebody is in between."
        return f"the certificate was refused: {exc.verify_message.partition(';')[0]}{about}", remedy
    if code in _WRONG_NAME:
        has = f"it is for {', '.join(shown.names) or 'no name'}" if shown else "it names others"
        remedy = "Use a name of the certificate in the URL, or give it with --server-hostname."
        return f"the certificate of the worker service is not for {name}: {has}", remedy
    if code in _SELF_SIGNED:
        remedy = "If it is the right one, give it, or its CA, with --ca-file (executor_config.ca_file)."
        return f"the certificate is self-signed, or of a CA that is not known here{about}", remedy
    if code in _NO_ISSUER:
        return (
            f"the CA of the certificate is not known here{about}",
            "Give the CA with --ca-file (executor_config.ca_file); if it is a public one, the worker's "
            "--tls-cert lacks the intermediate certificate.",
        )
    remedy = "Have a certificate made for a TLS server of this name, by a CA that is known here."
    return f"the certificate was refused: {exc.verify_message}{about}", remedy


def _broken(exc: ssl.SSLError) -> tuple[str, str]:
    origin = exc.__cause__
    reason = str(getattr(origin, "reason", None) or exc)
    for parts, cause, remedy in _REASONS:
        if any(part in reason.upper().replace(" ", "_") for part in parts):
            return cause, remedy
    if not isinstance(origin, ssl.SSLError):
        return (
            "the other side closed the connection during or right after the TLS handshake",
            "It may demand a client certificate (--client-cert-file), refuse the one given, or have no TLS.",
        )
    return (
        f"the TLS handshake failed: {reason}",
        "See the log of the other side.",
    )


# -- certificates ------------------------------------------------------------------------


def _fetched(options: LinkOptions) -> bytes | None:
    """Return the certificate that was refused, from a second connection on which nothing is sent."""
    clock = Clock()
    unchecked = dataclasses.replace(
        options, insecure=True, ca_file=None, client_cert_file=None, client_key_file=None, pinned_keys=None
    )
    seen: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        timeout = min(options.open_timeout, _FETCH_TIMEOUT)
        deadline = Deadline.after(timeout, clock.monotonic())
        connect(unchecked, tls_context(unchecked), deadline, clock, seen.__setitem__).close()
    der: bytes | None = seen["tls"].getpeercert(binary_form=True) if "tls" in seen else None
    return der


def _key(der: bytes | None) -> str:
    return "" if der is None else f"key {pin_of(der)}"


def _verified(fields: Any) -> _Certificate | None:
    """Read what the ssl module tells of a certificate that it has verified."""
    if not fields:
        return None
    names = [value for _, value in fields.get("subjectAltName", ())]
    issuer = {key: value for pairs in fields.get("issuer", ()) for key, value in pairs}
    begins, ends = (ssl.cert_time_to_seconds(fields[key]) for key in ("notBefore", "notAfter"))
    return _Certificate(names, _issuer(issuer), begins, ends)


def _issuer(parts: dict[str, str]) -> str:
    """Return how people call a CA, of its name's parts."""
    return parts.get("commonName") or " ".join(parts.values()) or "an issuer without a name"


def _unverified(der: bytes | None) -> _Certificate | None:
    """Read any certificate; None without the package for it, which only the extra ``worker`` brings."""
    try:
        from cryptography import x509
    except ModuleNotFoundError:
        return None
    try:
        certificate = x509.load_der_x509_certificate(der or b"")
        issuer = {str(part.rfc4514_attribute_name): str(part.value) for part in certificate.issuer}
        issuer["commonName"] = issuer.pop("CN", "")
        names: list[str] = []
        with contextlib.suppress(x509.ExtensionNotFound):
            listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = [str(name.value) for name in listed]
    except ValueError:
        return None
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return _Certificate(names, _issuer(issuer), begins.timestamp(), ends.timestamp())


def _described(shown: _Certificate | None) -> str:
    if shown is None:
        return ""
    whom = ", ".join(shown.names[:5]) + (", ..." if len(shown.names) > 5 else "") or "no name"
    when = f"expires in {shown.days:.0f} days" if shown.days >= 0 else f"expired {-shown.days:.0f} days ago"
    if shown.begins > time.time():
        when = f"valid from {_iso(shown.begins)}"
    return f"certificate for {whom}, issued by {shown.issuer}, {when}"


def _facts(shown: _Certificate | None, der: bytes | None) -> dict[str, Any]:
    facts = {} if der is None else {"pin": pin_of(der)}
    if shown is None:
        return facts
    return facts | {
        "names": shown.names,
        "issuer": shown.issuer,
        "not_before": _iso(shown.begins),
        "not_after": _iso(shown.ends),
        "days_left": round(shown.days, 2),
    }


def _iso(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="seconds")
