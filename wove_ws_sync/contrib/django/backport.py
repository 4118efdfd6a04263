"""The backend for ``django_tasks``, the backport of ``django.tasks`` (``pip install django-tasks``).

Owns: :class:`WoveWsBackend`. Never: does more than name what is the backport's own.
"""

from __future__ import annotations

try:
    from django_tasks import base, exceptions, signals
    from django_tasks.backends.base import BaseTaskBackend
    from django_tasks.utils import normalize_json
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "wove_ws_sync.contrib.django.backport needs the package 'django-tasks', which is not installed: "
        "pip install django-tasks",
        name=exc.name,
    ) from exc

from .task_backend import Kit, WoveWsTasks

__all__ = ["WoveWsBackend"]


class WoveWsBackend(WoveWsTasks, BaseTaskBackend):
    """``TASKS = {"default": {"BACKEND": "wove_ws_sync.contrib.django.backport.WoveWsBackend"}}``."""

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
