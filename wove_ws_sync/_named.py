"""Runs without pickles: a callable by its name, arguments and results as JSON.

Owns: what a callable is called on the wire, the ``run_task`` of ``result_format="json"``, the refusal
of pickles that come all the same. Never: pickles or unpickles, imports a module.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from . import payloads
from ._exact import JSONText, to_json
from .errors import PayloadError
from .frames import TERMINAL_EVENTS

__all__ = ["decode_event", "encode_frame", "named"]

_MAX_NAME = 4096
_SETTING = "executor_config.result_format='json'"


class _Named:
    """What :func:`named` returns. Immutable, and so thread-safe."""

    def __init__(self, name: str, parameters: tuple[str, ...]) -> None:
        self.wire_name = name
        self.__name__ = self.__qualname__ = name.rpartition(":")[2].rpartition(".")[2] or name
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(each, kind) for each in parameters])

    def __repr__(self) -> str:
        return f"named({self.wire_name!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"{self!r} stands for a task of the worker service and cannot be called here.")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} is called by its name, for which {_SETTING} is needed.")


def named(name: str, *parameters: str) -> Callable[..., Any]:
    """Return a callable that stands for the task *name* of a worker service.

    For ``submit``, ``map`` and weaves with ``executor_config["result_format"]`` "json", where the function
    is not importable on the host: it is in another language, say. *parameters* are the names of
    its parameters, by which a weave passes the results of other tasks. Calling it here raises
    RuntimeError. Raises TypeError or ValueError for what is no name of a task or a parameter. Thread-safe.
    """
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise TypeError("name must be a string of 1 to 4096 printable characters, as in named('resize').")
    return _Named(name, parameters)


def encode_frame(frame: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ``run_task`` with the name of its callable, and its arguments as JSON.

    Raises TypeError or ValueError for a callable without a name that can be imported, and for
    arguments that JSON does not carry exactly.
    """
    function: Any = frame["callable"]
    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = dict(frame.get("args") or {})
    while isinstance(function, functools.partial):
        positional, keywords = (*function.args, *positional), {**function.keywords, **keywords}
        function = function.func
    encoded = {key: value for key, value in frame.items() if key not in ("args", "positional")}
    encoded["callable"] = _name_of(function)
    if positional:
        items = [to_json(value, f"positional argument {at}") for at, value in enumerate(positional)]
        encoded["positional"] = JSONText(b"[%b]" % b",".join(items))
    encoded["args"] = JSONText(b"{%b}" % b",".join(_pair(*item) for item in keywords.items()))
    return encoded


def _pair(key: str, value: Any) -> bytes:
    if type(key) is not str:
        raise TypeError(f"Arguments have names of the type str, and one is a {type(key).__qualname__}.")
    return b"%b:%b" % (to_json(key, "a name"), to_json(value, f"argument {key!r}"))


def _name_of(function: Any) -> str:
    """Return ``module:qualname``, under which the same object is found."""
    if isinstance(function, _Named):
        return function.wire_name
    bound = isinstance(function, types.MethodType)
    if bound and not isinstance(function.__self__, type):
        raise _nameless(function, "it is a method of an instance")
    owner = function.__self__ if bound else function
    module, path = getattr(owner, "__module__", None), getattr(owner, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(path, str):
        raise _nameless(function, f"a {type(function).__qualname__} has none")
    path = f"{path}.{function.__name__}" if bound else path
    if module == "__main__":
        raise _nameless(function, "it is of the program itself, __main__")
    if "<" in path:
        kind = "a lambda" if path.endswith("<lambda>") else "defined inside a function"
        raise _nameless(function, f"it is {kind}")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    same = found is function or (bound and isinstance(found, types.MethodType) and found == function)
    if not same:
        raise _nameless(function, f"{module}:{path} is something else here")
    return f"{module}:{path}"


def _nameless(function: Any, reason: str) -> TypeError:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return TypeError(
        f"The callable {name} has no name under which a worker service could import it: {reason}. With "
        f"{_SETTING} pass a function of a module, or wove_ws_sync.named('name') for a task that "
        "the worker service knows by that name."
    )


def decode_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event with its plain ``result``, or its ``error`` and an ``exception`` made of that.

    A terminal event with a pickle becomes a ``task_error`` with a PayloadError of the kind
    PickleRefused; in other events a pickle is left out unread. Never raises for what a peer sent.
    """
    pickles = [key for key in event if key.endswith("_pickle")]
    if not pickles or event["type"] not in TERMINAL_EVENTS:
        return payloads.decode_event(event)
    fields = ", ".join(sorted(pickles))[:200]
    message = (
        f"The worker service answered run {event['run_id']!r} with a pickle ({fields}), "
        f"and this host takes none ({_SETTING}). Update or replace the worker service; only one that "
        "you trust like this program may send pickles, for result_format='pickle'."
    )
    error = {
        "kind": "PickleRefused",
        "message": message,
        "traceback": "",
        "retryable": False,
        "source": "payload",
    }
    kept = {key: value for key, value in event.items() if key not in pickles and key != "result"}
    return {**kept, "type": "task_error", "error": error, "exception": PayloadError(error)}
