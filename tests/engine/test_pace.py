"""How many drafts pay, from made-up measurements; and the counts that people see."""

from random import Random

import pytest

from saccade.api.settings.resolve import choose_speculate
from saccade.engine.pace import LONGEST_PERIOD, PERIOD, Pace, Stats, Tally, check_speculate, expect_tokens
from saccade.errors import ConfigError, LoadError


def simulate(pace, milliseconds, acceptance, steps, requests=1, seed=0):
    """Steps of a machine on which one with k drafts takes milliseconds[k], and a draft is right with the probability
    `acceptance` if those before it were. Returns what was chosen, step by step."""
    dice, chosen = Random(seed), []
    for _ in range(steps):
        k = pace.choose(requests)
        chosen.append(k)
        pace.note_time(requests, k, 1e-3 * milliseconds[k] * dice.uniform(0.97, 1.03))
        for _ in range(requests):
            right = 0
            while right < k and dice.random() < acceptance:
                right += 1
            pace.note_drafts(k, right)
    return chosen


@pytest.mark.parametrize("acceptance", [0.05, 0.5, 0.75, 0.95])
@pytest.mark.parametrize(
    "milliseconds",
    [
        [4.6, 7.0, 8.0, 9.0, 10.0, 11.0],  # a second token is dear, more are cheap: one draft alone never pays
        [4.6, 5.0, 5.4, 9.8, 10.2, 10.6],  # up to two pay
        [10, 20, 30, 40, 50, 60],  # nothing pays
        [20, 20.4, 20.8, 21.2, 21.6, 22],  # everything does
    ],
)
def test_the_number_with_the_most_tokens_a_second_is_chosen(milliseconds, acceptance):
    pace = Pace()
    last = simulate(pace, milliseconds, acceptance, 900)[-300:]
    rates = [(1 - acceptance ** (k + 1)) / (1 - acceptance) / milliseconds[k] for k in range(6)]
    common = max(set(last), key=last.count)
    assert rates[common] >= 0.95 * max(rates)
    assert sum(rates[k] for k in last) >= 0.9 * max(rates) * len(last)  # what is tried again costs little


def test_numbers_that_could_be_best_are_tried_and_the_others_looked_at_ever_more_rarely():
    pace, times = Pace(), [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    first = simulate(pace, times, 0.9, 40)
    assert set(first) == {0, 1, 5} and set(first[20:]) == {5}
    later = simulate(pace, times, 0.9, 7 * PERIOD)
    assert set(later) == {2, 3, 4, 5} and later.count(5) > 0.95 * len(later)
    assert simulate(pace, times, 0.9, 2 * LONGEST_PERIOD).count(5) > 0.985 * 2 * LONGEST_PERIOD


# ms of a step with 0 to 5 drafts: docs/performance.md for one H200 (2 and 4 lie between); launches only; arithmetic only.
STEPS = {
    "H200": [4.0, 6.18, 7.3, 8.37, 9.5, 10.7],
    "launches": [2.0, 3.0, 3.3, 3.6, 3.9, 4.2],
    "CPU": [4.6, 8.0, 11.0, 14.0, 17.0, 20.0],
}
# Accepted at positions 1 to 5: the bundled model's in docs/running.md, and each draft right with one probability.
ACCEPTED = {"bundled": [0.99, 0.98, 0.94, 0.84, 0.80]} | {p: [p**i for i in range(1, 6)] for p in (0.85, 0.6, 0.2)}


def answer(pace, milliseconds, accepted, answers, requests, new=(0.0, 0.0), seen=None):
    """Tokens a ms of answers of 256 tokens, `requests` at a time. `pace`: a Pace, or a number of drafts.

    As in the engine: what a step verifies is what the last one made, as far as it is wanted; half of what drafts cost is
    to verify them; beginning again after steps without is half a step more. `new`: what the first and the second step of
    a shape cost beside, which compile and capture.
    """
    dice, seen, total, made = Random(1), {} if seen is None else seen, 0.0, 0
    for _ in range(answers):
        left, ready, was_drafting = [256] * requests, [0] * requests, True
        while live := [i for i in range(requests) if left[i] > 0]:
            k = pace if isinstance(pace, int) else pace.choose(len(live))
            verified = {i: min(ready[i], k) for i in live}
            again, was_drafting = bool(k) and not was_drafting, k > 0
            ms = (milliseconds[sum(verified.values()) // len(live)] + milliseconds[k]) / 2 + again * milliseconds[5] / 2
            shape = sum(verified.values()), len(live), k
            seen[shape] = seen.get(shape, 0) + 1
            ms = ms * dice.uniform(0.98, 1.02) + (new[seen[shape] - 1] if seen[shape] <= 2 else 0.0)
            total += ms
            if not isinstance(pace, int) and not again and 4 * list(verified.values()).count(k) >= 3 * len(live):
                pace.note_time(len(live), k, ms)
            for i in live:
                right = 0
                while right < verified[i] and dice.random() < accepted[right] / (accepted[right - 1] if right else 1):
                    right += 1
                if not isinstance(pace, int):
                    pace.note_drafts(verified[i], right)
                made += min(left[i], 1 + right)
                left[i] -= 1 + right
                ready[i] = min(k, max(0, left[i] - 1))
    return made / total


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("acceptance", ACCEPTED)
@pytest.mark.parametrize("steps", STEPS)
def test_auto_is_nearly_as_fast_as_the_best_number(steps, acceptance, requests):
    """Of a first answer it may lose 15 % to trying, later 4 %. (Each number tried, and again every 64 steps: 29 and 16.)"""
    accepted = ACCEPTED[acceptance]
    milliseconds = [ms * (1 if requests == 1 else 1.6 if k == 0 else 1.9) for k, ms in enumerate(STEPS[steps])]
    for answers, bar in ((1, 0.85), (8, 0.96)):
        pace, best = Pace(), max(answer(k, milliseconds, accepted, answers, requests) for k in range(6))
        if answers > 1:
            answer(pace, milliseconds, accepted, 4, requests)
        found = answer(pace, milliseconds, accepted, answers, requests) / best
        print(f"{steps}, {acceptance}, {requests} at a time, {answers} answers: {found:.3f} of the best")
        assert found > bar


@pytest.mark.parametrize("requests", [1, 8])
def test_steps_that_compile_or_capture_do_not_decide(requests):
    """Each new shape of a step costs 30 ms, then 15, whatever it was to be timed for."""
    speeds = []
    for pace in (5, Pace()):
        how, seen = (STEPS["launches"], ACCEPTED["bundled"]), {}
        answer(pace, *how, 4, requests, (30.0, 15.0), seen)
        speeds.append(answer(pace, *how, 8, requests, (30.0, 15.0), seen))
    assert pace.chosen[requests] == 5
    print(f"{requests} at a time: {speeds[1] / speeds[0]:.3f} of five drafts")
    assert speeds[1] > 0.8 * speeds[0]


def test_drafts_that_cease_to_pay_are_given_up_and_taken_up_again():
    pace, times = Pace(), [4.0, 4.5, 5.0, 5.5, 6.0, 6.5]
    assert simulate(pace, times, 0.9, 300)[-1] >= 3
    assert simulate(pace, times, 0.02, 600)[-50:].count(0) > 40
    assert simulate(pace, times, 0.9, 1200)[-1] >= 2


def test_batch_sizes_are_judged_apart():
    pace = Pace()
    for seed in range(30):
        simulate(pace, [4.0, 4.2, 4.4, 4.6, 4.8, 5.0], 0.8, 30, requests=1, seed=seed)
        simulate(pace, [4.0, 9.0, 14.0, 19.0, 24.0, 29.0], 0.8, 30, requests=12, seed=seed)
    assert pace.chosen[1] == 5 and pace.chosen[16] == 0
    text = str(pace)
    assert "5 drafts a step for 1 request" in text and "0 drafts a step for up to 16 requests" in text


def test_a_number_that_cannot_be_timed_does_not_hold_up_the_others():
    pace = Pace()
    for _ in range(300):  # requests come and go: no step is steady
        k = pace.choose(4)
        if k == 0:
            pace.note_time(4, 0, 0.004)
    assert pace.chosen[4] == 0 and str(pace).startswith("0 drafts a step for up to 4 requests")
    assert str(Pace()).startswith("not chosen yet")


def test_a_tally_counts_by_position():
    tally = Tally()
    tally.add(3, 3, 4)
    tally.add(3, 1, 2)
    tally.add(1, 0, 1)
    assert (tally.drafted, tally.accepted) == ([3, 2, 2, 0, 0], [2, 1, 1, 0, 0])
    assert tally.tokens_per_step == pytest.approx(7 / 3)
    assert (
        str(tally)
        == "2.33 tokens a step; drafts accepted 67%, 50%, 50% at positions 1 to 3, each of the steps that guessed so far (4 of 7)"
    )
    assert str(Tally()) == "0.00 tokens a step, no drafts"
    assert str(Stats(3, {}, "", tally)).startswith("speculate 3: 2.33 tokens a step")
    assert str(Stats(3, {}, "", tally, "fast")).endswith("(4 of 7); kernels: fast")
    assert str(Stats("auto", {1: 2}, "2 drafts", tally)).startswith("speculate auto: 2.33")


def test_expected_tokens_are_one_and_every_accepted_draft():
    assert expect_tokens([0.9, 0.5, 0.1], 2) == pytest.approx(2.4)
    assert expect_tokens([0.9], 0) == 1


@pytest.mark.parametrize("value", [-1, 6, 2.0, True, None, "Auto", "6", "", "1.0", [1]])
def test_what_is_no_number_of_drafts_is_refused(value):
    with pytest.raises(ConfigError, match='speculate: expected 0 to 5 drafts a step, or "auto", found'):
        check_speculate(value)


def test_what_can_be_drafted_is_settled_before_anything_is_loaded():
    assert choose_speculate("3", True, True, "model.layers.61.", 1) == (3, ())
    assert choose_speculate("auto", True, True, "model.layers.61.", 1) == ("auto", ())
    assert choose_speculate(0, False, False, "model.layers.61.", None) == (0, ())
    assert choose_speculate("auto", True, False, "model.layers.61.", 1) == (
        0,
        ('speculate: "auto" is 0: drafts come from the MTP layer, and no file has a tensor of it (model.layers.61.*)',),
    )
    assert choose_speculate("auto", False, True, "model.layers.61.", 1)[0] == 0
    with pytest.raises(
        LoadError, match=r"speculate: 2 drafts .*model\.layers\.61\.\*.*num_nextn_predict_layers=1.*without speculate"
    ):
        choose_speculate(2, True, False, "model.layers.61.", 1)
    with pytest.raises(LoadError, match="config.json says nothing of one"):
        choose_speculate(2, True, False, "model.layers.61.", None)
    with pytest.raises(ConfigError, match="mtp=False leaves it out"):
        choose_speculate(2, False, True, "model.layers.61.", 1)
