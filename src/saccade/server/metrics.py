"""What /metrics tells, in Prometheus' text format: requests, tokens, times, queue, cache, drafts.

Counted where answers pass through the HTTP process; the state of the engine comes with each of its steps. Next:
service.py, which counts.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from saccade.server.engine.answers import ServedEngine
from saccade.server.engine.wire import Delta

FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PROMPT_HELP = "Tokens of prompts that were taken, each prompt once, however many answers it gets."
WHOLE_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineMetrics(Collector):
    """The engine's own numbers, as of its last step."""

    def __init__(self, engine: ServedEngine) -> None:
        self.engine = engine

    def collect(self) -> list[Metric]:
        load = self.engine.load
        used = load.pages - load.free_pages
        gauges = {
            "requests_running": ("Requests in the engine's steps.", load.running),
            "requests_waiting": ("Requests that wait for pages or places.", load.waiting),
            "cache_pages": ("Pages of the cache that requests can own.", load.pages),
            "cache_pages_used": ("Pages that requests own.", used),
            "cache_pages_kept": ("Pages that the prefix cache can find, whether owned or not.", load.prefix_pages),
            "cache_usage_ratio": ("Share of the pages that are used.", used / max(1, load.pages)),
            "engine_up": ("1 while the engine answers.", float(self.engine.failure is None)),
        }
        counters = {
            "engine_steps": ("Steps of the engine.", load.steps),
            "preemptions": ("Requests that lost their pages to older ones.", load.preemptions),
            "drafted_tokens": ("Tokens that the MTP layer guessed and that were judged.", load.drafted),
            "accepted_tokens": ("Guesses that were right.", load.accepted),
            "prefix_asked_tokens": ("Prompt tokens that were looked for in the prefix cache.", load.prefix_asked),
            "prefix_hit_tokens": ("Prompt tokens that were found there.", load.prefix_hits),
            "prefix_evictions": ("Pages that the prefix cache let go of.", load.prefix_evictions),
        }
        found: list[Metric] = [
            GaugeMetricFamily(f"saccade_{name}", text, float(value)) for name, (text, value) in gauges.items()
        ]
        found += [
            CounterMetricFamily(f"saccade_{name}", text, float(value)) for name, (text, value) in counters.items()
        ]
        return found


class ServerMetrics:
    """Counts of one server. Its registry is its own, so that a process may hold several."""

    def __init__(self, engine: ServedEngine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineMetrics(engine))
        own = self.registry
        self.requests = Counter("saccade_http_requests", "By path and status.", ["path", "status"], registry=own)
        self.ends = Counter(
            "saccade_answers",
            "Answers by why they ended; those that a full queue or an API refused are in http_requests alone.",
            ["reason"],
            registry=own,
        )
        self.prompt_tokens = Counter("saccade_prompt_tokens", PROMPT_HELP, registry=own)
        self.cached_tokens = Counter("saccade_cached_prompt_tokens", "Those found in the cache.", registry=own)
        self.answer_tokens = Counter("saccade_generation_tokens", "Tokens of answers.", registry=own)
        self.open = Gauge("saccade_answers_open", "Answers that are not complete.", registry=own)
        self.first = Histogram(
            "saccade_time_to_first_token_seconds",
            "From the request to the first token.",
            buckets=FIRST_BUCKETS,
            registry=own,
        )
        self.between = Histogram(
            "saccade_time_between_tokens_seconds", "Between tokens of an answer.", buckets=BETWEEN_BUCKETS, registry=own
        )
        self.whole = Histogram(
            "saccade_request_seconds", "From the request to the end of its answer.", buckets=WHOLE_BUCKETS, registry=own
        )
        self.mean_seconds = 1.0  # of the last answers, for Retry-After

    def render(self) -> bytes:
        return generate_latest(self.registry)


class AnswerClock:
    """The times of one answer, and its tokens."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._last: float | None = None
        self._is_open, self._counts_prompt = True, False
        metrics.open.inc()

    def take(self, prompt_tokens: int | None) -> None:
        """The engine has taken the prompt. None: another answer counts its tokens."""
        self._counts_prompt = prompt_tokens is not None
        self._metrics.prompt_tokens.inc(prompt_tokens or 0)

    def note(self, delta: Delta) -> None:
        """A piece has come."""
        metrics, now = self._metrics, time.monotonic()
        if self._counts_prompt:  # the first piece knows what was found
            self._counts_prompt = False
            metrics.cached_tokens.inc(delta.counts.cached)
        if delta.tokens:
            metrics.answer_tokens.inc(len(delta.tokens))
            if self._last is None:
                metrics.first.observe(now - self._began)
            else:
                for _ in delta.tokens:  # several with drafts, or if nobody looked for a while
                    metrics.between.observe((now - self._last) / len(delta.tokens))
            self._last = now
        if delta.is_last:
            self.end(name_end(delta), is_whole=True)

    def end(self, reason: str, is_whole: bool = False) -> None:
        """The answer is complete, or nobody waits for it. The first end counts."""
        if not self._is_open:
            return
        self._is_open = False
        metrics, seconds = self._metrics, time.monotonic() - self._began
        metrics.ends.labels(reason).inc()
        metrics.open.dec()
        if is_whole:
            metrics.whole.observe(seconds)
            metrics.mean_seconds += 0.1 * (seconds - metrics.mean_seconds)


def name_end(delta: Delta) -> str:
    """Why an answer ended. One without a token that the request allows is no fault of engine or model."""
    if delta.error is None:
        return delta.finish_reason or "error"
    return "no_answer" if delta.error_kind == "no_answer" else "error"
