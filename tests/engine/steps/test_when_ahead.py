"""Which steps are launched ahead: with "auto" those in which enough requests decode, and the texts are those of "off"."""

from dataclasses import replace
from itertools import groupby

import drafting_engines
import pytest
from ledger_engines import build, generate, make_request, watch_launches

from saccade.engine.params import SamplingParams
from saccade.engine.steps.ahead import LEAST_DECODES, check_launch_ahead, choose_launch_ahead
from saccade.errors import ConfigError

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def add(engine, number, tokens=60):
    """One of many that differ: every second one samples, by a seed."""
    return engine.add([number, 7], replace(GREEDY, max_tokens=tokens, temperature=number % 2 * 1.0, seed=number))


def step(engine, times):
    for _ in range(times):
        engine.step()


def test_steps_go_ahead_from_16_requests_on_and_one_by_one_below():
    """15 requests, then 16, 17 and 15: one comes, another, which ends at a stop token, and the first at its length.
    Two come and are cancelled; one comes for three tokens."""
    texts, stop = {}, generate([101], GREEDY).request.generated[4]
    for ahead in ("auto", "off", "on"):
        engine = build(pages=60, requests=20, ahead=ahead)
        launched, jobs = watch_launches(engine), [add(engine, i) for i in range(15)]
        step(engine, 4)
        jobs.append(add(engine, 100, tokens=9))
        step(engine, 4)
        jobs.append(engine.add([101], replace(GREEDY, stop_token_ids=(stop,))))
        step(engine, 12)
        gone = [add(engine, number) for number in (102, 103)]
        step(engine, 5)
        for job in gone:
            engine.cancel(job)
        step(engine, 5)
        jobs.append(add(engine, 104, tokens=3))
        while engine.jobs:
            engine.step()
        texts[ahead] = [(job.request.generated, job.text, job.finish_reason) for job in jobs]
        for job in gone:
            tokens = job.request.generated
            assert tokens and generate(job.request.tokens[:2], job.params).request.generated[: len(tokens)] == tokens
        if ahead == "auto":
            # Who comes is in the next step, and counts as soon as it decodes. An end at a length is foreseen.
            assert [(*key, len(list(steps))) for key, steps in groupby(launched)] == [
                (15, False, 4), (16, False, 1), (16, True, 4), (17, True, 4), (16, True, 2), (15, False, 5),
                (17, False, 1), (17, True, 5), (15, False, 4), (16, False, 1), (16, True, 2), (15, False, 27),
            ]  # fmt: skip
        else:
            assert {is_ahead for _, is_ahead in launched[1:]} == {ahead == "on"}
    assert texts["auto"] == texts["off"] == texts["on"]
    assert {reason for _, _, reason in texts["auto"]} == {"stop", "length"}


def test_prompts_do_not_count_until_they_decode():
    engine = build(requests=20, budget=32)
    other = build(requests=20, budget=32, ahead="auto")
    told = [watch_launches(each) for each in (engine, other)]
    for each in (engine, other):
        for i in range(20):
            each.add([i] * 16, GREEDY)
        step(each, 6)
    assert all(is_ahead for _, is_ahead in told[0][1:]) and not any(is_ahead for _, is_ahead in told[1])


@pytest.mark.parametrize(("others", "steps"), [(14, 1), (LEAST_DECODES, 2)])
def test_who_comes_waits_for_one_step_more_at_most(others, steps):
    engine = build(pages=60, requests=40, ahead="auto")
    for i in range(others):
        add(engine, i)
    step(engine, 5)
    job = add(engine, 200)
    told = [[len(update.tokens) for update in engine.step() if update.job is job] for _ in range(2)]
    assert told.index([1]) == steps - 1


def test_a_step_of_drafts_is_waited_for():
    told, texts = [], []
    for options in ({"launch_ahead": "on"}, {"launch_ahead": "auto"}, {}):
        engine = drafting_engines.build(2, **options)
        told.append(watch_launches(engine))
        wants = [(drafting_engines.make_prompt(3, i), replace(GREEDY, max_tokens=4)) for i in range(LEAST_DECODES)]
        texts.append(drafting_engines.tell(drafting_engines.run(engine, wants)))
    assert not any(is_ahead for launched in told for _, is_ahead in launched) and texts[0] == texts[1] == texts[2]


def test_many_requests_give_what_each_gives_alone():
    """Twenty and more of all kinds, on so few pages that some give way, around the border."""
    engine = build(pages=26, requests=24, ahead="auto", budget=160)
    launched, asked = watch_launches(engine), []
    for number in range(60):
        prompt, params = make_request(number)
        prompt, params = prompt[-50:], replace(params, max_tokens=(9, 40, 70)[number % 3])
        if params.logprobs is None and not (params.presence_penalty or params.min_tokens):
            asked.append((prompt, params, engine.add(prompt, params)))
        if number % 3 == 0 and number > 40:
            engine.step()
    while engine.jobs:
        engine.step()
    assert engine.scheduler.preemptions and {is_ahead for _, is_ahead in launched} == {False, True}
    for prompt, params, job in asked:
        alone = generate(prompt, params)
        assert (job.request.generated, job.text) == (alone.request.generated, alone.text)


def test_answers_that_cannot_be_booked_end_the_step_and_the_one_behind_it(monkeypatch):
    """The last token of one of them is in the step that fails: nothing would bring it."""
    engine = build(requests=2, ahead="on")
    first, second = (engine.add([i], replace(GREEDY, max_tokens=tokens)) for i, tokens in ((1, 3), (2, 12)))
    step(engine, 2)
    waiting = engine.add([4], replace(GREEDY, max_tokens=2))
    with monkeypatch.context() as broken, pytest.raises(ValueError) as failed:
        broken.setattr(engine._answers, "commit", lambda *_: int("no text"))
        engine.step()
    assert engine.fail(failed.value) and first.failure is second.failure is failed.value and not waiting.failure
    step(engine, 9)
    assert not engine.jobs and waiting.request.generated == generate([4], waiting.params).request.generated
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1


def test_auto_is_off_where_a_launch_is_the_step():
    assert [choose_launch_ahead(asked, kind) for asked in ("auto", "on", "off") for kind in ("cpu", "cuda")] == [
        "off", "auto", "on", "on", "off", "off",
    ]  # fmt: skip
    for value in (True, None, "yes", 1):
        with pytest.raises(ConfigError, match='launch_ahead: expected "auto", "on" or "off", found'):
            check_launch_ahead(value)
