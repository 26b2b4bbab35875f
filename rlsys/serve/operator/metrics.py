"""Prometheus metrics. Labels have few values: served bases, routes, methods, statuses; no tenant, no path."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rlsys.serve.operator.figures import Figures

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_GAUGES = {
    "sessions": "Open sessions of clients.",
    "unsettled_promises": "Operations without a result.",
    "samples_in_flight": "Completions that are being sampled.",
    "result_bytes": "Bytes of results that are kept for clients.",
    "memory_bytes": "Resident memory of the controller.",
}
_COUNTERS = {
    "train_tokens": "Tokens of forward and forward_backward calls, when they are submitted.",
    "sampled_tokens": "Tokens sampled.",
    "steps": "Optimizer steps, when they are submitted.",
    "sample_requests": "Requests for samples.",
}
_OF_BASES = {
    "models": "Training runs.",
    "samplers": "Open sampling sessions.",
    "waiting_calls": "Calls of training runs that wait for their turn.",
}


class Metrics:
    """Requests of one HTTP process, beside the figures of the controller."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, CPU time and open files of this process
        self._requests = Histogram(
            "rlsys_request_seconds",
            "HTTP requests by route, method and status; a poll for a result lasts until the result is there.",
            ("route", "method", "status"),
            buckets=BUCKETS_S,
            registry=self._registry,
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method if method in METHODS else "other", str(status)).observe(seconds)

    def text(self, found: Figures) -> bytes:
        """The exposition format, version 0.0.4."""
        figures = CollectorRegistry()
        figures.register(_FigureCollector(found))
        return generate_latest(figures) + generate_latest(self._registry)


class _FigureCollector(Collector):
    def __init__(self, found: Figures) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        found = self._found
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"rlsys_{name}", text, value=getattr(found, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"rlsys_{name}", text, value=getattr(found, name))
        for name, text in _OF_BASES.items():
            family = GaugeMetricFamily(f"rlsys_{name}", text, labels=["base"])
            for base in found.bases:
                family.add_metric([base.name], getattr(base, name))
            yield family
