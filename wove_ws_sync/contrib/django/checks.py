"""System checks of the setting ``WOVE_WS``: what is wrong, in which key, and what to do.

Owns: the ids ``wove_ws.E...`` and ``wove_ws.W...``. Never: connects (``manage.py wove_ws_check`` does),
shows a secret.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Sequence
from typing import Any

from django.core import checks
from django.core.exceptions import ImproperlyConfigured

from ... import security
from ..._carry import Carrier
from ..._route import tls_context
from ...options import DeliveryOptions, LinkOptions
from . import conf
from .deployment import check_deployment
from .messages import error, place

__all__ = ["check_settings", "register_all"]

_TAG = "wove_ws"


def register_all() -> None:
    """Register the checks with Django. Idempotent."""
    checks.register(check_settings, _TAG)
    checks.register(check_deployment, _TAG, checks.Tags.security, deploy=True)


def check_settings(app_configs: Sequence[Any] | None = None, **_: Any) -> list[checks.CheckMessage]:
    """Check what is wrong wherever the project runs. Secrets may be missing: a build has none."""
    try:
        names = conf.aliases()
    except ImproperlyConfigured as exc:
        return [
            checks.Error(
                str(exc), hint=f"Set {conf.SETTING} as for CACHES.", obj=conf.SETTING, id="wove_ws.E001"
            )
        ]
    if not names:
        hint = f"Set {conf.SETTING} = {{'default': {{'URL': 'wss://...', 'SECURITY': 'env:VARIABLE'}}}}."
        text = f"{conf.SETTING} names no worker service."
        return [checks.Warning(text, hint=hint, obj=conf.SETTING, id="wove_ws.W001")]
    found: list[checks.CheckMessage] = []
    environments: dict[str, str] = {}
    for name in names:
        found += _strays(name)
        try:
            alias = conf.read(name)
        except ImproperlyConfigured as exc:
            hint = (
                f"Correct {conf.SETTING}[{name!r}]. Its keys are those of executor_config and delivery_*, "
                "in capitals."
            )
            found.append(
                checks.Error(str(exc), hint=hint, obj=f"{conf.SETTING}[{name!r}]", id="wove_ws.E002")
            )
            continue
        found += _values(alias)
        if alias.environment is not None:
            other = environments.setdefault(alias.environment, name)
            if other != name:
                found.append(_same_environment(alias, other))
    return found


def _strays(name: str) -> Iterator[checks.CheckMessage]:
    for text in conf.stray_variables(name):
        key = text.removeprefix(conf.variable(name, ""))
        yield checks.Warning(
            f"The environment variable {text} sets nothing: there is no key {key!r}.",
            hint=f"Correct its name ({conf._hint(key)}) or remove it.",
            obj=f"{conf.SETTING}[{name!r}]",
            id="wove_ws.W002",
        )


def _values(alias: conf.Alias) -> Iterator[checks.CheckMessage]:
    try:
        DeliveryOptions(**alias.delivery)
    except (TypeError, ValueError) as exc:
        yield _wrong(alias, exc, "E004")
    options = None
    try:
        if alias.backend != "immediate":
            options = security.link_options(alias.executor_config)
    except RuntimeError:
        pass  # a secret that is not there: check --deploy tells
    except (TypeError, ValueError) as exc:
        yield _wrong(alias, exc, "E003")
        return
    try:
        Carrier(alias.executor_config.get("context_vars") or ())
    except (ImportError, TypeError, ValueError) as exc:
        yield _wrong(alias, exc, "E003")
    if options is not None:
        yield from _certificates(alias, options)


def _certificates(alias: conf.Alias, options: LinkOptions) -> Iterator[checks.CheckMessage]:
    try:
        tls_context(options)
    except (OSError, ssl.SSLError) as exc:
        files = [key for key in ("CA_FILE", "CLIENT_CERT_FILE", "CLIENT_KEY_FILE") if key in alias.given]
        for key in files[:1]:
            what = " and ".join(conf.key_name(alias.name, file) for file in files)
            reason = conf.in_settings(alias.name, exc.strerror or type(exc).__name__)
            text = f"cannot be used: {reason.removeprefix(conf.key_name(alias.name, key)).strip()}"
            yield error(alias, key, "E005", text, f"Check that what {what} names is there, readable and PEM.")


def _wrong(alias: conf.Alias, exc: Exception, number: str) -> checks.CheckMessage:
    key = _blamed(alias, str(exc))
    name = where = f"{conf.SETTING}[{alias.name!r}]"
    if key is not None:
        name, where = conf.key_name(alias.name, key), place(alias, key)
    text = conf.in_settings(alias.name, str(exc))
    return checks.Error(
        text if name in text else f"{name}: {text}",
        hint=f"Correct {where}.",
        obj=name,
        id=f"wove_ws.{number}",
    )


def _blamed(alias: conf.Alias, text: str) -> str | None:
    """Return the key that a message about ``executor_config`` is about, None if it does not say."""
    if text.startswith("websocket executor uses an insecure"):
        return "URL"
    for match in re.finditer(r"executor_config\.(\w+)|\b(delivery_\w+)|^(context_vars)\b", text):
        key = (match[1] or match[2] or match[3]).upper()
        if key in conf.KEYS:
            return key
    if header := re.search(r"\bheader '([^']*)'", text):
        given = alias.executor_config.get("headers") or ()
        own = header[1].lower() == "authorization" and "authorization" not in map(str.lower, given)
        return "SECURITY" if own else "HEADERS"
    return "SECURITY" if " security " in text else None


def _same_environment(alias: conf.Alias, other: str) -> checks.CheckMessage:
    return error(
        alias,
        "ENVIRONMENT",
        "E006",
        f"is that of the alias {other!r}, too.",
        "Give each alias a Wove environment of its own, or none.",
    )
