"""What Prometheus scrapes: what was asked, what was decoded, how fast, and the engine's memory of this moment."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from npr_engine.engine import EngineStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """The server's own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "npr_requests", "HTTP requests by path and status", ("path", "status"), registry=registry
        )
        self.choices = Counter(
            "npr_choices", "Responses decoded, by why they ended", ("outcome",), registry=registry
        )
        self.prompt_tokens = Counter("npr_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter(
            "npr_generated_tokens", "Tokens of responses, forced ones included", registry=registry
        )
        self.forced_tokens = Counter("npr_forced_tokens", "Tokens that the engine wrote", registry=registry)
        self.first_token = Histogram(
            "npr_time_to_first_token_seconds",
            "From submission to the first tokens of a response",
            buckets=_SECONDS,
            registry=registry,
        )
        self.rate = Histogram(
            "npr_tokens_per_second",
            "Tokens of a response over all branches, by the time since submission",
            buckets=_RATES,
            registry=registry,
        )
        self._running = Gauge("npr_running", "Responses that decode", registry=registry)
        self._waiting = Gauge("npr_waiting", "Responses that wait for memory", registry=registry)
        self._blocks_used = Gauge("npr_kv_blocks_used", "KV blocks that are not free", registry=registry)
        self._blocks_total = Gauge("npr_kv_blocks_total", "KV blocks", registry=registry)

    def text(self, stats: EngineStats) -> bytes:
        """Prometheus' text format."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._blocks_used.set(stats.num_blocks - stats.free_blocks)
        self._blocks_total.set(stats.num_blocks)
        return generate_latest(self.registry)


class Stopwatch:
    """Times one response for the histograms."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._begun = False

    def tokens(self) -> None:
        """Tokens have come."""
        if not self._begun:
            self._begun = True
            self._metrics.first_token.observe(time.perf_counter() - self._start)

    def end(self, outcome: str, *, tokens: int, forced: int) -> None:
        """The response has ended."""
        metrics = self._metrics
        metrics.choices.labels(outcome).inc()
        metrics.generated_tokens.inc(tokens)
        metrics.forced_tokens.inc(forced)
        if tokens:
            metrics.rate.observe(tokens / (time.perf_counter() - self._start))
