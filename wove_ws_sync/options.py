"""What the user asked for, checked once and frozen.

Owns: ``executor_config`` → :class:`LinkOptions`, delivery settings →
:class:`DeliveryOptions`, every check on them and its message. Never: does I/O; files and
environment variables named here are looked at when a connection is made.

A message names the key, the value and the remedy; the values of ``url``, ``security``,
``headers`` and ``proxy`` may be secrets and are never in it. Where Wove has a message
for the same mistake, it is that message.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hmac
import ipaddress
import math
import numbers
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

__all__ = ["DeliveryOptions", "LinkOptions", "SecurityConfig", "check_header"]

_Check = Callable[[str, Any, str], Any]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, lone surrogates
_URL = re.compile(r"[Ww][Ss]([Ss]?)://([^/?#]+)([^?#]*)(?:\?([^#]*))?(#?).*", re.DOTALL)
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


def _show(value: object) -> str:
    """Return a bounded ``repr`` that never raises."""
    try:
        text = repr(value)
    except Exception:  # a value's own __repr__ may do anything, and ints have a digit limit
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refusal(label: str, wanted: str, value: object, remedy: str) -> str:
    return f"{label} must be {wanted}, got {_show(value)}; {remedy}."


def _unknown(name: object, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"Did you mean {near[0]!r}?" if near else f"Known are: {', '.join(names)}."


# Checks of one value: (label for the message, value, remedy) -> the value to keep.


def _seconds(*, zero: bool = False) -> _Check:
    wanted = f"a number of seconds {'from' if zero else 'above'} 0 and up to {threading.TIMEOUT_MAX:.0f}"

    def check(label: str, value: Any, remedy: str) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(_refusal(label, wanted, value, remedy))
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not 0.0 <= number <= threading.TIMEOUT_MAX or (number == 0.0 and not zero):  # NaN fails the first
            raise ValueError(_refusal(label, wanted, value, remedy))
        return number

    return check


def _whole(least: int) -> _Check:
    wanted = f"a whole number from {least} up"

    def check(label: str, value: Any, remedy: str) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(_refusal(label, wanted, value, remedy))
        number = int(value)
        if not least <= number <= sys.maxsize:
            raise ValueError(_refusal(label, wanted, value, remedy))
        return number

    return check


def _flag(label: str, value: Any, remedy: str) -> bool:
    # Truthiness would turn the text "false" into permission for plain text connections.
    if not isinstance(value, bool):
        raise TypeError(_refusal(label, "True or False", value, remedy))
    return value


def _path(label: str, value: Any, remedy: str) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(_refusal(label, "the path of a PEM file", value, remedy))
    if not path or "\0" in path:
        raise ValueError(_refusal(label, "the path of a PEM file", value, remedy))
    return path


def _server_name(label: str, value: Any, remedy: str) -> str:
    if not isinstance(value, str):
        raise TypeError(_refusal(label, "a host name", value, remedy))
    return _host(label, _bracketed(value))


def _proxy(label: str, value: Any, remedy: str) -> str:
    text = f"{label} must have the form http://host:port or http://user:password@host:port; {remedy}."
    if not isinstance(value, str):
        raise TypeError(text)
    match = _PROXY.fullmatch(value)
    if match is None:
        raise ValueError(text)
    host, port = _host_and_port(label, match[2])
    if port is None:
        raise ValueError(text)
    return f"http://{match[1]}{_bracketed(host)}:{port}"


def _only(supported: str) -> _Check:
    def check(label: str, value: Any, remedy: str) -> str:
        if value != supported:
            raise ValueError(f"{label}={_show(value)} is not supported by this version; {remedy}.")
        return supported

    return check


def _or_none(check: _Check) -> _Check:
    return lambda label, value, remedy: None if value is None else check(label, value, remedy)


# Addresses.


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _host(label: str, text: str) -> str:
    """Return the host in the one form that is dialled, compared and verified.

    A label that is not ASCII must become an ``xn--`` label: characters that fold into
    plain ASCII (full width, ligatures, sharp s) make one address look like another.
    """
    if text.startswith("[") and "%" not in text:  # a zone index is for one machine's network card
        with contextlib.suppress(ValueError):
            return str(ipaddress.IPv6Address(text[1:-1]))
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


def _address(url: Any) -> dict[str, Any]:
    """Return the fields of :class:`LinkOptions` that the URL decides."""
    label = "executor_config.url"
    if not isinstance(url, str) or not url:
        raise TypeError("executor_config.url must be a non-empty ws:// or wss:// URL.")
    if "\\" in url or _CONTROL.search(url):
        raise ValueError(f"{label} must not contain a backslash or control characters; percent-encode them.")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("executor_config.url must be a ws:// or wss:// URL.")
    tls, authority, path, query, fragment = match.groups()
    if "@" in authority:
        raise ValueError(f"{label} must not contain a user name or password; use executor_config.security.")
    if fragment:
        raise ValueError(f"{label} must not contain a fragment; percent-encode '#' as %23.")
    host, port = _host_and_port(label, authority)
    target = _encoded(path, _PATH_SAFE) or "/"
    if query:
        target += "?" + _encoded(query, _PATH_SAFE + "?")
    return {
        "url": url,
        "secure": bool(tls),
        "host": host,
        "port": port or (443 if tls else 80),
        "target": target,
    }


# Headers and security.


def check_header(name: str, value: str) -> None:
    """Refuse a header that could not be sent as exactly one field; the value is never shown.

    Raises ValueError. Thread-safe.
    """
    if not _TOKEN.fullmatch(name):
        raise ValueError(f"executor_config.headers has an invalid name, {_show(name)}; use letters and '-'.")
    if not _FIELD_VALUE.fullmatch(value):
        raise ValueError(f"The value of header {name!r} must be Latin-1 text without control characters.")


def _headers(headers: Any) -> tuple[tuple[str, str], ...]:
    if headers is None:
        return ()
    if not isinstance(headers, dict):
        raise TypeError("executor_config.headers must be a dictionary.")
    pairs: dict[str, tuple[str, str]] = {}
    for name, value in ((str(key), str(value)) for key, value in headers.items()):
        check_header(name, value)
        if _RESERVED.fullmatch(name):
            raise ValueError(f"executor_config.headers must not set {name!r}; the handshake sets it itself.")
        if name.lower() in pairs:
            raise ValueError(f"executor_config.headers names {name!r} twice; header names ignore case.")
        pairs[name.lower()] = (name, value)
    return tuple(pairs[key] for key in sorted(pairs))  # the order of a dict must not make two links of one


class SecurityConfig:
    """Hold the ``security`` value of an ``executor_config``: frozen, comparable, never shown.

    *value* is None, ``"none"``, ``"env:VARIABLE"`` or a dictionary as
    ``wove.NetworkExecutorSecurity.from_config`` takes it. Equal content makes equal objects.
    It refuses to be pickled. Raises Wove's TypeError or ValueError. Thread-safe.
    """

    __slots__ = ("_frozen", "mode")

    mode: str
    _frozen: str | tuple[tuple[str, Any], ...] | None

    def __init__(self, value: Any = None) -> None:
        mode, frozen = _freeze(value)
        object.__setattr__(self, "mode", mode)
        object.__setattr__(self, "_frozen", frozen)

    @property
    def value(self) -> Any:
        """Return what ``wove.NetworkExecutorSecurity.from_config`` takes; None for no security."""
        return dict(self._frozen) if isinstance(self._frozen, tuple) else self._frozen

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"SecurityConfig is frozen; cannot set {name!r}")

    def __repr__(self) -> str:
        if isinstance(self._frozen, tuple):
            key = f", key={dict(self._frozen).get('key', 'default')!r}" if self.mode == "signed" else ""
            return f"SecurityConfig(type={self.mode!r}{key})"
        return f"SecurityConfig({self._frozen or 'none'!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecurityConfig):
            return NotImplemented
        mine, theirs = (repr(each._frozen).encode("utf-8", "surrogatepass") for each in (self, other))
        return hmac.compare_digest(mine, theirs)

    def __hash__(self) -> int:
        return hash(repr(self))  # made of what may be seen anyway

    def __copy__(self) -> SecurityConfig:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SecurityConfig:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("SecurityConfig holds a secret and is not pickled; pass 'env:VARIABLE' instead.")


def _freeze(value: Any) -> tuple[str, str | tuple[tuple[str, Any], ...] | None]:
    """Return the security mode and the value in an immutable form."""
    if value is None or (isinstance(value, str) and value == "none"):
        return "none", None
    if isinstance(value, str):
        if not value.startswith("env:"):
            raise ValueError("executor_config.security string must be 'none' or 'env:VARIABLE'.")
        return "signed", str.__str__(value)
    if not isinstance(value, dict):
        raise TypeError("executor_config.security must be a dictionary, 'env:VARIABLE', or 'none'.")
    mode = value.get("type", "signed")
    if not isinstance(mode, str) or mode not in ("signed", "bearer", "none"):
        raise ValueError("executor_config.security.type must be one of: 'signed', 'bearer', 'none'.")
    if mode == "none":
        return "none", None
    frozen = {}
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, str | bytes | int | float | None):
            raise TypeError(
                f"executor_config.security[{_show(key)}] must be text, bytes or a number; "
                "pass the secret itself or the name of its environment variable."
            )
        # A str that shows asterisks must neither be signed with them nor be equal to every other one.
        frozen[key] = str.__str__(item) if isinstance(item, str) else item
    if "key" in frozen:
        frozen["key"] = str(frozen["key"])
    return mode, tuple(sorted(frozen.items()))


_NO_SECURITY = SecurityConfig()

# The two results.


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LinkOptions:
    """Say how to reach one worker service and how to keep the connection.

    Equal options share one link. Times are seconds, sizes are bytes. ``host`` has no
    brackets, ``target`` is path and query exactly as they are sent and signed, ``proxy`` is
    ``http://[user:password@]host:port``. ``idle_timeout`` None keeps an unused connection
    for ever. Build it with :meth:`from_config`; thread-safe, and refuses to be pickled.
    """

    url: str = dataclasses.field(compare=False)
    secure: bool
    host: str
    port: int
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    security: SecurityConfig = _NO_SECURITY
    open_timeout: float = 10.0
    insecure: bool = False
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    server_hostname: str | None = None
    proxy: str | None = None
    ping_interval: float = 10.0
    pong_timeout: float = 5.0
    close_timeout: float = 2.0
    idle_timeout: float | None = 60.0
    max_message_bytes: int = 256 * 1024 * 1024
    send_buffer_bytes: int = 64 * 1024 * 1024
    reconnect_initial_delay: float = 0.1
    reconnect_max_delay: float = 30.0
    resume_window: float = 10.0
    max_requeues: int = 3
    cancel_ack_timeout: float = 10.0
    seal: str = "off"
    worker_auth: str = "off"
    result_format: str = "pickle"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LinkOptions:
        """Check an ``executor_config`` and return it as options, without any I/O.

        :func:`wove_ws_sync.security.link_options` adds the rules on security. Raises
        TypeError or ValueError, with Wove's text where Wove has one. Thread-safe.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"executor_config must be a dictionary, got {type(config).__name__}.")
        for key in config:
            if key not in _KEYS:
                raise ValueError(f"executor_config has no key {_show(key)}. {_unknown(key, _KEYS)}")
        values = _address(config.get("url"))
        values["security"] = SecurityConfig(config.get("security"))
        values["headers"] = _headers(config.get("headers"))
        for field in dataclasses.fields(cls):
            key = field.name
            if key not in _CHECKS or key not in config:
                continue
            if config[key] is None and key in ("open_timeout", "insecure"):
                continue  # as Wove reads them
            default = "" if field.default is None else f" for the default, {field.default!r}"
            values[key] = _CHECKS[key](f"executor_config.{key}", config[key], f"leave the key out{default}")
        options = cls(**values)
        options._check_together()
        return options

    def _check_together(self) -> None:
        if self.client_key_file and not self.client_cert_file:
            raise ValueError(
                "executor_config.client_key_file needs executor_config.client_cert_file, its certificate."
            )
        for key in ("ca_file", "client_cert_file", "client_key_file", "server_hostname"):
            if getattr(self, key) is not None and not self.secure:
                raise ValueError(f"executor_config.{key} needs TLS; use a wss:// URL or leave the key out.")
        if self.reconnect_max_delay < self.reconnect_initial_delay:
            raise ValueError(
                f"executor_config.reconnect_max_delay must be at least reconnect_initial_delay, which is "
                f"{self.reconnect_initial_delay}, got {self.reconnect_max_delay}; change one of the two."
            )

    @property
    def proxy_address(self) -> tuple[str, int] | None:
        """Return host (no brackets) and port of the proxy, without its credentials."""
        if self.proxy is None:
            return None
        parts = urllib.parse.urlsplit(self.proxy)
        return parts.hostname or "", parts.port or 0

    def __repr__(self) -> str:
        path, _, query = self.target.partition("?")
        place = f"{'wss' if self.secure else 'ws'}://{_bracketed(self.host)}:{self.port}{path}"
        parts = [f"url={place + '?...' * bool(query)!r}", f"security={self.security!r}"]
        if self.headers:
            parts.append(f"headers={[name for name, _ in self.headers]!r}")  # their values may be secrets
        if self.proxy_address:
            parts.append(f"proxy_address={self.proxy_address!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _CHECKS and field.name != "proxy" and value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"LinkOptions({', '.join(parts)})"


_CHECKS: dict[str, _Check] = {
    "open_timeout": _seconds(),
    "insecure": _flag,
    "ca_file": _or_none(_path),
    "client_cert_file": _or_none(_path),
    "client_key_file": _or_none(_path),
    "server_hostname": _or_none(_server_name),
    "proxy": _or_none(_proxy),
    "ping_interval": _seconds(),
    "pong_timeout": _seconds(),
    "close_timeout": _seconds(zero=True),
    "idle_timeout": _or_none(_seconds(zero=True)),
    "max_message_bytes": _whole(1),
    "send_buffer_bytes": _whole(1),
    "reconnect_initial_delay": _seconds(),
    "reconnect_max_delay": _seconds(),
    "resume_window": _seconds(zero=True),
    "max_requeues": _whole(0),
    "cancel_ack_timeout": _seconds(zero=True),
    "seal": _only("off"),
    "worker_auth": _only("off"),
    "result_format": _only("pickle"),
}
_KEYS = frozenset(_CHECKS) | {"url", "security", "headers"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryOptions:
    """Say how one run is delivered, watched and given up; Wove's ``delivery_*`` settings.

    Times are seconds as given, None for no limit. ``delivery_idempotency_key`` is None, text
    (``{name}`` stands for an argument), a callable of the arguments, or any value with a
    ``str()``. Raises TypeError or ValueError that names the setting. Thread-safe.
    """

    delivery_timeout: float | None = None
    delivery_heartbeat_seconds: float | None = None
    delivery_cancel_mode: str = "best_effort"
    delivery_orphan_policy: str = "cancel"
    delivery_max_in_flight: int | None = None
    delivery_idempotency_key: Any = None

    def __post_init__(self) -> None:
        for name, check in _LIMITS.items():
            value = getattr(self, name)
            number = None if value is None else check(name, value, "use None for no limit")
            # An int stays an int: the value travels, and stands in Wove's messages, as given.
            object.__setattr__(self, name, value if type(value) is int else number)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of: {', '.join(map(repr, known))}")
            object.__setattr__(self, name, known[known.index(value)])

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> DeliveryOptions:
        """Return the options that *mapping* sets; None and keys of other meaning are ignored."""
        return cls(**{name: mapping[name] for name in _DELIVERY_KEYS if mapping.get(name) is not None})

    def replace(self, **changes: Any) -> DeliveryOptions:
        """Return a copy with *changes*. Raises TypeError for a setting that does not exist."""
        for name in changes:
            if name not in _DELIVERY_KEYS:
                raise TypeError(f"There is no delivery setting {name!r}. {_unknown(name, _DELIVERY_KEYS)}")
        return dataclasses.replace(self, **changes)

    def as_frame(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``delivery`` field of a ``run_task`` frame for a task called with *args*.

        Runs the user's code if the idempotency key is a callable: call it with no lock held.
        """
        frame = {
            "delivery_timeout": self.delivery_timeout,
            "delivery_idempotency_key": _resolve_key(self.delivery_idempotency_key, args),
            "delivery_cancel_mode": self.delivery_cancel_mode,
            "delivery_heartbeat_seconds": self.delivery_heartbeat_seconds,
            "delivery_orphan_policy": self.delivery_orphan_policy,
        }
        return {name: value for name, value in frame.items() if value is not None}


_DELIVERY_KEYS = tuple(field.name for field in dataclasses.fields(DeliveryOptions))
_LIMITS = {
    "delivery_timeout": _seconds(),
    "delivery_heartbeat_seconds": _seconds(),
    "delivery_max_in_flight": _whole(1),
}
_CHOICES = {
    "delivery_cancel_mode": ("best_effort", "require_ack"),
    "delivery_orphan_policy": ("cancel", "detach", "fail", "requeue"),
}


def _resolve_key(key: Any, args: Mapping[str, Any]) -> str | None:
    """Make text of an idempotency key by Wove's rules."""
    if key is None:
        return None
    if isinstance(key, str):
        try:
            return key.format_map(args) if "{" in key else key
        except KeyError:
            return key  # names no argument of this task: plain text
    if not callable(key):
        return str(key)
    try:
        return str(key(args))
    except TypeError:
        return str(key(**args))  # written with the task's own parameters
