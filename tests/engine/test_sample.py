"""Sampling: every option changes what is drawn, frequencies are the probabilities, ties go to the lowest id."""

import pytest
import torch

from saccade.engine.sample import Row, Spec, choose_tokens, draw_uniform, join_samples, list_columns, sample

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBS.log()


def draw(count, **options):
    """How often each of the five tokens is drawn in `count` draws, as fractions."""
    rows = [Row(**({"temperature": 1.0} | options), uniform=draw_uniform(1, i)) for i in range(count)]
    tokens = sample(LOGITS.expand(count, 5).contiguous(), Spec.build(rows, count, -1, "cpu")).tokens
    return torch.bincount(tokens, minlength=5) / count


def assert_frequencies(found, expected, count):
    """Chi-square with four degrees of freedom: 18.5 is passed by chance once in a thousand; the seeds are fixed."""
    possible = expected > 0
    assert not found[~possible].any()
    assert (count * (found - expected)[possible] ** 2 / expected[possible]).sum() < 18.5


def test_tokens_are_drawn_as_often_as_they_are_likely():
    assert_frequencies(draw(20_000), PROBS, 20_000)


def test_temperature_sharpens():
    expected = (LOGITS / 0.5).softmax(0)
    assert (expected - PROBS).abs().max() > 0.1
    assert_frequencies(draw(20_000, temperature=0.5), expected, 20_000)


def test_temperature_zero_is_greedy():
    assert draw(100, temperature=0.0).tolist() == [0, 1, 0, 0, 0]


def test_a_tiny_temperature_is_greedy_and_not_nan():
    rows = [Row(temperature=1e-9, uniform=u) for u in (0.0, 0.5, 1 - 2**-53)]
    logits = torch.tensor([[-3e38, 1e30, 3e38, float("-inf")]]).expand(3, 4).contiguous()
    assert sample(logits, Spec.build(rows, 3, -1, "cpu")).tokens.tolist() == [2, 2, 2]


def test_top_k_keeps_the_k_likeliest():
    assert_frequencies(draw(20_000, top_k=2), torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65, 20_000)


@pytest.mark.parametrize("top_k", [2**53 + 1, 2**63, 10**400], ids=["2^53", "2^63", "10^400"])
def test_a_top_k_beyond_all_numbers_is_no_limit(top_k):
    assert draw(500, top_k=top_k).tolist() == draw(500).tolist()
    assert draw(500, top_k=top_k)[1] > 0.3


def test_top_p_keeps_the_fewest_that_reach_p():
    kept = torch.tensor([0, 0.4, 0, 0.25, 0.2]) / 0.85
    assert_frequencies(draw(20_000, top_p=0.7), kept, 20_000)
    assert draw(200, top_p=0.39).tolist() == [0, 1, 0, 0, 0]  # the likeliest always stays


def test_tokens_that_reach_top_p_exactly_are_enough():
    # Four tokens of exactly 1/4: the first two are exactly top_p, so the third has no place.
    rows = [Row(temperature=1.0, top_p=0.5, uniform=u) for u in (0.5 - 2**-53, 0.5, 1 - 2**-53)]
    assert sample(torch.zeros(3, 4), Spec.build(rows, 3, -1, "cpu")).tokens.tolist() == [0, 1, 1]


def test_top_p_counts_what_top_k_left():
    # Of the two likeliest, the first is 0.4 / 0.65 = 62 %: alone enough for top_p = 0.6, not for the unfiltered 40 %.
    assert draw(200, top_k=2, top_p=0.6).tolist() == [0, 1, 0, 0, 0]


def test_top_p_is_of_the_tempered_distribution():
    # At temperature 0.5 the likeliest has 0.16 / 0.275 = 58 %.
    assert draw(200, temperature=0.5, top_p=0.5).tolist() == [0, 1, 0, 0, 0]


def test_every_row_has_its_own_options():
    rows = [Row(), Row(temperature=1.0, uniform=0.999), Row(temperature=1.0, top_k=2, uniform=0.999), Row(target=4)]
    spec = Spec.build(rows, 6, -1, "cpu")
    assert sample(LOGITS.expand(6, 5).contiguous(), spec).tokens.tolist() == [1, 0, 3, 4, 1, 1]


def test_of_equal_maxima_the_lowest_id_is_chosen():
    logits = torch.zeros(3, 1000)
    logits[1, [700, 300]] = 1.0
    logits[2, [998, 999]] = 5.0
    assert sample(logits, Spec.build([Row()] * 3, 3, -1, "cpu")).tokens.tolist() == [0, 300, 998]


def test_of_equal_logits_top_k_keeps_the_lowest_ids():
    rows = [Row(temperature=1.0, top_k=3, uniform=u / 100) for u in range(100)]
    tokens = sample(torch.zeros(100, 50), Spec.build(rows, 100, -1, "cpu")).tokens
    assert sorted(set(tokens.tolist())) == [0, 1, 2]


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_kept_token():
    rows = [Row(temperature=1.0, top_p=0.7, uniform=u) for u in (0.0, 1 - 2**-53)]
    assert sample(LOGITS.expand(2, 5).contiguous(), Spec.build(rows, 2, -1, "cpu")).tokens.tolist() == [1, 4]


def test_every_token_in_the_tail_of_a_large_vocabulary_can_be_drawn():
    # One token of 1 - 1e-3 and 100,000 that share the rest: near 1, f32 cannot tell one from the next five.
    logits = torch.full((50, 100_001), 1e-8).log()
    logits[:, 0] = torch.tensor(1 - 1e-3).log()
    rows = [Row(temperature=1.0, uniform=0.9995 + i * 1.01e-8) for i in range(50)]
    drawn = choose_tokens(logits, list_columns(rows, 50)).tolist()
    assert len(set(drawn)) == 50
    assert all(abs(token - 50_000) < 200 for token in drawn)


def test_each_token_owns_its_interval_without_the_upper_end():
    rows = [Row(temperature=1.0, uniform=u) for u in (0.0, 0.5 - 2**-53, 0.5, 1 - 2**-53)]
    assert sample(torch.zeros(4, 2), Spec.build(rows, 4, -1, "cpu")).tokens.tolist() == [0, 0, 1, 1]


def test_a_row_draws_the_same_whatever_stands_beside_it():
    torch.manual_seed(0)
    logits = torch.randn(32, 500)
    rows = [Row(0.1 * (i + 1), i, 0.5 + i / 64, draw_uniform(i, i)) for i in range(32)]
    together = sample(logits, Spec.build(rows, 32, -1, "cpu")).tokens
    alone = [int(sample(logits[i : i + 1], Spec.build(rows[i : i + 1], 1, -1, "cpu")).tokens[0]) for i in range(32)]
    assert together.tolist() == alone


def test_logprobs_are_of_the_raw_distribution():
    rows = [Row(temperature=0.3, top_k=1), Row(temperature=0.3, top_k=1), Row(target=0)]
    found = sample(LOGITS.expand(3, 5).contiguous() + 7.0, Spec.build(rows, 3, 2, "cpu")).read()
    assert [token for token, _, _ in found] == [1, 1, 0]
    assert [p for _, p, _ in found] == pytest.approx(LOGITS[[1, 1, 0]].tolist(), abs=1e-5)
    for _, _, top in found:
        assert [token for token, _ in top] == [1, 3]
        assert [p for _, p in top] == pytest.approx(LOGITS[[1, 3]].tolist(), abs=1e-5)


def test_logprobs_are_computed_only_when_asked_for():
    assert sample(LOGITS[None], Spec.build([Row()], 1, -1, "cpu"))[2:] == (None, None, None)
    assert sample(LOGITS[None], Spec.build([Row()], 1, 0, "cpu")).top_tokens is None
    assert sample(LOGITS[None], Spec.build([Row()], 1, 9, "cpu")).top_tokens.shape == (1, 5)


@pytest.mark.parametrize("logprobs", [-1, 0, 2])
def test_parts_joined_read_like_the_whole(logprobs):
    torch.manual_seed(0)
    logits = torch.randn(5, 9)
    parts = [sample(part, Spec.build([Row()], len(part), logprobs, "cpu")) for part in (logits[:3], logits[3:])]
    whole = sample(logits, Spec.build([Row()], 5, logprobs, "cpu"))
    assert join_samples(parts).read() == whole.read()
    assert join_samples([whole]) is whole


def test_the_random_numbers_are_uniform_and_independent_of_each_other():
    for numbers in (
        [draw_uniform(7, i) for i in range(20_000)],
        [draw_uniform(i, 7) for i in range(20_000)],
        [draw_uniform(-i, 0) for i in range(20_000)],
    ):
        assert all(0 <= u < 1 for u in numbers)
        counts = torch.bincount((torch.tensor(numbers) * 20).long(), minlength=20)
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, one in a thousand
        follows = torch.corrcoef(torch.tensor([numbers[:-1], numbers[1:]]))[0, 1]
        assert abs(follows) < 0.03


def test_the_random_numbers_are_the_same_on_every_machine():
    assert draw_uniform(2**64 + 5, 3) == draw_uniform(5, 3)
    assert [round(draw_uniform(s, p), 12) for s, p in ((0, 0), (1, 2), (-1, 10**6))] == [
        0.281761297723,
        0.740805062001,
        0.273817973663,
    ]
