"""Steps of two kinds: tokens of long prompts are rounded, others never, whoever else is served."""

from random import Random

import pytest
from ledger_engines import build, judge, make_request

from saccade.engine.params import SamplingParams
from saccade.engine.scheduler import Scheduler
from saccade.engine.scheduling.step_kinds import EXACT_PROMPT, StepTurns, find_border


def test_what_a_prompt_is_rounded_up_to():
    """Tokens that were found count as done."""
    assert [find_border(n, 0) for n in (1, 128, 129, 500)] == [0, 0, 129, 500]
    assert [find_border(500, found) for found in (0, 371, 372, 499)] == [500, 500, 0, 0]


def test_kinds_take_turns():
    turns = StepTurns()
    wants, rounds = [1, 300, 1, 20], [False, True, False, False]
    assert turns.take(wants, rounds) == (True, [0, 300, 0, 0], 2)
    assert turns.take(wants, rounds) == (False, [1, 0, 1, 20], 2)
    assert turns.take(wants, rounds) == (True, [0, 300, 0, 0], 2)
    assert turns.take([0, 300], [False, True]) == (True, [0, 300], 0)  # nobody else is there
    assert turns.take([1, 0], [False, True]) == (False, [1, 0], 1)
    assert turns.take([0, 0], [False, True]) == (False, [0, 0], 0)


def test_a_prompt_beside_decodes_leaves_them_their_steps():
    """Its steps are as small as if decodes were in them: those wait for it."""
    scheduler = Scheduler(40, 400, 4, 1600, max_mixed_tokens=50, rounds=True)
    decodes = [scheduler.add([1] * 5, SamplingParams(max_tokens=60)) for _ in range(2)]
    finish(scheduler, scheduler.schedule())
    prompt = scheduler.add([1] * 130, SamplingParams(max_tokens=5))
    steps = []
    for _ in range(6):
        chunks = scheduler.schedule()
        steps.append([(chunk.request, chunk.size) for chunk in chunks])
        finish(scheduler, chunks)
    both = [(decodes[0], 1), (decodes[1], 1)]
    assert steps == [[(prompt, 48)], both, [(prompt, 48)], both, [(prompt, 34)], [*both, (prompt, 1)]]


def finish(scheduler, chunks):
    for chunk in chunks:
        scheduler.advance(chunk, [7] if chunk.is_last else [])
        if chunk.request.is_full:
            scheduler.finish(chunk.request, "length")


@pytest.mark.parametrize("seed", range(24))
def test_each_token_runs_in_a_step_of_its_kind(seed):
    """With drafts, and with so few pages that requests give way and begin again. Nobody waits for more than a step of
    the other kind, but for those who have no pages."""
    dice = Random(seed)
    scheduler = Scheduler(dice.choice((9, 12, 30)), dice.choice((70, 300)), 5, 500, max_mixed_tokens=64, rounds=True)
    requests, waited = [], dict[object, int]()
    for step in range(600):
        if step < 300 and len(scheduler.waiting) < 3:
            length = dice.choice((1, 40, 128, 129, 200, 400))
            requests.append(scheduler.add([1] * length, SamplingParams(max_tokens=dice.choice((1, 30)))))
        for request in scheduler.running:
            request.draft = (
                [7] * dice.choice((0, 0, 3)) if request.pending == 1 and request.computed and not request.rounds else []
            )
        chunks = scheduler.schedule(dice.choice((0, 2)))
        assert chunks or not scheduler.has_work  # an empty step would say that there is nothing to do
        kinds = {chunk.request.computed < chunk.request.rounded for chunk in chunks}
        assert len(kinds) <= 1
        for request, size, _ in chunks:
            assert request.rounded in (0, request.prompt_length) and (request.rounded > EXACT_PROMPT) == bool(
                request.rounded
            )
            assert request.computed >= request.rounded or request.computed + size <= request.rounded
        ran = {chunk.request for chunk in chunks}
        for request in scheduler.running:
            is_decode = request.pending == 1 and not request.rounds
            waited[request] = 0 if request in ran or not is_decode else waited.get(request, 0) + 1
            assert waited[request] <= 1
        finish(scheduler, chunks)
        if step >= 300 and not scheduler.has_work:
            break
    assert all(request.finish_reason == "length" for request in requests)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ahead", ["on", "off"])
def test_a_text_does_not_depend_on_who_else_is_served(seed, ahead):
    """A model that makes other tokens of rounded inputs: each text is that of its request alone."""
    dice = Random(seed)
    engine = build(dice.choice((9, 30)), dice.choice((70, 200)), ahead=ahead, prefix=False, mixed=66, rounds=True)
    asked, told = [], []
    for i in range(14):
        prompt, params = make_request(100 * seed + i)
        asked.append(((prompt, params), engine.add(prompt, params)))
        for _ in range(dice.randint(0, 6)):
            told += engine.step()
    while engine.jobs:
        told += engine.step()
    engine.settle()
    judge(engine, asked, told)
    assert any(len(prompt) > EXACT_PROMPT for (prompt, _), _ in asked)
