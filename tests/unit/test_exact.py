"""What JSON carries exactly, and the words about the rest."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import json
import math
import pathlib
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wove_ws_sync._exact import JSONText, to_json
from wove_ws_sync.frames import encode


class Colour(enum.IntEnum):
    RED = 1


class Name(str):
    pass


class Fraction(float):
    pass


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((1, 2), "argument 'x' is a tuple, which JSON cannot carry; make it a list."),
        ({1}, "is a set, which JSON cannot carry; make it a list."),
        (b"x", "is a bytes, which JSON cannot carry; send text"),
        (object(), "is a object, which JSON cannot carry; send what is None, bool, int"),
        (datetime.datetime.now(datetime.UTC), "is a datetime, which JSON cannot carry; send its isoformat()"),
        (decimal.Decimal(1), "send its str()"),
        (uuid.UUID(int=1), "send its str()"),
        (pathlib.Path("/"), "send its str()"),
        (Colour.RED, "convert it to a plain int"),
        (Name("x"), "convert it to a plain str"),
        (Fraction(1.0), "convert it to a plain float"),
        (collections.OrderedDict(), "convert it to a plain dict"),
        (collections.defaultdict(list), "convert it to a plain dict"),
        ({1: 2}, "argument 'x' has a key of the type int; JSON has keys of the type str only"),
        ({None: 2}, "a key of the type NoneType"),
        ({Name("k"): 2}, "a key of the type Name"),
        ({"a": [0, {"b": (1,)}]}, "argument 'x'['a'][1]['b'] is a tuple"),
        (print, "is a builtin_function_or_method, which JSON cannot carry"),
    ],
)
def test_values_of_other_types_are_refused_by_their_place(value: Any, said: str) -> None:
    """Nothing becomes something else on its way; the message says where it is, and what to do."""
    with pytest.raises(TypeError) as caught:
        to_json(value, "argument 'x'")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "argument 'x' is nan, for which JSON has no number"),
        ([1.0, -math.inf], "argument 'x'[1] is -inf"),
        (2**64, "an int of more than 64 bits; send it as text"),
        (-(2**63) - 1, "an int of more than 64 bits"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        to_json(value, "argument 'x'")
    assert said in str(caught.value)


def test_what_contains_itself_is_refused_and_deep_nesting_too() -> None:
    """Neither a RecursionError, nor a message of any length."""
    loop: list[Any] = []
    loop.append({"again": loop})
    deep: Any = 1
    for _ in range(101):
        deep = [deep]
    for value in (loop, deep):
        with pytest.raises(ValueError, match="nested too deep") as caught:
            to_json(value, "argument 'x'")
        assert len(str(caught.value)) < 400
    assert json.loads(to_json(deep[0], "argument 'x'")) == deep[0]


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def same(one: Any, other: Any) -> bool:
    """Tell whether values are equal, of the same types, and have the same sign of zero."""
    return bool(repr(one) == repr(other) and one == other)


@given(plain)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    text = to_json(value, "it")
    assert text.isascii() and same(json.loads(text), value)


def test_a_lone_surrogate_arrives() -> None:
    """A message is UTF-8 for all that."""
    assert json.loads(to_json("\ud800", "it").decode("utf-8")) == "\ud800"


def test_json_text_is_put_into_a_message_as_it_is() -> None:
    """Bytes of any other kind are no value of a frame."""
    frame = {"type": "run_task", "args": JSONText(b'{"a":1}'), "callable_pickle": b"eA=="}
    assert json.loads(encode(frame)) == {"type": "run_task", "args": {"a": 1}, "callable_pickle": "eA=="}
    assert encode({"result": JSONText(b"[1]")}) == b'{"result":[1]}'
    with pytest.raises(TypeError):
        encode({"args": b'{"a":1}'})
