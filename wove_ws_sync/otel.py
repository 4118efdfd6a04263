"""OpenTelemetry on the host: a span for each run, its context in the message, metrics.

Owns: :func:`instrument` and its undoing. Never: configures a provider or an exporter, which is
the program's own to do; without one everything here does nothing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from . import _otel, _telemetry
from ._otel import metrics, propagate, trace
from ._telemetry import Sink
from .frames import TERMINAL_EVENTS

__all__ = ["WoveInstrumentor", "instrument", "uninstrument"]

_logger = logging.getLogger("wove_ws_sync.host")


def instrument(
    *,
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
) -> None:
    """Trace and count the runs of all executors of this process from now on. Thread-safe.

    Without arguments the global providers are used. Calling it again replaces what the first
    call has set. A worker service that is made in this process from now on traces its tasks, too.
    """
    _telemetry.host = _Host(tracer_provider, meter_provider)
    _telemetry.worker = "here"


def uninstrument() -> None:
    """Trace and count no further runs; those under way are told of as they end. Thread-safe."""
    _telemetry.host = None
    _telemetry.worker = ""


class WoveInstrumentor:
    """What the command ``opentelemetry-instrument`` looks for: :func:`instrument` by another name."""

    def instrument(self, **options: Any) -> None:
        """Call :func:`instrument` with the providers among *options*."""
        known = ("tracer_provider", "meter_provider")
        instrument(**{name: options[name] for name in known if options.get(name) is not None})

    def uninstrument(self, **options: Any) -> None:
        """Call :func:`uninstrument`."""
        uninstrument()


class _Host:
    """See :class:`_telemetry.HostTelemetry`."""

    def __init__(
        self, tracer_provider: trace.TracerProvider | None, meter_provider: metrics.MeterProvider | None
    ) -> None:
        self.tracer = _otel.tracer(tracer_provider)
        self.instruments = _otel.meter(
            meter_provider,
            "messaging.client.sent.messages",
            "messaging.client.operation.duration",
            "wove_ws.client.active_runs",
        )

    @contextlib.contextmanager
    def sending(
        self, command: Mapping[str, Any], sink: Sink, environment: str, address: tuple[str, int]
    ) -> Iterator[tuple[Mapping[str, Any], Sink]]:
        """Begin a span, which ends with the run."""
        common = _otel.attributes("send", command["task_id"])
        common |= {"server.address": address[0], "server.port": address[1]}
        more = {"messaging.message.id": command["run_id"]}
        if environment:
            more["wove_ws.environment"] = environment
        name = f"send {common['messaging.destination.name']}"
        kind = trace.SpanKind.PRODUCER
        span = self.tracer.start_span(name, kind=kind, attributes={**common, **more})
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span))
        sent = _Sent(span, self.instruments, common)
        try:
            yield {**command, _otel.TRACE_FIELD: carrier} if carrier else command, sent.watch(sink)
        except BaseException as exc:  # it did not leave
            sent.end(_otel.Outcome("error", type(exc).__qualname__, exc))
            raise


class _Sent:
    """A run under way."""

    def __init__(self, span: trace.Span, instruments: _otel.Instruments, common: dict[str, Any]) -> None:
        self._open = [span]  # whoever takes it out ends it: a signal handler's exception may come twice here
        self._instruments = instruments
        self._common = common
        self._began = time.monotonic()
        instruments.active.add(1, common)

    def watch(self, sink: Sink) -> Sink:
        """Return a sink that ends the span before *sink* hears of the end."""

        def tell(event: dict[str, Any]) -> None:
            try:
                if event["type"] in TERMINAL_EVENTS:
                    self.end(_outcome(event))
            except Exception:  # the run's end must come all the same
                _logger.exception("telemetry failed")
            finally:
                sink(event)

        return tell

    def end(self, outcome: _otel.Outcome) -> None:
        try:
            span = self._open.pop()
        except IndexError:
            return
        _otel.end(span, self._instruments, self._common, outcome, time.monotonic() - self._began)


def _outcome(event: Mapping[str, Any]) -> _otel.Outcome:
    """Read a terminal event. The task's own exception stays pickled: nothing is loaded in the reader."""
    if event["type"] == "task_result":
        return _otel.Outcome("result")
    if event["type"] == "task_cancelled":
        return _otel.Outcome("cancelled")
    exception, error = event.get("exception"), event.get("error")
    if isinstance(exception, BaseException):  # made on this side
        return _otel.Outcome("error", type(exception).__qualname__, exception)
    kind = error.get("kind") if isinstance(error, dict) else None
    return _otel.Outcome("error", kind[:128] if isinstance(kind, str) and kind else "_OTHER")
