"""OpenTelemetry in the worker: a span around each task, with the host's as its parent, and metrics.

Owns: what ``--otel`` may say, and the set-up in each process that executes tasks. Never: imports
OpenTelemetry unless that was asked for, lets telemetry fail a task.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from .commands import RunTask

if TYPE_CHECKING:
    from opentelemetry import trace

    from .. import _otel

__all__ = ["HERE", "Traced", "begin", "check_setup", "prepare"]

_logger = logging.getLogger("wove_ws_sync.worker")

#: Use the providers that there are.
HERE = "here"
#: Have the SDK configured by the OTEL_* variables, unless it is configured already.
_ENVIRONMENT = "env"
_INSTALL = 'pip install "wove_ws_sync[otel]"'

# Held while a process is set up, which happens once for each setup.
_setting_up = threading.Lock()
_ready: dict[str, _Tracing | None] = {}


def check_setup(setup: str) -> str:
    """Return *setup* if it has the form of one: "env" or "module:function". Raises ValueError."""
    module, _, function = setup.partition(":")
    if setup != _ENVIRONMENT and not (module and function):
        raise ValueError(f"{setup!r} is neither 'env' nor module:function.")
    return setup


def prepare(setup: str) -> None:
    """Set this process up, to tell what is wrong now and not at the first task.

    Raises ValueError for what is no set-up, RuntimeError for a package that is missing.
    """
    with _setting_up:
        if setup not in _ready:
            _ready[setup] = _set_up(setup)


def begin(command: RunTask) -> Traced | None:
    """Begin the span of a run in the current context, which is the run's own. Never raises."""
    try:
        tracing = _ready.get(command.otel) or _tracing(command.otel)
        return None if tracing is None else tracing.begin(command)
    except Exception:
        _logger.exception("Telemetry failed.")
        return None


def _tracing(setup: str) -> _Tracing | None:
    with _setting_up:
        if setup not in _ready:
            _ready[setup] = None  # so that a failure is told once, and costs no other run
            _ready[setup] = _set_up(setup)
        return _ready[setup]


def _set_up(setup: str) -> _Tracing:
    try:
        _configure(setup)
        return _Tracing()
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise RuntimeError(f"Telemetry needs a package that is not installed: {_INSTALL}") from None


def _configure(setup: str) -> None:
    if setup == HERE:
        return
    if setup == _ENVIRONMENT:
        _configure_sdk()
        return
    module, _, name = check_setup(setup).partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if module.startswith(exc.name or module):
            raise ValueError(f"{setup!r} cannot be imported: {exc}.") from exc
        raise
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{module!r} has nothing called {name!r} that sets up telemetry.")
    found()


def _configure_sdk() -> None:
    """Do what ``opentelemetry-instrument`` does about the SDK."""
    from importlib.metadata import entry_points

    from opentelemetry import trace

    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return  # somebody did
    configurators = list(entry_points(group="opentelemetry_configurator"))
    if not configurators:
        raise RuntimeError(
            f"'env' needs what configures the SDK of OpenTelemetry: {_INSTALL} opentelemetry-distro"
        )
    configurators[0].load()().configure()


class _Tracing:
    """The tracer and the metrics of this process."""

    def __init__(self) -> None:
        from .. import _otel

        self.tracer = _otel.tracer()
        self.instruments = _otel.meter(
            None,
            "messaging.client.consumed.messages",
            "messaging.process.duration",
            "wove_ws.worker.active_runs",
        )

    def begin(self, command: RunTask) -> Traced:
        from opentelemetry import context, propagate, trace

        from .. import _otel

        common = _otel.attributes("process", command.task_id)
        sent = propagate.extract(dict(command.trace), context.Context())
        link = trace.get_current_span(sent).get_span_context()
        span = self.tracer.start_span(
            f"process {common['messaging.destination.name']}",
            sent,
            trace.SpanKind.CONSUMER,
            {**common, "messaging.message.id": command.run_id},
            [trace.Link(link)] if link.is_valid else None,
        )
        context.attach(trace.set_span_in_context(span, sent))  # for good: the context ends with the run
        return Traced(span, self.instruments, common)


class Traced:
    """A run that is being executed."""

    def __init__(self, span: trace.Span, instruments: _otel.Instruments, common: dict[str, Any]) -> None:
        self._span = span
        self._instruments = instruments
        self._common = common
        self._began = time.monotonic()
        instruments.active.add(1, common)

    def end(self, outcome: str, error_type: str = "", exception: BaseException | None = None) -> None:
        """End the span: with a "result", an "error" or "cancelled". Never raises."""
        from .. import _otel

        took = time.monotonic() - self._began
        try:
            told = _otel.Outcome(outcome, error_type[:128], exception)
            _otel.end(self._span, self._instruments, self._common, told, took)
        except Exception:
            _logger.exception("Telemetry failed.")
