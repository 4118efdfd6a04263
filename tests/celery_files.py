"""Celery's broker of files, whose messages appear whole.

kombu's own names a file before it writes it, so that a consumer who looks at that moment reads half a
message, and ends.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import kombu.transport
from kombu.transport import filesystem

SCHEME = "wholefiles"


class Channel(filesystem.Channel):  # type: ignore[misc]  # kombu has no types
    """A channel that renames what it has written."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        name = f"{time.monotonic_ns() // 1_000_000}_{uuid.uuid4()}"
        part = Path(self.data_folder_out, f"{name}.part")
        part.write_text(json.dumps(payload), "utf-8")
        os.rename(part, Path(self.data_folder_out, f"{name}.{queue}.msg"))


class Transport(filesystem.Transport):  # type: ignore[misc]
    """For ``broker_url="wholefiles://"`` once this module has been imported."""

    Channel = Channel


kombu.transport.TRANSPORT_ALIASES[SCHEME] = "celery_files:Transport"
