"""Settings that take something from each other are told at the start."""

from dataclasses import replace
from typing import Any

import pytest

from saccade.api.llm import LLM
from saccade.api.loading.prepare import prepare
from saccade.api.settings.conflicts import find_conflicts
from saccade.api.settings.resolve import resolve

SMALL: dict[str, Any] = {
    "path": "model", "device": "cpu", "dtype": "auto", "mtp": True, "max_length": 128, "cache_tokens": None,
    "max_batch_tokens": None, "max_requests": None, "free_bytes": 10**12, "weight_bytes": 0, "page_bytes": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cache_tokens": 10}, ["holds 64 tokens, the context is 128: a prompt and its answer may have 65 together"]),
        ({"cache_tokens": 127}, []),
        ({"cache_tokens": 128, "max_length": 129}, []),  # the last token of an answer needs no row
        ({"cache_tokens": 640, "max_requests": 11}, ["11 were asked for, but each needs a page and the cache has 10"]),
        ({"cache_tokens": 640}, []),  # 64 requests are the default
        ({"max_batch_tokens": 63}, ["a step of 63 tokens has no place for one of each of 64 requests"]),
        ({"max_batch_tokens": 3, "max_requests": 3, "speculate": 3}, ["3 drafts and a token do not fit into a step of 3"]),
        ({"max_mixed_tokens": 513}, ["max_mixed_tokens: 513 were asked for, but a step has 512 at most"]),
        ({"max_mixed_tokens": 512}, []),
        ({"max_requests": 512}, []),
        ({"max_requests": 513}, ["a step of 512 tokens has no place for one of each of 513 requests"]),
        ({"check_ranks": True}, ["one rank, and nothing to compare it with"]),
        ({"check_ranks": True, "tp": 2}, []),
        ({"speculate": "auto"}, []),
        ({"launch_ahead": "on"}, []),
        ({"launch_ahead": "on", "speculate": "auto"}, ["steps with drafts are waited for: none is launched ahead"]),
        ({"launch_ahead": "on", "state_bytes": 8}, ["steps with states are waited for: none is launched ahead"]),
        ({"activations": "fp8"}, []),
    ],
)  # fmt: skip
def test_what_settings_take_from_each_other(asked: dict[str, Any], words: list[str]) -> None:
    told = list(find_conflicts(resolve(**SMALL | asked | {"check_ranks": False}), asked))
    assert len(told) == len(words) and all(word in line for word, line in zip(words, told, strict=True)), told


def test_conflicts_are_found_again_when_ranks_agree_on_a_smaller_cache() -> None:
    """Notes on other things stay, and stand once."""
    asked = prepare(cache_tokens=8192, max_requests=20)
    whole = replace(asked, settings=replace(asked.settings, notes=("another", *asked.settings.notes)))
    assert whole.settings.notes == ("another",)
    smaller = whole.with_cache(640)
    other, cache, requests = smaller.settings.notes
    assert other == "another" and cache.startswith("cache_tokens: the cache holds 640 tokens")
    assert requests.startswith("max_requests: 20 were asked for, but each needs a page and the cache has 10")
    assert smaller.with_cache(64).settings.notes[1].startswith("cache_tokens: the cache holds 64 tokens")
    assert smaller.with_cache(8192).settings == whole.settings


def test_a_small_cache_is_noted_with_the_other_notes() -> None:
    (note,) = LLM(cache_tokens=10).settings.notes
    assert note.startswith("cache_tokens: the cache holds 64 tokens, the context is 4,096")
    assert not LLM(cache_tokens=4096).settings.notes
