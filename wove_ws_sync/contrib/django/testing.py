"""What a project's tests need: aliases that run in process, and a real worker service for them.

Owns: :class:`DjangoWorker` and the settings of both kinds of tests; the fixtures of pytest are in
``pytest_plugin``. Never: changes a setting for longer than it is asked to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.test import override_settings

from ...testing import LoopbackWorker
from . import conf

__all__ = ["DjangoWorker", "immediate"]

_AROUND = "wove_ws_sync.contrib.django.worker:around"
# How a worker service runs tasks is not how it is reached: these stay as they are.
_KEPT = ("ENVIRONMENT", "DELIVERY_", "CONTEXT_VARS", "RESULT_FORMAT")


def immediate() -> override_settings:
    """Return what has every alias run in process: a context manager, a decorator of tests and classes.

    ``submit()`` calls the function at once, in the same thread, so that it sees the transaction of the
    test; tasks of a weave run by Wove's executor "local", in threads. Environment variables
    are not looked at.
    """
    return override_settings(**{conf.SETTING: {name: _kept(name, BACKEND="immediate") for name in _names()}})


class DjangoWorker(LoopbackWorker):
    """A worker service for this project in a subprocess, as ``wove_ws_worker`` is; a context manager.

    Start it when the test databases are there: it uses those, and never the databases that
    the settings name. One in memory cannot be shared with it. Takes what LoopbackWorker takes.
    """

    def __init__(self, *, args: Sequence[str] = (), **options: Any) -> None:
        super().__init__(args=["--around", _AROUND, *args], **options)

    def start(self) -> DjangoWorker:
        """Start the service and wait until it listens; return self."""
        from .worker import TEST_DATABASES

        module = os.environ.get("DJANGO_SETTINGS_MODULE")  # overridden settings have no module
        if not module:
            raise ImproperlyConfigured(
                "DjangoWorker needs DJANGO_SETTINGS_MODULE: its process imports it, too."
            )
        names = {alias: str(connections[alias].settings_dict["NAME"]) for alias in connections}
        self._env["DJANGO_SETTINGS_MODULE"] = module
        self._env[TEST_DATABASES] = json.dumps(names)
        super().start()
        return self

    def __enter__(self) -> DjangoWorker:
        return self.start()

    def settings(self, alias: str = conf.DEFAULT_ALIAS, **keys: Any) -> override_settings:
        """Return what has *alias* use this service: a context manager, a decorator of tests and classes.

        *keys* are further keys of the alias, such as ``DELIVERY_TIMEOUT=1.0``.
        """
        reached = {**{key.upper(): value for key, value in self.config.items()}, **keys}
        changed = {name: dict(getattr(settings, conf.SETTING, {}).get(name, {})) for name in _names()}
        return override_settings(**{conf.SETTING: {**changed, alias: _kept(alias, **reached)}})


def _names() -> list[str]:
    return [*conf.aliases(), *({conf.DEFAULT_ALIAS} - set(conf.aliases()))]


def _kept(name: str, **others: Any) -> dict[str, Any]:
    values = getattr(settings, conf.SETTING, {}).get(name, {})
    kept = {key: value for key, value in values.items() if key.startswith(_KEPT)}
    return {**kept, **others, "VARIABLES": False}
