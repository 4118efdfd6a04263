"""What Prometheus reads of a service.

Owns: the names, types and help texts of the metrics; the only import of prometheus_client.
Never: counts anything itself (the numbers are those of ``Statistics``), never has a label
whose values a host could choose.
"""

from __future__ import annotations

import functools
import itertools
import platform
from collections.abc import Iterator
from typing import Any, Protocol

from .._version import __version__
from .statistics import BOUNDS, Histogram, Statistics

__all__ = ["MISSING", "Metered", "make_exposition"]

#: What is said where prometheus_client is missing.
MISSING = (
    "Metrics need the package 'prometheus_client', which is not installed: "
    'pip install "wove_ws_sync[prometheus]"\n'
)
#: Every second class is told: a factor of two is fine enough for an alert.
_TOLD = range(2, len(BOUNDS), 2)


class Metered(Protocol):
    """What is read of the service at each scrape."""

    counters: Any
    engine: Any

    @property
    def statistics(self) -> Statistics: ...
    @property
    def refusal(self) -> str: ...
    @property
    def hosts(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def uptime(self) -> float: ...
    @property
    def certificate_ends(self) -> float | None: ...
    def traffic(self) -> tuple[int, int]:
        """Return how many bytes of messages were received and sent so far."""


def make_exposition(service: Metered) -> Any:
    """Return a function from an Accept header to (content type, body), on a registry of its own.

    Raises ImportError without prometheus_client.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))

    def expose(accept: str) -> tuple[str, bytes]:
        encoder, content_type = choose_encoder(accept)
        return content_type, encoder(registry)

    return expose


class _Collector:
    def __init__(self, service: Metered) -> None:
        self._service = service

    def describe(self) -> list[Any]:
        """Return nothing: then the registry does not collect to learn the names."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield every metric as it is now."""
        return itertools.chain(self._gauges(), self._counters(), self._histograms(), self._about())

    def _gauges(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        service, statistics = self._service, self._service.statistics
        yield Gauge("wove_ws_hosts_connected", "Hosts that are connected.", service.hosts)
        yield Gauge("wove_ws_runs_queued", "Runs that wait for a slot.", statistics.queued)
        yield Gauge("wove_ws_runs_running", "Runs whose task has begun.", statistics.running)
        yield Gauge("wove_ws_workers", "Slots of the engine.", service.engine.workers)
        help_text = "What the ends of runs take that have not arrived."
        yield Gauge("wove_ws_kept_results_bytes", help_text, service.kept_bytes)
        help_text = "Whether the service is draining."
        yield Gauge("wove_ws_draining", help_text, float(service.refusal == "draining"))
        yield Gauge("wove_ws_ready", "Whether new runs are taken.", float(not service.refusal))
        yield Gauge("wove_ws_uptime_seconds", "How long the service is there.", service.uptime)
        if service.certificate_ends is not None:
            help_text = "When the TLS certificate ends, in seconds since the epoch."
            yield Gauge("wove_ws_certificate_expiry_timestamp_seconds", help_text, service.certificate_ends)

    def _counters(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        def counter(name: str, text: str, value: float) -> Any:
            return CounterMetricFamily(name, text, value)

        service, statistics = self._service, self._service.statistics
        received, sent = service.traffic()
        yield counter("wove_ws_connections", "Connections of hosts.", service.counters["connections"])
        yield counter("wove_ws_runs_accepted", "Runs that were taken.", statistics.accepted_total)
        ended = CounterMetricFamily("wove_ws_runs_ended", "Runs that ended.", labels=["outcome"])
        for outcome, count in statistics.ended_total.items():
            ended.add_metric([outcome], count)
        yield ended
        yield counter("wove_ws_received_bytes", "Bytes of messages from hosts.", received)
        yield counter("wove_ws_sent_bytes", "Bytes of messages to hosts.", sent)
        text = "What was refused, ignored or dropped."
        incidents = CounterMetricFamily("wove_ws_incidents", text, labels=["reason"])
        for reason, count in sorted(service.counters.items()):
            if reason != "connections":
                incidents.add_metric([reason], count)
        yield incidents

    def _histograms(self) -> Iterator[Any]:
        statistics = self._service.statistics
        yield _family(
            "wove_ws_run_seconds", "From the beginning of a task to its end.", statistics.run_seconds
        )
        text = "From the acceptance of a run to the beginning of its task."
        yield _family("wove_ws_queue_wait_seconds", text, statistics.wait_seconds)

    def _about(self) -> Iterator[Any]:
        from prometheus_client.core import InfoMetricFamily

        about = {
            "version": __version__,
            "engine": str(self._service.engine.name),
            "python_version": platform.python_version(),
        }
        yield InfoMetricFamily("wove_ws_worker", "What serves here.", about)


def _family(name: str, text: str, histogram: Histogram) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    sums = list(itertools.accumulate(histogram.counts))
    buckets = [(_bound(index), sums[index]) for index in _TOLD]
    return HistogramMetricFamily(name, text, buckets=[*buckets, ("+Inf", sums[-1])], sum_value=histogram.sum)


@functools.cache
def _bound(index: int) -> str:
    return str(round(BOUNDS[index], 6))
