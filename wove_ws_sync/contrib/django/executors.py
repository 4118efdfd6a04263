"""One executor for each alias and process, made when it is first asked for.

Owns: the shared executors, what ends them, and the Wove environments that aliases stand for. Never:
connects; an executor does on its first use.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from typing import Any, cast

import wove
from django.core.exceptions import ImproperlyConfigured
from django.utils.connection import ConnectionProxy
from wove.runtime import runtime

from ... import _fork
from ...aio import AsyncWebSocketEnvironmentExecutor
from ...futures import WebSocketExecutor
from . import conf
from .immediate import ImmediateExecutor

__all__ = ["Executors", "executor", "executors", "register_environments"]


class Executors:
    """The executors of this process by alias, as ``caches`` is for caches. Thread-safe.

    ``executors["default"]`` is the same object in all threads, until the settings change or somebody
    shuts it down: the next one who asks gets a new one. In a forked child it dials its own connection.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards _made; held while an executor is made, which does no I/O
        self._made: dict[str, WebSocketExecutor] = {}
        _fork.forget_in_child(self)

    def __repr__(self) -> str:
        return f"<Executors {', '.join(sorted(self._made)) or 'none made'}>"

    def abandon_after_fork(self) -> None:
        """Have a fresh lock in a forked child; the executors know by themselves whose they are."""
        self._lock = threading.RLock()

    def __getitem__(self, alias: str) -> WebSocketExecutor:
        """Return the executor of *alias*; raise ConnectionDoesNotExist or ImproperlyConfigured."""
        _fork.check()
        made = self._made.get(alias)
        if made is not None and not made.is_shut:
            return made
        with self._lock:
            made = self._made.get(alias)
            if made is None or made.is_shut:
                made = self._made[alias] = _make(conf.read(alias))
            return made

    def __iter__(self) -> Iterator[str]:
        return iter(conf.aliases())

    def __contains__(self, alias: object) -> bool:
        return alias in conf.aliases()

    def close(self, wait: bool = False) -> None:
        """Shut down every executor that was made: runs on their way go on, what comes gets new ones."""
        _fork.check()
        with self._lock:
            made, self._made = list(self._made.values()), {}
        for each in made:
            each.shutdown(wait=wait)


def _make(alias: conf.Alias) -> WebSocketExecutor:
    try:
        if alias.backend == "immediate":
            config = alias.executor_config
            return ImmediateExecutor(
                config.get("context_vars") or (), result_format=config.get("result_format", "pickle")
            )
        if alias.executor_config.get("url") is None:  # the core would take WOVE_WS_URL and its secret
            url = conf.key_name(alias.name, "URL")
            raise ImproperlyConfigured(f"{url} is not set: say where the worker service is.")
        return WebSocketExecutor(**alias.executor_config, **alias.delivery)
    except (TypeError, ValueError, RuntimeError, ImportError) as exc:
        raise ImproperlyConfigured(conf.in_settings(alias.name, str(exc))) from exc


executors = Executors()
#: The executor of the alias "default", looked up anew at each use.
executor: WebSocketExecutor = cast(
    WebSocketExecutor, ConnectionProxy(cast(Any, executors), conf.DEFAULT_ALIAS)
)

atexit.register(executors.close)

_registered: dict[str, dict[str, Any] | None] = {}


def register_environments() -> None:
    """Make Wove environments of the aliases that name one, in place of those made before.

    An alias whose setting is wrong is left out: the system checks tell what is wrong with it.
    """
    for name, before in _registered.items():
        _replace_environment(name, before)
    _registered.clear()
    for alias in _readable():
        if alias.environment is not None and alias.environment not in _registered:
            _registered[alias.environment] = runtime.environments.get(alias.environment)
            _replace_environment(alias.environment, _definition(alias))


def _replace_environment(name: str, definition: dict[str, Any] | None) -> None:
    """Have Wove know *name* by *definition* and nothing of an earlier one, which it would merge."""
    runtime.environments.pop(name, None)
    wove.config(environments={} if definition is None else {name: definition})


def _readable() -> Iterator[conf.Alias]:
    try:
        names = conf.aliases()
    except ImproperlyConfigured:
        return
    for name in names:
        try:
            yield conf.read(name)
        except ImproperlyConfigured:
            continue


def _definition(alias: conf.Alias) -> dict[str, Any]:
    if alias.backend == "immediate":
        return {"executor": "local"}
    return {
        "executor": AsyncWebSocketEnvironmentExecutor(),
        "executor_config": dict(alias.executor_config),
        **alias.delivery,
    }
