"""LLM(tp=2) on the bundled model, in processes of its own: whatever one rank does, two do, and nothing stays behind."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from announcements import announce
from killed_ranks import find_children, is_there

from saccade import LLM, SamplingParams
from saccade.checkpoint.open import bundled_path, open_model
from saccade.checkpoint.read import read_tensors
from saccade.errors import NumericsError, RankError

PROMPTS = ["Tom has 12 apples.", "Lucy has 4 boxes with 9 pencils each."]
GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
HOT = SamplingParams(max_tokens=10, temperature=1.2, top_p=0.9, seed=7, stop=("####",), logprobs=2)
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_tokens": 1024, "speculate": "auto"}


@pytest.fixture(scope="module")
def one() -> LLM:
    return LLM(**OPTIONS)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Made in a thread that ends: its ranks must not end with it."""
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(LLM, tp=2, **OPTIONS).result()
    ranks = find_children(os.getpid())
    yield made
    made.close()
    assert ranks and not any(map(is_there, ranks))


def test_answers_are_those_of_one_rank(one: LLM, llm: LLM) -> None:
    mixed = [GREEDY, HOT]
    for mine, its in zip(llm.generate(PROMPTS, mixed), one.generate(PROMPTS, mixed), strict=True):
        assert (mine.text, mine.token_ids, mine.finish_reason) == (its.text, its.token_ids, its.finish_reason)
    assert sum(llm.stats.tally.drafted) > 0 and (llm.settings.tp, llm.settings.ep) == (2, 1)
    assert llm.score(range(20)) == pytest.approx(one.score(range(20)), abs=1e-4)
    assert len(llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=1.0))) == 2  # seeds are rank 0's


def test_selections_and_streams(one: LLM, llm: LLM) -> None:
    found = [each.generate(PROMPTS[1], GREEDY, capture_selection=True)[0] for each in (llm, one)]
    assert found[0].token_ids == found[1].token_ids
    assert found[0].selections is not None and found[1].selections is not None
    assert len(found[0].selections) == len(found[1].selections)
    stream = llm.stream(PROMPTS[0], GREEDY)
    first = next(stream)
    left = llm.stream(PROMPTS[1], GREEDY)
    next(left)
    left.close()  # a cancellation goes to the other rank with the next step
    assert first.text + "".join(piece.text for piece in stream) == one.generate(PROMPTS[0], GREEDY)[0].text


def test_threads_share_the_steps(one: LLM, llm: LLM) -> None:
    wanted = [one.generate(prompt, GREEDY)[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: llm.generate(PROMPTS[i % 2], GREEDY)[0].text, range(6)))
    assert found == wanted * 3


def test_ctrl_c_leaves_the_ranks_together(one: LLM, llm: LLM) -> None:
    pieces = llm.stream(PROMPTS[0], GREEDY)
    next(pieces)
    timer = threading.Timer(0.05, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS * 2, SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True))
    assert not llm.engine.jobs or len(llm.engine.jobs) == 1
    assert llm.generate(PROMPTS[1], GREEDY)[0].text == one.generate(PROMPTS[1], GREEDY)[0].text


def read_bundled() -> dict[str, torch.Tensor]:
    _, index = open_model(bundled_path())
    return read_tensors(index, list(index.entries))


def push(llm: LLM, tensors: dict[str, torch.Tensor], staged: bool | None) -> None:
    with llm.push(announce(tensors), staged) as pushed:
        for name, tensor in tensors.items():
            pushed.feed(name, tensor)
        pushed.finish()


def test_a_push_reaches_every_rank(one: LLM, llm: LLM) -> None:
    """Also numbers that are not finite, in a row that only rank 1 holds: both ranks say so, and go on."""
    old = read_bundled()
    new = old | {"model.norm.weight": old["model.norm.weight"] * 0.5}
    bad = old | {"lm_head.weight": old["lm_head.weight"].clone()}
    bad["lm_head.weight"][-1] = torch.nan
    hot = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    before = llm.generate(PROMPTS, hot)
    push(one, new, None)
    push(llm, new, None)
    assert [c.text for c in llm.generate(PROMPTS, hot)] == [c.text for c in one.generate(PROMPTS, hot)]
    push(llm, bad, True)
    with pytest.raises(NumericsError, match="not finite"):
        llm.generate(PROMPTS, hot)
    push(one, old, False)
    push(llm, old, False)
    assert [c.token_ids for c in llm.generate(PROMPTS, hot)] == [c.token_ids for c in before]


def test_what_is_closed_refuses_by_name(llm: LLM) -> None:
    """The last of this file."""
    ranks = find_children(os.getpid())
    os.kill(ranks[0], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 on .* was killed by SIGKILL"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True))
    for ask in (lambda: llm.generate(PROMPTS), lambda: llm.stream(PROMPTS[0]), lambda: llm.score([1, 2])):
        with pytest.raises(RankError, match="rank 1"):
            ask()
