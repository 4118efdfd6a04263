"""What leaves the link for the user: events to their sinks, log records to logging.

Owns: the calls of sinks and of logging handlers, which are user code and may do anything.
Never: takes a lock, knows a connection.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from ._run import Run
from .current import unheard
from .frames import TERMINAL_EVENTS

__all__ = ["host_log", "note", "tell"]

host_log = logging.getLogger("wove_ws_sync.host")
_task_log = logging.getLogger("wove_ws_sync.task")


def tell(run: Run, event: dict[str, Any], extra: Mapping[str, Any], *, own_thread: bool) -> None:
    """Give *event* to the run's sink; in one of the link's own threads nothing that it raises gets out."""
    kind = event["type"]
    if run.attempt > 1:
        event["attempt"] = run.attempt
    if host_log.isEnabledFor(logging.DEBUG):
        details = {**extra, "event_type": kind, "task_id": run.task_id}
        note(host_log, logging.DEBUG, "%s %s", kind, run.run_id, extra=details)
    if kind == "log":
        _forward(run, event)
    try:
        run.sink(event)
    except BaseException as exc:  # a done-callback may call sys.exit()
        if not isinstance(exc, Exception) and not own_thread:
            raise
        note(host_log, logging.ERROR, "a receiver of events failed", exc_info=True, extra=extra)
        if kind in TERMINAL_EVENTS and not own_thread:
            # It may have been a signal handler, which struck before the receiver had it.
            with contextlib.suppress(Exception):
                run.sink(event)
    if kind in TERMINAL_EVENTS:  # its alarm may lie in the table for long, with all that these hold
        run.sink, run.receipt = _nobody, None


def note(logger: logging.Logger, level: int, text: str, *args: Any, **details: Any) -> None:
    """Log, and take it calmly if a handler fails: a full disk must not end a connection."""
    with contextlib.suppress(Exception):
        logger.log(level, text, *args, stacklevel=2, **details)


def _nobody(event: dict[str, Any]) -> None:
    pass


def _forward(run: Run, event: dict[str, Any]) -> None:
    """Give a task's log record to this side's logging."""
    name, created = str(event.get("level", "INFO")), event.get("created")
    level = logging.getLevelNamesMapping().get(name.upper(), logging.INFO)
    if _task_log.isEnabledFor(level):
        extra = {
            "action": "log",
            "run_id": run.run_id,
            "task_id": run.task_id,
            "task_logger": event.get("logger"),
            "task_level": name,
            "task_created": created if type(created) in (int, float) else None,
        }
        with unheard():  # a worker service in this process must not send it again
            note(_task_log, level, "%s", event.get("message", ""), extra=extra)
