"""Context variables travel with a callable, and leave no trace where it ran."""

from __future__ import annotations

import asyncio
import pickle
import sys
import types
from collections.abc import Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from wove_ws_sync import WebSocketExecutor
from wove_ws_sync._carry import Carrier, WithContext
from wove_ws_sync.options import LinkOptions

user: ContextVar[str] = ContextVar("user", default="nobody")


@pytest.fixture(autouse=True)
def module() -> Iterator[None]:
    """A module that can be imported by its name."""
    made: Any = types.ModuleType("carried_module")
    made.user, made.plain = user, 5
    sys.modules["carried_module"] = made
    yield
    del sys.modules["carried_module"]


def look(*more: str) -> tuple[str, ...]:
    return (user.get(), *more)


def wrapped(function: Any, value: str | None) -> Any:
    """Return *function* as it is sent from a context where the variable has *value*."""

    def wrap() -> Any:
        if value is not None:
            user.set(value)
        return Carrier(["carried_module:user"]).wrap(function)

    return copy_context().run(wrap)


def test_a_function_sees_the_value_and_its_caller_does_not() -> None:
    assert wrapped(look, "somebody")("more") == ("somebody", "more")
    assert user.get() == "nobody"


def test_a_coroutine_sees_it_too() -> None:
    """Wherever it is driven."""

    async def later() -> str:
        resumed = asyncio.Event()
        asyncio.get_running_loop().call_soon(resumed.set)
        await resumed.wait()
        return user.get()

    assert asyncio.run(wrapped(later, "somebody")()) == "somebody"
    assert user.get() == "nobody"


def test_what_is_not_set_does_not_travel() -> None:
    """The worker's own default counts then."""
    carried = wrapped(look, None)
    assert carried.values == () and carried() == ("nobody",)


def test_it_is_pickled_by_reference_and_shows_no_value() -> None:
    carried = pickle.loads(pickle.dumps(WithContext(len, (("carried_module:user", "secret"),))))
    assert type(carried) is WithContext and carried([1]) == 1
    assert "secret" not in repr(carried)


def test_nothing_asked_for_is_nothing_done() -> None:
    assert Carrier().wrap(look) is look


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("no_such_module:user", "cannot be imported"),
        ("carried_module:nothing", "no such attribute"),
        ("carried_module:plain", "not a ContextVar"),
    ],
)
def test_what_is_no_variable_is_told_on_either_side(name: str, error: str) -> None:
    """On the host when the executor is made, on the worker as one error of the run."""
    with pytest.raises((ImportError, TypeError), match=error):
        WebSocketExecutor("ws://127.0.0.1:1", context_vars=[name])
    with pytest.raises(RuntimeError, match=error) as caught:
        WithContext(look, ((name, 1),))()
    assert "Install that module on the worker" in str(caught.value)


@pytest.mark.parametrize("wrong", ["a:b", 5, None, [5], ["nocolon"], ["__main__:x"], ["a:"], ["a b:c"]])
def test_the_option_is_checked(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"executor_config\.context_vars"):
        LinkOptions.from_config({"url": "ws://127.0.0.1:1", "context_vars": wrong})


def test_the_option_is_not_the_links() -> None:
    """Executors that differ only in it share a connection."""
    url = "ws://127.0.0.1:1"
    one, two = (LinkOptions.from_config({"url": url, "context_vars": names}) for names in ([], ["m:v"]))
    assert one == two and hash(one) == hash(two)
    assert two.context_vars == ("m:v",)
