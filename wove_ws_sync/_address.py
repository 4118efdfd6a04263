"""Where a connection goes, and the headers that go with it: URL, host, proxy, header fields.

Owns: the one form of a host that is dialled, compared and verified, what a URL means, and which
headers may be sent. Never: asks a resolver; a message never shows a URL or a header's value,
which may be secrets.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import urllib.parse
from typing import Any, NamedTuple

from ._checks import refusal, show
from ._secrets import Headers, Secret

__all__ = [
    "WebAddress",
    "address",
    "bracketed",
    "check_headers",
    "headers",
    "proxy",
    "server_name",
    "web_address",
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates
_URL = re.compile(r"[Ww][Ss]([Ss]?)://([^/?#]+)([^?#]*)(?:\?([^#]*))?(#?).*", re.DOTALL)
_WEB_URL = re.compile(r"[Hh][Tt][Tt][Pp]([Ss]?)://([^/?#]+)([^?#]*)(?:\?([^#]*))?(#?).*", re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::([0-9]*))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PROXY = re.compile(
    r"[Hh][Tt][Tt][Pp]://((?:(?:[\w.~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?)([^@/?#]+)/?", re.ASCII
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_FIELD_VALUE = re.compile(r"[ -~\xa0-\xff]*")  # Latin-1 without control characters
_RESERVED = re.compile(
    r"host|connection|upgrade|content-length|transfer-encoding|sec-.*|x-wove-.*", re.IGNORECASE | re.DOTALL
)
_PATH_SAFE = "/:@!$&'()*+,;=-._~%"  # RFC 3986, 3.3


def bracketed(host: str) -> str:
    """Return *host* as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _host(label: str, text: str) -> str:
    """Return the host in the one form that is dialled, compared and verified.

    A label that is not ASCII must become an ``xn--`` label: characters that fold into
    plain ASCII (full width, ligatures, sharp s) make one address look like another.
    """
    if text.startswith("[") and "%" not in text:  # a zone index is for one machine's network card
        with contextlib.suppress(ValueError):
            address = ipaddress.IPv6Address(text[1:-1])
            # Python 3.13 writes it like this, earlier ones without dots.
            return f"::ffff:{address.ipv4_mapped}" if address.ipv4_mapped else str(address)
    labels = [part.lower() if part.isascii() else _idna(label, part) for part in text.split(".")]
    host = ".".join(labels)
    if labels[-1] == "" and len(labels) > 1:
        labels.pop()  # the dot of the root
    if len(host) > 253 or not all(_LABEL.fullmatch(part) for part in labels):
        raise ValueError(f"{label} has an empty or invalid host; write a name, an IPv4 address or [IPv6].")
    return host


def _idna(label: str, part: str) -> str:
    try:
        encoded = part.encode("idna").decode("ascii")
    except UnicodeError:
        encoded = ""
    if not encoded.startswith("xn--"):
        raise ValueError(f"{label} has a host with invalid or look-alike characters; use its xn-- form.")
    return encoded


def _host_and_port(label: str, authority: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise ValueError(f"{label} must name the host as host, host:port or [IPv6]:port.")
    host = _host(label, match[1])
    if not match[2]:
        return host, None
    if len(match[2]) > 5 or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{label} has an invalid port; ports go from 1 to 65535.")
    return host, int(match[2])


def _encoded(text: str, safe: str) -> str:
    """Percent-encode what may not stand in a request target; keep what is encoded already."""
    return urllib.parse.quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", text), safe=safe)


def _parts(
    label: str, url: str, form: re.Pattern[str], wrong: str, login: str
) -> tuple[bool, str, int | None, str]:
    """Return whether the URL means TLS, its host, port and target. *wrong* and *login* end a refusal."""
    if "\\" in url or _CONTROL.search(url):
        raise ValueError(f"{label} must not contain a backslash or control characters; percent-encode them.")
    match = form.fullmatch(url)
    if match is None:
        raise ValueError(f"{label} {wrong}")
    tls, authority, path, query, fragment = match.groups()
    if "@" in authority:
        raise ValueError(f"{label} must not contain a user name or password; {login}")
    if fragment:
        raise ValueError(f"{label} must not contain a fragment; percent-encode '#' as %23.")
    host, port = _host_and_port(label, authority)
    target = _encoded(path, _PATH_SAFE) or "/"
    if query:
        target += "?" + _encoded(query, _PATH_SAFE + "?")
    return bool(tls), host, port, target


def address(url: Any) -> dict[str, Any]:
    """Return the fields of :class:`LinkOptions` that the URL decides."""
    label = "executor_config.url"
    if not isinstance(url, str) or not url:
        raise TypeError("executor_config.url must be a non-empty ws:// or wss:// URL.")
    secure, host, port, target = _parts(
        label, url, _URL, "must be a ws:// or wss:// URL.", "use executor_config.security."
    )
    port = port or (443 if secure else 80)
    return {"url": url, "secure": secure, "host": host, "port": port, "target": target}


class WebAddress(NamedTuple):
    """Where a web server is; ``host`` has no brackets."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def place(self) -> str:
        """Return the part of the URL that may be shown."""
        port = "" if self.port == (443 if self.secure else 80) else f":{self.port}"
        return f"{'https' if self.secure else 'http'}://{bracketed(self.host)}{port}"

    @property
    def url(self) -> str:
        """Return the URL in its one form."""
        return self.place + self.target


def web_address(label: str, url: Any) -> WebAddress:
    """Return what an ``https://`` or ``http://`` URL says; the URL is in no message."""
    wrong = "must be an https:// or http:// URL."
    if not isinstance(url, str):
        raise TypeError(f"{label} {wrong}")
    secure, host, port, target = _parts(label, url, _WEB_URL, wrong, "leave them out.")
    return WebAddress(secure, host, port or (443 if secure else 80), target)


def server_name(label: str, value: Any, remedy: str) -> str:
    """Check the name to expect in a certificate."""
    if not isinstance(value, str):
        raise TypeError(refusal(label, "a host name", value, remedy))
    return _host(label, bracketed(value))


def proxy(label: str, value: Any, remedy: str) -> Secret:
    """Check the URL of a proxy and return it with its host in the one form."""
    text = f"{label} must have the form http://host:port or http://user:password@host:port; {remedy}."
    if not isinstance(value, str):
        raise TypeError(text)
    match = _PROXY.fullmatch(value)
    if match is None:
        raise ValueError(text)
    host, port = _host_and_port(label, match[2])
    if port is None:
        raise ValueError(text)
    return Secret(f"http://{match[1]}{bracketed(host)}:{port}")


def check_headers(given: Headers) -> None:
    """Refuse a header that could not be sent as exactly one field; no value is ever shown.

    Raises ValueError, in whose traceback no frame has a value among its variables. Thread-safe.
    """
    for fault in map(_header_fault, given.items()):
        if fault:
            raise ValueError(fault)


def _header_fault(item: tuple[str, str]) -> str:
    name, value = item
    if not _TOKEN.fullmatch(name):
        return f"executor_config.headers has an invalid name, {show(name)}; use letters and '-'."
    if not _FIELD_VALUE.fullmatch(value):
        return f"The value of header {name!r} must be Latin-1 text without control characters."
    return ""


def headers(given: Any) -> tuple[tuple[str, Secret], ...]:
    """Return the headers that the user adds to the handshake, in one order."""
    if given is None:
        return ()
    if not isinstance(given, dict):
        raise TypeError("executor_config.headers must be a dictionary.")
    pairs: dict[str, tuple[str, Secret]] = {}
    for name, secret in [(str(key), Secret(str(value))) for key, value in given.items()]:
        check_headers(Headers({name: secret.reveal()}))
        if _RESERVED.fullmatch(name):
            raise ValueError(f"executor_config.headers must not set {name!r}; the handshake sets it itself.")
        if name.lower() in pairs:
            raise ValueError(f"executor_config.headers names {name!r} twice; header names ignore case.")
        pairs[name.lower()] = (name, secret)
    return tuple(pairs[key] for key in sorted(pairs))  # the order of a dict must not make two links of one
