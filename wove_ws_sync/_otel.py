"""The words of OpenTelemetry that both ends use: names, attributes, instruments.

Owns: which semantic conventions are followed, and the error for a missing package. Never:
configures a provider; it is imported only when telemetry was asked for.

Source: OpenTelemetry semantic conventions for messaging spans and metrics, 1.27 and later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

try:
    from opentelemetry import metrics, propagate, trace
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        'OpenTelemetry needs the package opentelemetry-api: pip install "wove_ws_sync[otel]"',
        name="opentelemetry",
    ) from None

from ._version import __version__

__all__ = [
    "TRACE_FIELD",
    "Instruments",
    "Outcome",
    "attributes",
    "end",
    "meter",
    "metrics",
    "propagate",
    "trace",
    "tracer",
]

#: The field of a run_task frame with what the propagators inject.
TRACE_FIELD = "trace"
_SCOPE = "wove_ws_sync"
#: A task's name is for people, and may be anything; it labels spans and metrics.
_MAX_NAME = 128
_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    30.0,
    60.0,
    300.0,
)


class Outcome(NamedTuple):
    """How a run ended: "result", "error" or "cancelled"; of an error its type, and what was raised."""

    name: str
    error_type: str = ""
    exception: BaseException | None = None


class Instruments(NamedTuple):
    """The metrics of one end."""

    runs: metrics.Counter
    duration: metrics.Histogram
    active: metrics.UpDownCounter


def tracer(provider: trace.TracerProvider | None = None) -> trace.Tracer:
    """Return the tracer of this package."""
    return trace.get_tracer(_SCOPE, __version__, provider)


def meter(provider: metrics.MeterProvider | None, runs: str, duration: str, active: str) -> Instruments:
    """Return the instruments with these names."""
    made = metrics.get_meter(_SCOPE, __version__, provider)
    return Instruments(
        made.create_counter(runs, unit="{message}", description="Runs that have ended."),
        made.create_histogram(
            duration,
            unit="s",
            description="How long runs took.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        ),
        made.create_up_down_counter(active, unit="{run}", description="Runs under way."),
    )


def attributes(operation: str, task_id: str) -> dict[str, Any]:
    """Return what spans and metrics of an operation have in common."""
    return {
        "messaging.system": "wove_ws",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": task_id[:_MAX_NAME],
    }


def end(
    span: trace.Span, instruments: Instruments, common: Mapping[str, Any], outcome: Outcome, took: float
) -> None:
    """End *span* and count the run, which took so many seconds."""
    instruments.active.add(-1, common)
    labels = {**common, "wove_ws.outcome": outcome.name}
    if outcome.error_type:
        labels["error.type"] = outcome.error_type
        span.set_attribute("error.type", outcome.error_type)
        span.set_status(trace.StatusCode.ERROR)
    span.set_attribute("wove_ws.outcome", outcome.name)
    if outcome.exception is not None:
        span.record_exception(outcome.exception)
    instruments.runs.add(1, labels)
    instruments.duration.record(took, labels)
    span.end()
