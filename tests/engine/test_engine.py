"""The engine on a tiny random model: what runs beside a request never shows in its tokens."""

from itertools import pairwise

import pytest
import torch
from byte_tokenizer import SPECIAL, TOKENIZER
from tiny_models import assemble, empty_cache, full_batch, tiny_config, tiny_tensors
from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from saccade.engine.engine import Engine
from saccade.engine.pages import allocate_cache
from saccade.engine.params import Defaults, SamplingParams
from saccade.engine.sample import LOGIT_ROWS
from saccade.engine.scheduler import Scheduler
from saccade.engine.shared import SharedEngine
from saccade.errors import RequestError
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference
from saccade.text.tokenizer import Tokenizer as OurTokenizer

CONFIG = tiny_config(vocab_size=264, num_hidden_layers=2, max_position_embeddings=512)
MODEL = Transformer(CONFIG, assemble(CONFIG, tiny_tensors(CONFIG, mtp=False)), Reference())
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


def build(pages=40, max_batch_tokens=96, max_requests=16, model=MODEL, **options):
    scheduler = Scheduler(pages, max_batch_tokens, max_requests, CONFIG.max_position_embeddings)
    cache = allocate_cache(CONFIG, pages, "float32", "cpu", mtp=False)
    return Engine(model, cache, scheduler, CONFIG.vocab_size, **options)


def run(engine):
    """Step until nothing is left. Returns {job: (tokens, text)} as the updates told it."""
    told = {}
    while engine.scheduler.has_work:
        for update in engine.step():
            tokens, text = told.get(update.job, ([], ""))
            told[update.job] = tokens + update.tokens, text + update.text
    assert engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    assert not engine.jobs
    return told


def generate(prompt, params=GREEDY, **options):
    """One request alone."""
    engine = build(**options)
    job = engine.add(prompt, params)
    run(engine)
    return job


def make_prompt(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Scripted:
    """A model whose likeliest next token at position i is script[i + 1], by 2; all others are equally unlikely."""

    ops = None

    def __init__(self, script):
        self.script = [*script, *[0] * 600]

    def forward(self, batch, cache, capture=None):
        return batch.positions[:, None]

    def logits(self, rows):
        wanted = torch.tensor([self.script[int(p) + 1] for p in rows[:, 0]])
        return torch.nn.functional.one_hot(wanted, CONFIG.vocab_size).float() * 2


def test_a_request_gives_what_the_model_gives_in_one_pass():
    prompt = make_prompt(70)
    job = generate(prompt, SamplingParams(max_tokens=12, temperature=0.0, logprobs=3), max_batch_tokens=33)
    batch = full_batch([job.request.tokens])
    logprobs = MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch))).log_softmax(-1)[69:-1]
    assert job.request.generated == logprobs.argmax(-1).tolist()
    best = logprobs.topk(3)
    for i, choice in enumerate(job.logprobs):
        assert choice.token == job.request.generated[i] == choice.top[0][0]
        assert [t for t, _ in choice.top] == best.indices[i].tolist()
        assert [p for _, p in choice.top] == pytest.approx(best.values[i].tolist(), abs=1e-4)
        assert choice.logprob == pytest.approx(float(best.values[i, 0]), abs=1e-4)
    assert job.finish_reason == "length"


def test_64_requests_in_a_quarter_of_the_cache_they_need_answer_as_if_alone():
    config = tiny_config(vocab_size=264, num_hidden_layers=1, max_position_embeddings=512)
    model = Transformer(config, assemble(config, tiny_tensors(config, mtp=False)), Reference())
    wants = [
        (
            make_prompt(64 * (1 + i % 3) - 7 * i % 12, i),  # just below a border of pages: many grow by one
            SamplingParams(max_tokens=1 + 11 * i % 24, temperature=i % 3 / 2, seed=i),
        )
        for i in range(64)
    ]
    need = sum((len(prompt) + params.max_tokens - 2) // 64 + 1 for prompt, params in wants)
    engine = build(pages=need // 4 + 1, max_batch_tokens=512, max_requests=64, model=model)
    jobs = [engine.add(*want) for want in wants]
    told = run(engine)
    assert engine.scheduler.preemptions > 5
    for want, job in zip(wants, jobs, strict=True):
        assert job.request.generated == generate(*want, max_batch_tokens=256, model=model).request.generated
        assert told[job][0] == job.request.generated
        assert job.finish_reason == "length"


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it():
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    alone = generate(make_prompt(20), params).request.generated
    engine = build(max_batch_tokens=24)
    others = [engine.add(make_prompt(30 + i, i), SamplingParams(max_tokens=30, temperature=1.5)) for i in range(3)]
    for _ in range(4):
        engine.step()
    job = engine.add(make_prompt(20), params)
    run(engine)
    assert job.request.generated == alone
    assert len({tuple(other.request.generated) for other in others}) == 3


def test_another_seed_gives_other_tokens_and_no_seed_fresh_ones():
    def draw(seed):
        return tuple(generate([1, 2], SamplingParams(max_tokens=8, temperature=2.0, seed=seed)).request.generated)

    assert len({draw(seed) for seed in (1, 2, 3, None, None, None)}) == 6
    assert draw(1) == draw(1)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 0.0}, {"temperature": 1e-6}])
def test_every_filter_that_leaves_one_token_is_greedy(options):
    params = SamplingParams(**({"max_tokens": 12, "temperature": 3.0, "seed": 1} | options))
    assert generate(make_prompt(5), params).request.generated == generate(make_prompt(5)).request.generated


def test_the_same_options_without_a_filter_are_not_greedy():
    params = SamplingParams(max_tokens=12, temperature=3.0, seed=1)
    assert generate(make_prompt(5), params).request.generated != generate(make_prompt(5)).request.generated


def test_defaults_of_the_checkpoint_are_used_where_the_request_is_silent():
    defaults = Defaults(temperature=3.0, top_k=1)
    params = SamplingParams(max_tokens=12, seed=1)
    greedy = generate(make_prompt(5)).request.generated
    assert generate(make_prompt(5), params, defaults=defaults).request.generated == greedy
    hot = SamplingParams(max_tokens=12, seed=1, top_k=0)
    assert generate(make_prompt(5), hot, defaults=defaults).request.generated != greedy


def test_the_end_token_ends_the_answer_unless_it_is_ignored():
    script = [1, *b"abc", SPECIAL, *b"de", 0, 0]
    options = dict(model=Scripted(script), tokenizer=TOKENIZER, defaults=Defaults(eos_token_ids=(7, SPECIAL)))
    engine = build(**options)
    job, other = engine.add([1], GREEDY), engine.add([1], SamplingParams(max_tokens=6, ignore_eos=True))
    told = run(engine)
    assert told[job] == ([*b"abc", SPECIAL], "abc")
    assert told[other] == ([*b"abc", SPECIAL, *b"de"], "abcde")
    assert (job.finish_reason, other.finish_reason) == ("stop", "length")


def test_a_stop_string_ends_the_text_before_it():
    engine = build(model=Scripted(b"\1xENEND!!"), tokenizer=TOKENIZER)
    job = engine.add([1], SamplingParams(max_tokens=8, stop="END"))
    other = engine.add([1], SamplingParams(max_tokens=5, stop=("END!", "Z")))
    told = run(engine)
    assert told[job] == ([*b"xENEND"], "xEN")
    assert told[other] == ([*b"xENEN"], "xENEN")
    assert (job.finish_reason, other.finish_reason) == ("stop", "length")


@pytest.mark.parametrize(
    ("script", "stop", "options", "expected"),
    [
        ([*b"ab", SPECIAL, *b"cd"], "<eos>", dict(ignore_eos=True), ("ab", [*b"ab", SPECIAL])),
        ([*b"ab", SPECIAL, *b"cd"], "b<eos>c", dict(ignore_eos=True), ("a", [*b"ab", SPECIAL, *b"c"])),
        ([*b"ab", SPECIAL, *b"cd"], "b<eos>", {}, ("a", [*b"ab", SPECIAL])),  # and the end token itself
        ([*b"ab", 7, *b"cd"], "b", {}, ("a", [*b"ab"])),
    ],
)
def test_a_stop_string_may_contain_a_special_token_and_the_end(script, stop, options, expected):
    known = dict(model=Scripted([1, *script]), tokenizer=TOKENIZER, defaults=Defaults(eos_token_ids=(7, SPECIAL)))
    job = generate([1], SamplingParams(max_tokens=5, stop=(stop,), **options), **known)
    assert (job.text, job.request.generated, job.finish_reason) == (*expected, "stop")


def test_the_space_between_prompt_and_answer_is_kept_where_a_decoder_drops_the_first():
    encoder = Encoder(WordLevel({"▁Tom": 0, "▁has": 1, "<s>": 2}, unk_token="<s>"))
    encoder.decoder = Metaspace()
    encoder.add_special_tokens(["<s>"])
    for prompt, text in (([0], " has Tom"), ([2], "has Tom"), ([0, 2], "has Tom")):
        options = dict(model=Scripted([*prompt, 1, 0]), tokenizer=OurTokenizer(encoder))
        job = generate(prompt, SamplingParams(max_tokens=2), **options)
        assert job.text == text


def test_text_comes_as_whole_characters():
    engine = build(model=Scripted([1, *"né😀!".encode()]), tokenizer=TOKENIZER)
    engine.add([1], SamplingParams(max_tokens=8))
    pieces = []
    while engine.scheduler.has_work:
        pieces += [update.text for update in engine.step()]
    assert pieces == ["n", "", "é", "", "", "", "😀", "!"]


def test_an_unfinished_character_is_shown_broken_at_the_end():
    engine = build(model=Scripted([1, *"n😀".encode()]), tokenizer=TOKENIZER)
    job = engine.add([1], SamplingParams(max_tokens=3))
    assert run(engine)[job] == ([*"n😀".encode()[:3]], "n\ufffd")


def test_max_tokens_is_kept():
    assert [len(generate([1], SamplingParams(max_tokens=n)).request.generated) for n in (1, 2, 9)] == [1, 2, 9]


def test_without_max_tokens_the_answer_ends_with_the_context_or_the_cache():
    assert len(generate([1] * 500, SamplingParams()).request.tokens) == 512
    assert len(generate([1] * 100, SamplingParams(), pages=3).request.tokens) == 129


def test_logprobs_are_kept_only_where_asked_for():
    engine = build()
    jobs = [engine.add([i], SamplingParams(max_tokens=4, logprobs=n)) for i, n in enumerate((None, 0, 2))]
    run(engine)
    assert [[len(choice.top) for choice in job.logprobs] for job in jobs] == [[], [0] * 4, [2] * 4]


def test_a_cancelled_request_stops_and_gives_its_pages_back():
    engine = build(max_requests=2)
    running, other, waiting = (engine.add(make_prompt(80, i), SamplingParams(max_tokens=20)) for i in range(3))
    for _ in range(5):
        engine.step()
    assert list(engine.scheduler.waiting) == [waiting.request]
    free = engine.scheduler.pages.free
    engine.cancel(running)
    assert engine.scheduler.pages.free == free + 2
    engine.cancel(waiting)
    engine.cancel(waiting)
    told = run(engine)
    assert list(told) == [other]
    assert (running.finish_reason, waiting.finish_reason, other.finish_reason) == ("cancelled", "cancelled", "length")
    engine.cancel(other)
    assert other.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_the_number_of_steps_and_not_the_tokens(temperature):
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, logprobs=0)
    plain = generate(make_prompt(40), params)
    tokens = plain.request.generated
    engine = build()
    job, steps = engine.add(make_prompt(40), params), 0
    beside = engine.add(make_prompt(9), SamplingParams(max_tokens=40, temperature=0.0))
    while job.finish_reason is None:
        done = len(job.request.generated)
        guesses = tokens[done : done + 3] if done else []
        if steps % 3 == 1 and len(guesses) == 3:
            guesses[1] = (guesses[1] + 1) % 264  # a wrong one in the middle
        job.request.draft = guesses
        engine.step()
        steps += 1
    run(engine)
    assert job.request.generated == tokens
    assert [c.logprob for c in job.logprobs] == pytest.approx([c.logprob for c in plain.logprobs], abs=1e-4)
    assert steps < 15
    assert beside.request.generated == generate(make_prompt(9), beside.params).request.generated


def test_scores_are_the_log_probabilities_of_each_token_given_its_prefix():
    tokens = make_prompt(300)
    engine = build(max_batch_tokens=170)
    job, beside = engine.add_scoring(tokens), engine.add(make_prompt(9), GREEDY)
    run(engine)
    batch = full_batch([tokens])
    logprobs = MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch))).log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert job.scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert job.finish_reason == "length"
    assert beside.request.generated == generate(make_prompt(9)).request.generated


def test_scoring_never_holds_more_than_a_few_rows_of_logits(monkeypatch):
    rows = []
    monkeypatch.setattr(MODEL, "logits", lambda x: rows.append(len(x)) or Transformer.logits(MODEL, x))
    engine = build(max_batch_tokens=500)
    engine.add_scoring(make_prompt(400))
    run(engine)
    assert sum(rows) >= 399
    assert max(rows) == LOGIT_ROWS


def test_a_prefill_that_chooses_no_token_computes_no_logits(monkeypatch):
    rows = []
    monkeypatch.setattr(MODEL, "logits", lambda x: rows.append(len(x)) or Transformer.logits(MODEL, x))
    engine = build(max_batch_tokens=30)
    engine.add(make_prompt(100), SamplingParams(max_tokens=1))
    run(engine)
    assert rows == [1]


@pytest.mark.parametrize(("pages", "is_preempted"), [(5, True), (40, False)])
def test_captured_selections_are_what_the_indexers_chose(pages, is_preempted):
    prompt = make_prompt(90)
    engine = build(pages=pages, max_batch_tokens=64)
    older = engine.add(make_prompt(60, 1), SamplingParams(max_tokens=80))
    job = engine.add(prompt, SamplingParams(max_tokens=40), capture=True)
    run(engine)
    assert (job.request.preemptions > 0) == is_preempted
    assert older.seen is None
    batch, expected = full_batch([job.request.tokens[:-1]]), []
    MODEL.forward(batch, empty_cache(CONFIG, batch), expected)
    found = job.selections()
    assert len(found) == CONFIG.num_hidden_layers
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == (129, CONFIG.index_topk)
        assert torch.equal(mine, theirs)
        assert (mine[:, 0] >= 0).all()
        assert all(row[row >= 0].max() <= i for i, row in enumerate(mine))


def test_a_refused_draft_leaves_no_selection_behind():
    tokens = generate(make_prompt(20)).request.generated
    place = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    engine = build(defaults=Defaults(eos_token_ids=(tokens[place],)))
    job = engine.add(make_prompt(20), GREEDY, capture=True)
    while len(job.request.generated) < place:
        engine.step()
    job.request.draft = [(tokens[place] + 1) % 264] * 2
    run(engine)
    assert job.request.generated == tokens[: place + 1]
    assert [len(seen) for seen in job.selections()] == [20 + place] * 2


@pytest.mark.parametrize("moment", ["forward", "logits"])
def test_a_job_abandoned_in_the_middle_of_a_step_breaks_no_other(monkeypatch, moment):
    engine = build()
    shared = SharedEngine(engine)
    dropped, other = engine.add(make_prompt(9, 1), GREEDY), engine.add(make_prompt(20), GREEDY)
    whole = getattr(Transformer, moment)
    calls = []

    def abandon_in_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            shared.cancel([dropped])
            assert dropped.finish_reason is None
        return whole(MODEL, *args)

    monkeypatch.setattr(MODEL, moment, abandon_in_the_third)
    shared.run([other])
    assert not engine.jobs and engine.scheduler.pages.free == engine.scheduler.pages.count - 1
    assert (dropped.finish_reason, len(dropped.request.generated)) == ("cancelled", 3)
    monkeypatch.undo()
    assert other.request.generated == generate(make_prompt(20)).request.generated


@pytest.mark.parametrize("tokens", [[1, 264], [-1], [2**40]])
def test_a_token_outside_the_vocabulary_is_refused(tokens):
    engine = build()
    for add in (engine.add, lambda t: engine.add_scoring([1, *t])):
        with pytest.raises(RequestError, match=rf"token {tokens[-1]} at place .*0 to 263"):
            add(tokens)
    assert not engine.jobs
    assert not engine.scheduler.has_work


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(RequestError, match="stop strings: .*no tokenizer"):
        build().add([1], SamplingParams(stop="x"))


def test_an_idle_engine_does_nothing():
    assert build().step() == []


def test_a_failing_forward_leaves_an_engine_that_can_go_on(monkeypatch):
    engine = build()
    job = engine.add(make_prompt(20), GREEDY)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(MODEL, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    run(engine)
    assert job.request.generated == generate(make_prompt(20)).request.generated


def test_every_update_belongs_to_the_step_that_made_it():
    engine = build()
    job, lengths = engine.add(make_prompt(5), GREEDY), []
    while engine.scheduler.has_work:
        (update,) = engine.step()
        assert update.job is job
        lengths.append(len(job.request.tokens))
    assert all(b - a == 1 for a, b in pairwise(lengths))


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_cpu():
    weights = assemble(CONFIG, tiny_tensors(CONFIG, mtp=False))
    weights.held = {
        name: type(held)(held[0].cuda()) if isinstance(held, tuple) else held.cuda()
        for name, held in weights.held.items()
    }
    wants = [
        (make_prompt(40 * i + 3, i), SamplingParams(max_tokens=20, temperature=i % 2, seed=i, logprobs=i))
        for i in range(4)
    ]
    scheduler = Scheduler(20, 96, 4, CONFIG.max_position_embeddings)
    cache = allocate_cache(CONFIG, 20, "float32", "cuda", mtp=False)
    engine = Engine(Transformer(CONFIG, weights, Reference()), cache, scheduler, CONFIG.vocab_size, "cuda")
    jobs = [engine.add(*want) for want in wants]
    scoring = engine.add_scoring(make_prompt(200))
    run(engine)
    for want, job in zip(wants, jobs, strict=True):
        assert job.request.generated == generate(*want).request.generated
    alone = build()
    expected = alone.add_scoring(make_prompt(200))
    run(alone)
    assert scoring.scores == pytest.approx(expected.scores, abs=1e-4)
