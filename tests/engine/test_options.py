"""Each option of SamplingParams does what it says, with drafts and without, whatever runs beside it."""

import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from byte_tokenizer import SPECIAL, TOKENIZER
from drafting_engines import CONFIG, MODEL, Oracle, Shifted, build, make_prompt, run, tell
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_models import empty_cache, full_batch

from saccade.engine.params import Defaults, SamplingParams
from saccade.errors import MissingPackageError, RequestError

PROMPT = make_prompt(30, 5)
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=3)
EOS = Defaults(eos_token_ids=(SPECIAL,))
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}


def make(speculate=0, **options):
    return build(speculate, layer=Shifted(40), tokenizer=TOKENIZER, defaults=EOS, **options)


def answer(params, prompt=PROMPT, speculate=0, **options):
    return run(make(speculate, **options), [(prompt, params)])[0]


@torch.inference_mode()
def find_logits(tokens):
    batch = full_batch([tokens])
    return MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch)))


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        dict(presence_penalty=2.0),
        dict(frequency_penalty=2.0),
        dict(frequency_penalty=-2.0),
        dict(repetition_penalty=3.0),
        dict(logit_bias={10: 4, 20: 4, "30": -100}),
        dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.7, logit_bias={65: 3.5}),
    ],
    ids=str,
)
def test_each_token_is_the_likeliest_after_what_was_asked(options, speculate):
    """Recounted for each place from one pass over the text. And the option matters."""
    params = replace(GREEDY, **options)
    job = answer(params, speculate=speculate)
    logits, tokens = find_logits(job.request.tokens), job.request.tokens
    repetition, presence, frequency = params.penalties
    for place in range(len(PROMPT), len(tokens)):
        row, counts = logits[place - 1].clone(), Counter(tokens[len(PROMPT) : place])
        for token in set(tokens[:place]):
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        for token, count in counts.items():
            row[token] -= presence + frequency * count
        for token, bias in params.biases:
            row[token] += bias
        assert row[tokens[place]] >= row.max() - 1e-4
    assert job.request.generated != answer(GREEDY).request.generated


def test_min_p_drops_unlikely_tokens():
    plain, found = answer(SAMPLED).request, answer(replace(SAMPLED, min_p=0.9)).request
    logits = find_logits(found.tokens)
    for place in range(len(PROMPT), len(found.tokens)):
        probs = logits[place - 1].softmax(-1)
        assert probs[found.tokens[place]] >= 0.9 * probs.max() - 1e-4
    assert found.generated != plain.generated


def test_stop_tokens_end_an_answer_and_are_told():
    plain = answer(GREEDY).request.generated
    place = next(i for i in range(3, 20) if plain[i] not in plain[:i])
    for ignore_eos in (False, True):
        job = answer(replace(GREEDY, stop_token_ids=[plain[place]], ignore_eos=ignore_eos))
        assert job.request.generated == plain[: place + 1]
        assert (job.finish_reason, job.stop_reason) == ("stop", plain[place])


@pytest.mark.parametrize("speculate", [0, 3])
def test_nothing_ends_before_min_tokens(speculate):
    """End tokens cannot be chosen; a stop string does not count where it lies in the first tokens."""
    plain = answer(GREEDY)
    generated, text = plain.request.generated, plain.text
    first = answer(replace(GREEDY, stop_token_ids=generated[:2]), speculate=speculate)
    assert first.request.generated == generated[:1]
    found = answer(replace(GREEDY, stop_token_ids=generated[:2], min_tokens=6), speculate=speculate).request.generated
    assert len(found) > 6 or found[6:] == [] and len(found) == 24
    assert not set(found[:6]) & set(generated[:2])
    stopped = replace(GREEDY, stop=text[0])
    assert answer(stopped, speculate=speculate).text == ""
    later = answer(replace(stopped, min_tokens=1), speculate=speculate)
    assert later.text.startswith(text[0]) and (text[0] not in later.text[1:])


def test_a_stop_string_is_told_and_can_be_kept():
    text = answer(SAMPLED).text
    stop = text[9:11]
    assert stop not in text[:9]
    for is_kept, expected in ((False, text[:9]), (True, text[:11])):
        for speculate in (0, 4):
            params = replace(SAMPLED, stop=["never there", stop], include_stop_str_in_output=is_kept)
            job = answer(params, speculate=speculate)
            assert (job.text, job.finish_reason, job.stop_reason) == (expected, "stop", stop)


def test_special_tokens_and_end_tokens_are_shown_if_wanted():
    forced = replace(GREEDY, logit_bias={SPECIAL: 100}, max_tokens=3)
    assert answer(forced).text == "" and answer(forced).stop_reason is None
    shown = replace(forced, skip_special_tokens=False)
    assert answer(shown).text == ""  # it ended the answer
    assert answer(replace(shown, include_stop_str_in_output=True)).text == "<eos>"
    assert answer(replace(shown, ignore_eos=True)).text == "<eos>" * 3


@pytest.mark.parametrize(("speculate", "budget"), [(0, 96), (0, 7), (3, 20)])
def test_log_probabilities_of_a_prompt_are_its_scores(speculate, budget):
    engine = make()
    scoring = engine.add_scoring(PROMPT)
    run(engine, [])
    likeliest = find_logits(PROMPT).log_softmax(-1)
    wants = [(PROMPT, replace(SAMPLED, prompt_logprobs=2)), (make_prompt(9), replace(SAMPLED, logprobs=1))]
    jobs = run(make(speculate, max_batch_tokens=budget), wants)
    found = jobs[0].prompt_logprobs
    assert [choice.token for choice in found] == PROMPT[1:] and jobs[1].prompt_logprobs is None
    assert [choice.logprob for choice in found] == pytest.approx(scoring.scores[: len(PROMPT) - 1], abs=1e-4)
    for i, choice in enumerate(found):
        assert [t for t, _ in choice.top] == likeliest[i].topk(2).indices.tolist()
    assert len(jobs[1].logprobs[0].top) == 1 and jobs[0].logprobs == []
    assert tell(jobs) == tell(run(make(), [(p, replace(w, prompt_logprobs=None)) for p, w in wants]))


def test_log_probabilities_of_a_prompt_outlive_a_preemption():
    wants = [(make_prompt(60, i), SamplingParams(max_tokens=30, temperature=0.0, prompt_logprobs=0)) for i in range(3)]
    engine = make(2, pages=4, max_batch_tokens=33)
    jobs = run(engine, wants)
    assert engine.scheduler.preemptions > 0
    for job, alone in zip(jobs, run(make(), wants), strict=True):
        assert [c.token for c in job.prompt_logprobs] == job.request.tokens[1:60]
        assert [c.logprob for c in job.prompt_logprobs] == pytest.approx(
            [c.logprob for c in alone.prompt_logprobs], abs=1e-4
        )


# Grammars.

GRAMMAR = 'root ::= "<" [a-f]{3,9} ">" root | "."'


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_match_and_end_where_the_grammar_does(temperature, speculate):
    pytest.importorskip("xgrammar")
    params = SamplingParams(max_tokens=200, temperature=temperature, seed=4)
    job = answer(replace(params, json_schema=SCHEMA), speculate=speculate)
    assert job.finish_reason == "stop" and job.error is None
    values = json.loads(job.text)
    assert values["a"] in (1, 22) and isinstance(values["b"], bool) and set(values) == {"a", "b"}
    assert job.text.endswith("}") and SPECIAL not in job.request.generated  # not one step more
    job = answer(replace(params, regex="[a-c]{4}x|yy[0-9]+z"), speculate=speculate)
    assert re.fullmatch("[a-c]{4}x|yy[0-9]+z", job.text) and job.finish_reason == "stop"
    job = answer(replace(params, grammar=GRAMMAR), speculate=speculate)
    assert re.fullmatch(r"(<[a-f]{3,9}>)*\.", job.text) or job.finish_reason == "length"


def test_where_a_grammar_may_go_on_the_end_token_ends_it():
    pytest.importorskip("xgrammar")
    asked = replace(GREEDY, regex="(ab)+", logit_bias={SPECIAL: 100})
    assert answer(asked).text == "ab" and answer(asked).request.generated[-1] == SPECIAL
    for speculate in (0, 3):
        longer = answer(replace(asked, min_tokens=6), speculate=speculate)
        assert re.fullmatch("(ab)+", longer.text) and len(longer.request.generated) in (7, 8)
        assert answer(replace(asked, ignore_eos=True), speculate=speculate).text == "ab"


def test_a_grammar_and_options_that_leave_no_token_are_an_error_by_name():
    pytest.importorskip("xgrammar")
    for speculate in (0, 3):
        params = replace(GREEDY, regex="xy+", stop_token_ids=[ord("y")], min_tokens=9)
        jobs = run(make(speculate), [(PROMPT, params), (PROMPT, GREEDY)])
        assert jobs[0].finish_reason == "error" and jobs[0].request.generated == [ord("x")]
        text = f"behind position {len(PROMPT)} regex and the other options ban every token"
        assert jobs[0].error == f"there is no answer: {text}"
        assert tell(jobs[1:]) == tell([answer(GREEDY)])
        short = answer(replace(GREEDY, regex="xy", min_tokens=3), speculate=speculate)  # ends before it may
        text = f"behind position {len(PROMPT) + 1} regex and the other options ban every token"
        assert (short.finish_reason, short.error) == ("error", f"there is no answer: {text}")
        assert answer(replace(GREEDY, regex="xy", min_tokens=2), speculate=speculate).text == "xy"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(regex="("), "regex: cannot be compiled: "),
        (dict(grammar='x ::= "a"'), "grammar: cannot be compiled: "),
        (dict(json_schema={"type": "foo"}), "json_schema: cannot be compiled: "),
        (dict(logit_bias={264: 1}), "logit_bias: token 264 is not in the vocabulary; ids are 0 to 263"),
        (dict(stop_token_ids=[9999]), "stop_token_ids: token 9999 is not in the vocabulary"),
        (dict(n=2), "n: expected 1 of what has one answer, found 2"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(options, text):
    if "cannot be compiled" in text:
        pytest.importorskip("xgrammar")
    engine = make()
    with pytest.raises(RequestError) as caught:
        engine.add(PROMPT, SamplingParams(**options))
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value) and ".cc" not in str(caught.value)
    assert not engine.jobs


def test_a_model_that_likes_blanks_comes_to_the_end_of_its_json():
    pytest.importorskip("xgrammar")
    asked = replace(GREEDY, max_tokens=300, json_schema=SCHEMA, logit_bias={10: 60, 32: 60})
    job = answer(asked)
    assert job.finish_reason == "stop" and len(job.text) > 100 and json.loads(job.text)


def test_without_xgrammar_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(MissingPackageError, match=r"^json_schema needs the package xgrammar.*saccade\[serve\]"):
        make().add(PROMPT, SamplingParams(json_schema={}))


def test_a_grammar_needs_a_tokenizer():
    with pytest.raises(RequestError, match="^regex: matching it needs a tokenizer"):
        build().add(PROMPT, SamplingParams(regex="a"))


# All together.

OPTIONS = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(8, 20),
        "temperature": st.sampled_from([0.0, 0.5, 1.0]),
        "seed": st.integers(0, 99),
        "top_k": st.sampled_from([0, 3, 50]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "presence_penalty": st.sampled_from([0.0, 1.0, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "logit_bias": st.sampled_from([{}, {97: 5, 10: -50}, dict.fromkeys(range(100, 140), 2.5)]),
        "min_tokens": st.sampled_from([0, 3, 8]),
        "stop_token_ids": st.lists(st.integers(0, 255), max_size=40),
        "stop": st.sampled_from([(), ("a", "}"), ("\n",)]),
        "ignore_eos": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "prompt_logprobs": st.sampled_from([None, 1]),
        "logprobs": st.sampled_from([None, 2]),
    }
)
CONSTRAINTS = st.sampled_from(
    [{}, {}, {"regex": "[a-z]+( [a-z]+)*"}, {"json_schema": json.dumps(SCHEMA)}, {"grammar": GRAMMAR}]
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.tuples(OPTIONS, CONSTRAINTS, st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 5))
@example([({"max_tokens": 20, "temperature": 1.0, "seed": 1}, {"json_schema": json.dumps(SCHEMA)}, 9)], 5)
def test_a_seed_gives_the_same_text_with_and_without_drafts(wants, speculate):
    pytest.importorskip("xgrammar")
    asked = [(make_prompt(n, n), SamplingParams(**options, **constraint)) for options, constraint, n in wants]
    plain = [answer(params, prompt) for prompt, params in asked]  # each alone
    drafted = run(make(speculate, max_batch_tokens=40), asked)
    assert tell(drafted) == tell(plain)
    assert [(j.error, j.stop_reason) for j in drafted] == [(j.error, j.stop_reason) for j in plain]
    for job in drafted:
        if job.params.json_schema and job.finish_reason == "stop" and job.stop_reason is None:
            assert json.loads(job.text)["a"] in (1, 22)


def test_right_guesses_count_with_penalties_and_grammars():
    """An oracle's drafts are all accepted, so rows behind guesses are chosen from as they will be."""
    pytest.importorskip("xgrammar")
    for options in (
        dict(repetition_penalty=1.3, frequency_penalty=1.0, logit_bias={97: 2}),
        dict(regex="([a-f]{7}[0-9]{2})+"),
    ):
        params = SamplingParams(max_tokens=25, temperature=0.0, **options)
        plain = answer(params)
        engine = build(5, layer=Oracle([*PROMPT, *plain.request.generated]), tokenizer=TOKENIZER, defaults=EOS)
        (job,) = run(engine, [(PROMPT, params)])
        assert tell([job]) == tell([plain])
        assert job.tally.steps <= 6 and set(job.tally.shares) == {1.0}


def test_an_end_that_is_likely_comes_right_behind_min_tokens_though_its_row_is_behind_guesses():
    params = replace(GREEDY, stop_token_ids=[7], logit_bias={7: 100}, min_tokens=8)
    plain = answer(params)
    assert len(plain.request.generated) == 9 and plain.stop_reason == 7
    engine = build(5, layer=Oracle(plain.request.tokens), tokenizer=TOKENIZER, defaults=EOS)
    assert tell(run(engine, [(PROMPT, params)])) == tell([plain])
