"""Tasks by their names: what a name stands for, and which names a service with a registry takes.

Owns: ``--registry``, the look-up of a task in the process that executes it, the refusals. Never:
unpickles, calls a task.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .commands import RunTask
from .events import service_error

__all__ = ["Registry", "UnknownTask", "call_of"]

_SHOWN = 200


class UnknownTask(LookupError):
    """A name for which there is no task here."""


class Registry:
    """The callables that *modules* list in their ``__all__``, and nothing else.

    Each has up to three names: ``module:name``; ``name`` alone; the same by the module that defines it,
    which is what a host with that module sends, if that names no other task.

    Raises ValueError for a module that cannot be imported or has no ``__all__``, and for two tasks that
    are listed by the same name.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        if isinstance(modules, str):
            raise TypeError("registry must be a list of names of modules.")
        self.modules = tuple(modules)
        self._paths: dict[str, str] = {}
        tasks: dict[str, Any] = {}
        for module in self.modules:
            for name, task in _listed(module):
                for alias in (f"{module}:{name}", name):
                    if tasks.setdefault(alias, task) is not task:
                        both = f"{self._paths[alias]} and {module}:{name}"
                        raise ValueError(f"The registry has two tasks called {alias!r}: {both}.")
                    self._paths.setdefault(alias, f"{module}:{name}")
        self.count = len(set(self._paths.values()))
        self._add_homes(tasks)

    def __repr__(self) -> str:
        return f"<Registry {', '.join(self.modules)} tasks={self.count}>"

    def _add_homes(self, tasks: dict[str, Any]) -> None:
        """Add the names by which tasks know themselves; a decorator may give its own to several."""
        homes: dict[str, dict[int, str]] = {}
        for path in dict.fromkeys(self._paths.values()):
            task = tasks[path]
            home, name = getattr(task, "__module__", None), getattr(task, "__qualname__", None)
            if isinstance(home, str) and isinstance(name, str):
                homes.setdefault(f"{home}:{name}", {}).setdefault(id(task), path)
        for alias, paths in homes.items():
            if len(paths) == 1:
                self._paths.setdefault(alias, *paths.values())

    def admit(self, command: RunTask, counters: Counter[str]) -> RunTask | bytes:
        """Return the command with the one path of its task, or the event that refuses it."""
        if not command.name:
            counters["refused_pickle"] += 1
            message = (
                "This worker service takes calls by name only (--registry) and has not looked at the pickle. "
                "Set executor_config.result_format='json' on a host of wove_ws_sync."
            )
            return self._refusal(command, "PickleRefused", message)
        path = self._paths.get(command.name)
        if path is None:
            counters["unknown_task"] += 1
            message = f"The registry of this worker service has no task {command.name[:_SHOWN]!r}."
            return self._refusal(command, "UnknownTask", message)
        return dataclasses.replace(command, name=path)

    def _refusal(self, command: RunTask, kind: str, message: str) -> bytes:
        return service_error(command.run_id, command.task_id, kind, message, retryable=False, started=False)


def _listed(module: str) -> list[tuple[str, Any]]:
    """Return what the module offers that can be called, by name."""
    try:
        imported = importlib.import_module(module)
    except Exception as exc:  # the module's own code may raise anything
        raise ValueError(f"The registry {module!r} cannot be imported: {type(exc).__name__}: {exc}.") from exc
    names = getattr(imported, "__all__", None)
    if not isinstance(names, list | tuple):
        raise ValueError(f"The registry {module!r} has no __all__, the list of the names of its tasks.")
    missing = [name for name in names if not isinstance(name, str) or not hasattr(imported, name)]
    if missing:
        raise ValueError(f"The registry {module!r} lists {missing[0]!r} in __all__ and does not have it.")
    tasks = [(name, getattr(imported, name)) for name in names if callable(getattr(imported, name))]
    if not tasks:
        raise ValueError(f"The registry {module!r} lists nothing in __all__ that can be called.")
    return tasks


def call_of(command: RunTask) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    """Return the task that the command names, its positional arguments and the others.

    Imports the module. Raises UnknownTask if there is no such task here, and ValueError or
    RecursionError for arguments that cannot be read.
    """
    module, _, path = command.name.partition(":")
    if not module or not path:
        raise UnknownTask(f"{command.name[:_SHOWN]!r} is not of the form module:name")
    try:
        found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except Exception as exc:
        raise UnknownTask(f"{type(exc).__name__}: {str(exc)[:1024]}") from exc
    if not callable(found):
        raise UnknownTask(f"it is a {type(found).__name__}, which cannot be called")
    positional, arguments = json.loads(command.arguments)
    return found, positional, arguments
