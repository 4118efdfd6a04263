"""A set-up of OpenTelemetry for worker processes that writes spans and metrics to files, and tasks."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path
from typing import Any

from opentelemetry import baggage, metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

__all__ = ["configure", "fail", "folder_variable", "hold", "inner", "inner_later", "measured"]

folder_variable = "OTEL_TEST_FOLDER"


def configure() -> None:
    """Write each span as one line of ``spans-*.json``, and the metrics at the end to ``metrics-*.json``."""
    folder, name = Path(os.environ[folder_variable]), uuid.uuid4().hex
    spans = (folder / f"spans-{name}.json").open("w", buffering=1)
    tracers = TracerProvider()
    exporter = ConsoleSpanExporter(out=spans, formatter=lambda span: f"{span.to_json(indent=None)}\n")
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(tracers)
    figures = (folder / f"metrics-{name}.json").open("w", buffering=1)
    reader = PeriodicExportingMetricReader(
        ConsoleMetricExporter(out=figures, formatter=lambda data: f"{data.to_json(indent=None)}\n"),
        export_interval_millis=3_600_000,
    )
    metrics.set_meter_provider(MeterProvider([reader]))


def inner(number: int) -> tuple[int, Any]:
    """Make a span inside of a task; return what the baggage says, too."""
    with trace.get_tracer("test").start_as_current_span("inner"):
        return number * number, baggage.get_baggage("customer")


async def inner_later(number: int) -> tuple[int, Any]:
    await asyncio.sleep(0)
    return inner(number)


def fail(text: str) -> None:
    raise LookupError(text)


async def hold(marker: str) -> None:
    Path(marker).touch()
    await asyncio.Event().wait()


def measured() -> None:
    """Do nothing, with a name of its own in the metrics."""
