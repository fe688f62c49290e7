"""A number that is not finite is never an answer: the request ends with an error that names the cause, others go on."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import assemble, tiny_config, tiny_tensors
from torch import Tensor

from saccade.engine.causes import Causes, count_bad
from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.params import SamplingParams
from saccade.engine.sample import Row, Spec, sample
from saccade.engine.sampling.choice import NOT_FINITE
from saccade.engine.scheduler import Scheduler
from saccade.engine.speculate import Drafter, EagerDrafts
from saccade.kernels.types import Matrix
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference

CONFIG = tiny_config(vocab_size=264, num_hidden_layers=2, max_position_embeddings=512)
NAN, INF = math.nan, math.inf
BAD = 200  # the token whose embedding is spoiled
PROMPT = [(7 * i + 3) % 190 for i in range(40)]  # longer than index_topk, 16
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
USES = {
    "greedy": GREEDY,
    "sampled": SamplingParams(max_tokens=6, temperature=1.0, seed=3),
    "logprobs": SamplingParams(max_tokens=6, temperature=0.0, logprobs=2),
    "scored": None,
}


def make(spoil=None, value=NAN, place=(0,), speculate=0, pages=40, most=96):
    """An engine on a tiny model with one spoiled number."""
    held = assemble(CONFIG, tiny_tensors(CONFIG, mtp=True))
    flat: dict[str, Tensor] = {n: t.data if isinstance(t, Matrix) else t for n, t in held.held.items()}
    if spoil is not None:
        flat[spoil][place] = value
    model = Transformer(CONFIG, held, Reference())
    scheduler = Scheduler(pages, most, 16, CONFIG.max_position_embeddings)
    cache = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=True)
    drafter = Drafter(model, model.mtp, CONFIG.index_share_for_mtp_iteration, CONFIG.max_position_embeddings)
    options = {"speculate": speculate, "run_drafts": EagerDrafts(drafter), "causes": Causes(model, flat)}
    return Engine(model, cache, scheduler, CONFIG.vocab_size, **options)


def run(engine, *wants):
    """(prompt, params) or (tokens to be scored, None) each, side by side."""
    jobs = [engine.add(*want) if want[1] else engine.add_scoring(want[0]) for want in wants]
    while engine.jobs:
        engine.step()
        engine.failures.explain()
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    return jobs


FAULTS = {
    "final norm": ("model.norm.weight", NAN, (0,)),
    "one entry of the vocabulary": ("lm_head", NAN, (17, 3)),
    "one that is infinite": ("lm_head", INF, (17, 3)),
    "one that is never the likeliest": ("lm_head", -INF, (17, 3)),
    "latent": ("model.layers.0.self_attn.kv_a_layernorm.weight", NAN, (5,)),
    "index keys": ("model.layers.1.self_attn.indexer.wk_weights_proj", NAN, (2, 3)),
    "index keys' norm": ("model.layers.1.self_attn.indexer.k_norm.weight", INF, (4,)),
    "head weights": ("model.layers.1.self_attn.indexer.wk_weights_proj", NAN, (33, 3)),
    "index queries": ("model.layers.1.self_attn.indexer.wq_b", NAN, (9, 3)),
    "a router's bias": ("model.layers.1.mlp.gate.e_score_correction_bias", NAN, (6,)),
    "a bias that never chooses": ("model.layers.1.mlp.gate.e_score_correction_bias", -INF, (6,)),
    "a router's row": ("model.layers.1.mlp.gate", NAN, (6, 1)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_parameter_that_is_not_finite_is_named(fault, use):
    name, value, place = FAULTS[fault]
    (job,) = run(make(name, value, place), (PROMPT, USES[use]))
    assert job.finish_reason == "error"
    assert f"parameter {name} 1 number is NaN or infinite, the first at {list(place)}" in job.error
    assert not (job.request.generated if USES[use] else any(job.request.tokens[len(PROMPT) :]))


def test_finite_numbers_that_overflow_are_traced_to_their_layer():
    engine = make("model.layers.1.mlp.experts.down_proj", 3e38, (slice(None), 0))  # of every expert
    for job in run(engine, (PROMPT, GREEDY), (PROMPT, None)):
        assert job.finish_reason == "error"
        assert "model.layers.1.mlp is the first whose output is not finite, at position" in job.error
    (job,) = run(make("model.embed_tokens", 3e38, (PROMPT[30], slice(None)), most=16), (PROMPT, GREEDY))
    assert "finite, at position 30 (token 23)" in job.error  # the third chunk of the prompt


@pytest.mark.parametrize("place", [0, 5, 39], ids=["first", "in a chunk without logits", "last"])
@pytest.mark.parametrize("speculate", [0, 3])
def test_others_answer_as_if_alone(place, speculate):
    spoiled = [*PROMPT[:place], BAD, *PROMPT[place + 1 :]]
    wants = [
        ([(3 * i + n) % 190 for i in range(n)], replace(GREEDY, temperature=n % 2 / 2, seed=n)) for n in (9, 30, 70)
    ]
    engine = make("model.embed_tokens", NAN, (BAD, 7), speculate, pages=9, most=24)
    alone = [run(make(), want)[0].request.generated for want in wants]
    scores = run(make(), (PROMPT, None))[0].scores
    for order in ([0, 1, 2], [2, 0, 1]):  # again: in pages that a failed request has left
        jobs = run(engine, (spoiled, GREEDY), *(wants[i] for i in order), (PROMPT, None), ([*spoiled, 1], None))
        assert [job.error is None for job in jobs] == [False, True, True, True, True, False]
        assert [job.request.generated for job in jobs[1:4]] == [alone[i] for i in order]
        assert jobs[4].scores == pytest.approx(scores, abs=1e-4)


def test_what_was_chosen_before_is_kept():
    tokens = run(make(), (PROMPT, replace(GREEDY, max_tokens=20)))[0].request.generated
    place = next(i for i in range(1, 20) if tokens[i] not in [*tokens[:i], *PROMPT])
    for speculate in (0, 4):
        engine = make("model.embed_tokens", NAN, (tokens[place], 0), speculate)
        (job,) = run(engine, (PROMPT, replace(GREEDY, max_tokens=20)))
        assert job.request.generated == tokens[: place + 1]
        assert f"behind position {len(PROMPT) + place} are not finite" in job.error
        assert f"model.embed_tokens {1:,} number" in job.error


@pytest.mark.parametrize("speculate", [1, 5])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_that_are_not_finite_are_only_guesses(speculate, temperature):
    wants = [(PROMPT[:n], SamplingParams(max_tokens=12, temperature=temperature, seed=n)) for n in (5, 30)]
    alone = [run(make(), want)[0].request.generated for want in wants]
    for name in ("eh_proj", "self_attn.indexer.wk_weights_proj", "shared_head.head"):
        jobs = run(make(f"model.layers.2.{name}", NAN, (0, 0), speculate), *wants)
        assert [job.request.generated for job in jobs] == alone
        assert [job.error for job in jobs] == [None, None]


def test_a_guess_whose_row_is_not_finite_is_refused_like_any_other():
    alone = run(make(), (PROMPT, GREEDY))[0].request.generated
    engine = make("model.embed_tokens", NAN, (BAD, 7))
    job = engine.add(PROMPT, GREEDY)
    while engine.jobs:
        engine.step()
        job.request.draft = [BAD, BAD] if engine.jobs else []
    assert job.request.generated == alone


@pytest.mark.parametrize("logprobs", [-1, 0, 3])
def test_only_rows_that_are_not_finite_have_no_token(logprobs):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 49], logits[2, 3], logits[3, 8], logits[4] = NAN, INF, -INF, NAN
    rows = [Row(), Row(temperature=1.0, uniform=0.9), Row(), Row(target=2 if logprobs >= 0 else -1), Row()]
    chosen = sample(logits, Spec.build(rows, 6, logprobs, "cpu"))
    assert ((chosen.tokens >= 0) & (chosen.tokens < 50)).all()  # embeddings are looked up by them
    choices, beside = chosen.read_beside(torch.zeros(2, 2, dtype=torch.long))
    assert [c.token == NOT_FINITE for c in choices] == [False, True, True, True, True, False]
    assert beside == [[0, 0]] * 2


def test_a_log_probability_beyond_f32_is_none():
    logits = torch.tensor([[3e38, -3e38]])
    spec = Spec.build([Row(target=1)], 1, 0, "cpu")
    assert sample(logits, spec).read()[0].cut(0).token == NOT_FINITE


@pytest.mark.parametrize(
    ("numbers", "is_scale", "expected"),
    [
        (torch.tensor([1.0, NAN, -INF]), False, (2, 1)),
        (torch.tensor([0.0, 448.0, NAN, -NAN]).to(torch.float8_e4m3fn), False, (2, 2)),
        (torch.tensor([127, 255, 0], dtype=torch.uint8), True, (1, 1)),  # E8M0
        (torch.tensor([127 << 8, 255 << 16], dtype=torch.int32), True, (1, 1)),  # four in a word
        (torch.tensor([255, 255], dtype=torch.uint8), False, (0, 0)),  # codes of 4 bits
    ],
    ids=["f32", "e4m3", "e8m0", "packed e8m0", "codes"],
)
def test_every_encoding_is_looked_into(numbers, is_scale, expected):
    assert count_bad(numbers, is_scale) == expected
