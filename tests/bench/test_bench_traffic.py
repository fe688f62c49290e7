"""The engine under clients, on a CPU: what is counted, and what is refused before anything is built."""

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from saccade.bench.steps import chunks, clients, host, traffic
from saccade.bench.steps.chunks import SHORT, UNCOUNTED, bench_chunks, measure_beside, show_chunks
from saccade.bench.steps.clients import Arrivals, Client, TrafficTask, find_late
from saccade.bench.steps.host import bench_host, show_host
from saccade.bench.steps.traffic import bench_engine, show_cost, show_engine
from saccade.engine.engine import Engine
from saccade.engine.params import SamplingParams
from saccade.errors import ConfigError, RequestError


class Instant:
    """An engine whose requests end when the test says so."""

    vocab_size = 50

    def __init__(self) -> None:
        self.jobs: dict[object, object] = {}
        self.asked: list[tuple[int, int | None]] = []
        self.captured: list[bool] = []
        self.drawn: list[tuple[float | None, float | None]] = []

    def add(self, prompt: list[int], params: SamplingParams, capture: bool) -> object:
        self.captured.append(capture)
        self.asked.append((len(prompt), params.max_tokens))
        self.drawn.append((params.temperature, params.top_p))
        request = object()
        self.jobs[request] = None
        return type("Job", (), {"request": request})()


def test_a_client_counts_its_tokens_and_asks_again_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.time, "perf_counter", lambda: 100.0)
    engine = Instant()
    client = Client(engine, TrafficTask(7, 9, 64, captures=True, temperature=0.7, top_p=0.9), Random(0))  # type: ignore[arg-type]
    for tokens, now in ((0, 100.5), (1, 101.0), (2, 102.0)):  # a step of its prompt, its first token, a draft beside
        client.take(tokens, now)
    engine.jobs.clear()
    client.take(1, 105.0)
    assert engine.drawn == [(0.7, 0.9)] * 2
    assert client.firsts == [1.0] and client.gaps == [0.5, 0.5, 3.0] and (client.tokens, client.ended) == (4, 1)
    assert [length for length, _ in engine.asked] == [7, 7] and engine.asked[1][1] == 9
    assert engine.captured == [True, True]
    client.take(1, 106.0)  # of the next request: no gap between two requests
    assert client.firsts == [1.0, 6.0] and len(client.gaps) == 3
    assert (find_late(range(1, 201)), find_late([5.0]), find_late(range(1, 201), 95)) == (198, 5.0, 190)


def test_a_record_of_traffic_says_all_that_is_asked_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built = list[dict[str, Any]]()
    monkeypatch.setattr(traffic, "Engine", lambda *given, **how: built.append(how) or Engine(*given, **how))
    one, kept, two, _ = bench_engine(
        "bundled", 1, clients=(1, 3), prompt=5, output=4, device="cpu", commit="abc", capture=True
    )
    assert (one["selections"], kept["selections"], kept["clients"]) == ("-", "captured", 1)
    rates = ({"tokens_per_s": 120.0}, {"tokens_per_s": 100.0})
    assert show_cost([one | rates[0], kept | rates[1]]) == ["captured selections cost 20.0% of the time of 1 clients"]
    assert "captured selections cost" in show_engine([one, kept]) and "cost" not in show_engine([one, two])
    assert (one["clients"], one["requests"]) == (1, 3) and two["requests"] >= 9
    for record in (one, two):
        assert record["tokens_per_s"] == pytest.approx(4 * record["requests_per_s"], rel=0.35)
        assert 0 < record["gap_ms"] <= record["gap_p99_ms"] <= record["longest_gap_ms"]
    monkeypatch.setattr(traffic, "measure_traffic", lambda *_: {"requests_per_s": 50.0})
    how = {"arrivals": "poisson", "load": 2.0, "ahead": "on", "temperature": 0.7, "top_p": 0.9}
    (late,) = bench_engine("bundled", 1, (2,), 5, 4, device="cpu", seed=3, **how)  # type: ignore[arg-type]
    assert "drawn at temperature 0.7, top-p 0.9" in show_engine([late]) and "drawn" not in show_engine([one])
    assert (
        late["requests"] == 20
        and late["asked_per_s"] == 100
        and [how["launch_ahead"] for how in built] == ["off"] * 4 + ["on"]
        and late["gap_p95_ms"] <= late["longest_gap_ms"]
    )
    assert "Poisson, seed 3, 2.0 of what" in show_engine([late]) and "launched ahead" in show_engine([late])
    assert one["ahead"] == "off" and "launched one by one, with" in show_engine([one])  # on a CPU
    assert "launched ahead where 16 decode" in show_engine([late | {"ahead": "auto"}])
    assert "requests/s" in show_engine([one, two]) and "bundled (1 of 4 layers" in show_engine([one])
    with pytest.raises(RequestError, match="prompt and output: expected .* tokens at most, found 900005"):
        bench_engine(prompt=5, output=900_000, device="cpu")
    with pytest.raises(ConfigError, match='^ahead: expected "auto", "on" or "off", found \'yes\''):
        bench_engine(ahead="yes", device="cpu")
    with pytest.raises(RequestError, match="arrivals: expected again or poisson, found 'now'"):
        bench_engine(arrivals="now", device="cpu")
    with pytest.raises(RequestError, match="load: expected a number above 0"):
        bench_engine(arrivals="poisson", load=0, device="cpu")
    with pytest.raises(RequestError, match="output: expected an integer of at least 1, found 0"):
        bench_engine(output=0, device="cpu")


def test_requests_that_come_by_chance_wait_for_a_place_and_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.time, "perf_counter", lambda: 0.0)
    engine = Instant()
    came = Arrivals(engine, TrafficTask(7, 9, 64), 100.0, 2, Random(5))  # type: ignore[arg-type]
    came.enter(1.0)
    assert len(came.open) == len(engine.asked) == 2
    first, second = came.open.values()
    assert 0.0 == first.asked < second.asked < 0.2
    del came.open[first.job.request]
    came.enter(1.0)  # the third has been waiting all the time
    third = list(came.open.values())[-1]
    assert second.asked < third.asked < 0.3
    engine.jobs.clear()
    third.take(1, 1.5)
    assert third.firsts == [1.5 - third.asked] and third.ended == 1 and len(engine.asked) == 3  # it asks once
    times = [one.expovariate(100.0) for one in [Random(1)] for _ in range(4000)]
    assert sum(times) / 4000 == pytest.approx(0.01, rel=0.05)


class Timed:
    """An engine whose steps take a second; beside a prompt as long as the test says."""

    vocab_size = 50

    def __init__(self, *prompts: list[float]) -> None:
        self.now, self.jobs = 0.0, dict[Any, Any]()
        self.asked = list[tuple[int, int | None]]()
        self._prompts, self._left, self._prompt = list(prompts), list[float](), object()

    def add(self, prompt: list[int], params: SamplingParams) -> Any:
        self.asked.append((len(prompt), params.max_tokens))
        request = type("Request", (), {"pending": 1})()
        self.jobs[request] = job = SimpleNamespace(request=request)
        if len(prompt) > SHORT:
            self._prompt, self._left = request, self._prompts.pop(0)
        return job

    def step(self) -> None:
        self.now += self._left.pop(0) if self._left else 1.0
        if not self._left:
            self.jobs.pop(self._prompt, None)

    def cancel(self, job: Any) -> None:
        del self.jobs[job.request]


def test_gaps_beside_a_prompt_are_those_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    uncounted = [[90.0, 90.0]] * UNCOUNTED
    engine = Timed(*map(list, uncounted), [2.0, 5.0, 3.0], [2.0, 7.0, 3.0, 1.0], [1.0, 6.0, 3.0])
    monkeypatch.setattr(chunks.time, "perf_counter", lambda: engine.now)
    found = measure_beside(engine, 2, 40, 99, 3, Random(0))  # type: ignore[arg-type]
    assert found == {"ttft_ms": 10_000, "longest_gap_ms": 6000, "alone_ms": 1000, "steps": 3}
    assert engine.asked == [(SHORT, 99)] * 2 + [(40, 1)] * (UNCOUNTED + 3) and not engine.jobs


def test_the_host_s_share_and_gaps_beside_a_prompt_are_told_with_their_conditions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = list[Engine]()
    build = host.build_idle_engine
    monkeypatch.setattr(host, "build_idle_engine", lambda *how: made.append(build(*how)) or made[-1])
    records = bench_host((2,), prompt=5, output=4, device="cpu", commit="abc")
    assert [engine.tokenizer is not None for engine in made] == [False, True, True]
    assert [{job.params.temperature for job in engine.jobs.values()} for engine in made] == [{0.0}, {0.0}, {0.8}]
    assert [record["answers"] for record in records] == ["token ids", "text", "sampled"]
    assert all(record["decode_steps"] and record["mixed_steps"] and record["decode_ms"] > 0 for record in records)
    assert "a model that computes nothing" in show_host(records)
    one, usual = bench_chunks("bundled", 1, (8, None), decodes=2, context=20, repeats=1, device="cpu", commit="abc")
    assert (one["mixed_chunk"], usual["mixed_chunk"], one["default_mixed_chunk"], one["chunk"]) == (8, 512, 512, 512)
    assert "LLM has 512 for this shape, and 512 in other steps" in show_chunks([one]) and usual["steps"] == 1
    assert one["steps"] == 4 and 0 < one["alone_ms"] <= one["longest_gap_ms"] <= one["ttft_ms"]
    assert "2 requests decode while a prompt of 20 tokens enters" in show_chunks([one])
    with pytest.raises(RequestError, match="chunk: expected twice 8 decodes at least"):
        bench_chunks("bundled", 1, (8,), device="cpu")
