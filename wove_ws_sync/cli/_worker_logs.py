"""How ``wove-ws-sync worker`` writes its log to stderr.

Owns: the handlers and the two formats. Never: writes a field of a record that is not listed here.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys

__all__ = ["FORMATS", "JsonFormatter", "log_to_stderr"]

FORMATS = ("text", "json")

#: What a record may bring along (``extra``) that is shown.
_EXTRA = ("action", "run_id", "task_id", "peer")


class JsonFormatter(logging.Formatter):
    """One JSON object a line. It can be pickled: the engine ``processes`` gives it to its processes."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of *record*; whatever a task logs, there is one, and one only."""
        created = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields = {
            "ts": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": str(record.levelname).lower(),
            "logger": str(record.name),
            "message": self._message(record),
        }
        for name in _EXTRA:
            value = getattr(record, name, None)
            if isinstance(value, str):  # all else may run code of a task
                fields[name] = str.__str__(value)
        if record.exc_info and record.exc_info[0] is not None:
            fields["exc"] = self._trace(record)
        return json.dumps(fields)

    @staticmethod
    def _message(record: logging.LogRecord) -> str:
        try:
            return str(record.getMessage())
        except Exception as exc:
            return f"(this log record could not be formatted: {type(exc).__name__})"

    def _trace(self, record: logging.LogRecord) -> str:
        try:
            return self.formatException(record.exc_info)  # type: ignore[arg-type]
        except Exception as exc:
            return f"(this traceback could not be formatted: {type(exc).__name__})"


def log_to_stderr(level: str, style: str = "text") -> None:
    """Give the service a handler apart from that of the tasks, whose records run user code in its lock."""
    own = logging.getLogger("wove_ws_sync")
    for logger in (logging.getLogger(), own):
        handler = logging.StreamHandler(sys.stderr)
        text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
        handler.setFormatter(JsonFormatter() if style == "json" else text)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    own.propagate = False
