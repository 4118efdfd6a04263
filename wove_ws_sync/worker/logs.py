"""Log records of tasks, on their way to the host.

Owns: the handler on the root logger. Never: forwards records of this package or of the
WebSocket libraries, nor those that come about while a record is handled, so that nothing
goes round in circles; never hurts the task.
"""

from __future__ import annotations

import logging
import threading
import traceback
from typing import Any

from ..current import log_sink, unheard

__all__ = ["TaskLogHandler", "install", "uninstall"]

_MAX_TEXT = 16 * 1024
_OWN = ("wove_ws_sync", "websockets", "websocket")

_lock = threading.Lock()  # guards _users and whether the handler is on the root logger
_users = 0


class TaskLogHandler(logging.Handler):
    """Hand every record that a task emits to that task's run. Runs in the task's thread."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Emit without the handler's lock: formatting runs user code, which may block for long."""
        sink = log_sink.get()
        if sink is not None and record.name.partition(".")[0] not in _OWN and sink.admits_log():
            with unheard():
                try:
                    sink.log(_fields(record))
                except Exception:
                    self.handleError(record)
        return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what travels of *record*; its text is bounded to 16 Ki characters."""
    return {
        "level": str(record.levelname),
        "logger": str(record.name)[:256],
        "message": _text(record),
        "created": record.created,
    }


def _text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    except Exception as exc:
        text = f"(this log record could not be formatted: {type(exc).__name__})"
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "\N{HORIZONTAL ELLIPSIS}"


_handler = TaskLogHandler()


def install() -> None:
    """Put the handler on the root logger; counted, one ``uninstall()`` per call takes it off."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            logging.getLogger().addHandler(_handler)


def uninstall() -> None:
    """Undo one ``install()``."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            logging.getLogger().removeHandler(_handler)
