"""Metrics of the server, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one server, in a registry of its own: a process may run several servers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of = {"registry": self._registry}
        self.requests = Counter("zebra_requests", "Answered requests", ["path", "status"], **of)
        self.endings = Counter("zebra_answers", "Generated answers by what ended them", ["finish"], **of)
        self.prompt_tokens = Counter("zebra_prompt_tokens", "Tokens of prompts", **of)
        self.cached_tokens = Counter("zebra_cached_tokens", "Tokens of prompts that a cache held", **of)
        self.completion_tokens = Counter("zebra_completion_tokens", "Generated tokens", **of)
        self.first_token = Histogram(
            "zebra_time_to_first_token_seconds", "From the request's arrival", buckets=_SECONDS, **of
        )
        self.duration = Histogram("zebra_request_seconds", "From arrival to the last token", buckets=_SECONDS, **of)
        self.waiting = Gauge("zebra_requests_waiting", "Requests in the queue", **of)
        self.running = Gauge("zebra_requests_running", "Requests that the model answers now", **of)
        self.cache_bytes = Gauge("zebra_cache_bytes", "Bytes of key-value caches that are kept", **of)
        self.caches = Gauge("zebra_caches", "Key-value caches that are kept", **of)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
