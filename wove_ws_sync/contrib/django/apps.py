"""The app's configuration.

Owns: what happens when Django starts: checks and environments are registered. Never: connects.
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core.signals import setting_changed

from . import conf
from .executors import executors, register_environments

__all__ = ["WoveWsConfig"]


class WoveWsConfig(AppConfig):
    """``INSTALLED_APPS = ["wove_ws_sync.contrib.django", ...]``."""

    name = "wove_ws_sync.contrib.django"
    label = "wove_ws"
    verbose_name = "Wove over WebSockets"

    def ready(self) -> None:
        """Register what there is; nothing is connected."""
        from . import checks

        checks.register_all()
        register_environments()
        setting_changed.connect(_settings_changed, dispatch_uid="wove_ws_sync.contrib.django")


def _settings_changed(*, setting: str, **_: Any) -> None:
    """Begin anew after ``override_settings``: executors are made by what is set now."""
    if setting == conf.SETTING:
        executors.close()
        register_environments()
