"""Sessions that take turns: a cache that holds all of them finds what one that holds half of them has to compute."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_checkpoint import write

from saccade.bench.steps import sessions
from saccade.bench.steps.sessions import bench_sessions, play_sessions
from saccade.errors import RequestError

# The second page of a first prompt is filled by its answer.
HOW = {"device": "cpu", "shared": 64, "own": 60, "new": 20, "answer": 8, "turns": 3}


def test_a_larger_cache_finds_more(tmp_path: Path) -> None:
    root = str(write(tmp_path / "tiny"))
    found = {tokens: bench_sessions(root, [1, 4], cache_tokens=tokens, **HOW) for tokens in (320, 4096)}  # type: ignore[arg-type]
    rows = {tokens: {row["count"]: row for row in each["sessions"]} for tokens, each in found.items()}
    assert rows[320][1] | {"first_token_ms": 0} == rows[4096][1] | {"first_token_ms": 0}
    small, large = rows[320][4], rows[4096][4]
    assert small["prompt_tokens"] == large["prompt_tokens"] == 4 * (124 + 152 + 180)
    # The first turn finds the shared page, each later one a page of its own too.
    assert large["found_tokens"] == 3 * 64 + 4 * (128 + 128) > small["found_tokens"]
    assert large["evicted_pages"] == 0 < small["evicted_pages"]
    assert large["hit_rate"] == round((3 * 64 + 4 * 256) / (4 * 456), 3)
    assert large["hit_rate_after_first"] == round(256 / (152 + 180), 3)
    assert found[320]["cache_tokens"] == 320


def test_the_wait_is_that_for_a_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(sessions.time, "perf_counter", lambda: now)

    def stream(*_: object) -> Iterator[object]:
        nonlocal now
        for seconds in (2.0, 5.0):
            now += seconds
            yield SimpleNamespace(token_ids=[1], cached_tokens=4)

    llm: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=9), stats=SimpleNamespace(prefix=None), stream=stream)
    row = play_sessions(llm, 2, 4, 4, 2, 2, 2)
    assert (row["first_token_ms"], row["found_tokens"], row["prompt_tokens"]) == (2000, 16, 2 * (8 + 12))


def test_senseless_numbers_are_refused(tmp_path: Path) -> None:
    root = str(write(tmp_path / "tiny"))
    for how, word in (({"turns": 0}, "turns"), ({"sessions": [0]}, "sessions"), ({"cache_tokens": 64}, "room for 64")):
        with pytest.raises(RequestError, match=word):
            bench_sessions(root, **HOW | how)  # type: ignore[arg-type]
