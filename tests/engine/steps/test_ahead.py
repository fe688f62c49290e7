"""Steps that are launched before the one in front of them has been read: the same tokens and texts, whatever ends,
enters, is cancelled or gives way meanwhile.
"""

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_engines import Told, build, generate, judge, make_request, watch_launches

from saccade.engine.params import SamplingParams
from saccade.engine.ranks.replicate import FollowEngine, LeadEngine
from saccade.engine.steps.ahead import LAUNCH_AHEAD
from saccade.engine.steps.flight import Flight
from saccade.parallel.ranks import ONE_RANK


def build_with_least(least, *args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAUNCH_AHEAD, "auto", least)
        return build(*args, ahead="auto", **options)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("aaasssssssc"), st.integers(0, 10**6)), max_size=60),
    st.integers(8, 30),
    st.sampled_from([None, 20]),
    st.sampled_from([0, 2, 4]),
)
def test_what_runs_ahead_changes_no_token_and_no_text(events, pages, mixed, least):
    """`least`: requests that must decode."""
    engine, asked, told = build_with_least(least, pages, mixed=mixed), [], []
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


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("aaasssssssc"), st.integers(0, 10**6)), max_size=40),
    st.integers(8, 30),
    st.sampled_from([0, 2, 4]),
)
def test_ranks_that_repeat_what_enters_run_ahead_together(events, pages, least):
    follower = build_with_least(least, pages, make=partial(FollowEngine, ONE_RANK))
    told = Told(follower)
    lead, jobs = build_with_least(least, pages, make=partial(LeadEngine, told, ONE_RANK)), []
    launched = [watch_launches(engine) for engine in (lead, follower)]
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
    assert launched[0] == launched[1]
    assert follower.model.pool.equal(lead.model.pool) and follower.model.forwards == lead.model.forwards
    assert not follower.jobs and follower.scheduler.pages.free == lead.scheduler.pages.free
