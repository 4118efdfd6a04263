"""What both backends of ``django.tasks`` share, that of Django itself and that of the backport.

Owns: how a task travels, runs in the worker service and is reported, and the results that this process
remembers. Never: stores anything for longer than the process lives.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone
from django.utils.connection import ConnectionDoesNotExist
from django.utils.crypto import get_random_string
from django.utils.module_loading import import_string

from ... import _fork
from ..._checks import unknown
from ...futures import RunFuture, WebSocketExecutor
from ...options import DeliveryOptions
from . import conf
from .executors import executors

__all__ = ["Kit", "WoveWsTasks", "run_task"]

_DELIVERY = {
    "DELIVERY_TIMEOUT",
    "DELIVERY_HEARTBEAT_SECONDS",
    "DELIVERY_ORPHAN_POLICY",
    "DELIVERY_MAX_IN_FLIGHT",
}
_OPTIONS = _DELIVERY | {"ALIAS", "MAX_RESULTS"}
_MAX_RESULTS = 1000


class Kit(NamedTuple):
    """The classes and signals that Django and the backport each have of their own."""

    task_result: Any
    task_error: Any
    task_context: Any
    status: Any
    does_not_exist: type[Exception]
    normalize_json: Any
    enqueued: Any
    started: Any
    finished: Any


class WoveWsTasks:
    """Run tasks on the worker service of an alias of ``WOVE_WS``. Mixed into a ``BaseTaskBackend``.

    ``OPTIONS`` may have ALIAS (default "default"), MAX_RESULTS (how many results this process
    remembers, 1000) and the delivery settings of tasks: no deadline by default, and a task goes on when the
    process that enqueued it ends.
    """

    kit: Kit
    alias: str
    options: Any
    task_class: Any

    supports_async_task = True
    supports_defer = False
    supports_get_result = False  # other processes know nothing of a result
    supports_priority = False

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        """Hand the task to the worker service; raise what the connection raises if it cannot be reached."""
        self.validate_task(task)  # type: ignore[attr-defined]  # of BaseTaskBackend
        kit = self.kit
        result = kit.task_result(
            task=task,
            id=get_random_string(32),
            status=kit.status.READY,
            enqueued_at=timezone.now(),
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        executor = self._executor()
        executor.connect()
        kit.enqueued.send(type(self), task_result=result)
        future = executor.submit(
            run_task, f"{type(self).__module__}.{type(self).__qualname__}", _order(result)
        )
        _results.keep(result, future, int(self.options.get("MAX_RESULTS", _MAX_RESULTS)))
        return copy.deepcopy(result)

    def get_result(self, result_id: str) -> Any:
        """Return the result of a task that this process enqueued, while it remembers it."""
        found = _results.find(result_id)
        if found is None or found[0].backend != self.alias:
            raise self.kit.does_not_exist(result_id)
        result, future = copy.deepcopy(found[0]), found[1]
        if not future.done():
            if future.running():
                _set(result, status=self.kit.status.RUNNING)
            return result
        try:
            _report(self.kit, result, future.result())
        except BaseException as exc:  # the run itself was lost, or cancelled
            _set(result, status=self.kit.status.FAILED, finished_at=timezone.now())
            result.errors.append(_error(self.kit, exc))
        return result

    def check(self, **_: Any) -> list[checks.CheckMessage]:
        """Check the options."""
        return list(self._faults())

    def _faults(self) -> Iterator[checks.CheckMessage]:
        where = f"TASKS[{self.alias!r}]['OPTIONS']"
        for key in self.options:
            if key not in _OPTIONS:
                yield checks.Error(
                    f"{where} has no key {key!r}.", hint=unknown(key, _OPTIONS), obj=where, id="wove_ws.E020"
                )
        try:
            conf.read(self._service())  # no executor, for which a build has no secret
        except (ConnectionDoesNotExist, ImproperlyConfigured) as exc:
            hint = f"Set {where}['ALIAS'] to an alias of {conf.SETTING}, and correct that alias."
            yield checks.Error(str(exc), hint=hint, obj=where, id="wove_ws.E021")
        try:
            DeliveryOptions(**self._delivery())
        except (TypeError, ValueError) as exc:
            hint = f"Correct {where}. Its delivery settings are those of an alias."
            yield checks.Error(f"{where}: {exc}", hint=hint, obj=where, id="wove_ws.E021")

    def _executor(self) -> WebSocketExecutor:
        return executors[self._service()].with_options(**self._delivery())

    def _service(self) -> str:
        return str(self.options.get("ALIAS", conf.DEFAULT_ALIAS))

    def _delivery(self) -> dict[str, Any]:
        given = {key.lower(): self.options[key] for key in _DELIVERY if key in self.options}
        return {"delivery_timeout": None, "delivery_orphan_policy": "detach", **given}


def run_task(backend: str, order: dict[str, Any]) -> dict[str, Any]:
    """Run a task in the worker service and return what became of it; sends the signals there."""
    sender = import_string(backend)
    kit: Kit = sender.kit
    task = _task(sender.task_class, order)
    result = kit.task_result(
        task=task,
        status=kit.status.RUNNING,
        started_at=timezone.now(),
        last_attempted_at=timezone.now(),
        finished_at=None,
        errors=[],
        worker_ids=[f"{socket.gethostname()}:{os.getpid()}"],
        **order["result"],
    )
    kit.started.send(sender=sender, task_result=result)
    first = [kit.task_context(task_result=result)] if task.takes_context else []
    value = None
    try:
        value = kit.normalize_json(task.call(*first, *result.args, **result.kwargs))
        _set(result, status=kit.status.SUCCESSFUL, _return_value=value)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # be it SystemExit, as in Django's own backends
        result.errors.append(_error(kit, exc))
        _set(result, status=kit.status.FAILED)
    _set(result, finished_at=timezone.now())
    kit.finished.send(sender=sender, task_result=result)
    return {
        "status": str(result.status),
        "value": value,
        "started_at": result.started_at,
        "finished_at": result.finished_at,
        "errors": [(error.exception_class_path, error.traceback) for error in result.errors],
        "worker_ids": result.worker_ids,
    }


def _task(kind: Any, order: dict[str, Any]) -> Any:
    """Return the task of an *order*; what this version of Django asks for besides is for who enqueues it."""
    found = import_string(order["path"])
    known = {"func": getattr(found, "func", found), **order["task"]}
    needed = (field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
    return kind(**{**dict.fromkeys(needed), **known})


def _order(result: Any) -> dict[str, Any]:
    """Return what a worker service needs to know, without objects of a version of Django."""
    task = result.task
    named = ("priority", "queue_name", "backend", "takes_context")
    return {
        "path": task.module_path,
        "task": {name: getattr(task, name) for name in named},
        "result": {
            name: getattr(result, name) for name in ("id", "args", "kwargs", "backend", "enqueued_at")
        },
    }


def _report(kit: Kit, result: Any, outcome: dict[str, Any]) -> None:
    started: datetime.datetime = outcome["started_at"]
    _set(
        result,
        status=kit.status(outcome["status"]),
        started_at=started,
        last_attempted_at=started,
        finished_at=outcome["finished_at"],
        _return_value=outcome["value"],
        errors=[
            kit.task_error(exception_class_path=path, traceback=text) for path, text in outcome["errors"]
        ],
        worker_ids=list(outcome["worker_ids"]),
    )


def _error(kit: Kit, exc: BaseException) -> Any:
    path = f"{type(exc).__module__}.{type(exc).__qualname__}"
    return kit.task_error(exception_class_path=path, traceback="".join(traceback.format_exception(exc)))


def _set(result: Any, **values: Any) -> None:
    """Change a result, which is frozen for others."""
    for name, value in values.items():
        object.__setattr__(result, name, value)


class _Results:
    """The results of this process, the newest of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _kept
        self._kept: collections.OrderedDict[str, tuple[Any, RunFuture[Any]]] = collections.OrderedDict()
        _fork.forget_in_child(self)

    def abandon_after_fork(self) -> None:
        """Begin anew in a forked child: the tasks are its parent's."""
        self._lock = threading.Lock()
        self._kept = collections.OrderedDict()

    def keep(self, result: Any, future: RunFuture[Any], most: int) -> None:
        with self._lock:
            self._kept[result.id] = (result, future)
            while len(self._kept) > most:
                self._kept.popitem(last=False)

    def find(self, result_id: str) -> tuple[Any, RunFuture[Any]] | None:
        with self._lock:
            return self._kept.get(result_id)


_results = _Results()
