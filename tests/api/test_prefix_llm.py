"""The prefix cache as callers see it: counts in answers, pieces and `stats`, and a client that goes away."""

import pytest
from tiny_checkpoint import SIZES, write

from saccade.api.llm import LLM
from saccade.engine.params import SamplingParams
from saccade.errors import ConfigError

PROMPT = [i * 7 % 250 for i in range(210)]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "tiny")


def test_answers_say_what_was_found(root):
    llm, plain = (LLM(root, dtype="float32", prefix_cache=how, **SIZES) for how in (True, False))
    first, second = (llm.generate(PROMPT, GREEDY)[0] for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens) == (0, 192)
    pieces = list(llm.stream([*PROMPT[:140], 3], GREEDY))
    assert {piece.cached_tokens for piece in pieces} == {128}
    assert first.token_ids == second.token_ids == plain.generate(PROMPT, GREEDY)[0].token_ids
    tally = llm.stats.prefix
    assert (tally.looked_up, tally.found) == (561, 320) and tally.pages >= 3 and tally.evictions == 0
    assert tally.hit_rate == pytest.approx(320 / 561)
    assert str(llm.stats).endswith(str(tally)) and "320 of 561" in str(tally)
    assert plain.stats.prefix is None and not plain.settings.prefix_cache and llm.settings.prefix_cache
    captured = llm.generate(PROMPT, GREEDY, capture_selection=True)[0]
    assert captured.cached_tokens == 0 and len(captured.selections[0]) == 215


def test_two_models_name_their_pages_otherwise(root):
    plain, fp8 = (LLM(root, dtype="float32", index_cache=how, **SIZES) for how in ("bf16", "fp8"))
    again = LLM(root, dtype="float32", **SIZES)
    roots = [llm.engine.scheduler._prefix._keys.root for llm in (plain, fp8, again)]
    assert roots[0] == roots[2] != roots[1]


def test_a_client_that_goes_away_frees_its_pages_within_a_step(root):
    llm = LLM(root, **SIZES)
    pages = llm.engine.scheduler.pages
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    other = llm.stream(PROMPT[5:], SamplingParams(max_tokens=4, ignore_eos=True))
    next(stream)
    assert pages.free < pages.count - 1 - 4
    stream.close()
    next(other)
    assert len(llm.engine.jobs) == 1 and pages.free == pages.count - 1 - 4
    list(other)
    assert pages.free == pages.count - 1
    assert llm.generate(PROMPT, GREEDY)[0].cached_tokens == 192  # what it had computed is not lost


def test_a_senseless_setting_is_refused(root):
    with pytest.raises(ConfigError, match='prefix_cache: expected True, False or "auto", found'):
        LLM(root, prefix_cache="yes", **SIZES)
