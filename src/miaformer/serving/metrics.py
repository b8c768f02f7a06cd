"""What a server tells Prometheus of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
FRACTIONS = tuple(step / 10 for step in range(1, 11))
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Of one application: each has a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._model = Info("miaformer_model", "What is served.", registry=registry)
        self._requests = Counter("miaformer_requests", "Answered requests.", ("path", "status"), registry=registry)
        self._latency = Histogram(
            "miaformer_request_seconds",
            "From a request's arrival to its answer, of answered pictures.",
            buckets=SECONDS,
            registry=registry,
        )
        self._batch = Histogram("miaformer_batch_pictures", "Pictures in a batch.", buckets=PICTURES, registry=registry)
        self._batch_seconds = Histogram(
            "miaformer_batch_seconds", "The model's time for a batch.", buckets=SECONDS, registry=registry
        )
        self._macs = Histogram(
            "miaformer_macs_fraction",
            "A picture's MACs, of the dense model's.",
            buckets=FRACTIONS,
            registry=registry,
        )
        self._budget = Histogram(
            "miaformer_budget", "Budget a picture was given.", buckets=FRACTIONS, registry=registry
        )
        self._lowered = Counter("miaformer_lowered", "Pictures given less than asked, for load.", registry=registry)
        self._refused = Counter("miaformer_refused", "Requests refused for load (503).", registry=registry)
        self.queue = Gauge("miaformer_queue_pictures", "Pictures admitted and not answered.", registry=registry)

    def serves(self, **what: str) -> None:
        self._model.info(what)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        if status == 200:
            self._latency.observe(seconds)
        elif status == 503:
            self._refused.inc()

    def batch_ran(self, pictures: int, seconds: float) -> None:
        self._batch.observe(pictures)
        self._batch_seconds.observe(seconds)

    def spent(self, macs_fraction: float, budget: float | None, lowered: bool) -> None:
        self._macs.observe(macs_fraction)
        if budget is not None:
            self._budget.observe(budget)
        if lowered:
            self._lowered.inc()

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self._registry)
