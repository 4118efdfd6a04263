"""The switch of traces and metrics: what the host's side asks before each run.

Owns: the hook, which is None unless somebody asked for telemetry. Never: imports OpenTelemetry;
:mod:`wove_ws_sync.otel` sets the hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

__all__ = ["HostTelemetry", "Sink", "host", "worker"]

Sink = Callable[[dict[str, Any]], None]


class HostTelemetry(Protocol):
    """What is told of runs. Any thread."""

    def sending(
        self, command: Mapping[str, Any], sink: Sink, environment: str, address: tuple[str, int]
    ) -> AbstractContextManager[tuple[Mapping[str, Any], Sink]]:
        """Return a context in which the run is sent, with the command and the sink to use for it."""


host: HostTelemetry | None = None
#: What a worker service of this process does about its tasks unless it is told: see ``--otel``.
worker: str = ""
