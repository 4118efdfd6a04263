"""Calls by name: what a callable is called, what a frame becomes, what a registry takes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import operator
import sys
import time
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import cloudpickle
import named_tasks
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scripted_worker import SONGS, Canary, pickled

from wove_ws_sync import PayloadError, WebSocketExecutor, named
from wove_ws_sync._named import decode_event, encode_frame
from wove_ws_sync.frames import FEATURES, encode, offered
from wove_ws_sync.options import LinkOptions
from wove_ws_sync.worker import commands
from wove_ws_sync.worker.commands import MalformedRun, RunTask
from wove_ws_sync.worker.registry import Registry, UnknownTask, call_of


def nested() -> Callable[[], None]:
    def inner() -> None:
        """Have no name that anybody could import."""

    return inner


class Callable_:
    def __call__(self) -> None:
        """Be called."""


@functools.wraps(named_tasks.add)
def disguised(*args: Any) -> Any:
    """Have the name of another function."""


def frame_of(function: Any, **args: Any) -> dict[str, Any]:
    """Return the named frame of a call, as it arrives."""
    frame = {"type": "run_task", "run_id": "r", "task_id": "t", "callable": function, "args": args}
    sent: dict[str, Any] = json.loads(encode(encode_frame(frame)))
    return sent


# On the host


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda: 1, "it is a lambda"),
        (nested(), "it is defined inside a function"),
        (named_tasks.Box().double.__get__, "method-wrapper"),
        ([].append, "list.append"),
        (Callable_(), "a Callable_ has none"),
        (disguised, "named_tasks:add is something else here"),
        (types.MethodType(named_tasks.add, 5), "it is a method of an instance"),
        (functools.partial(lambda: 1), "it is a lambda"),
        ("named_tasks:add", "a str has none"),
        (None, "a NoneType has none"),
    ],
)
def test_a_callable_without_a_name_is_refused_with_the_way_out(function: Any, said: str) -> None:
    with pytest.raises(TypeError) as caught:
        frame_of(function)
    assert said in str(caught.value)
    assert "executor_config.result_format='json'" in str(caught.value)
    assert "wove_ws_sync.named('name')" in str(caught.value)


def test_a_function_of_the_program_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker service has another __main__."""
    monkeypatch.setattr(named_tasks.add, "__module__", "__main__")
    with pytest.raises(TypeError, match="it is of the program itself, __main__"):
        frame_of(named_tasks.add)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (named_tasks.add, "named_tasks:add"),
        (named_tasks.Box, "named_tasks:Box"),
        (named_tasks.Box.double, "named_tasks:Box.double"),
        (named_tasks.Box.name, "named_tasks:Box.name"),
        (time.time, "time:time"),
        (operator.add, "_operator:add"),
        (len, "builtins:len"),
        (named("resize"), "resize"),
        (named("café/größer:x.y z"), "café/größer:x.y z"),
    ],
)
def test_names(function: Any, name: str) -> None:
    """The name under which pickle would find it, or the one that was given."""
    assert frame_of(function)["callable"] == name


def test_positional_arguments_are_taken_out_of_partials() -> None:
    """As a call of the partial would have them."""
    inner = functools.partial(named_tasks.add, 1, b=2)
    sent = frame_of(functools.partial(functools.partial(inner, "x"), c=[]), b=3)
    assert (sent["positional"], sent["args"]) == ([1, "x"], {"b": 3, "c": []})
    assert "positional" not in frame_of(named_tasks.add, a=1)
    assert not {key for key in sent if key.endswith("_pickle")}


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (((1,),), TypeError, "positional argument 0 is a tuple"),
        (([1, {"a": b""}],), TypeError, "positional argument 0[1]['a'] is a bytes"),
        ((1, math.inf), ValueError, "positional argument 1 is inf"),
    ],
)
def test_an_argument_that_json_does_not_carry_is_named(
    arguments: tuple[Any, ...], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind) as caught:
        frame_of(functools.partial(named_tasks.echo, *arguments))
    assert said in str(caught.value)
    with pytest.raises(kind, match="argument 'image'"):
        frame_of(named_tasks.echo, image=arguments[-1])


@pytest.mark.parametrize("key", [3, None, type("Name", (str,), {})("x")])
def test_a_name_of_an_argument_is_text(key: Any) -> None:
    """A frame of somebody's own may hold anything."""
    frame = {"callable": named_tasks.echo, "args": {key: 1}}
    with pytest.raises(TypeError, match="of the type str"):
        encode_frame(frame)


def test_named_stands_for_a_task_of_the_worker_service_only() -> None:
    """Not called here, not pickled; a weave sees name and parameters."""
    resize = named("images:jobs.resize", "image", "width")
    assert repr(resize) == "named('images:jobs.resize')" and resize.__name__ == "resize"
    assert list(inspect.signature(resize).parameters) == ["image", "width"]
    assert list(inspect.signature(named("x")).parameters) == []
    assert named("odd.").__name__ == "odd."
    with pytest.raises(RuntimeError, match="cannot be called here"):
        resize(1, 2)
    with pytest.raises(TypeError, match="result_format='json'"):
        cloudpickle.dumps(resize)
    for wrong in ("", 5, None, "a\nb", "x" * 4097):
        with pytest.raises(TypeError, match="name must be a string"):
            named(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a valid parameter name"):
        named("x", "not an identifier")


@pytest.mark.parametrize("field", ["result", "exception", "error", "callable", "args", "future"])
@pytest.mark.parametrize("kind", ["task_result", "task_error", "task_cancelled"])
def test_an_event_that_ends_a_run_with_a_pickle_is_refused_unread(kind: str, field: str) -> None:
    """Also beside a plain value, and whatever the field is called."""
    SONGS.clear()
    event = {"type": kind, "run_id": "r", "task_id": "t", "result": 1, "error": {"message": "x"}}
    decoded = decode_event({**event, f"{field}_pickle": pickled(Canary("sang"))})
    assert SONGS == []
    error = decoded["exception"]
    assert (decoded["type"], type(error)) == ("task_error", PayloadError)
    assert error.payload["kind"] == "PickleRefused"
    assert f"({field}_pickle)" in str(error) and "result_format='json'" in str(error)
    assert decoded["error"] == error.payload and "result" not in decoded
    assert not [key for key in decoded if key.endswith("_pickle")]


@pytest.mark.parametrize("kind", ["task_started", "heartbeat", "log", "progress"])
def test_a_pickle_in_another_event_is_left_out_unread(kind: str) -> None:
    SONGS.clear()
    decoded = decode_event({"type": kind, "run_id": "r", "result_pickle": pickled(Canary("sang"))})
    assert decoded == {"type": kind, "run_id": "r"} and SONGS == []


@pytest.mark.parametrize("odd", [None, 5, [], "text", {}, {"message": 5}, {"traceback": ["x"]}])
def test_whatever_a_plain_error_is_it_can_be_raised(odd: Any) -> None:
    error = decode_event({"type": "task_error", "run_id": "r", "error": odd, "exception": odd})["exception"]
    assert isinstance(error, Exception) and isinstance(str(error), str)


def test_the_extension_is_offered_by_those_who_need_it() -> None:
    assert offered("json").split(",") == list(FEATURES)
    assert "json" not in offered("pickle").split(",")


def test_settings_that_do_not_go_together() -> None:
    """Values of context variables are pickled; a chunk is a function without a name."""
    with pytest.raises(ValueError, match=r"context_vars needs result_format='pickle'.*leave it out"):
        LinkOptions.from_config({"url": "ws://h", "result_format": "json", "context_vars": ["m:v"]})
    with (
        WebSocketExecutor("ws://127.0.0.1:1", result_format="json") as pool,
        pytest.raises(ValueError, match="chunksize must be 1"),
    ):
        pool.map(named_tasks.add, [1], chunksize=2)


# On the worker


def read(**fields: Any) -> Any:
    return commands.read(json.dumps({"type": "run_task", "run_id": "r", "task_id": "t", **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"callable": 5}, "callable of run_task must be a name"),
        ({"callable": None}, "callable of run_task must be a name"),
        ({"callable": ""}, "callable of run_task must be a name"),
        ({"callable": "x" * 4097}, "callable of run_task must be a name"),
        ({"callable": "m:f", "args": [1]}, "args of run_task must be an object"),
        ({"callable": "m:f", "args": "{}"}, "args of run_task must be an object"),
        ({"callable": "m:f", "positional": {}}, "positional a list"),
        ({"callable": "m:f", "positional": 5}, "positional a list"),
        ({"callable": "m:f", "args_pickle": "eA=="}, "needs a callable_pickle"),
        ({"callable": "m:f", "delivery": {"delivery_idempotency_key": 5}}, "delivery_idempotency_key"),
        ({}, "needs a callable_pickle"),
    ],
)
def test_a_malformed_call_by_name_is_an_error_of_its_run(fields: dict[str, Any], said: str) -> None:
    found = read(**fields)
    assert isinstance(found, MalformedRun) and said in found.message


def test_a_call_by_name_is_read() -> None:
    found = read(callable="m:f", args={"a": [1]}, positional=[None, "é"], delivery={})
    assert isinstance(found, RunTask) and (found.name, found.callable_pickle) == ("m:f", "")
    assert json.loads(found.arguments) == [[None, "é"], {"a": [1]}]
    assert json.loads(read(callable="m:f", args=None, positional=None).arguments) == [[], {}]
    both = read(callable="m:f", callable_pickle="eA==")
    assert (both.name, both.callable_pickle) == ("", "eA=="), "a pickle counts as one, to be refused"


@pytest.mark.parametrize(
    "name",
    [
        "add",
        "named_tasks",
        "named_tasks:",
        ":add",
        "nowhere:f",
        "named_tasks:nothing",
        "named_tasks:VERSION",
    ],
)
def test_a_name_without_a_task_is_unknown(name: str) -> None:
    with pytest.raises(UnknownTask):
        call_of(RunTask("r", "t", "", None, None, "best_effort", name=name, arguments="[[],{}]"))


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> str:
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return name


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({}, "has no __all__"),
        ({"__all__": "add"}, "has no __all__"),
        ({"__all__": []}, "lists nothing in __all__ that can be called"),
        ({"__all__": ["x"], "x": 5}, "lists nothing in __all__ that can be called"),
        ({"__all__": ["gone"]}, "lists 'gone' in __all__ and does not have it"),
        ({"__all__": [5]}, "lists 5 in __all__"),
        ({"__all__": ["add"], "add": lambda: 1}, "two tasks called 'add': named_tasks:add and odd:add"),
    ],
)
def test_a_module_that_is_no_registry_is_refused(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Registry(["named_tasks", module(monkeypatch, "odd", **names)])
    assert said in str(caught.value)


def test_a_module_that_cannot_be_imported_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'nowhere\.at_all' cannot be imported: ModuleNotFoundError"):
        Registry(["nowhere.at_all"])
    with pytest.raises(TypeError, match="a list of names"):
        Registry("named_tasks")


def admitted(registry: Registry, name: str) -> str:
    """Return what the name stands for, or the kind of the refusal."""
    found = registry.admit(RunTask("r", "t", "", None, None, "best_effort", name=name), Counter())
    if isinstance(found, RunTask):
        return found.name
    kind: str = json.loads(found)["error"]["kind"]
    return kind


def test_only_what_is_listed_is_taken() -> None:
    registry = Registry(["named_tasks"])
    for name in (
        "named_tasks:unlisted",
        "unlisted",
        "named_tasks:VERSION",
        "named_tasks:Box.double",
        "named_tasks:os.mkdir",
        "named_tasks:add.__globals__",
        "named_tasks:__builtins__",
        "named_tasks:",
        "os:mkdir",
        "builtins:eval",
        " add",
        "x" * 4096,
    ):
        assert admitted(registry, name) == "UnknownTask", name
    assert admitted(registry, "add") == admitted(registry, "named_tasks:add") == "named_tasks:add"
    assert admitted(registry, "Box") == "named_tasks:Box"
    assert registry.count == 12 and "named_tasks" in repr(registry)


def test_tasks_that_know_themselves_by_one_name_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decorator may leave its own name on each, or the name of the function that it wraps."""

    def logged(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            return function(*args)

        return wrapper

    tasks = {"one": logged(abs), "two": logged(len), "cached": functools.lru_cache(named_tasks.add)}
    names = ["one", "two", "cached", "add"]
    odd = module(monkeypatch, "odd", __all__=names, add=named_tasks.add, **tasks)
    registry = Registry([odd])
    assert [admitted(registry, name) for name in names] == [f"odd:{name}" for name in names]
    assert admitted(registry, "named_tasks:add") == "UnknownTask"  # which of the two is not to be guessed
    assert registry.count == 4


def test_a_task_is_known_by_the_module_that_lists_it_and_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host sends the latter; the path is of the former, as the other may not be meant to be used."""
    front = module(monkeypatch, "front", __all__=["plus"], plus=named_tasks.add)
    registry = Registry([front])
    assert {admitted(registry, name) for name in ("plus", "front:plus", "named_tasks:add")} == {"front:plus"}
    assert admitted(registry, "add") == "UnknownTask"
    assert Registry([front, "named_tasks"]).count == 13, "the same task may be listed twice"


def test_a_pickle_is_refused_and_counted() -> None:
    counters: Counter[str] = Counter()
    event = Registry(["named_tasks"]).admit(RunTask("r", "t", "eA==", None, None, "best_effort"), counters)
    assert isinstance(event, bytes)
    error = json.loads(event)["error"]
    assert (error["kind"], error["retryable"], error["started"]) == ("PickleRefused", False, False)
    assert "result_format='json'" in error["message"] and counters == {"refused_pickle": 1}


# Whatever comes

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)
keys = st.sampled_from(
    ["callable", "args", "positional", "callable_pickle", "args_pickle", "delivery", "attempt", "task_id"]
)


@given(st.dictionaries(keys, values | st.just("named_tasks:add")))
def test_any_command_is_read_and_admitted_or_refused(fields: dict[str, Any]) -> None:
    """Nothing raises, and a pickle never gets through."""
    found = commands.read(json.dumps({"task_id": "t", **fields, "type": "run_task", "run_id": "r"}))
    assert isinstance(found, RunTask | MalformedRun)
    if isinstance(found, RunTask):
        end = Registry(["named_tasks"]).admit(found, Counter())
        if isinstance(end, RunTask):
            assert end.name and not (end.callable_pickle or end.args_pickle)
            call_of(end)
        else:
            assert json.loads(end)["error"]["kind"] in ("PickleRefused", "UnknownTask")


@given(st.text(max_size=12) | st.from_regex(r"named_tasks[:.]{1,2}[a-zA-Z_.]{0,12}", fullmatch=True))
def test_any_name_is_looked_up_or_unknown(name: str) -> None:
    """Also one that no import and no attribute could have."""
    assume(":" not in name or name.startswith("named_tasks"))  # a module that is there would be imported
    with contextlib.suppress(UnknownTask):
        assert callable(call_of(RunTask("r", "t", "", None, None, "x", name=name, arguments="[[],{}]"))[0])


@given(
    st.sampled_from(["task_result", "task_error", "task_cancelled", "heartbeat", "log"]),
    st.dictionaries(
        st.sampled_from(["result", "error", "exception", "message", "result_pickle", "_pickle", "x_pickle"]),
        values | st.just(pickled(Canary("sang"))),
    ),
)
def test_any_event_is_decoded_without_a_pickle(kind: str, fields: dict[str, Any]) -> None:
    SONGS.clear()
    decoded = decode_event({"type": kind, "run_id": "r", **fields})
    assert not [key for key in decoded if key.endswith("_pickle")] and SONGS == []
    if decoded["type"] == "task_error":
        assert isinstance(decoded["exception"], Exception)
