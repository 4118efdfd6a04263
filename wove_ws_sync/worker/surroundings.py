"""What every task is surrounded by: a framework that has to be set up before, and tidied up after.

Owns: ``--around``, and that whatever fails there harms no task. Never: knows a framework; the module
that is named does.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

__all__ = ["Around", "awaited", "call", "use"]

_logger = logging.getLogger("wove_ws_sync.worker")
# Tells the processes of the engine what to use.
_VARIABLE = "WOVE_WS_TASKS_AROUND"


class Around(Protocol):
    """What ``--around`` names: an object, whose import may set up what tasks need.

    It may also have a coroutine function ``awaited(awaitable)``, which awaits what a task returned, on
    the loop that drives coroutines, and returns what comes of it.
    """

    def __call__(self) -> AbstractContextManager[object]:
        """Return what is entered in the thread of each task, before the task is loaded.

        It is left when the end of the task has been reported, and does not see its exception.
        """


_around: Any = None
_known = False


def use(name: str) -> None:
    """Surround tasks from now on by *name*, ``module:attribute``, in processes of an engine as well.

    "" is nothing. Raises ValueError for a name that is none.
    """
    global _around, _known
    _around, _known = _load(name) if name else None, True
    os.environ[_VARIABLE] = name
    if not name:
        del os.environ[_VARIABLE]


def call(function: Callable[..., None], *args: Any) -> None:
    """Call *function*, which raises nothing, in the surroundings of a task."""
    around = _current()
    if around is None:
        function(*args)
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(around())
        except BaseException:
            _logger.exception("What is around the tasks (--around) failed before a task.")
        function(*args)
        try:
            stack.close()
        except BaseException:
            _logger.exception("What is around the tasks (--around) failed after a task.")


async def awaited(awaitable: Awaitable[Any]) -> Any:
    """Await what a task returned, in its surroundings."""
    inner: Callable[[Awaitable[Any]], Awaitable[Any]] | None = getattr(_current(), "awaited", None)
    return await (awaitable if inner is None else inner(awaitable))


def _current() -> Any:
    """Return what is used; in a process of an engine that is what the service was told to."""
    global _around, _known
    if not _known:
        name = os.environ.get(_VARIABLE, "")
        _around, _known = _load(name) if name else None, True
    return _around


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must be module:attribute.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as exc:
        raise ValueError(f"{name!r} cannot be had: {exc}.") from exc
    if not callable(found) or inspect.isclass(found):
        raise ValueError(f"{name!r} must be a function, or an object that can be called.")
    return found
