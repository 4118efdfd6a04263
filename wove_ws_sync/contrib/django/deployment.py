"""Checks of ``WOVE_WS`` for where the project is served: TLS, secrets, deadlines.

Owns: what ``check --deploy`` asks beyond the ordinary checks. Never: connects, shows a secret.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured

from ... import security
from ..._keys import SharedKey
from ...options import LinkOptions
from . import conf
from .messages import error, warning

__all__ = ["check_deployment"]

# What a secret should have at least, in bytes: the worker service warns of less, too.
_MIN_SECRET_BYTES = 16


def check_deployment(app_configs: Sequence[Any] | None = None, **_: Any) -> list[CheckMessage]:
    """Check what must hold where the project is served: TLS, secrets, deadlines."""
    found: list[CheckMessage] = []
    try:
        names = conf.aliases()
    except ImproperlyConfigured:
        return found  # check_settings tells
    for name in names:
        try:
            alias = conf.read(name)
        except ImproperlyConfigured:
            continue
        if alias.backend == "immediate":
            found.append(
                error(
                    alias,
                    "BACKEND",
                    "E010",
                    "runs every task in the process that submits it.",
                    "Set it to 'websocket' in production; 'immediate' is for tests.",
                )
            )
            continue
        try:
            options = LinkOptions.from_config(alias.executor_config)
        except (TypeError, ValueError):
            continue
        found += _transport(alias, options)
        found += _secret(alias, options)
        if alias.delivery.get("delivery_timeout") is None:
            found.append(
                warning(
                    alias,
                    "DELIVERY_TIMEOUT",
                    "W014",
                    "is not set: a view waits without limit for a task that is stuck.",
                    "Set it to the seconds that a task may take, below the timeout of your web server.",
                )
            )
    return found


def _transport(alias: conf.Alias, options: LinkOptions) -> Iterator[CheckMessage]:
    local = security.is_local_host(options.host)
    if options.insecure:
        yield warning(
            alias,
            "INSECURE",
            "W010",
            "is True: TLS, its certificates and SECURITY are not asked for.",
            "Remove it. For an own authority set CA_FILE, for another name SERVER_HOSTNAME.",
        )
    if not options.secure and not local:
        yield warning(
            alias,
            "URL",
            "W011",
            "has no TLS: everybody on the way can read and change what is sent.",
            "Use wss:// and start the worker service with --tls-cert and --tls-key.",
        )


def _secret(alias: conf.Alias, options: LinkOptions) -> Iterator[CheckMessage]:
    mode = options.security.mode
    value = alias.executor_config.get("security")
    if mode == "none":
        yield warning(
            alias,
            "SECURITY",
            "W012",
            "is not set: whoever listens at the address gets what is sent, "
            "and the worker service cannot tell this project from anybody else.",
            "Set it to 'env:VARIABLE', and start the worker service with --security env:VARIABLE.",
        )
        return
    if isinstance(value, dict) and _literal(value):
        yield warning(
            alias,
            "SECURITY",
            "W013",
            "has the secret itself, where whoever reads the settings sees it.",
            "Keep it in the environment or in a file: 'env:VARIABLE', secret_env, secret_file, token_env, "
            "client_secret_env.",
        )
    try:
        key = security.host_key(options)
        security.link_options(alias.executor_config)
    except RuntimeError as exc:
        yield error(
            alias,
            "SECURITY",
            "E011",
            f"cannot be used: {conf.in_settings(alias.name, str(exc))}",
            "Set the variable, or write the file, where this process is started.",
        )
        return
    except (TypeError, ValueError):
        return  # check_settings tells
    if isinstance(key, SharedKey) and len(key.secret) < _MIN_SECRET_BYTES:
        yield warning(
            alias,
            "SECURITY",
            "W015",
            f"has a secret of fewer than {_MIN_SECRET_BYTES} bytes: it may be guessed.",
            "Make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'.",
        )


def _literal(value: dict[Any, Any]) -> bool:
    entries = [value, *(entry for entry in value.get("keys") or () if isinstance(entry, dict))]
    return any(entry.get(name) for entry in entries for name in ("secret", "token", "client_secret"))
