"""Event frames that the worker service makes itself, as encoded messages.

Owns: what they look like. Never: executes user code, never decides when one is due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import payloads
from ..frames import encode

__all__ = [
    "cancelled_event",
    "error_event",
    "is_result",
    "life_event",
    "plain_error",
    "queue_full_event",
    "renamed",
    "service_error",
]

_MAX_ERROR_TEXT = 64 * 1024


def error_event(
    run_id: str,
    task_id: str,
    error: Mapping[str, Any],
    exception: bytes | None = None,
    *,
    plain: bool = False,
) -> bytes:
    """Return a ``task_error`` message; *exception* is its base64 cloudpickle, if there is one.

    If *plain* the error travels as JSON, for a host that takes no pickles.
    """
    event: dict[str, Any] = {"type": "task_error", "run_id": run_id, "task_id": task_id}
    if exception is not None:
        event["exception_pickle"] = exception
    if plain:
        event["error"] = dict(error)
    else:
        event["error_pickle"] = payloads.encode_value(dict(error))
    return encode(event)


def service_error(
    run_id: str,
    task_id: str,
    kind: str,
    message: str,
    *,
    retryable: bool,
    started: bool | None = None,
) -> bytes:
    """Return a ``task_error`` about a run that the service itself cannot finish.

    Its ``error`` is plain JSON: a host acts on such errors and need not unpickle for that.
    *started* says whether the task may have begun, None that this is not told.
    """
    error = plain_error(kind, message, "executor")
    error["retryable"] = retryable
    if started is not None:
        error["started"] = started
    return encode({"type": "task_error", "run_id": run_id, "task_id": task_id, "error": error})


def queue_full_event(run_id: str, task_id: str, limit: int, option: str) -> bytes:
    """Return the ``task_error`` of a run that is not accepted, as there are *limit* of them already."""
    message = (
        f"The worker service has too many runs ({limit}) and did not take this one. Submit it again "
        "later, submit fewer at once (delivery_max_in_flight), or raise --workers or "
        f"{option} of the worker service."
    )
    return service_error(run_id, task_id, "QueueFull", message, retryable=True, started=False)


def cancelled_event(run_id: str, task_id: str) -> bytes:
    """Return a ``task_cancelled`` message."""
    return encode({"type": "task_cancelled", "run_id": run_id, "task_id": task_id})


def life_event(run_id: str, task_id: str, *, started: bool) -> bytes:
    """Return ``task_started``, or a ``heartbeat`` for a task that is still queued."""
    kind = "task_started" if started else "heartbeat"
    return encode({"type": kind, "run_id": run_id, "task_id": task_id})


def renamed(event: bytes, of: tuple[str, str], to: tuple[str, str]) -> bytes:
    """Return *event* of the run and task *of* as one of *to*; what else it says is not looked at."""
    if of == to:
        return event
    kind = event[: event.index(b",")]  # {"type":"task_result"
    head, new = (kind + b"," + encode({"run_id": ids[0], "task_id": ids[1]})[1:-1] for ids in (of, to))
    if not event.startswith(head):
        raise ValueError("An event begins with its type, its run_id and its task_id.")
    return new + event[len(head) :]


def is_result(event: bytes) -> bool:
    """Tell whether *event* is a ``task_result``."""
    return event.startswith(b'{"type":"task_result"')


def plain_error(kind: str, message: str, source: str, *, text: str = "") -> dict[str, Any]:
    """Return Wove's error dictionary, its texts bounded."""
    return {
        "kind": kind,
        "message": _bounded(message),
        "traceback": _bounded(text),
        "retryable": False,
        "source": source,
        "adapter": "websocket",
    }


def _bounded(text: str) -> str:
    if len(text) <= _MAX_ERROR_TEXT:
        return text
    half = _MAX_ERROR_TEXT // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
