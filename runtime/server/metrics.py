"""Prometheus metrics of one server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from megalith.runtime.scheduler import Load

if TYPE_CHECKING:
    from .service import Service

_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms as they happen; gauges are set when they are read."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._previous = Load(0, 0, 0, 0, 0, 0, 0)
        self.queued = self._gauge("requests_queued", "Sequences that wait for a slot")
        self.running = self._gauge("requests_running", "Sequences that hold a slot")
        self.pages_used = self._gauge("kv_pages_used", "Pages of the KV cache that sequences hold")
        self.pages_total = self._gauge("kv_pages", "Pages of the KV cache")
        self.usage = self._gauge("kv_usage_ratio", "Share of the KV cache that sequences hold")
        self.ready = self._gauge("ready", "1 where the engine takes requests")
        self.places = self._gauge("places_taken", "Sequences that run, wait or are being read")
        self.restarts = self._gauge("engine_restarts", "How often the engine was started again")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of accepted prompts")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.prefix_tokens = self._counter("prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache")
        self.preemptions = self._counter("preemptions", "Sequences that gave their pages up")
        self.requests = Counter("megalith_http_requests", "Answered requests", ["path", "status"], registry=self._registry)
        self.first_token = self._histogram("time_to_first_token_seconds", "From request to first token", _FIRST_TOKEN_BUCKETS)
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Between tokens of a sequence, as they are sent", _INTER_TOKEN_BUCKETS
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"megalith_{name}", text, registry=self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"megalith_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"megalith_{name}", text, buckets=buckets, registry=self._registry)

    def take(self, load: Load) -> None:
        """Count what an engine's own counters gained; they start again with its process."""
        before = self._previous
        if load.prompt_tokens < before.prompt_tokens or load.preemptions < before.preemptions:
            before = Load(0, 0, 0, 0, 0, 0, 0)
        if load.prefix_tokens > before.prefix_tokens:
            self.prefix_tokens.inc(load.prefix_tokens - before.prefix_tokens)
        if load.preemptions > before.preemptions:
            self.preemptions.inc(load.preemptions - before.preemptions)
        self._previous = load

    def text(self, service: Service) -> bytes:
        """The exposition format."""
        load = service.engine.load
        for gauge, value in (
            (self.queued, load.waiting),
            (self.running, load.running),
            (self.pages_used, load.pages_used),
            (self.pages_total, load.pages_total),
            (self.usage, load.pages_used / max(1, load.pages_total)),
            (self.ready, int(service.is_ready)),
            (self.places, service.places.taken),
            (self.restarts, service.engine.restarts),
        ):
            gauge.set(value)
        return generate_latest(self._registry)
