"""Settings that each make sense, and together do less than one of them says: told before the first request meets it.

Knows no torch. Next: resolve.py, whose Settings these are; loading/prepare.py, which adds what is found to the notes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from saccade.api.settings.resolve import Settings


def find_conflicts(s: Settings, asked: Mapping[str, Any]) -> Iterator[str]:
    """A line for each. `asked`: the options as they were given; of defaults only the cache is spoken of."""
    pages, longest = s.pages - 1, s.cache_tokens + 1  # the last token of an answer needs no row
    if longest < s.max_length:
        yield (
            f"cache_tokens: the cache holds {s.cache_tokens:,} tokens, the context is {s.max_length:,}: a prompt and "
            f"its answer may have {longest:,} together"
        )
    if asked.get("max_requests") is not None and s.max_requests > pages:
        yield (
            f"max_requests: {s.max_requests:,} were asked for, but each needs a page and the cache has {pages:,}: so "
            "many run at the same time"
        )
    if s.max_batch_tokens < s.max_requests:  # defaults are far from it
        yield (
            f"max_batch_tokens: a step of {s.max_batch_tokens:,} tokens has no place for one of each of "
            f"{s.max_requests:,} requests: when so many run, they take turns"
        )
    mixed = asked.get("max_mixed_tokens")
    if mixed is not None and mixed > s.max_batch_tokens:
        yield (
            f"max_mixed_tokens: {mixed:,} were asked for, but a step has {s.max_batch_tokens:,} at most "
            "(max_batch_tokens)"
        )
    if isinstance(s.speculate, int) and s.speculate >= s.max_batch_tokens:
        yield (
            f"speculate: {s.speculate} drafts and a token do not fit into a step of {s.max_batch_tokens} "
            "(max_batch_tokens): fewer are made"
        )
    if asked.get("launch_ahead") == "on" and (s.speculate or s.state_bytes):
        why = "drafts" if s.speculate else "states"
        yield f'launch_ahead: "on" was asked for, but steps with {why} are waited for: none is launched ahead'
    if asked.get("check_ranks") and s.tp == 1:
        yield "check_ranks: there is one rank, and nothing to compare it with"
