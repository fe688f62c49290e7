"""The engine under clients, on a CPU: what is counted, and what is refused before anything is built."""

from random import Random

import pytest

from saccade.bench.steps import traffic
from saccade.bench.steps.chunks import bench_chunks, show_chunks
from saccade.bench.steps.host import bench_host, show_host
from saccade.bench.steps.traffic import Arrivals, Client, TrafficTask, bench_engine, find_late, show_engine
from saccade.errors import RequestError


class Instant:
    """An engine whose requests end when the test says so."""

    vocab_size = 50

    def __init__(self) -> None:
        self.jobs: dict[object, object] = {}
        self.asked: list[tuple[int, int | None]] = []

    def add(self, prompt: list[int], params: object, capture: bool) -> object:
        self.asked.append((len(prompt), params.max_tokens))  # type: ignore[attr-defined]
        request = object()
        self.jobs[request] = None
        return type("Job", (), {"request": request})()


def test_a_client_counts_its_tokens_and_asks_again_behind_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: 100.0)
    engine = Instant()
    client = Client(engine, TrafficTask(7, 9, 64), Random(0))  # type: ignore[arg-type]
    for tokens, now in ((0, 100.5), (1, 101.0), (2, 102.0)):  # a step of its prompt, its first token, a draft beside
        client.take(tokens, now)
    engine.jobs.clear()
    client.take(1, 105.0)
    assert client.firsts == [1.0] and client.gaps == [0.5, 0.5, 3.0] and (client.tokens, client.ended) == (4, 1)
    assert [length for length, _ in engine.asked] == [7, 7] and engine.asked[1][1] == 9
    client.take(1, 106.0)  # of the next request: no gap between two requests
    assert client.firsts == [1.0, 6.0] and len(client.gaps) == 3
    assert (find_late(range(1, 201)), find_late([5.0]), find_late(range(1, 201), 95)) == (198, 5.0, 190)


def test_a_record_of_traffic_says_all_that_is_asked_of_it() -> None:
    one, kept, two, _ = bench_engine(
        "bundled", 1, clients=(1, 3), prompt=5, output=4, device="cpu", commit="abc", capture=True
    )
    assert (one["selections"], kept["selections"], kept["clients"]) == ("-", "captured", 1)
    assert "captured selections cost" in show_engine([one, kept]) and "cost" not in show_engine([one, two])
    assert (one["clients"], one["requests"]) == (1, 3) and two["requests"] >= 9
    for record in (one, two):
        assert record["tokens_per_s"] == pytest.approx(4 * record["requests_per_s"], rel=0.35)
        assert 0 < record["gap_ms"] <= record["gap_p99_ms"] <= record["longest_gap_ms"]
    (late,) = bench_engine("bundled", 1, (2,), 5, 4, device="cpu", arrivals="poisson", load=2.0, ahead=True, seed=3)
    assert late["requests"] == 20 and late["asked_per_s"] > 0 and late["gap_p95_ms"] <= late["longest_gap_ms"]
    assert "Poisson, seed 3, 2.0 of what" in show_engine([late]) and "launched ahead" in show_engine([late])
    assert "requests/s" in show_engine([one, two]) and "bundled (1 of 4 layers" in show_engine([one])
    with pytest.raises(RequestError, match="prompt and output: expected .* tokens at most, found 900005"):
        bench_engine(prompt=5, output=900_000, device="cpu")
    with pytest.raises(RequestError, match="arrivals: expected again or poisson, found 'now'"):
        bench_engine(arrivals="now", device="cpu")
    with pytest.raises(RequestError, match="load: expected a number above 0"):
        bench_engine(arrivals="poisson", load=0, device="cpu")
    with pytest.raises(RequestError, match="output: expected an integer of at least 1, found 0"):
        bench_engine(output=0, device="cpu")


def test_requests_that_come_by_chance_wait_for_a_place_and_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: 0.0)
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


def test_the_host_s_share_and_gaps_beside_a_prompt_are_told_with_their_conditions() -> None:
    records = bench_host((2,), prompt=5, output=4, device="cpu", commit="abc")
    assert [record["answers"] for record in records] == ["token ids", "text", "sampled"]
    assert all(record["decode_steps"] and record["mixed_steps"] and record["decode_ms"] > 0 for record in records)
    assert "a model that computes nothing" in show_host(records)
    (one,) = bench_chunks("bundled", 1, (8,), decodes=2, context=20, repeats=1, device="cpu", commit="abc")
    assert one["steps"] == 4 and 0 < one["alone_ms"] <= one["longest_gap_ms"] <= one["ttft_ms"]
    assert "2 requests decode while a prompt of 20 tokens enters" in show_chunks([one])
    with pytest.raises(RequestError, match="chunk: expected twice 8 decodes at least"):
        bench_chunks("bundled", 1, (8,), device="cpu")
