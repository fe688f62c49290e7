"""Sampled decoding with drafts has the distribution of sampling: 5,000 short answers against exact probabilities, and
20,000 in `make soak`.

The model has six tokens, so that the probability of each of the 216 answers of three tokens is known from one pass.
Broken rules of acceptance, two that engines have shipped, are found by the same test.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_models import assemble, empty_cache, full_batch, tiny_config, tiny_tensors

from saccade.engine import speculate
from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.params import SamplingParams
from saccade.engine.sample import Row, choose_tokens, draw_uniform, list_columns
from saccade.engine.scheduler import Scheduler
from saccade.engine.speculate import Drafter, EagerDrafts
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference

VOCAB, LENGTH, ANSWERS, PROMPT = 6, 3, 5_000, [3, 1]
CONFIG = tiny_config(
    vocab_size=VOCAB, num_hidden_layers=1, first_k_dense_replace=1, hidden_size=32, intermediate_size=32,
    max_position_embeddings=16, index_topk=64, index_n_heads=2,
)  # fmt: skip
MODEL = Transformer(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG, seed=3)), Reference())
DRAFTER = Drafter(MODEL, MODEL.mtp, False, 16)
HOW = {"temperature": 0.7, "top_k": 5, "top_p": 0.95}


def draw_answers(run, count):
    """Answers with seeds 0, 1, ..., as base-six numbers [count], and the share of accepted drafts."""
    cache = allocate_cache(CONFIG, 1001, "float32", "cpu", mtp=True)
    engine = Engine(MODEL, cache, Scheduler(1001, 4000, 1000, 16), VOCAB, run_drafts=run, speculate=2)
    jobs = [engine.add(PROMPT, SamplingParams(max_tokens=LENGTH, seed=i, **HOW)) for i in range(count)]
    while engine.jobs:
        engine.step()
    found = torch.tensor([job.request.generated for job in jobs])
    return found @ VOCAB ** torch.arange(LENGTH - 1, -1, -1), engine.tally.shares[0]


@torch.inference_mode()
def find_probabilities():
    """Of each answer, f64 [VOCAB ** LENGTH]: the same filters, written out here."""
    answers = torch.tensor(list(product(range(VOCAB), repeat=LENGTH)))
    batch = full_batch([[*PROMPT, *answer] for answer in answers.tolist()])
    logits = MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch))).double().unflatten(0, (len(answers), -1))
    p = (logits[:, len(PROMPT) - 1 : -1] / HOW["temperature"]).softmax(-1)  # [answers, LENGTH, VOCAB]
    for row in p.flatten(0, 1):
        order = row.argsort(descending=True)
        row[order[HOW["top_k"] :]] = 0
        row /= row.sum()
        before = row[order].cumsum(0) - row[order]
        row[order[before >= HOW["top_p"]]] = 0
        row /= row.sum()
    return p.gather(2, answers[:, :, None])[:, :, 0].prod(1)


def find_p(found, probabilities):
    """The chi-square test's p: answers that are expected fewer than five times are one class."""
    counts = torch.bincount(found, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(found)
    common = expected >= 5
    counts, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def find_drafts(batch, flat, kind):
    """For each row of logits the draft that stands behind it, or -1."""
    c = speculate.cut_columns(flat, len(batch.tokens), batch.page_table.shape[0], kind.drafts)
    drafts = torch.full((len(batch.logit_rows),), -1)
    is_there = c.guesses >= 0
    drafts[c.rows[is_there].long()] = c.guesses[is_there].long()
    return drafts


def accept_any_kept(tokens, drafts, logits, spec):
    """A draft is taken if the filters leave it at all."""
    ranks = logits.argsort(-1, descending=True).argsort(-1)
    is_kept = (ranks.gather(1, drafts.clamp(min=0)[:, None])[:, 0] < 2) & (drafts >= 0)
    return torch.where(is_kept, drafts, tokens)


def draw_again(tokens, drafts, logits, spec):
    """A refused draft is replaced by a fresh choice, from which it was not taken out."""
    fresh = [Row(0.7, 5, 0.95, draw_uniform(7, i + 1000 * int(1e6 * u))) for i, u in enumerate(spec.columns[4])]
    again = choose_tokens(logits, list_columns(fresh, len(fresh)))
    return torch.where((drafts >= 0) & (drafts != tokens), again, tokens)


def break_rule(rule):
    """Steps that choose by another rule."""
    inner = EagerDrafts(DRAFTER)

    def run(inputs, cache, flat, kind, capture, *changes):
        drafts = find_drafts(inputs.batch, flat, kind)
        whole = speculate.sample_rows

        def choose_otherwise(find_logits, hidden, places, spec, *more):
            sampled = whole(find_logits, hidden, places, spec, *more)
            return sampled._replace(tokens=rule(sampled.tokens, drafts, find_logits(hidden[places]), spec))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speculate, "sample_rows", choose_otherwise)
            return inner(inputs, cache, flat, kind, capture, *changes)

    return run


@pytest.mark.parametrize("count", [ANSWERS, pytest.param(20_000, marks=pytest.mark.soak)])
def test_answers_with_drafts_have_the_probabilities_of_answers_without(count):
    found, accepted = draw_answers(EagerDrafts(DRAFTER), count)
    p = find_p(found, find_probabilities())
    print(f"{len(found)} answers, {len(set(found.tolist()))} different; drafts accepted {accepted:.0%}; p = {p:.3f}")
    assert p > 0.01
    assert 0.15 < accepted < 0.9  # many of both


@pytest.mark.parametrize("rule", [accept_any_kept, draw_again])
def test_a_broken_rule_of_acceptance_is_found(rule):
    found, _ = draw_answers(break_rule(rule), ANSWERS)
    counts = torch.bincount(found, minlength=VOCAB**LENGTH)
    probabilities = find_probabilities()
    wrong = int(counts[probabilities == 0].sum())
    p = 0.0 if wrong else find_p(found, probabilities)
    print(f"{rule.__name__}: p = {p:.1e}, {wrong} impossible answers")
    assert p < 1e-6


def test_the_chi_square_test_knows_chance_from_bias():
    dice = torch.Generator().manual_seed(0)
    probabilities = torch.rand(50, generator=dice).double()
    probabilities /= probabilities.sum()
    fair = torch.multinomial(probabilities, 20_000, True, generator=dice)
    assert find_p(fair, probabilities) > 0.01
    biased = torch.where((fair == 5) & (torch.rand(20_000, generator=dice) < 0.3), 4, fair)
    assert find_p(biased, probabilities) < 1e-6
    # of a fair coin, 60 heads in 100 throws: chi-square 4 with one degree of freedom, p = 0.0455
    coin = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert find_p(torch.tensor([0] * 60 + [1] * 40), coin) == pytest.approx(0.0455, abs=2e-4)


def test_the_drafter_is_another_distribution():
    """Else a broken rule would not show."""
    batch = full_batch([PROMPT])
    cache = empty_cache(CONFIG, batch)
    with torch.inference_mode():
        hidden = MODEL.forward(batch, cache)
        state, _ = MODEL.mtp.forward(replace(batch), torch.tensor([PROMPT[1], 2]), hidden, cache)
        q = MODEL.mtp.logits(state)[-1].softmax(-1)
        after = full_batch([[*PROMPT, 2]])
        p = MODEL.logits(MODEL.forward(after, empty_cache(CONFIG, after)))[-1].softmax(-1)
    assert (p - q).abs().sum() > 0.1
