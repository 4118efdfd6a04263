"""Values as base64 cloudpickle.

Owns: the only import of cloudpickle, and the rule that nothing is unpickled before the
thread that wants the value asks for it. Never: looks at the network or at a run's state.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import pickle
import signal
import traceback
from collections.abc import Mapping
from typing import Any

import wove
from wove.environment import EnvironmentExecutionError

from .errors import PayloadError

__all__ = ["RemoteTraceback", "decode_event", "decode_value", "encode_frame", "encode_value", "error_payload"]

_PICKLED_FIELDS = ("callable", "args", "result", "exception", "error")
# What a terminal event may bring; no other pickle that a peer sends is ever loaded.
_LOADED_FIELDS = {"task_result": ("result",), "task_error": ("error", "exception")}
# A pickle may call anything, sys.exit() too. What else is no Exception, as KeyboardInterrupt, comes
# from outside and is not the pickle's.
_RAISED_BY_PICKLES = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
_PLAIN = frozenset({bool, int, float, str, bytes})
_REASON = "the websocket network executor serializes task frames for a remote worker service."


class RemoteTraceback(Exception):
    """The worker's traceback as text, raised as the ``__cause__`` of a task's own exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


def _cloudpickle() -> Any:
    try:
        import cloudpickle
    except ImportError as exc:
        raise wove.MissingDispatchFeatureError(_REASON) from exc
    return cloudpickle


def encode_value(value: Any) -> bytes:
    """Return *value* as base64 text of its cloudpickle. Runs user code (``__reduce__``)."""
    # Plain values need none of what cloudpickle adds, and a tenth of its time.
    plain = value is None or type(value) in _PLAIN or (type(value) is dict and not value)
    return base64.b64encode(
        pickle.dumps(value, pickle.HIGHEST_PROTOCOL) if plain else _cloudpickle().dumps(value)
    )


def decode_value(text: str | bytes) -> Any:
    """Return the value behind *text*. Runs whatever code the pickle holds.

    Raises PayloadError if the text is no base64 or no pickle of something known here. What a signal
    handler raises meanwhile comes as itself: it says nothing about the text.
    """
    try:
        return pickle.loads(base64.b64decode(text))  # line breaks are passed over, as Wove does
    except _RAISED_BY_PICKLES as exc:
        if is_of_a_signal_handler(exc):
            raise
        payload, cause = _undecodable(exc), exc
    # Without this frame, whose variable is what could not be decoded.
    cause.__traceback__ = None if cause.__traceback__ is None else cause.__traceback__.tb_next
    del text
    raise PayloadError(payload) from cause


def is_of_a_signal_handler(exc: BaseException) -> bool:
    """Tell whether a signal handler of this process raised *exc*, wherever the signal came.

    One that is no handler any more, as it has taken itself back before it raised, is not recognised.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    handlers = [each.func if isinstance(each, functools.partial) else each for each in handlers]
    codes = {
        getattr(each, "__code__", None) or getattr(type(each).__call__, "__code__", None)
        for each in handlers
        if callable(each)
    }
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(exc.__traceback__))


def _undecodable(exc: BaseException) -> dict[str, Any]:
    cause = "it is not base64" if isinstance(exc, binascii.Error) else f"{type(exc).__name__}: {_text(exc)}"
    return {
        "kind": "PayloadDecodeError",
        "message": (
            f"A payload from the worker service could not be unpickled ({cause}). "
            "Check that both sides have the same modules and compatible versions."
        ),
        "traceback": "".join(traceback.format_exception(exc)),
        "retryable": False,
        "source": "payload",
    }


def encode_frame(frame: Mapping[str, Any]) -> dict[str, Any]:
    """Return *frame* with its Python values replaced by their ``*_pickle`` fields (bytes)."""
    encoded: dict[str, Any] = {}
    for key, value in frame.items():
        if key in _PICKLED_FIELDS:
            encoded[f"{key}_pickle"] = encode_value(value)
        else:
            encoded[key] = value
    return encoded


def decode_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event with its pickled fields decoded: ``result``, or ``error`` and ``exception``.

    Pickles in events of other types are left out unread. An exception is ready to raise: the
    worker's traceback is its ``__cause__``, and what must not be raised in a thread of ours
    (StopIteration, SystemExit, KeyboardInterrupt, no exception at all) comes as a wove
    EnvironmentExecutionError. A payload that cannot be unpickled turns the event into a
    ``task_error`` with a PayloadError. Never raises for what a peer sent.
    """
    decoded = {key: value for key, value in event.items() if not key.endswith("_pickle")}
    try:
        for field in _LOADED_FIELDS.get(event["type"], ()):
            if f"{field}_pickle" in event:
                decoded[field] = decode_value(event[f"{field}_pickle"])
    except PayloadError as exc:
        exc.__traceback__ = None  # it has the event in it
        said = error_payload(None, decoded.get("error")).get("message")
        if said is not None:
            exc.add_note(f"The worker service said of the run: {_text(said)}")
        decoded.pop("result", None)
        decoded.update(type="task_error", error=exc.payload, exception=exc)
        return decoded
    if event["type"] == "task_error":
        decoded["exception"] = _raisable(decoded.get("exception"), decoded.get("error"))
    elif event["type"] == "task_result":
        decoded.setdefault("result", None)
    return decoded


def _raisable(exception: Any, error: Any) -> Exception:
    details = error_payload(exception, error)
    text = details.get("traceback")
    text = "" if text is None else _text(text)
    if isinstance(exception, Exception) and not isinstance(exception, StopIteration):
        raised: Exception = exception
    else:
        message = details.get("message")
        if isinstance(message, str) and not message:  # KeyboardInterrupt(), say
            details = {**details, "message": details.get("kind", "")}
        raised = EnvironmentExecutionError(details)
    if text and raised.__cause__ is None:
        # As "raise ... from" does it, whatever __setattr__ the class has (a frozen dataclass, say).
        object.__setattr__(raised, "__cause__", RemoteTraceback(text))
    return raised


def error_payload(exception: Any, error: Any) -> dict[str, Any]:
    """Return Wove's error dictionary for a failed run, from whatever the worker sent."""
    if isinstance(error, dict):
        return error
    is_empty = error is None or error is False or (isinstance(error, str) and not error)
    if not is_empty:
        return {"message": _text(error), "kind": "ExecutionError", "source": "executor"}
    if isinstance(exception, BaseException):
        return {"message": _text(exception), "kind": type(exception).__name__, "source": "task"}
    return {}


def _text(value: Any) -> str:
    """Return ``str(value)``, of objects of the worker's making too, whose ``__str__`` may fail."""
    try:
        return str(value)
    except Exception as exc:
        return f"(str() of this {type(value).__name__} failed: {type(exc).__name__})"
