"""What is shown of a service: the document behind the status page, whether it takes runs.

Owns: which facts are shown, and their bounds. Never: HTTP, credentials, payloads (of an
error it shows the text that the host gets, too), user code.

Times are ages in seconds: whoever reads the document may have another clock.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import pickle
import platform
import ssl
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .._version import __version__
from .connection import HostConnection
from .dispatcher import Dispatcher
from .engines import Engine
from .statistics import Failure, Record, Statistics, quantile

__all__ = ["StatusView"]

_LISTED = 50
_STEP = 5
_STEPS = 60
#: Over how many seconds the rate of now, and the times of now, are taken.
_RATE_SECONDS = 10
_TIMES_SECONDS = 60
_MAX_TEXT = 1000
_MAX_TRACEBACK = 6000


class StatusView:
    """Look at one service: its *dispatcher*, its *engine*, its *counters*. Use it on their loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        dispatcher: Dispatcher,
        engine: Engine,
        counters: Counter[str],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._context = context
        self._loop = loop
        self._dispatcher = dispatcher
        self.engine = engine
        self.counters = counters

    @property
    def statistics(self) -> Statistics:
        """Return the numbers of the service."""
        return self._dispatcher.statistics

    @property
    def refusal(self) -> str:
        """Return why no new run would be taken now, "" if one would."""
        return self._dispatcher.refusal

    @property
    def hosts(self) -> int:
        """Return how many hosts are connected."""
        return len(self._dispatcher.connections())

    @property
    def kept_bytes(self) -> int:
        """Return what the ends of runs take that have not arrived."""
        return self._dispatcher.kept_bytes()

    @property
    def uptime(self) -> float:
        """Return for how long the service is there, in seconds."""
        return self._loop.time() - self.statistics.since

    @property
    def certificate_ends(self) -> float | None:
        """Return when the certificate ends, in seconds since the epoch; None without TLS, or if unknown."""
        return getattr(self._context, "ends_at", None)

    def traffic(self) -> tuple[int, int]:
        """Return how many bytes of messages were received and sent so far."""
        connections = self._dispatcher.connections()
        received = self.statistics.received_bytes + sum(each.received_bytes for each in connections)
        return received, self.statistics.sent_bytes + sum(each.sent_bytes for each in connections)

    def document(self) -> dict[str, Any]:
        """Return everything that the status page shows, as JSON values."""
        now, statistics = self._loop.time(), self.statistics
        connections = self._dispatcher.connections()
        live = statistics.longest_running(_LISTED)
        live += statistics.longest_queued(_LISTED - len(live))
        return {
            "version": __version__,
            "python": platform.python_version(),
            "pid": os.getpid(),
            "engine": self.engine.name,
            "workers": self.engine.workers,
            "uptime": self.uptime,
            "refusal": self.refusal,
            "kept_bytes": self.kept_bytes,
            "queued": statistics.queued,
            "running": statistics.running,
            "ended": dict(statistics.ended_total),
            "hosts": len(connections),
            "host_list": [_host(each, now) for each in connections[:_LISTED]],
            "live": [_live(record, now) for record in live],
            "recent": [_recent(record, now) for record in reversed(statistics.recent)],
            "errors": [_failure(failure, now) for failure in reversed(statistics.failures)],
            "incidents": {
                name: count for name, count in sorted(self.counters.items()) if name != "connections"
            },
            **self._curves(now),
        }

    def _curves(self, now: float) -> dict[str, Any]:
        bins = self.statistics.series(now, step=_STEP, count=_STEPS)
        lasted = [float(_STEP)] * (_STEPS - 1) + [max(1.0, now - bins[-1].second)]
        ends = [
            {outcome: count / seconds for outcome, count in each.ends.items()}
            for each, seconds in zip(bins, lasted, strict=True)
        ]
        last_seconds = min(_RATE_SECONDS, max(1, int(now) - int(self.statistics.since)))
        rate = sum(self.statistics.over_last(now, last_seconds).ends.values()) / last_seconds
        times = self.statistics.over_last(now, _TIMES_SECONDS, whole=False).times
        return {
            "rate": rate,
            "p50": quantile(times, 0.5),
            "p95": quantile(times, 0.95),
            "curves": {
                "step": _STEP,
                "ends": ends,
                "p50": [quantile(each.times, 0.5) for each in bins],
                "p95": [quantile(each.times, 0.95) for each in bins],
            },
        }


def _host(connection: HostConnection, now: float) -> dict[str, Any]:
    return {
        "peer": connection.peer,
        "key": connection.key[:100],
        "since": now - connection.since,
        "runs": len(connection.host.runs),
        "ours": connection.greeting.ours,
        "received_bytes": connection.received_bytes,
        "sent_bytes": connection.sent_bytes,
    }


def _live(record: Record, now: float) -> dict[str, Any]:
    return {
        "number": record.number,
        "id": record.run_id[:100],
        "task": record.name,
        "waited": (now if record.started is None else record.started) - record.accepted,
        "running": None if record.started is None else now - record.started,
        "done": record.done,
        "total": record.total,
        "message": record.message,
    }


def _recent(record: Record, now: float) -> dict[str, Any]:
    assert record.ended is not None
    return {
        "number": record.number,
        "id": record.run_id[:100],
        "task": record.name,
        "outcome": record.outcome,
        "waited": (record.ended if record.started is None else record.started) - record.accepted,
        "ran": record.ran,
        "ago": now - record.ended,
    }


def _failure(failure: Failure, now: float) -> dict[str, Any]:
    record, error = failure.record, _error_of(failure.event)
    assert record.ended is not None
    return {
        "number": record.number,
        "id": record.run_id[:100],
        "task": record.name,
        "ago": now - record.ended,
        "kind": str(error.get("kind", "Error"))[:100],
        "message": str(error.get("message", ""))[:_MAX_TEXT],
        "traceback": str(error.get("traceback", ""))[-_MAX_TRACEBACK:],
    }


def _error_of(event: bytes) -> Mapping[str, Any]:
    """Return Wove's error dictionary out of a ``task_error``."""
    if not event:
        return {"message": "The error is too large to be kept for this page; its host has it."}
    try:
        fields = json.loads(event)
        error = fields.get("error") or _Plain(io.BytesIO(base64.b64decode(fields["error_pickle"]))).load()
        return error if isinstance(error, dict) else {"message": error}
    except Exception:  # an engine of somebody else's making may send what it likes
        return {"message": "The error cannot be shown here; its host has it."}


class _Plain(pickle.Unpickler):
    """Load texts and numbers only: what a task has made must not run on the loop of the service."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is nothing plain")
