"""The engine under clients, on a CPU: what is counted, and what is refused before anything is built."""

from random import Random

import pytest

from saccade.bench.steps import traffic
from saccade.bench.steps.traffic import Client, TrafficTask, bench_engine, find_late, show_engine
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
    assert (find_late(range(1, 201)), find_late([5.0])) == (198, 5.0)


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
    assert "requests/s" in show_engine([one, two]) and "bundled (1 of 4 layers" in show_engine([one])
    with pytest.raises(RequestError, match="prompt and output: expected .* tokens at most, found 900005"):
        bench_engine(prompt=5, output=900_000, device="cpu")
    with pytest.raises(RequestError, match="output: expected an integer of at least 1, found 0"):
        bench_engine(output=0, device="cpu")
