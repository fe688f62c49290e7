"""Steps that are launched before the one in front of them has been read: the same tokens and texts, whatever ends,
enters, is cancelled or gives way meanwhile.

The model here is quick and sees all: what it makes of a token depends on every token of its request, read through the
page table out of a pool, as attention would.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from random import Random

import pytest
import torch
from byte_tokenizer import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.engine.engine import Engine
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.ranks.replicate import FollowEngine, LeadEngine
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.prefix_keys import PrefixKeys
from saccade.engine.steps.flight import Flight
from saccade.ops.step import Cache
from saccade.parallel.ranks import ONE_RANK

VOCAB, PRIME, END = 264, 9973, 10
TABLE = torch.randn(PRIME, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
TABLE[:, 256:] = -20.0  # special tokens


class Ledger:
    """Keeps each token where its cache row would be."""

    ops = None

    def __init__(self, pages):
        self.pool, self.forwards, self.fails_at = torch.zeros(pages * 64, dtype=torch.long), 0, None

    def forward(self, batch, cache, capture=None):
        self.forwards += 1
        if self.forwards == self.fails_at:
            raise RuntimeError("a launch failed")
        real = batch.slots >= 0
        self.pool[batch.slots[real]] = batch.tokens[real] + 1
        table = batch.page_table[batch.request]
        rows = (table[:, :, None] * 64 + torch.arange(64)).flatten(1)  # [T, positions]
        place = torch.arange(rows.shape[1])
        seen = torch.where(place <= batch.positions[:, None], self.pool[rows] * (7 * place + 11), 0)
        return (seen.sum(1) % PRIME)[:, None]

    def logits(self, rows):
        return TABLE[rows[:, 0]]


def build(pages=30, budget=96, requests=6, ahead=True, prefix=True, make=Engine, mixed=None):
    scheduler = Scheduler(pages, budget, requests, 400, PrefixKeys(b"ledger") if prefix else None, mixed)
    options = {"defaults": Defaults(eos_token_ids=(END,)), "tokenizer": TOKENIZER, "runs_ahead": ahead}
    return make(Ledger(pages), Cache((), ()), scheduler, VOCAB, **options)


def generate(prompt, params):
    """A request by itself, one step after the other. Log-probabilities have its tokens booked in the other of two
    ways: by `_accept`, not by the shorter `_take`."""
    engine = build(ahead=False, prefix=False)
    job = engine.add(prompt, replace(params, logprobs=params.logprobs or 0))
    while engine.jobs:
        engine.step()
    return job


def make_request(seed):
    """A prompt, of which many begin alike, and what is asked; now and then what a step ahead cannot serve."""
    dice = Random(seed)
    prompt = [*range(40, 40 + dice.choice((0, 64, 130))), *(dice.randrange(256) for _ in range(dice.randint(1, 70)))]
    special = dice.choice(({}, {}, {}, {}, {"logprobs": 2}, {"min_tokens": 1}, {"presence_penalty": 1.0}))
    stop = {} if dice.random() < 0.6 else {"stop": tuple(chr(dice.randrange(33, 127)) for _ in range(8))}
    return prompt, SamplingParams(
        max_tokens=dice.choice((1, 2, 9, 70)), temperature=dice.choice((0.0, 1.0)), seed=seed,
        ignore_eos=dice.random() < 0.5, **special, **stop,
    )  # fmt: skip


def judge(engine, asked, told):
    """What each job gave is what it gives alone; nothing is left."""
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    for (prompt, params), job in asked:
        text = "".join(update.text for update in told if update.job is job)
        tokens = [token for update in told if update.job is job for token in update.tokens]
        assert job.request.generated == tokens and job.text == text
        alone = generate(prompt, params)
        if job.finish_reason == "cancelled":
            assert alone.request.generated[: len(tokens)] == tokens and alone.text.startswith(text)
        else:
            assert (tokens, text) == (alone.request.generated, alone.text)
            assert (job.finish_reason, job.stop_reason) == (alone.finish_reason, alone.stop_reason)
            assert job.tally == alone.tally
            assert job.logprobs == (alone.logprobs if params.logprobs else [])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("aaasssssssc"), st.integers(0, 10**6)), max_size=60),
    st.integers(8, 30),
    st.sampled_from([None, 20]),
)
def test_what_runs_ahead_changes_no_token_and_no_text(events, pages, mixed):
    engine, asked, told = build(pages, mixed=mixed), [], []
    for what, number in events:
        if what == "a":
            asked.append((make_request(number), engine.add(*make_request(number))))
        elif what == "c" and asked:
            engine.cancel(asked[number % len(asked)][1])
        else:
            told += engine.step()
    while engine.jobs:
        told += engine.step()
    engine.settle()
    assert engine.step() == []
    judge(engine, asked, told)


def test_the_next_step_is_launched_before_this_one_is_read():
    engine = build()
    job = engine.add([1, 2, 3], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    steps = []
    while engine.jobs:
        steps.append((len(engine.step()), engine.model.forwards))
    assert steps == [(1, 2), (1, 3), (1, 4), (1, 4)]  # its end is known beforehand: no fifth
    assert job.finish_reason == "length" and engine.tally.steps == job.tally.steps == 3


def test_a_stop_string_ends_an_answer_at_its_token():
    """Whichever token it is, the one behind it is computed already, and dropped."""
    engine, greedy, ends = build(requests=40), SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True), []
    for first in range(40):
        whole = generate([first], greedy).request.generated
        end = next((i for i, token in enumerate(whole) if i and 33 <= token < 127 and token not in whole[:i]), None)
        if end is not None:
            job = engine.add([first], replace(greedy, stop=(chr(whole[end]),)))
            ends.append((end, job, whole[: end + 1]))
    while engine.jobs:
        engine.step()
    assert {end for end, _, _ in ends} >= {1, 2, 3, 4}
    assert all(job.finish_reason == "stop" and job.request.generated == tokens for _, job, tokens in ends)


@pytest.mark.parametrize("special", ["logprobs", "penalty"])
def test_who_needs_a_token_on_the_host_is_waited_for(special):
    engine = build()
    engine.add([1, 2], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    more = {"logprobs": 1} if special == "logprobs" else {"presence_penalty": 1.0}
    engine.add([3, 4], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, **more))
    engine.step()
    assert engine.model.forwards == 1


def test_a_launch_that_fails_ends_its_requests_and_leaves_the_others():
    engine = build(requests=2)
    first, second = (engine.add([i], SamplingParams(max_tokens=9, ignore_eos=True)) for i in (1, 2))
    engine.step()
    third = engine.add([3], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    engine.model.fails_at = engine.model.forwards + 1
    with pytest.raises(RuntimeError) as failed:
        engine.step()
    assert engine.fail(failed.value) and first.failure is second.failure is failed.value
    assert first.request.generated == first.request.tokens[1:2]  # the token that was read, and no place for another
    while engine.jobs:
        engine.step()
    assert third.request.generated == generate([3], third.params).request.generated
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1


def test_a_step_that_cannot_be_read_ends_the_one_behind_it_too(monkeypatch):
    engine = build(requests=2)
    first = engine.add([1], SamplingParams(max_tokens=9, ignore_eos=True))
    engine.step()
    second = engine.add([2], SamplingParams(max_tokens=9, ignore_eos=True))  # will be in the step behind alone
    third = engine.add([3], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    with monkeypatch.context() as broken, pytest.raises(RuntimeError) as failed:
        broken.setattr(Flight, "read", lambda _: (_ for _ in ()).throw(RuntimeError("the device is gone")))
        engine.step()
    assert engine.fail(failed.value) and first.failure is second.failure is failed.value
    assert third.failure is None
    while engine.jobs:
        engine.step()
    assert third.request.generated == generate([3], third.params).request.generated
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1


class Told:
    """Rank 0's connection to another rank, which does at once what it is told."""

    def __init__(self, follower):
        self.follower, self.tracker = follower, self

    def check(self):
        pass

    def together(self, what):
        return nullcontext()

    def working(self):
        return nullcontext()

    def tell(self, head, payload):
        self.follower.enter(json.loads(json.dumps(head["events"])))
        self.follower.repeat(head["drafts"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aaasssssssc"), st.integers(0, 10**6)), max_size=40), st.integers(8, 30))
def test_ranks_that_repeat_what_enters_run_ahead_together(events, pages):
    follower = build(pages, make=partial(FollowEngine, ONE_RANK))
    told = Told(follower)
    lead, jobs = build(pages, make=partial(LeadEngine, told, ONE_RANK)), []
    for what, number in events:
        if what == "a":
            jobs.append(lead.add(*make_request(number)))
        elif what == "c" and jobs:
            lead.cancel(jobs[number % len(jobs)])
        elif what == "s":
            lead.step()
    while lead.jobs:
        lead.step()
    lead.step()  # tells what entered last
    assert follower.model.pool.equal(lead.model.pool) and follower.model.forwards == lead.model.forwards
    assert not follower.jobs and follower.scheduler.pages.free == lead.scheduler.pages.free
