"""What the sandbox server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from abyssal.sandbox.edge import Edge

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server, over its edge's own numbers."""

    def __init__(self, edge: Edge):
        self.registry = CollectorRegistry()
        self._edge = edge
        self._operations = Counter(
            "abyssal_sandbox_operations_total", "Operations asked for.", ["op", "outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "abyssal_sandbox_operation_seconds", "From request to reply.", ["op"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        for name, text, read in (
            ("live", "Sandboxes that live.", lambda: edge.admission.sandboxes),
            ("memory_bytes", "Bytes of their limits together.", lambda: edge.admission.memory),
            ("waiting", "Requests that wait for room.", lambda: edge.admission.waiting),
            ("starting", "Sandboxes that are being started.", lambda: edge.admission.starting),
            ("rejected", "Requests rejected for want of room.", lambda: edge.admission.rejected),
            ("warm", "Boxes that are ready.", lambda: len(edge.pool.ids)),
            ("warm_taken", "Warm boxes given out.", lambda: edge.pool.taken),
            ("warm_missed", "Requests that found no warm box.", lambda: edge.pool.missed),
        ):
            Gauge(f"abyssal_sandbox_{name}", text, registry=self.registry).set_function(read)

    def operation(self, op: str, outcome: str, seconds: float) -> None:
        """One call."""
        self._operations.labels(op, outcome).inc()
        self._seconds.labels(op).observe(seconds)

    def text(self) -> bytes:
        """All, as Prometheus reads it."""
        return generate_latest(self.registry)
