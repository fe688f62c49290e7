"""How many drafts pay, from made-up measurements; and the counts that people see."""

from random import Random

import pytest

from saccade.errors import ConfigError, LoadError
from saccade.pace import PERIOD, Pace, Stats, Tally, check_speculate, expect_tokens
from saccade.settings import choose_speculate


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


def test_each_number_is_tried_and_all_are_tried_again():
    pace, times = Pace(), [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    first = simulate(pace, times, 0.9, 40)
    assert set(first) == set(range(6)) and len(set(first[30:])) == 1
    later = simulate(pace, times, 0.9, 7 * PERIOD)
    assert set(later) == set(range(6)) and later.count(5) > 0.9 * len(later)


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
    assert str(Stats("auto", {1: 2}, "2 drafts", tally)).startswith("speculate auto: 2.33")


def test_expected_tokens_are_one_and_every_accepted_draft():
    assert expect_tokens([0.9, 0.5, 0.1], 2) == pytest.approx(2.4)
    assert expect_tokens([0.9], 0) == 1


@pytest.mark.parametrize("value", [-1, 6, 2.0, True, None, "Auto", "6", "", "1.0", [1]])
def test_what_is_no_number_of_drafts_is_refused(value):
    with pytest.raises(ConfigError, match='speculate: expected 0 to 5 drafts a step, or "auto", found'):
        check_speculate(value)


def test_what_can_be_drafted_is_settled_before_anything_is_loaded():
    assert choose_speculate("3", True, True, 61, 1) == (3, ())
    assert choose_speculate("auto", True, True, 61, 1) == ("auto", ())
    assert choose_speculate(0, False, False, 61, None) == (0, ())
    assert choose_speculate("auto", True, False, 61, 1) == (
        0,
        ('speculate: "auto" is 0: drafts come from the MTP layer, and no file has a tensor of it (model.layers.61.*)',),
    )
    assert choose_speculate("auto", False, True, 61, 1)[0] == 0
    with pytest.raises(
        LoadError, match=r"speculate: 2 drafts .*model\.layers\.61\.\*.*num_nextn_predict_layers=1.*without speculate"
    ):
        choose_speculate(2, True, False, 61, 1)
    with pytest.raises(LoadError, match="config.json says nothing of one"):
        choose_speculate(2, True, False, 61, None)
    with pytest.raises(ConfigError, match="mtp=False leaves it out"):
        choose_speculate(2, False, True, 61, 1)
