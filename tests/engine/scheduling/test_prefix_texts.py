"""Sessions that branch, on a model: each text is that of an engine without a prefix cache, whatever was found, evicted,
drafted or preempted on the way. And what a request that failed, scored or captured leaves to others."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import assemble, tiny_config, tiny_tensors

from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.speculate import Drafter, EagerDrafts
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference

CONFIG = tiny_config(vocab_size=264, num_hidden_layers=1, first_k_dense_replace=1, max_position_embeddings=512)
MODEL = Transformer(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG)), Reference())
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


class Counted:
    """The model, which counts the tokens that it runs."""

    ops = None

    def __init__(self, model=MODEL):
        self.model, self.tokens = model, 0

    def forward(self, batch, cache, capture=None):
        self.tokens += int(batch.query_start[-1])
        return self.model.forward(batch, cache, capture)

    def logits(self, rows):
        return self.model.logits(rows)


class Shifted:
    """Drafts that are right now and then: the main model, on a text that lacks its first token, with pools of its own."""

    def __init__(self, pages):
        self.cache = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=False)

    def forward(self, batch, next_tokens, hidden, cache, selection=None):
        return MODEL.forward(replace(batch, tokens=next_tokens), self.cache), batch.positions[:, None].int()

    def logits(self, rows):
        return MODEL.logits(rows)


def build(pages=40, budget=96, speculate=0, prefix=True, index_cache="bf16", model=None, layer=MODEL.mtp, requests=4):
    keys = PrefixKeys(b"tiny", bool(speculate)) if prefix else None
    scheduler = Scheduler(pages, budget, requests, CONFIG.max_position_embeddings, keys)
    pools = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=True, index_cache=index_cache)
    model = model or Counted()
    drafts = EagerDrafts(Drafter(model, layer, CONFIG.index_share_for_mtp_iteration, 512))
    return Engine(model, pools, scheduler, CONFIG.vocab_size, speculate=speculate, run_drafts=drafts)


def run(engine, *jobs):
    for _ in range(3000):
        if not engine.jobs:
            break
        engine.step()
    assert not engine.jobs and engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    return jobs


def make_prompt(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer_plain(asked):
    """The text of each prompt with its params, without a prefix cache, drafts or too few pages. All at once: one step
    for all of them takes as long as one for each."""
    engine = build(pages=64, prefix=False, budget=512, requests=len(asked))
    return [job.request.generated for job in run(engine, *(engine.add(*each) for each in asked))]


turns = st.lists(
    st.tuples(
        st.integers(0, 20),  # the earlier turn to go on from
        st.sampled_from([0, 1, 20, 64, 130, 200]),  # of its tokens, from the end, those that are dropped
        st.sampled_from([50, 1, 64, 90, 140]),  # new ones
        st.sampled_from([66, 5, 66, 1, 12]),  # to generate
        st.sampled_from([0.0, 0.0, 1.0]),
        st.sampled_from([1, 0, 0, 6, 30]),  # steps until the next turn
        st.booleans(),  # the client goes away then
    ),
    min_size=3,
    max_size=5,
)


def play(turns, pages, budget, speculate, seed):
    """The engine, after turns that run beside each other as they come, each compared with its text alone."""
    engine, jobs, asked = build(pages, budget, speculate, layer=Shifted(pages)), [], []
    if speculate == "auto":
        ticks = iter(range(10**6))
        engine.pace.choose = lambda requests: (3, 3, 0, 0, 1)[next(ticks) // 2 % 5]
    for place, (earlier, dropped, new, count, temperature, steps, goes) in enumerate(turns):
        before = jobs[earlier % len(jobs)].request.tokens if jobs else make_prompt(150, seed)
        prompt = [*before[: max(0, len(before) - dropped)], *make_prompt(new, place % 3)][: (pages - 1) * 64 - count]
        asked.append((prompt[:440], SamplingParams(max_tokens=count, temperature=temperature, seed=place)))
        jobs.append(engine.add(*asked[-1]))
        for _ in range(steps):
            engine.step()
        if goes:
            engine.cancel(jobs[-1])
    run(engine)
    for job, turn, wanted in zip(jobs, turns, answer_plain(asked), strict=True):
        assert job.request.generated == (wanted[: len(job.request.generated)] if turn[6] else wanted)
    return engine


SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
options = (
    turns,
    st.sampled_from([5, 6, 8]),
    st.sampled_from([20, 96, 300]),
    st.sampled_from([0, 3, "auto"]),
    st.integers(0, 5),
)


@settings(max_examples=6, **SLOW)
@given(*options)
def test_texts_of_sessions_that_branch_are_those_without_the_cache(turns, pages, budget, speculate, seed):
    play(turns, pages, budget, speculate, seed)


@pytest.mark.soak
@pytest.mark.timeout(1800)  # 40 s of one core, if it has one
def test_200_sessions_that_branch(capsys):
    """200 at least, with counts of what they met."""
    met = {"sessions": 0, "turns": 0, "found": 0, "looked up": 0, "evictions": 0, "preemptions": 0, "accepted": 0}

    @settings(max_examples=200, **SLOW)
    @given(*options)
    def check(turns, pages, budget, speculate, seed):
        engine = play(turns, pages, budget, speculate, seed)
        tally = engine.scheduler.prefix_tally
        found = (1, len(turns), tally.found, tally.looked_up, tally.evictions, engine.scheduler.preemptions)
        for name, count in zip(met, (*found, sum(engine.tally.accepted)), strict=True):
            met[name] += count

    check()
    with capsys.disabled():
        print(f"\n{met}")
    assert met["sessions"] >= 200 and all(met.values())


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("index_cache", ["bf16", "fp8"])
def test_a_second_question_runs_only_what_is_new(speculate, index_cache):
    prompt = make_prompt(330)
    engine = build(speculate=speculate, index_cache=index_cache)
    (first,) = run(engine, engine.add(prompt, GREEDY))
    before = engine.model.tokens
    (second,) = run(engine, engine.add([*prompt[:325], 1, 2], GREEDY))
    assert second.request.cached_tokens == 320
    assert engine.model.tokens - before <= 7 + 6 * (1 + speculate)
    plain = build(speculate=speculate, index_cache=index_cache, prefix=False)
    alone = run(plain, plain.add(prompt, GREEDY), plain.add([*prompt[:325], 1, 2], GREEDY))
    assert [job.request.tokens for job in (first, second)] == [job.request.tokens for job in alone]


def test_drafts_behind_found_pages_are_as_good_as_without():
    """The layer's rows of a found page are those of this text: the token behind the page is part of its name."""
    prompt, drafts = make_prompt(200), []
    for prefix in (True, False):
        engine = build(speculate=5, prefix=prefix)
        run(engine, engine.add([*prompt[:128], *make_prompt(40, 9)], GREEDY))
        job = engine.add(prompt, SamplingParams(max_tokens=20, temperature=0.0))
        made = []
        while job.finish_reason is None:
            engine.step()
            made.append(list(job.request.draft))
        drafts.append(made)
        assert job.request.cached_tokens == (64 if prefix else 0)
    assert [each for each in drafts[0] if each] == [each for each in drafts[1] if each]


def test_captured_selections_and_scores_are_whole():
    prompt = make_prompt(200)
    engine, plain = build(), build(prefix=False)
    run(engine, engine.add(prompt, GREEDY))
    found, wanted = (
        run(e, e.add(prompt, GREEDY, capture=True), e.add_scoring(make_prompt(200)[:150])) for e in (engine, plain)
    )
    assert found[0].selections()[0].shape[0] == 205
    assert all(a.equal(b) for a, b in zip(found[0].selections(), wanted[0].selections(), strict=True))
    assert found[1].scores == pytest.approx(wanted[1].scores, abs=1e-5)


class Spoiled(Counted):
    """Puts NaN into the cache while `is_bad`."""

    is_bad = True

    def forward(self, batch, cache, capture=None):
        hidden = super().forward(batch, cache, capture)
        if self.is_bad:
            cache.latent[0].data[batch.slots] = float("nan")
            hidden = hidden * float("nan")
        return hidden


def test_a_request_that_failed_leaves_no_page():
    prompt = make_prompt(200)
    engine = build(model=Spoiled())
    (bad,) = run(engine, engine.add(prompt, GREEDY))
    assert bad.error is not None and engine.scheduler.pages.cached == 0
    engine.model.is_bad = False
    (good,) = run(engine, engine.add(prompt, GREEDY))
    assert good.request.cached_tokens == 0 and [good.request.generated] == answer_plain([(prompt, GREEDY)])


def test_a_step_that_raises_ends_those_who_were_in_it():
    """Not who waits for the pages that another computes, and would find them."""
    engine = build(budget=64)
    first, second = (engine.add(make_prompt(200), GREEDY) for _ in range(2))
    engine.step()
    whole, engine.model = engine.model, None
    with pytest.raises(AttributeError):
        engine.step()
    assert engine.fail(RuntimeError("out of memory"))
    assert first.finish_reason == "error" and second.finish_reason is None
    engine.model = whole
    run(engine)
    assert [second.request.generated] == answer_plain([(make_prompt(200), GREEDY)])
    assert second.request.cached_tokens == 64  # of the step that ended
