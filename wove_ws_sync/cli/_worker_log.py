"""How ``wove-ws-sync worker`` writes its log to stderr.

Owns: the handlers, and the two formats. Never: writes payloads or secrets, which nobody logs.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from typing import Any

__all__ = ["JsonFormatter", "log_to_stderr"]

# What a record may say beside its text, if somebody gave it as ``extra``.
_EXTRA = ("action", "run_id", "task_id", "peer", "generation")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts (UTC, ISO 8601), level, logger, message, what was given as extra, exc."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _EXTRA if hasattr(record, name)}
        if record.exc_info:
            line["exc"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(level: str, style: str) -> None:
    """Give the service a handler apart from that of the tasks, whose records run user code in its lock."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    own = logging.getLogger("wove_ws_sync")
    for logger in (logging.getLogger(), own):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter() if style == "json" else text)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    own.propagate = False
