"""Sessions of agents that take turns: what of their prompts the prefix cache still holds when they come back.

Each session sends its whole history again, longer by an answer and a message. A beginning is the same for all (tools, a
system prompt), the rest is its own. Tokens are random. Next: engine/scheduling/prefix_cache.py; prefix.py beside.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from saccade.api.llm import LLM
from saccade.base.values import is_count, show
from saccade.engine.params import SamplingParams
from saccade.errors import RequestError


def bench_sessions(
    model: str | None = None,
    sessions: Sequence[int] = (2, 8),
    shared: int = 1000,
    own: int = 500,
    new: int = 150,
    answer: int = 30,
    turns: int = 6,
    cache_tokens: int | None = None,
    device: str = "auto",
    speculate: int | str = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Of each number of sessions: the share of prompt tokens found, after each session's first turn and in all, and the
    seconds to a first token. A prompt is `shared` tokens of all, `own` of its session, and for each turn before it an
    `answer` and `new` tokens. Raises RequestError for senseless numbers, and what LLM raises."""
    named = {"shared": shared, "own": own, "new": new, "answer": answer, "turns": turns}
    for name, value in (*named.items(), *(("sessions", count) for count in sessions)):
        if not is_count(value, 1):
            raise RequestError(f"{name}: expected an integer of at least 1, found {show(value)}")
    rows, settings = list[dict[str, Any]](), None
    for count in sessions:
        llm = LLM(model, device, speculate=speculate, cache_tokens=cache_tokens, prefix_cache=True)
        settings = llm.settings
        if (longest := shared + own + turns * (new + answer)) > min(settings.max_length, settings.cache_tokens):
            room = min(settings.max_length, settings.cache_tokens)
            raise RequestError(
                f"turns: the last prompt and its answer have {longest:,} tokens; there is room for {room:,}"
            )
        rows.append(play_sessions(llm, count, shared, own, new, answer, turns))
        say(f"{count} sessions: {rows[-1]['hit_rate']:.1%} of all prompt tokens found")
    assert settings is not None
    return {
        "sessions": rows,
        **named,
        "cache_tokens": settings.cache_tokens,
        "max_length": settings.max_length,
        "model": settings.path,
        "device": settings.device,
        "speculate": speculate,
        "load": "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg()),
        "command": " ".join(["saccade", *sys.argv[1:]]),
    }


def play_sessions(llm: LLM, count: int, shared: int, own: int, new: int, answer: int, turns: int) -> dict[str, Any]:
    """One number of sessions, which take turns, on an engine that has seen none."""
    dice = random.Random(0)

    def draw(length: int) -> list[int]:
        return [dice.randrange(llm.config.vocab_size) for _ in range(length)]

    params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
    beginning = draw(shared)
    histories = [beginning + draw(own) for _ in range(count)]
    asked, found, waits, later = 0, 0, list[float](), [0, 0]
    for turn in range(turns):
        for history in histories:
            start, first = time.perf_counter(), 0.0
            tokens, cached = list[int](), 0
            for piece in llm.stream(history, params):
                first = first or time.perf_counter() - start
                tokens, cached = tokens + piece.token_ids, piece.cached_tokens
            asked, found = asked + len(history), found + cached
            if turn:
                later = [later[0] + len(history), later[1] + cached]
                waits.append(first)
            history += tokens + draw(new)
    tally = llm.stats.prefix
    return {
        "count": count,
        "prompt_tokens": asked,
        "found_tokens": found,
        "hit_rate": round(found / asked, 3),
        "hit_rate_after_first": round(later[1] / max(1, later[0]), 3),
        "evicted_pages": tally.evictions if tally else 0,
        "first_token_ms": round(1e3 * statistics.median(waits), 1) if waits else None,
    }
