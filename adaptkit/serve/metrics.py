"""What happened, in numbers, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server. A name that is no task is counted as ``unknown``: clients cannot add labels."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("adaptkit_requests", "Requests answered", ["task", "status"], registry=own)
        self.errors = Counter(
            "adaptkit_errors", "Requests answered with a status from 400 on", ["status"], registry=own
        )
        self.seconds = Histogram("adaptkit_request_seconds", "From request to answer", ["task"], buckets=SECONDS,
                                 registry=own)  # fmt: skip
        self.images = Histogram("adaptkit_batch_images", "Images that were answered together",
                                buckets=(1, 2, 4, 8, 16, 32, 64), registry=own)  # fmt: skip
        self.passes = Counter("adaptkit_passes", "Runs of the backbone: shared by tasks, or of one task alone",
                              ["kind"], registry=own)  # fmt: skip
        self.passed = Counter("adaptkit_pass_images", "Images in these runs", ["kind"], registry=own)
        self.waiting = Gauge("adaptkit_waiting_images", "Images that wait for the model", registry=own)
        self.mounted = Gauge("adaptkit_adapters", "Adapters that are mounted", registry=own)

    def ran(self, kind: str, images: int) -> None:
        """Count a run of the backbone."""
        self.passes.labels(kind).inc()
        self.passed.labels(kind).inc(images)

    def answered(self, task: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(task, str(status)).inc()
        self.seconds.labels(task).observe(seconds)
        if status >= 400:
            self.errors.labels(str(status)).inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
