"""Context variables that travel with a run.

Owns: the names that were asked for, the values at the moment of submission, and setting them
around the task on the worker. Never: looks at a connection. It is the one module of this
package that a worker must be able to import for such runs.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

__all__ = ["Carrier", "WithContext"]

_Values = tuple[tuple[str, Any], ...]


class Carrier:
    """Give callables the values that the named context variables have. Thread-safe.

    *names* are ``"module:attribute"``. Raises ImportError or TypeError if one of them is no
    context variable here.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._found = [(name, _find(name)) for name in self.names]

    def wrap(self, function: Any) -> Any:
        """Return *function* with the values that are set in the caller's context."""
        if not self._found:
            return function
        context = contextvars.copy_context()
        values = tuple((name, context[variable]) for name, variable in self._found if variable in context)
        return WithContext(function, values)

    def wrap_frame(self, frame: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a ``run_task`` frame whose callable has them."""
        return {**frame, "callable": self.wrap(frame["callable"])} if self._found else frame


class WithContext:
    """A callable that runs another one with context variables set; pickled by reference to this class."""

    def __init__(self, function: Callable[..., Any], values: _Values) -> None:
        self.function = function
        self.values = values

    def __reduce__(self) -> Any:
        return WithContext, (self.function, self.values)

    def __repr__(self) -> str:
        return f"<WithContext {[name for name, _ in self.values]} {self.function!r}>"  # values may be secrets

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the function in a context of its own; an awaitable that it returns has the values too."""
        variables = [(_find_there(name), value) for name, value in self.values]
        call = functools.partial(self.function, *args, **kwargs)
        result = contextvars.copy_context().run(_call, variables, call)
        return _await(variables, result) if inspect.isawaitable(result) else result


def _call(variables: list[tuple[Any, Any]], call: Callable[[], Any]) -> Any:
    for variable, value in variables:
        variable.set(value)
    return call()


async def _await(variables: list[tuple[Any, Any]], awaitable: Awaitable[Any]) -> Any:
    for variable, value in variables:
        variable.set(value)
    return await awaitable


def _find(name: str) -> contextvars.ContextVar[Any]:
    module, _, path = name.partition(":")
    try:
        found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except AttributeError as exc:
        raise ImportError(f"context_vars names {name!r}, and there is no such attribute: {exc}.") from exc
    except ImportError as exc:
        raise ImportError(f"context_vars names {name!r}, which cannot be imported: {exc}.") from exc
    if not isinstance(found, contextvars.ContextVar):
        raise TypeError(f"context_vars names {name!r}, which is a {type(found).__name__}, not a ContextVar.")
    return found


def _find_there(name: str) -> contextvars.ContextVar[Any]:
    try:
        return _find(name)
    except (ImportError, TypeError) as exc:
        raise RuntimeError(
            f"The host sends the context variable {name!r} with this run, and the worker does not have it: "
            f"{exc} Install that module on the worker, or leave it out of context_vars."
        ) from exc
