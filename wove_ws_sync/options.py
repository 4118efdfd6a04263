"""What the user asked for, checked once and frozen.

Owns: ``executor_config`` → :class:`LinkOptions`, delivery settings →
:class:`DeliveryOptions`, which check applies to which of them. Never: does I/O; files and
environment variables named here are looked at when a connection is made.

A message names the key, the value and the remedy; the values of ``url``, ``security``,
``headers`` and ``proxy`` may be secrets and are never in it. Where Wove has a message
for the same mistake, it is that message.
"""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Collection, Mapping
from typing import Any

from . import _address, _checks, _pins
from ._secrets import Secret
from ._security_config import SecurityConfig

__all__ = ["DeliveryOptions", "LinkOptions", "check_keys"]

_NO_SECURITY = SecurityConfig()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LinkOptions:
    """Say how to reach one worker service and how to keep the connection.

    Equal options share one link. Times are seconds, sizes are bytes. ``host`` has no
    brackets, ``target`` is path and query exactly as they are sent and signed, ``proxy`` holds
    ``http://[user:password@]host:port``. What may be secret of headers and proxy has to be asked
    for with ``reveal()``; a query of ``url`` and ``target`` may be secret as well. ``idle_timeout``
    None keeps an unused connection for ever. Build it with :meth:`from_config`; thread-safe, and
    refuses to be pickled.
    """

    url: str = dataclasses.field(compare=False)
    secure: bool
    host: str
    port: int
    target: str
    headers: tuple[tuple[str, Secret], ...] = ()
    security: SecurityConfig = _NO_SECURITY
    open_timeout: float = 10.0
    insecure: bool = False
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None
    server_hostname: str | None = None
    tls_min_version: str = "1.2"
    pinned_keys: tuple[str, ...] | None = None
    proxy: Secret | None = None
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
    seal: str = "auto"
    worker_auth: str = "auto"
    result_format: str = "pickle"
    context_vars: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # not the link's

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LinkOptions:
        """Check an ``executor_config`` and return it as options, without any I/O.

        :func:`wove_ws_sync.security.link_options` adds the rules on security. Raises
        TypeError or ValueError, with Wove's text where Wove has one. Thread-safe.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"executor_config must be a dictionary, got {type(config).__name__}.")
        check_keys(config)
        values = _address.address(config.get("url"))
        values["security"] = SecurityConfig(config.get("security"))
        values["headers"] = _address.headers(config.get("headers"))
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
        for key in _TLS_KEYS:
            if getattr(self, key) != _DEFAULTS[key] and not self.secure:
                raise ValueError(f"executor_config.{key} needs TLS; use a wss:// URL or leave the key out.")
        if self.result_format == "json" and self.context_vars:
            raise ValueError(
                "executor_config.context_vars needs result_format='pickle', as the values are pickled; "
                "with result_format='json' leave it out and pass them as arguments."
            )
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
        parts = urllib.parse.urlsplit(self.proxy.reveal())
        return parts.hostname or "", parts.port or 0

    def __repr__(self) -> str:
        path, _, query = self.target.partition("?")
        place = f"{'wss' if self.secure else 'ws'}://{_address.bracketed(self.host)}:{self.port}{path}"
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


_CHECKS: dict[str, _checks.Check] = {
    "open_timeout": _checks.seconds(),
    "insecure": _checks.flag,
    "ca_file": _checks.or_none(_checks.path),
    "client_cert_file": _checks.or_none(_checks.path),
    "client_key_file": _checks.or_none(_checks.path),
    "server_hostname": _checks.or_none(_address.server_name),
    "tls_min_version": _checks.one_of("1.2", "1.3"),
    "pinned_keys": _checks.or_none(_pins.check_pins),
    "proxy": _checks.or_none(_address.proxy),
    "ping_interval": _checks.seconds(),
    "pong_timeout": _checks.seconds(),
    "close_timeout": _checks.seconds(zero=True),
    "idle_timeout": _checks.or_none(_checks.seconds(zero=True)),
    "max_message_bytes": _checks.whole(1),
    "send_buffer_bytes": _checks.whole(1),
    "reconnect_initial_delay": _checks.seconds(),
    "reconnect_max_delay": _checks.seconds(),
    "resume_window": _checks.seconds(zero=True),
    "max_requeues": _checks.whole(0),
    "cancel_ack_timeout": _checks.seconds(zero=True),
    "seal": _checks.one_of("auto", "require", "off"),
    "worker_auth": _checks.one_of("auto", "require", "off"),
    "result_format": _checks.one_of("pickle", "json"),
    "context_vars": _checks.context_vars,
}
_KEYS = frozenset(_CHECKS) | {"url", "security", "headers"}
_TLS_KEYS = (
    "ca_file",
    "client_cert_file",
    "client_key_file",
    "server_hostname",
    "tls_min_version",
    "pinned_keys",
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LinkOptions)}


def check_keys(config: Mapping[str, Any], more: Collection[str] = ()) -> None:
    """Raise ValueError for a key that is none of ``executor_config``, nor one of *more*."""
    for key in config:
        if key in _KEYS or key in more:
            continue
        hint = _checks.unknown(key, {*_KEYS, *more})
        if key in _DELIVERY_KEYS:
            hint = "Delivery settings stand beside executor_config, not in it."
        raise ValueError(f"executor_config has no key {_checks.show(key)}. {hint}")


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
                raise TypeError(
                    f"There is no delivery setting {name!r}. {_checks.unknown(name, _DELIVERY_KEYS)}"
                )
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
    "delivery_timeout": _checks.seconds(),
    "delivery_heartbeat_seconds": _checks.seconds(),
    "delivery_max_in_flight": _checks.whole(1),
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
