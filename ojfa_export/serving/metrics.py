"""What `/metrics` says, for Prometheus.

Names behind the prefix are those of vLLM, which people have dashboards for: replace `vllm:` by
`ojfa:` in a panel. The prefix is our own, as two programs may be watched in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ojfa_export.serving.catalogue import Catalogue, Served
from ojfa_export.serving.promise_watch import PromiseWatch

_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_BETWEEN = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2,
    0.5, 1.0,
)  # fmt: skip
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 600.0)
_LABEL = "model_name"
# Ours to OpenAI's words, as dashboards group by them.
_FINISHED = {
    "end_of_text": "stop", "stop_token": "stop", "stop_string": "stop",
    "max_new_tokens": "length", "cache_full": "length", "cancelled": "abort", "timeout": "timeout",
    "error": "error",
}  # fmt: skip


class Latencies:
    """Times of one bundle's streams, as the server sees them."""

    def __init__(self, first: Histogram, between: Histogram, whole: Histogram) -> None:
        self._first, self._between, self._whole = first, between, whole

    def tokens(self, seconds: float, count: int, *, is_first: bool) -> None:
        """Takes tokens that came together, so many seconds after those before them."""
        if is_first:
            self._first.observe(seconds)
        else:
            self._between.observe(seconds / count)

    def end(self, seconds: float) -> None:
        """Takes a request's whole time."""
        self._whole.observe(seconds)


class Metrics:
    """The metrics of a server.

    Args:
        catalogue: Whose engines are asked when somebody looks.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(catalogue))
        self._first = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _SECONDS
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a stream.", _BETWEEN
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "From the request to the end of its answer.", _WHOLE
        )
        self._answers = Counter(
            "ojfa:http_requests",
            "Answers by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self._latencies: dict[str, Latencies] = {}

    def latencies(self, name: str) -> Latencies:
        """Of a bundle."""
        if name not in self._latencies:
            series = (each.labels(name) for each in (self._first, self._between, self._whole))
            self._latencies[name] = Latencies(*series)
        return self._latencies[name]

    def count(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ojfa:{name}", text, (_LABEL,), registry=self._registry, buckets=buckets)


class _Engines:
    """Asks the engines, and the watches of promises, when metrics are read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    def collect(self) -> Iterator[Metric]:
        """All families of metrics."""
        families = _Families()
        for served in list(self._catalogue.served.values()):
            _read_engine(families, served)
            if served.watch is not None:
                _read_watch(families, served.name, served.watch)
        yield from families.found.values()


class _Families:
    """Families of metrics by name, made when they are first used."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def gauge(self, name: str, text: str, model: str, value: float, **labels: str) -> None:
        self._add(GaugeMetricFamily, name, text, model, value, labels)

    def count(self, name: str, text: str, model: str, value: float, **labels: str) -> None:
        self._add(CounterMetricFamily, name, text, model, value, labels)

    def _add(
        self, kind: Any, name: str, text: str, model: str, value: float, labels: dict[str, str]
    ) -> None:
        if name not in self.found:
            self.found[name] = kind(f"ojfa:{name}", text, labels=[_LABEL, *labels])
        self.found[name].add_metric([model, *labels.values()], value)


def _read_engine(families: _Families, served: Served) -> None:
    stats, name = served.engine.stats(), served.name
    gauge, count = families.gauge, families.count
    gauge("num_requests_running", "Requests that have a slot.", name, stats.running)
    gauge("num_requests_waiting", "Requests in the queue.", name, stats.waiting)
    used = stats.pages_used / max(stats.pages, 1)
    gauge("kv_cache_usage_perc", "Used share of the KV cache, 1 is all.", name, used)
    count("prompt_tokens", "Tokens of prompts.", name, stats.prompt_tokens)
    count("generation_tokens", "Generated tokens.", name, stats.new_tokens)
    count("prefix_cache_queries", "Tokens looked up.", name, stats.prompt_tokens)
    count("prefix_cache_hits", "Tokens found in the prefix cache.", name, stats.cached_tokens)
    count("num_preemptions", "Requests sent back to the queue.", name, stats.preemptions)
    ended = dict.fromkeys(_FINISHED.values(), 0)
    for reason, number in stats.finished.items():
        ended[_FINISHED[reason]] += number
    for reason, number in ended.items():
        text = "Requests that ended, by why."
        count("request_success", text, name, number, finished_reason=reason)
    for blocks in range(1, served.model.blocks + 1):
        text = "Generated tokens by the blocks that computed them: the exits taken."
        count("tokens_by_blocks", text, name, stats.blocks_run.get(blocks, 0), blocks=str(blocks))
    gauge("blocks_per_token", "Mean since the start.", name, stats.blocks_per_token)
    count("draft_tokens_accepted", "Drafted and kept.", name, stats.drafted)
    count("catch_up_tokens", "Left early, ran deeper later.", name, stats.catch_up_tokens)
    count("passes", "Runs of the model.", name, stats.passes)
    count("pass_tokens", "Tokens in runs of the model.", name, stats.pass_tokens)


def _read_watch(families: _Families, name: str, watch: PromiseWatch) -> None:
    gauge, count, state = families.gauge, families.count, watch.state
    text = "Early tokens compared with the full model."
    count("shadow_checks", text, name, watch.checks)
    count("shadow_disagreements", "Those that differ.", name, watch.disagreements)
    count("shadow_requests_left_out", "The queue was full.", name, watch.left_out)
    gauge("promise_max_disagreement", "What the bundle promises.", name, watch.limit)
    text = "Share of tokens that differ from the full model's: estimate and bounds."
    if state.units:
        gauge("disagreement", text, name, state.estimate, bound="estimate")
    gauge("disagreement", text, name, state.lower, bound="lower")
    gauge("disagreement", text, name, state.upper, bound="upper")
    gauge("promise_alarm", "1 where the promise was seen broken.", name, float(watch.alarm))
