"""Sessions that take turns: a cache that holds all of them finds what one that holds half of them has to compute."""

from pathlib import Path

import pytest
from tiny_checkpoint import write

from saccade.bench.steps.sessions import bench_sessions
from saccade.errors import RequestError

HOW = {"device": "cpu", "shared": 64, "own": 100, "new": 20, "answer": 4, "turns": 3}


def test_a_larger_cache_finds_more(tmp_path: Path) -> None:
    root = str(write(tmp_path / "tiny"))
    found = {tokens: bench_sessions(root, [1, 4], cache_tokens=tokens, **HOW) for tokens in (320, 4096)}  # type: ignore[arg-type]
    rows = {tokens: {row["count"]: row for row in each["sessions"]} for tokens, each in found.items()}
    assert rows[320][1] | {"first_token_ms": 0} == rows[4096][1] | {"first_token_ms": 0}
    small, large = rows[320][4], rows[4096][4]
    assert small["prompt_tokens"] == large["prompt_tokens"] == 4 * (164 + 188 + 212)
    # The first turn finds the shared page, each later one two or three pages of its own too.
    assert large["found_tokens"] == 3 * 64 + 4 * (128 + 128) > small["found_tokens"]
    assert large["evicted_pages"] == 0 < small["evicted_pages"]
    assert found[320]["cache_tokens"] == 320


def test_senseless_numbers_are_refused(tmp_path: Path) -> None:
    root = str(write(tmp_path / "tiny"))
    for how, word in (({"turns": 0}, "turns"), ({"sessions": [0]}, "sessions"), ({"cache_tokens": 64}, "room for 64")):
        with pytest.raises(RequestError, match=word):
            bench_sessions(root, **HOW | how)  # type: ignore[arg-type]
