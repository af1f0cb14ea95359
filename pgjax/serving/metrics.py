"""What /metrics tells Prometheus, in a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pgjax.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("pgjax_requests", "Answers to requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("pgjax_request_seconds", "From arrival to the end", ["route"], buckets=SECONDS, registry=self.registry)
        self.flagged = Counter("pgjax_flagged", "Conversations that were flagged", ["route"], registry=self.registry)
        self.unparsed = Counter("pgjax_parse_failures", "Conversations of which no answer was in format", ["route"], registry=self.registry)

    def judged(self, route: str, verdict: dict) -> None:
        self.flagged.labels(route).inc(verdict["flagged"])
        self.unparsed.labels(route).inc(not verdict["parsed"])

    def watch(self, engine: Engine, prefix: str = "pgjax") -> None:
        self.registry.register(_OfEngine(engine, prefix))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfEngine:
    def __init__(self, engine: Engine, prefix: str):
        self.engine, self.prefix = engine, prefix

    def collect(self) -> Iterator[Metric]:
        counts, prefix = self.engine.counts, self.prefix
        yield GaugeMetricFamily(f"{prefix}_waiting", "Requests in the engine's queue", counts.waiting)
        yield GaugeMetricFamily(f"{prefix}_busy_rows", "Rows that decode an answer", counts.busy)
        yield GaugeMetricFamily(f"{prefix}_rows", "Rows of the engine", self.engine.rows)
        yield CounterMetricFamily(f"{prefix}_answers", "Answers written", counts.answers)
        yield CounterMetricFamily(f"{prefix}_tokens", "Their tokens", counts.tokens)
        yield CounterMetricFamily(f"{prefix}_engine_failures", "Programs that failed", counts.failures)
