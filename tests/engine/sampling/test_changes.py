"""Penalties, biases and masks on rows of logits, against transformers' processors and plain counting."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from saccade.engine.params import SamplingParams
from saccade.engine.sample import Row, Spec, sample
from saccade.engine.sampling.change import Change, Changes, count_numbers, fill_changes, find_change_kind
from saccade.engine.sampling.choice import NOTHING_LEFT
from saccade.engine.sampling.seen import SeenTokens
from saccade.engine.scheduling.requests import Request

VOCAB = 70  # no multiple of a mask's 32 bits
LOGITS = 3 * torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))


def take(changes, length=4, seen=None):
    kind = find_change_kind(changes)
    flat = torch.full((count_numbers(kind, length),), 7.0, dtype=torch.float64)  # whatever a step before has left
    fill_changes(changes, kind, flat)
    return Changes.take(flat, kind, seen)


def make_request(prompt, answer):
    return Request(0, [*prompt, *answer], len(prompt), 500, SamplingParams())


def test_without_changes_there_is_no_kind():
    assert find_change_kind([Change(), Change()]) is None and find_change_kind([]) is None
    assert count_numbers(None, 5) == 0


def test_repetition_is_that_of_transformers():
    """Of prompt and answer alike; a row of another request keeps its bits."""
    seen = SeenTokens(2, VOCAB, "cpu")
    request = make_request([3, 3, 5], [9, 5])
    (row,) = seen.follow([request])
    found = take([Change(), Change(row, (1.3, 0.0, 0.0))], seen=seen.table).apply(LOGITS)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([request.tokens]), LOGITS[1:2].clone())
    torch.testing.assert_close(found[1:2], expected)
    assert not found[1:2].equal(LOGITS[1:2])
    assert found[[0, 2, 3]].equal(LOGITS[[0, 2, 3]])


def test_presence_and_frequency_count_the_answer_and_the_guesses_before_a_row():
    seen = SeenTokens(3, VOCAB, "cpu")
    request = make_request([3, 3, 5], [9, 5, 9])
    other = make_request([1], [2, 2])
    rows = seen.follow([other, request])
    changes = [Change(rows[1], (1.0, 0.5, 0.25), ahead) for ahead in ([], [9], [9, 11])]
    found = take([*changes, Change(rows[0], (1.0, 0.0, 1.0))], seen=seen.table).apply(LOGITS)
    for i, ahead in enumerate(([], [9], [9, 11])):
        counts = Counter([9, 5, 9, *ahead])
        expected = LOGITS[i].clone()
        for token, count in counts.items():
            expected[token] -= 0.5 + 0.25 * count
        torch.testing.assert_close(found[i], expected)
    assert LOGITS[3, 2] - found[3, 2] == pytest.approx(2.0) and found[3, 1] == LOGITS[3, 1]


def test_seen_tokens_grow_with_their_requests_and_rows_are_used_again():
    """At most two rows for three requests: one that lost its row is counted anew."""
    dice = torch.Generator().manual_seed(1)
    seen = SeenTokens(2, VOCAB, "cpu")
    requests = [make_request(torch.randint(0, VOCAB, (9,), generator=dice).tolist(), []) for _ in range(3)]
    for step in range(40):
        in_step = [requests[i] for i in ((0, 1), (1, 2), (2, 0), (1,))[step // 3 % 4]]
        for request in in_step:
            request.tokens += torch.randint(0, VOCAB, (step % 3,), generator=dice).tolist()
        for row, request in zip(seen.follow(in_step), in_step, strict=True):
            counts = Counter(request.tokens[9:])
            expected = [2 * counts[t] + (t in request.tokens[:9]) for t in range(VOCAB)]
            assert seen.table[row].tolist() == expected
        if step % 7 == 0:
            seen.forget(requests[step % 3])
    assert not seen.table[0].any()


def test_biases_are_added_behind_penalties_and_bans_are_final():
    seen = SeenTokens(1, VOCAB, "cpu")
    (row,) = seen.follow([make_request([4], [])])
    changes = [Change(row, (2.0, 0.0, 0.0), biases=((0, 1.5), (4, -1.0), (69, 100.0)), banned=(69, 7)), Change()]
    found = take(changes, seen=seen.table).apply(LOGITS)
    value = float(LOGITS[0, 4])
    assert found[0, 4] == pytest.approx((value / 2 if value > 0 else value * 2) - 1)
    assert found[0, 0] == LOGITS[0, 0] + 1.5 and found[0, 69] == found[0, 7] == -math.inf
    assert found[1:].equal(LOGITS[1:])


def make_mask(allowed):
    bits = np.zeros(96, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_mask_are_chosen(temperature):
    changes = take([Change(mask=make_mask({31, 32, 69})), Change(), Change(mask=make_mask({63}))])
    for i in range(20):
        rows = [Row(temperature, uniform=(i + 0.5) / 20)] * 4
        tokens = sample(LOGITS, Spec.build(rows, 4, 2, "cpu"), changes)
        assert tokens.tokens[0] in (31, 32, 69) and tokens.tokens[2] == 63
        # Log-probabilities are the model's own.
        assert tokens.logprob[2] == LOGITS.log_softmax(-1)[2, 63]
        assert tokens.top_tokens.equal(sample(LOGITS, Spec.build(rows, 4, 2, "cpu")).top_tokens)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_any_token_is_told_apart_from_one_that_is_not_finite(temperature):
    logits = LOGITS.clone()
    logits[2, 40], logits[3, 5] = math.nan, math.inf
    empty = Change(mask=make_mask(()))
    changes = take([empty, Change(), empty, empty])
    chosen = sample(logits, Spec.build([Row(temperature, uniform=0.5)] * 4, 4, 1, "cpu"), changes)
    assert ((chosen.tokens >= 0) & (chosen.tokens < VOCAB)).all()  # embeddings are looked up by them
    tokens = [choice.token for choice in chosen.read()]
    assert tokens[0] == NOTHING_LEFT and tokens[1] >= 0 and tokens[2:] == [-1, -1]


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_min_p_keeps_the_tokens_that_transformers_keeps(min_p):
    row = Row(temperature=1.0, min_p=min_p)
    rows = [row._replace(uniform=(i + 0.5) / 2000) for i in range(2000)]
    logits = LOGITS[:1] / 2
    drawn = set(sample(logits.expand(2000, VOCAB), Spec.build(rows, 2000, -1, "cpu")).tokens.tolist())
    kept = MinPLogitsWarper(min_p)(None, logits)[0].isfinite()
    likely = {t for t in range(VOCAB) if kept[t] and logits.softmax(-1)[0, t] > 1e-3}
    assert likely <= drawn <= set(kept.nonzero()[:, 0].tolist())


def test_parts_of_rows_are_changed_alike():
    changes = [Change(mask=make_mask({i, 50}), biases=((i, 5.0),)) for i in range(4)]
    whole = take(changes)
    parts = [whole.part(0, 1).apply(LOGITS[:1]), whole.part(1, 4).apply(LOGITS[1:])]
    assert torch.cat(parts).equal(whole.apply(LOGITS))
