"""Drafts: the text is that without them, the MTP layer's cache is that of one pass, and its drafts are those of a loop
that keeps no books."""

import pytest
import torch
from byte_tokenizer import TOKENIZER
from drafting_engines import CONFIG, MODEL, MODELS, SHARING, Oracle, Shifted, build, make_prompt, run, tell
from tiny_models import empty_cache, full_batch, step_batch
from torch import Tensor

from saccade.engine.buffers import Buffers, Run, StepInputs
from saccade.engine.pages import allocate_cache
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.sample import GREEDY as LIKELIEST
from saccade.engine.sample import Row, list_columns
from saccade.engine.speculate import Ask, Drafter, StepKind, draft_and_verify, fill_columns
from saccade.kernels import PAGE

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


WANTS = [
    (
        make_prompt(n, i),
        SamplingParams(max_tokens=m, temperature=i % 3 / 2, seed=i, top_k=(0, 40, 2**63 - 1)[i % 3], logprobs=i % 2),
    )
    for i, (n, m) in enumerate([(60, 30), (3, 25), (61, 20), (1, 40), (130, 9), (64, 2), (30, 1)])
]


@pytest.mark.parametrize(
    ("speculate", "pages", "budget", "mixed"),
    [(1, 40, 96, None), (2, 6, 33, None), (3, 40, 20, None), (5, 5, 96, None), (3, 40, 96, 20)],
)
def test_the_text_is_that_without_drafts(speculate, pages, budget, mixed):
    plain = run(build(pages=pages, max_batch_tokens=budget), WANTS)
    engine = build(speculate, pages, layer=Shifted(pages), max_batch_tokens=budget, mixed=mixed)
    drafted = run(engine, WANTS)
    assert tell(drafted) == tell(plain)
    for a, b in zip(drafted, plain, strict=True):
        assert [c.logprob for c in a.logprobs] == pytest.approx([c.logprob for c in b.logprobs], abs=1e-4)
    assert engine.scheduler.preemptions > 0 or pages == 40
    tally = engine.tally
    assert 0 < sum(tally.accepted) < sum(tally.drafted)  # both were met
    assert tally.tokens == sum(len(job.request.generated) - 1 for job in drafted)
    assert tally.steps + sum(tally.accepted) >= tally.tokens > tally.steps


def test_sampled_drafts_are_coupled_to_the_choice():
    """A drafter that thinks as the model does is right at temperature 1, not only in sum p^2 of the cases."""
    wants = [(make_prompt(40, i), SamplingParams(max_tokens=30, temperature=1.0, seed=i)) for i in range(6)]
    engine = build(3, layer=Shifted(40))
    run(engine, wants)
    batch = full_batch([wants[0][0]])
    p = MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch))).softmax(-1)
    alone = float(p.square().sum(-1).mean())
    likeliest = float(p.amax(-1).mean())  # how often a drafter that always takes the likeliest token is right
    assert alone < 0.1 and engine.tally.shares[0] > max(4 * alone, 1.5 * likeliest)


def test_ends_in_the_middle_of_accepted_tokens_are_ends():
    plain = run(build(tokenizer=TOKENIZER), [(make_prompt(20), GREEDY)])[0].request.generated
    place = next(i for i in range(4, 20) if plain[i] not in plain[:i])
    options = dict(tokenizer=TOKENIZER, defaults=Defaults(eos_token_ids=(plain[place],)))
    for params in (
        GREEDY,
        SamplingParams(max_tokens=place, temperature=0.0),
        SamplingParams(max_tokens=18, temperature=0.0, ignore_eos=True),
    ):
        wanted, found = (
            run(build(k, layer=Oracle([*make_prompt(20), *plain]), **options), [(make_prompt(20), params)])
            for k in (0, 5)
        )
        assert tell(found) == tell(wanted)
        assert found[0].tally.steps < wanted[0].tally.steps
        assert set(found[0].tally.shares) == {1.0}  # drafts behind the end met no choice


def test_stop_strings_end_where_they_would():
    letters = SamplingParams(max_tokens=30, temperature=1.0, seed=1, top_k=0)
    plain = run(build(tokenizer=TOKENIZER), [(make_prompt(20), letters)])[0]
    stop = SamplingParams(max_tokens=30, temperature=1.0, seed=1, top_k=0, stop=plain.text[9:11])
    text = [*make_prompt(20), *plain.request.generated]
    wanted, found = (run(build(k, layer=Oracle(text), tokenizer=TOKENIZER), [(make_prompt(20), stop)]) for k in (0, 5))
    assert tell(found) == tell(wanted) and found[0].finish_reason == "stop"


def test_a_perfect_drafter_needs_a_step_for_every_six_tokens():
    params = SamplingParams(max_tokens=31, temperature=0.0)
    plain = run(build(), [(make_prompt(20), params)])[0].request
    (job,) = run(build(5, layer=Oracle(plain.tokens)), [(make_prompt(20), params)])
    assert job.request.tokens == plain.tokens
    assert (job.tally.steps, job.tally.tokens, job.tally.shares) == (5, 30, [1.0] * 5)


def test_drafts_behind_a_wrong_one_are_not_taken_though_they_are_right():
    """The next drafts begin behind the last certain token: a step takes all up to the next place that is guessed wrong."""
    params = SamplingParams(max_tokens=31, temperature=0.0)
    plain = run(build(), [(make_prompt(20), params)])[0].request
    wrong = {23, 24, 29, 31, 40}
    (job,) = run(build(5, layer=Oracle(plain.tokens, wrong)), [(make_prompt(20), params)])
    steps, length = 0, 21
    while length < 51:
        right = next((i for i in range(5) if length + i in wrong), 5)
        steps, length = steps + 1, min(51, length + right + 1)
    assert job.request.tokens == plain.tokens and job.tally.steps == steps


# The layer's books.


@torch.inference_mode()
def draft_alone(config, tokens, count):
    """Greedy drafts behind `tokens`, in one pass over all of them and one more for each further draft."""
    model = MODELS[config]
    table = torch.arange(1, 2 + (len(tokens) + count) // PAGE)[None]
    cache = allocate_cache(config, table.shape[1] + 1, "float32", "cpu", mtp=True)
    batch = step_batch([(0, tokens[:-1], 0)], table)
    hidden = model.forward(batch, cache)
    state, selection = model.mtp.forward(batch, torch.tensor(tokens[1:]), hidden, cache)
    state, drafts = state[-1:], []
    for i in range(count):
        drafts.append(int(model.mtp.logits(state).argmax()))
        batch = step_batch([(0, drafts[-1:], len(tokens) - 1 + i)], table)
        given = selection[-1:] if config.index_share_for_mtp_iteration else None
        state, _ = model.mtp.forward(batch, torch.tensor(drafts[-1:]), state, cache, given)
    return drafts, cache, table


def find_rows(cache, pages, counts):
    """What the MTP layer's pools hold of a request's first positions: so many latents, so many index keys."""
    position = torch.arange(max(counts))
    slots = torch.tensor(pages)[position // PAGE] * PAGE + position % PAGE
    return cache.latent[-1].data[slots[: counts[0]]], cache.index_keys[-1].data[slots[: counts[1]]]


@pytest.mark.parametrize("config", [CONFIG, SHARING], ids=["own selections", "shared selection"])
@pytest.mark.parametrize(("speculate", "pages", "budget"), [(5, 40, 300), (5, 6, 33), ("auto", 40, 50)])
def test_drafts_are_those_of_one_pass_over_the_text(config, speculate, pages, budget):
    engine = build(speculate, pages, config, max_batch_tokens=budget)
    ticks = iter(range(1000))
    if speculate == "auto":  # steps without drafts between those with: the layer has to catch up
        engine.pace.choose = lambda requests: (3, 3, 0, 0)[next(ticks) % 4]
    wants = [
        (make_prompt(60, 1), GREEDY),
        (make_prompt(60, 2), GREEDY),  # both come to the end of a page in the same step
        (make_prompt(126, 3), SamplingParams(max_tokens=5, temperature=0.0)),
    ]
    jobs, compared = [engine.add(*want) for want in wants], 0
    while engine.jobs:
        engine.step()
        for request in [
            job.request
            for job in jobs
            if job.request.draft and len(job.request.tokens) in (61, 62, 63, 64, 65, 72, 128)
        ]:
            drafts, cache, table = draft_alone(config, request.tokens, len(request.draft))
            assert request.draft == drafts
            assert request.followed == request.computed == len(request.tokens) - 1
            # Rows of the first len(drafts) - 1 drafts lie behind the known tokens: in pages that are the request's own.
            counts = [request.computed + len(drafts) - 1, request.computed]
            mine = find_rows(engine.cache, request.pages, counts)
            one_pass = find_rows(cache, table[0].tolist(), counts)
            for a, b in zip(mine, one_pass, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            compared += len(drafts)
    assert compared > 9
    assert engine.scheduler.preemptions > 0 or pages == 40


def test_sharing_a_selection_changes_later_drafts_and_never_the_first():
    drafts = [[draft_alone(config, make_prompt(200, i), 4)[0] for i in range(5)] for config in MODELS]
    own, shared = ([d[1:] for d in some] for some in drafts)
    assert [d[0] for d in drafts[0]] == [d[0] for d in drafts[1]] and own != shared


def test_captured_selections_are_those_without_drafts():
    wants = [(make_prompt(50), GREEDY)]
    seen = []
    for speculate in (0, 3):
        engine = build(speculate, layer=Shifted(40), max_batch_tokens=32)
        job = engine.add(*wants[0], capture=True)
        while engine.jobs:
            engine.step()
        seen.append(job.selections())
    assert len(seen[0]) == len(seen[1]) == CONFIG.num_hidden_layers
    assert all(a.equal(b) for a, b in zip(*seen, strict=True))


def test_scores_and_drafts_share_steps():
    tokens = make_prompt(120, 9)
    plain, engine = build(), build(3, layer=Shifted(40), max_batch_tokens=40)
    expected = plain.add_scoring(tokens)
    run(plain, [])
    scoring = engine.add_scoring(tokens)
    found = run(engine, WANTS[:3])
    assert scoring.scores == pytest.approx(expected.scores, abs=1e-4)
    assert tell(found) == tell(run(build(), WANTS[:3]))


def test_automatic_drafts_give_the_same_text_and_catch_up():
    ticks = iter(range(10**6))

    engine = build("auto", layer=Shifted(40), max_batch_tokens=300)
    engine.pace.choose = lambda requests: (5, 1, 0, 2, 0)[next(ticks) // 3 % 5]
    found = run(engine, WANTS)
    assert tell(found) == tell(run(build(), WANTS))
    assert sum(engine.tally.accepted) > 10


def test_a_failing_step_with_drafts_leaves_an_engine_that_can_go_on():
    engine = build(3, layer=Shifted(40))
    job, whole = engine.add(*WANTS[0]), engine._run_drafts
    for _ in range(3):
        engine.step()
    engine._run_drafts = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine._run_drafts = whole
    run(engine, [])
    assert tell([job]) == tell(run(build(), WANTS[:1]))


def test_a_full_table_keeps_its_last_row_while_another_request_drafts():
    full, other = make_prompt(PAGE, 1), make_prompt(10, 2)
    kept = []
    for drafts in (0, 4):
        cache = allocate_cache(CONFIG, 3, "float32", "cpu", mtp=True)
        batch = Buffers("cpu", 96, 2, 1).fill([Run(full, 0, [1], 1), Run(other, 0, [2], 1, ahead=4)])
        asks = [Ask([Row()], (), [*tokens[1:], 0], ()) for tokens in (full, other)]
        drafter = Drafter(MODEL, MODEL.mtp, False, CONFIG.max_position_embeddings)
        inputs = StepInputs(batch, list_columns([], len(batch.logit_rows)))
        draft_and_verify(drafter, inputs, cache, fill_columns(asks, batch, drafts), StepKind(drafts, LIKELIEST))
        kept.append(cache.latent[CONFIG.num_hidden_layers].data[PAGE : 2 * PAGE].clone())
    assert torch.equal(*kept)


def test_an_idle_engine_makes_no_drafts():
    assert build(3).step() == []


def test_a_step_has_no_shape_that_depends_on_data():
    """A CUDA graph could not hold it: nothing of the step asks the host for a number."""

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
            return func(*args, **(kwargs or {}))

    engine = build(3)
    inner = engine._run_drafts

    def watched(inputs, cache, flat: Tensor, kind, capture, seen):
        with Watched():
            return inner(inputs, cache, flat, kind, capture, seen)

    engine._run_drafts = watched
    jobs = run(engine, [WANTS[4]])
    assert all(job.finish_reason == "length" for job in jobs)
