"""Figures for Prometheus, in a registry of the server's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from twofold.serve.service import Service
    from twofold.serve.work import Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """What happened since the start, and what goes on now."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "twofold_requests", "Requests that ended.", ["route", "status"], registry=self.registry
        )
        self.request_s = Histogram(
            "twofold_request_seconds",
            "From a request's arrival to its last byte.",
            ["route"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "twofold_time_to_first_token_seconds",
            "From handing in to the first token.",
            ["model"],
            buckets=_REQUEST_S,
            registry=self.registry,
        )
        self.token_s = Histogram(
            "twofold_time_per_token_seconds",
            "Between two steps of one request, after its first.",
            ["model"],
            buckets=_TOKEN_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "twofold_prompt_tokens", "Tokens read.", ["model"], registry=self.registry
        )
        self.new_tokens = Counter("twofold_new_tokens", "Tokens written.", ["model"], registry=self.registry)
        self.registry.register(_Now(service))

    def take(self, work: Work) -> None:
        """Work that ended, well or not."""
        model = work.served.name
        self.prompt_tokens.labels(model).inc(work.num_prompt_tokens)
        self.new_tokens.labels(model).inc(work.num_new_tokens)
        if work.first:
            self.first_token_s.labels(model).observe(work.first - work.started)
            # Rows of one work are written together, each step bringing a token for each.
            n_steps = work.num_new_tokens / work.n_answers - 1
            if n_steps > 0:
                self.token_s.labels(model).observe((work.last - work.first) / n_steps)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)


class _Now(Collector):
    """What is read from the engines when somebody asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See `Collector`."""
        named = {
            "twofold_open_answers": "Answers that are written or wait.",
            "twofold_requests_running": "Requests that the engine works on.",
            "twofold_requests_waiting": "Requests that wait for room in the engine.",
            "twofold_cache_bytes": "Of keys and values, reserved by running requests.",
            "twofold_cache_limit_bytes": "Of keys and values, at most.",
        }
        gauges = {name: GaugeMetricFamily(name, text, labels=["model"]) for name, text in named.items()}
        for model, served in self._service.models.items():
            scheduler = served.engine.loop.scheduler
            values = (
                served.gate.n_open,
                scheduler.n_running,
                scheduler.n_waiting,
                scheduler.used_bytes,
                scheduler.max_bytes,
            )
            for gauge, value in zip(gauges.values(), values, strict=True):
                gauge.add_metric([model], value)
        yield from gauges.values()
        ready = GaugeMetricFamily("twofold_ready", "1 while new requests are taken.")
        ready.add_metric([], float(self._service.is_ready))
        yield ready
