"""The backend for ``django.tasks`` of Django 6.

Owns: :class:`WoveWsBackend`. Never: does more than name what is Django's own.
"""

from __future__ import annotations

try:
    from django.tasks import base, exceptions, signals
    from django.tasks.backends.base import BaseTaskBackend
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "wove_ws_sync.contrib.django.tasks needs Django 6. For earlier versions: "
        "pip install django-tasks, and the backend "
        "wove_ws_sync.contrib.django.backport.WoveWsBackend",
        name=exc.name,
    ) from exc
from django.utils.json import normalize_json

from .task_backend import Kit, WoveWsTasks

__all__ = ["WoveWsBackend"]


class WoveWsBackend(WoveWsTasks, BaseTaskBackend):
    """``TASKS = {"default": {"BACKEND": "wove_ws_sync.contrib.django.tasks.WoveWsBackend"}}``."""

    kit = Kit(
        task_result=base.TaskResult,
        task_error=base.TaskError,
        task_context=base.TaskContext,
        status=base.TaskResultStatus,
        does_not_exist=exceptions.TaskResultDoesNotExist,
        normalize_json=normalize_json,
        enqueued=signals.task_enqueued,
        started=signals.task_started,
        finished=signals.task_finished,
    )
