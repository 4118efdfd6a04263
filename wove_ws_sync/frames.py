"""Frames as JSON text.

Owns: what a command frame and an event frame look like on the wire (Wove's format, byte
for byte). Never: unpickles, never touches a socket. Pickled fields stay base64 text
here; :mod:`wove_ws_sync.payloads` turns them into values when somebody asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

from ._exact import JSONText
from ._progress import read as read_progress

__all__ = [
    "COMMANDS",
    "EVENTS",
    "EXTENDED_COMMANDS",
    "EXTENDED_EVENTS",
    "FEATURES",
    "MAX_ID",
    "NOTICES",
    "TERMINAL_EVENTS",
    "CommandFrame",
    "Decoded",
    "EventFrame",
    "InvalidMessage",
    "check_ids",
    "decode",
    "encode",
    "offered",
    "with_attempt",
]

_to_json = json.JSONEncoder(separators=(",", ":")).encode

COMMANDS = frozenset({"run_task", "cancel_task", "shutdown"})
TERMINAL_EVENTS = frozenset({"task_result", "task_error", "task_cancelled"})
EVENTS = TERMINAL_EVENTS | {"task_started", "heartbeat", "log"}

#: The extensions of this version, and the frames that only they bring: commands to the worker
#: service, events (of the extension with the same name), and notices to the host, which are
#: about no run.
FEATURES = ("resume", "ack", "drain", "progress", "json")
EXTENDED_COMMANDS = frozenset({"resume", "event_ack", "detach_task", "attach_task"})
EXTENDED_EVENTS = frozenset({"progress"})
NOTICES = frozenset({"resume_state", "draining"})

#: The most characters of the id of a run or a task.
MAX_ID = 4096


class CommandFrame(TypedDict, total=False):
    """Host to worker. ``callable`` and ``args`` travel as ``callable_pickle`` and ``args_pickle``.

    With ``result_format="json"`` they travel by name and as JSON, with ``positional`` beside ``args``.
    """

    type: str
    run_id: str
    task_id: str
    callable: Any
    args: dict[str, Any]
    delivery: dict[str, Any]
    delivery_cancel_mode: str
    delivery_orphan_policy: str


class EventFrame(TypedDict, total=False):
    """Worker to host. ``result``, ``exception`` and ``error`` travel pickled or as plain JSON."""

    type: str
    run_id: str
    task_id: str
    result: Any
    exception: BaseException
    error: Any
    message: str
    level: str
    logger: str
    done: float
    total: float | None


class InvalidMessage(ValueError):
    """A message that is not JSON text; it may have been a terminal event, so the link must close.

    ``close_code`` is the WebSocket close code to send (RFC 6455, 7.4.1).
    """

    def __init__(self, message: str, close_code: int = 1007) -> None:
        super().__init__(message)
        self.close_code = close_code


class Decoded(NamedTuple):
    """What one message held: events and notices in order, and why others were ignored, once per item."""

    events: tuple[dict[str, Any], ...]
    ignored: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Decoded({len(self.events)} events, ignored={self.ignored!r})"


def offered(result_format: str) -> str:
    """Return the extensions that a host with that ``result_format`` offers, as X-Wove-Sync lists them."""
    return ",".join(feature for feature in FEATURES if feature != "json" or result_format == "json")


def check_ids(run_id: str, task_id: str) -> None:
    """Raise ValueError for ids that no worker service takes, as it could not even answer."""
    for key, value in (("run_id", run_id), ("task_id", task_id)):
        if len(value) > MAX_ID:
            raise ValueError(
                f"{key} {value[:40]!r}... has {len(value)} characters; use {MAX_ID} of them at most."
            )


def encode(frame: Mapping[str, Any]) -> bytes:
    """Return *frame* as compact UTF-8 JSON.

    Values of type bytes under a key that ends in ``_pickle`` are spliced in as they are,
    between quotes: they are base64 text, which needs no escape, and may be large (no copy
    through the JSON encoder). So is JSONText, without quotes.

    Raises TypeError or ValueError for what JSON cannot express.
    """
    plain: dict[str, Any] = {}
    spliced: list[bytes] = []
    for key, value in frame.items():
        if isinstance(value, bytes) and (key.endswith("_pickle") or isinstance(value, JSONText)):
            quote = b"" if isinstance(value, JSONText) else b'"'
            spliced += [b',"', key.encode("ascii"), b'":', quote, value, quote]
        else:
            plain[key] = value
    head = _to_json(plain).encode("utf-8")
    if not spliced:
        return head
    if not plain:
        spliced[0] = b'"'
    return b"".join([head[:-1], *spliced, b"}"])


def with_attempt(message: bytes, attempt: int) -> bytes:
    """Return an encoded ``run_task`` that says which delivery it is; the first one does not."""
    return message if attempt == 1 else b'%b,"attempt":%d}' % (message[:-1], attempt)


def decode(message: bytes | bytearray | memoryview) -> Decoded:
    """Turn one message into event frames: one event, a list, or ``{"events": [...]}``.

    Valid JSON of another shape is ignored and named in ``ignored`` ("shape", "type",
    "run_id"), so that one odd item hurts nobody. Pickled fields are left alone.

    Raises InvalidMessage for what is not UTF-8, not JSON, or beyond the parser's limits.
    """
    try:
        data = json.loads(str(message, "utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidMessage(f"message is not UTF-8 (byte {exc.start})") from None
    except json.JSONDecodeError as exc:
        raise InvalidMessage(f"message is not JSON (position {exc.pos})") from None
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage(f"message is beyond the JSON parser's limits ({type(exc).__name__})") from None

    items: list[Any]
    if isinstance(data, dict) and "events" in data:
        if not isinstance(data["events"], list):
            return Decoded((), ("shape",))
        items = data["events"]
    elif isinstance(data, list):
        items = data
    else:
        items = [data]

    events: list[dict[str, Any]] = []
    ignored: list[str] = []
    for item in items:
        fault = _fault(item)
        if fault:
            ignored.append(fault)
        else:
            events.append(item)
    return Decoded(tuple(events), tuple(ignored))


def _fault(item: Any) -> str:
    """Return why *item* is no event frame of ours; "" if it is one."""
    if not isinstance(item, dict):
        return "shape"
    kind = item.get("type")
    if not isinstance(kind, str):
        return "type"
    if kind in NOTICES:
        return ""
    if kind not in EVENTS and kind not in EXTENDED_EVENTS:
        return "type"
    run_id = item.get("run_id")
    if not isinstance(run_id, str) or not run_id:
        return "run_id"
    return _fault_of_progress(item) if kind == "progress" else ""


def _fault_of_progress(item: dict[str, Any]) -> str:
    """Check a ``progress`` event and bound it, in place."""
    progress = read_progress(item)
    if progress is None:
        return "shape"
    item.update(progress._asdict())
    return ""
