"""Counters, gauges and histograms for Prometheus, named as vLLM names its own where it has the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from abyssal.chat.api import Completer, Load

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 7200)


class _Loads(Collector):
    """Gauges, and counters that are kept elsewhere, which are read when somebody asks."""

    def __init__(self, load: Callable[[], Load], model: str):
        self._load, self._model = load, model

    def collect(self) -> Iterable[Metric]:
        """All of them now."""
        load = self._load()
        for name, help_text, value in (
            ("num_requests_running", "Answers that are being made.", load.running),
            ("num_requests_waiting", "Answers that wait for memory.", load.waiting),
            ("kv_cache_usage_perc", "Share of the cache's memory that is taken, 0 to 1.", load.cache_used),
        ):
            gauge = GaugeMetricFamily(f"abyssal:{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, help_text, count in (
            ("expert_hits", "Experts that a pass found in memory.", load.expert_hits),
            ("expert_misses", "Experts that a pass read from disk.", load.expert_misses),
            ("expert_read_bytes", "Bytes of experts that were read from disk.", load.expert_bytes),
        ):
            if count is not None:
                counter = CounterMetricFamily(f"abyssal:{name}", help_text, labels=["model_name"])
                counter.add_metric([self._model], count)
                yield counter


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, completer: Completer):
        self.registry = CollectorRegistry()
        self.registry.register(_Loads(completer.load, completer.model))
        self._model = completer.model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"abyssal:{name}", text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"abyssal:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)

        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.generated = counter("generation_tokens", "Tokens of answers.")
        self.reasoning = counter("reasoning_tokens", "Tokens of answers that were thinking.")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up for reuse.")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were reused.")
        self.success = counter("request_success", "Answers by how they ended.", "finished_reason")
        self.http = counter("http_requests", "Requests by route and status.", "route", "status")
        self.repairs = counter("repairs", "Repairs of completions and conversations.", "name")
        self.first = histogram("time_to_first_token_seconds", "From request to first token.", _FIRST)
        self.between = histogram("inter_token_latency_seconds", "Between tokens of an answer.", _BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "From request to last token.", _WHOLE)
        # there from the start: what appears with its first use has no rate
        for metric in (self.prompt, self.generated, self.reasoning, self.queries, self.hits, self.first, self.between):
            metric.labels(completer.model)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)

    def meter(self) -> Meter:
        """Measures one request, from now on."""
        return Meter(self, self._model)


class Meter:
    """What one request adds to the metrics.

    Attributes:
        first_s: seconds to its first token, or None.
    """

    def __init__(self, metrics: Metrics, model: str):
        self._metrics, self._model = metrics, model
        self.began = time.monotonic()
        self._last = 0.0
        self.first_s: float | None = None
        self._between = metrics.between.labels(model)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began

    def output(self) -> None:
        """Something of the answer came."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now - self.began
            self._metrics.first.labels(self._model).observe(self.first_s)
        else:
            self._between.observe(now - self._last)
        self._last = now

    def repaired(self, name: str) -> None:
        """Something was repaired."""
        self._metrics.repairs.labels(self._model, name).inc()

    def finished(self, reason: str) -> None:
        """One answer ended."""
        self._metrics.success.labels(self._model, reason).inc()

    def used(self, prompt: int, cached: int, completion: int, reasoning: int = 0) -> None:
        """The request is over."""
        m = self._metrics
        m.prompt.labels(self._model).inc(prompt)
        m.queries.labels(self._model).inc(prompt)
        m.hits.labels(self._model).inc(cached)
        m.generated.labels(self._model).inc(completion)
        m.reasoning.labels(self._model).inc(reasoning)
        m.whole.labels(self._model).observe(self.seconds)
