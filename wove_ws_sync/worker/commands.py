"""Command frames, read from messages of a host that nobody trusts.

Owns: what a valid command is, those of the extensions included. Never: unpickles, never
touches a socket, never knows which extensions are used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from ..frames import COMMANDS, EXTENDED_COMMANDS, MAX_ID, InvalidMessage

__all__ = [
    "AttachTask",
    "CancelTask",
    "Command",
    "DetachTask",
    "EventAck",
    "Ignored",
    "MalformedRun",
    "Resume",
    "RunTask",
    "Shutdown",
    "Withdrawn",
    "read",
]

#: So many fields, and so many characters: what W3C allows for baggage, and as much again.
_MAX_TRACE_FIELDS, _MAX_TRACE = 16, 16_384
#: A longer list of runs would hold up every other host.
_MAX_RUN_IDS = 100_000
_CANCEL_MODES = ("best_effort", "require_ack")
_ORPHAN_POLICIES = ("fail", "cancel", "requeue", "detach")
#: A host that asks for more beats than 100 a second gets 100 a second.
_MIN_BEAT_INTERVAL = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class RunTask:
    """Execute a task, unless the same work was done already: ``idempotency_key`` names it, "" does not.

    ``beat_interval`` is a third of the heartbeat asked for, in seconds. What to call is a pickle, or
    else ``name`` says it and ``arguments`` is the JSON text of [positional ones, the others by name].
    ``trace`` is the host's trace context; ``otel`` is the service's own: how telemetry is set up, if at all.
    """

    run_id: str
    task_id: str
    callable_pickle: str = dataclasses.field(repr=False)
    args_pickle: str | None = dataclasses.field(repr=False)
    beat_interval: float | None
    cancel_mode: str
    orphan_policy: str = "cancel"
    idempotency_key: str = ""
    name: str = ""
    arguments: str = ""
    trace: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)  # baggage may be anything
    otel: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class AttachTask:
    """Take a run that was let go; the other fields are those of its new delivery."""

    run_id: str
    task_id: str
    beat_interval: float | None
    cancel_mode: str
    orphan_policy: str = "cancel"


@dataclasses.dataclass(frozen=True, slots=True)
class DetachTask:
    """Let go of a run."""

    run_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class Resume:
    """Say what became of these runs; another ``resume`` continues the list if ``more`` is true."""

    run_ids: tuple[str, ...]
    more: bool


@dataclasses.dataclass(frozen=True, slots=True)
class EventAck:
    """The terminal events of these runs have arrived."""

    run_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class MalformedRun:
    """A command that names its run and is wrong otherwise: that run gets the error.

    ``kind`` is its type, "run_task" or "attach_task".
    """

    run_id: str
    task_id: str
    message: str
    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class CancelTask:
    """Cancel a run; ``cancel_mode`` is None if the frame leaves it to the run's own."""

    run_id: str
    cancel_mode: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Shutdown:
    """Cancel every run of this host."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ignored:
    """Valid JSON that is no command; ``reason`` is "shape", "type", "run_id" or "run_ids"."""

    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Withdrawn:
    """A ``run_task`` and a ``cancel_task`` for it that was read before the run was begun with."""

    run_id: str
    task_id: str
    cancel_mode: str | None


Command = (
    RunTask
    | MalformedRun
    | CancelTask
    | Shutdown
    | Ignored
    | Resume
    | EventAck
    | DetachTask
    | AttachTask
    | Withdrawn
)

_KINDS = COMMANDS | EXTENDED_COMMANDS


def read(message: bytes | bytearray | str) -> Command:
    """Return the command in *message*.

    Raises InvalidMessage for what is not UTF-8, not JSON or beyond the parser's limits.
    """
    frame = _parse(message)
    if not isinstance(frame, dict):
        return Ignored("shape")
    kind = frame.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        return Ignored("type")
    if kind == "shutdown":
        return Shutdown()
    if kind in ("event_ack", "resume"):
        return _about_runs(frame, kind)
    run_id = frame.get("run_id")
    if not isinstance(run_id, str) or not 0 < len(run_id) <= MAX_ID:
        return Ignored("run_id")
    if kind == "cancel_task":
        mode = frame.get("delivery_cancel_mode")
        return CancelTask(run_id, mode if mode in _CANCEL_MODES else None)
    if kind == "detach_task":
        return DetachTask(run_id)
    task_id = frame.get("task_id")
    if not isinstance(task_id, str) or len(task_id) > MAX_ID:
        return MalformedRun(run_id, "", f"{kind} needs a task_id, a string of at most 4096 characters.", kind)
    delivery = _delivery(frame, kind)
    if isinstance(delivery, str):
        return MalformedRun(run_id, task_id, delivery, kind)
    if kind == "attach_task":
        return AttachTask(run_id, task_id, *delivery)
    return _run_task(frame, run_id, task_id, delivery)


def _parse(message: bytes | bytearray | str) -> Any:
    try:
        return json.loads(message if isinstance(message, str) else str(message, "utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidMessage(f"message is not UTF-8 (byte {exc.start})") from None
    except json.JSONDecodeError as exc:
        raise InvalidMessage(f"message is not JSON (position {exc.pos})") from None
    except (ValueError, RecursionError) as exc:
        raise InvalidMessage(f"message is beyond the JSON parser's limits ({type(exc).__name__})") from None


def _about_runs(frame: dict[str, Any], kind: str) -> Resume | EventAck | Ignored:
    run_ids, more = frame.get("run_ids"), frame.get("more", False)
    if not isinstance(run_ids, list) or len(run_ids) > _MAX_RUN_IDS or not isinstance(more, bool):
        return Ignored("run_ids")
    if not all(isinstance(run_id, str) and 0 < len(run_id) <= MAX_ID for run_id in run_ids):
        return Ignored("run_ids")
    return EventAck(tuple(run_ids)) if kind == "event_ack" else Resume(tuple(run_ids), more)


def _run_task(
    frame: dict[str, Any], run_id: str, task_id: str, delivery: tuple[float | None, str, str]
) -> RunTask | MalformedRun:
    key = (frame.get("delivery") or {}).get("delivery_idempotency_key") or ""
    if not isinstance(key, str) or len(key) > MAX_ID:
        message = "delivery_idempotency_key must be a string of at most 4096 characters."
        return MalformedRun(run_id, task_id, message, "run_task")
    function, args = frame.get("callable_pickle"), frame.get("args_pickle")
    if function is None and args is None and "callable" in frame:
        named = _named(frame)
        if isinstance(named, str):
            return MalformedRun(run_id, task_id, named, "run_task")
        return RunTask(run_id, task_id, "", None, *delivery, key, *named, trace=_trace(frame))
    if not isinstance(function, str) or not function:
        return MalformedRun(run_id, task_id, "run_task needs a callable_pickle, a base64 string.", "run_task")
    if args is not None and not isinstance(args, str):
        return MalformedRun(run_id, task_id, "args_pickle of run_task must be a base64 string.", "run_task")
    return RunTask(run_id, task_id, function, args or None, *delivery, key, trace=_trace(frame))


def _trace(frame: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the trace context of a run; () for one that is odd, which fails no run."""
    trace = frame.get("trace")
    if not isinstance(trace, dict) or len(trace) > _MAX_TRACE_FIELDS:
        return ()
    fields = tuple(trace.items())
    if not all(isinstance(value, str) for _, value in fields):
        return ()
    return fields if sum(len(name) + len(value) for name, value in fields) <= _MAX_TRACE else ()


def _named(frame: dict[str, Any]) -> tuple[str, str] | str:
    """Return name and arguments of a call by name, or what is wrong with them."""
    name = frame["callable"]
    positional, args = frame.get("positional"), frame.get("args")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID:
        return "callable of run_task must be a name, a string of at most 4096 characters."
    if not isinstance(args, dict | None) or not isinstance(positional, list | None):
        return "args of run_task must be an object, and positional a list."
    try:  # as text they go wherever the task is executed, however deep they are
        return name, json.dumps([positional or [], args or {}])
    except (ValueError, RecursionError) as exc:
        return f"the arguments of run_task are beyond the limits of JSON here ({type(exc).__name__})."


def _delivery(frame: dict[str, Any], kind: str) -> tuple[float | None, str, str] | str:
    """Return beat interval, cancel mode and orphan policy, or what is wrong with them."""
    delivery = frame.get("delivery")
    if delivery is None:
        delivery = {}
    if not isinstance(delivery, dict):
        return f"delivery of {kind} must be an object."
    heartbeat = delivery.get("delivery_heartbeat_seconds")
    if heartbeat is not None and not _is_positive(heartbeat):
        return "delivery_heartbeat_seconds must be a number above 0."
    mode = delivery.get("delivery_cancel_mode")
    if mode is not None and mode not in _CANCEL_MODES:
        return "delivery_cancel_mode must be one of: 'best_effort', 'require_ack'"
    policy = delivery.get("delivery_orphan_policy")
    return (
        None if heartbeat is None else max(heartbeat / 3, _MIN_BEAT_INTERVAL),
        mode or "best_effort",
        # A foreign host may have another policy than ours; it is never away, so none is needed.
        policy if policy in _ORPHAN_POLICIES else "cancel",
    )


def _is_positive(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value > 0
    except OverflowError:  # an integer that no float can hold
        return False
