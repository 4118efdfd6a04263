"""What one task says of itself while it runs: beats, progress, log records.

Owns: how often, and which of many reports is sent. Never: blocks the task, never sends
anything when the run is over or in a forked child; it hands encoded events to the report
of its job, which may be a pipe.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .._progress import Progress
from ..frames import encode
from . import pacing
from .events import life_event

__all__ = ["LOG_BURST", "LOG_RATE", "Execution", "Voice"]

#: The least seconds between two reports of progress, or two beats, of a run.
_INTERVAL = 0.1
#: What one run may log: so many records, then so many in each second.
LOG_BURST, LOG_RATE = 500, 100.0
#: How long, in seconds, records may be left out before that is told.
_SUMMARY_AFTER = 5.0


class Execution(Protocol):
    """What is to be known of the job."""

    done: bool
    abandoned: bool
    cancel_requested: bool


class Voice:
    """The way of one run's task to its host; see :mod:`wove_ws_sync.current`. Any thread."""

    __slots__ = (
        "_bucket",
        "_closed",
        "_head",
        "_job",
        "_latest",
        "_lock",
        "_next_beat",
        "_next_progress",
        "_pid",
        "_report",
        "_summary_at",
        "_suppressed",
        "_told",
        "_waits",
    )

    def __init__(
        self, job: Execution, run_id: str, task_id: str, report: Callable[[str, bytes], None]
    ) -> None:
        self._job = job
        self._head = {"run_id": run_id, "task_id": task_id}
        self._report = report
        self._pid = os.getpid()
        # Held while anything is reported, so that nothing is after the end and no progress passes a
        # newer one, and while records are counted. Reentrant: a finalizer may come in the middle.
        self._lock = threading.RLock()
        self._closed = False
        self._latest: Progress | None = None
        self._told: Progress | None = None
        self._waits = False  # the pacer will look at _latest
        self._next_progress = 0.0
        self._next_beat = 0.0
        self._bucket: pacing.Bucket | None = None
        self._suppressed = 0
        self._summary_at = 0.0

    @property
    def _is_mute(self) -> bool:
        return self._closed or self._job.done or self._job.abandoned or os.getpid() != self._pid

    def _say(self, kind: str, event: bytes) -> None:
        """Report, unless the run is over. In a forked child the lock may be held for ever."""
        if self._is_mute:
            return
        with self._lock:
            if not self._closed:
                self._report(kind, event)

    @property
    def is_cancelled(self) -> bool:
        """Tell whether the run was cancelled, or nobody wants its result."""
        return self._job.cancel_requested or self._job.abandoned

    def beat(self) -> None:
        """Report a heartbeat, unless one was reported a moment ago."""
        now = time.monotonic()
        if now >= self._next_beat and not self._is_mute:
            self._next_beat = now + _INTERVAL
            self._say("heartbeat", life_event(self._head["run_id"], self._head["task_id"], started=False))

    def tell(self, progress: Progress) -> None:
        """Report *progress* now, or leave that to the pacer if one was reported a moment ago."""
        self._latest = progress
        if self._waits:  # set back before the pacer looks at _latest, so this one is seen
            return
        if self._is_mute:
            return
        if time.monotonic() >= self._next_progress:
            self._report_progress()
        else:
            self._waits = True
            if not pacing.later(self._next_progress, self._report_progress):
                self._waits = False  # the next report, or the end, says it

    def _report_progress(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._waits = False
            latest = self._latest
            if latest is None or latest is self._told or self._is_mute:
                return
            self._told = latest
            self._next_progress = time.monotonic() + _INTERVAL
            message = latest.message.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates
            event = {"done": latest.done, "total": latest.total, "message": message}
            self._report("progress", encode({"type": "progress", **self._head, **event}))

    def admits_log(self) -> bool:
        """Tell whether one more log record may be sent now, and count it if not."""
        if self._is_mute:
            return False
        with self._lock:
            if self._bucket is None:
                self._bucket = pacing.Bucket(LOG_BURST, LOG_RATE)
            now = time.monotonic()
            if self._bucket.take(now) and pacing.for_process(now):
                return True
            if not self._suppressed:
                self._summary_at = now + _SUMMARY_AFTER
            self._suppressed += 1
            return False

    def log(self, fields: Mapping[str, Any]) -> None:
        """Send the fields of a record that was admitted."""
        if self._is_mute:
            return
        if self._suppressed and time.monotonic() >= self._summary_at:
            self._tell_suppressed()
        self._say("log", encode({"type": "log", **self._head, **fields}))

    def _tell_suppressed(self) -> None:
        with self._lock:
            count, self._suppressed = self._suppressed, 0
        if count:
            text = (
                f"{count} further log records of this run were not sent to the host: a run may send "
                f"{LOG_BURST} and then {LOG_RATE:g} a second, all runs of a process together "
                f"{pacing.PROCESS_BURST} and then {pacing.PROCESS_RATE:g} a second."
            )
            own = {"level": "WARNING", "logger": "wove_ws_sync.task", "message": text, "created": time.time()}
            self._say("log", encode({"type": "log", **self._head, **own}))

    def close(self) -> None:
        """Say what is still to be said, and nothing from then on; the end of the run follows."""
        if os.getpid() != self._pid:
            return
        with self._lock:  # or what the pacer is about to report could come after the end
            if self._latest is not self._told:
                self._report_progress()
            if self._suppressed and not self._is_mute:
                self._tell_suppressed()
            self._closed = True
