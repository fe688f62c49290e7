"""The Python API on a tiny checkpoint on disk: what goes in is checked, what comes out is what the engine said."""

import gc
import json
from array import array
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import CONFIG, SIZES, TENSORS, write
from tiny_models import assemble, empty_cache, full_batch

from saccade.api.llm import LLM
from saccade.checkpoint.hub.fetch import fetch_checkpoint
from saccade.engine.params import SamplingParams
from saccade.errors import CheckpointError, ConfigError, PlanError, RequestError, SaccadeError
from saccade.kernels import ACTIVATION_NAMES
from saccade.models.dsa.transformer import Transformer
from saccade.ops.reference import Reference
from saccade.text.prompts import as_prompts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(root):
    return LLM(root, dtype="float32", **SIZES)


@pytest.fixture(autouse=True)
def nothing_stays_behind(llm):
    yield
    if llm.engine.jobs or llm.shared.inboxes:  # of a stream in a cycle, as a traceback makes one
        gc.collect()  # 0.24 s with what torch and transformers have made
    assert not llm.engine.jobs
    assert not llm.shared.inboxes
    assert not llm.engine.scheduler.has_work
    assert llm.engine.scheduler.pages.free == llm.engine.scheduler.pages.count - 1


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_an_fp8_index_cache_is_half_the_keys_and_another_rounding(root, dtype):
    plain, fp8 = (LLM(root, dtype=dtype, index_cache=how, **SIZES) for how in ("bf16", "fp8"))
    assert (fp8.settings.index_cache, plain.settings.index_cache) == ("fp8", "bf16")
    assert fp8.settings.cache_bytes < plain.settings.cache_bytes
    tokens = [i * 7 % 250 for i in range(200)]  # more than index_topk
    differences = [abs(a - b) for a, b in zip(plain.score(tokens), fp8.score(tokens), strict=True)]
    assert max(differences[:8]) == 0 < max(differences)
    out = fp8.generate([tokens, tokens[:90]], SamplingParams(max_tokens=20, temperature=0.0))
    assert [len(o.token_ids) for o in out] == [20, 20]


@pytest.mark.parametrize("name", ["index_cache", "latent_cache"])
@pytest.mark.parametrize("value", ["int8", None, 8, ["fp8"]])
def test_a_cache_that_does_not_exist_is_refused(root, name, value):
    with pytest.raises(ConfigError, match=f'^{name}: expected "bf16" or "fp8", found '):
        LLM(root, **{name: value}, **SIZES)


def test_activations_round_long_prompts():
    """A prompt of 128 tokens keeps its inputs whole; one of 129 does not, whatever its steps have. FP8 inputs are taken
    where weights are FP8 too."""
    sizes = dict(device="cpu", cache_tokens=192, max_batch_tokens=40, mtp=False)
    models = [LLM(activations=how, **sizes) for how in ACTIVATION_NAMES]
    assert [llm.settings.activations for llm in models] == ["exact", "bf16", "fp8"]
    tokens = [i * 7 % 250 for i in range(130)]
    exact, bf16, fp8 = (torch.tensor(llm.score(tokens)) for llm in models)
    assert 0 < (bf16 - exact).abs().mean() < (fp8 - exact).abs().mean()
    assert models[2].score(tokens[:129]) == models[0].score(tokens[:129])


def test_fast_kernels_are_refused_on_a_cpu_before_anything_is_loaded(root):
    def load(done, total):
        raise AssertionError("a byte was read")

    with pytest.raises(ConfigError, match="^kernels: \"fast\" needs a CUDA device, found device 'cpu'"):
        LLM(root, kernels="fast", progress=load, **SIZES)
    assert LLM(root, **SIZES).settings.kernels == "reference"


def expect_logprobs(tokens):
    """[n, vocab] by the model in one pass, its weights assembled by hand."""
    model = Transformer(CONFIG, assemble(CONFIG, {name: t.float() for name, t in TENSORS.items()}), Reference())
    batch = full_batch([tokens])
    return model.logits(model.forward(batch, empty_cache(CONFIG, batch))).log_softmax(-1)


GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
HOT = SamplingParams(max_tokens=30, temperature=1.5, seed=4, ignore_eos=True, logprobs=2)


def test_text_and_its_token_ids_are_the_same_prompt(llm):
    text = "The eye jumps."
    by_text, by_ids = llm.generate([text, list(text.encode())], GREEDY)
    assert by_text == by_ids == llm.generate(text, GREEDY)[0] == llm.generate(list(text.encode()), GREEDY)[0]
    assert by_text.token_ids == expect_logprobs([*text.encode(), *by_text.token_ids])[13:-1].argmax(-1).tolist()
    assert by_text.text == llm.tokenizer.decode(by_text.token_ids)
    assert by_text.finish_reason == "length"


def test_each_prompt_may_have_its_own_params(llm):
    first, second = llm.generate(["a", "b"], [GREEDY, HOT])
    assert (len(first.token_ids), len(second.token_ids)) == (10, 30)
    assert first.logprobs is None
    assert [(choice.token, len(choice.top)) for choice in second.logprobs] == [(t, 2) for t in second.token_ids]
    with pytest.raises(RequestError, match="2 prompts but 1 params"):
        llm.generate(["a", "b"], [GREEDY])


def test_n_answers_are_those_of_seeds_in_a_row(llm):
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=5)
    found = llm.generate(["abc", [1, 2]], [SamplingParams(max_tokens=6, temperature=1.0, seed=5, n=3), params])
    alone = llm.generate(["abc"] * 3, [SamplingParams(max_tokens=6, temperature=1.0, seed=5 + i) for i in range(3)])
    assert [c.token_ids for c in found[:3]] == [c.token_ids for c in alone] and len(found) == 4
    assert len({tuple(c.token_ids) for c in found[:3]}) == 3
    with pytest.raises(RequestError, match=r"^n: expected 1 of what has one answer, found 2"):
        llm.stream("abc", SamplingParams(n=2))


def test_what_ended_an_answer_and_the_prompts_log_probabilities_are_told(llm):
    tokens, asked = [i * 7 % 250 for i in range(20)], dict(max_tokens=4, temperature=0.0, prompt_logprobs=1)
    (plain,) = llm.generate(tokens, SamplingParams(**asked))
    (out,) = llm.generate(tokens, SamplingParams(stop_token_ids=plain.token_ids[1:2], **asked))
    assert (out.stop_reason, plain.stop_reason) == (plain.token_ids[1], None)
    assert [c.logprob for c in out.prompt_logprobs] == pytest.approx(llm.score(tokens), abs=1e-4)
    pieces = list(llm.stream(tokens, SamplingParams(stop_token_ids=plain.token_ids[1:2], **asked)))
    assert pieces[0].prompt_logprobs == out.prompt_logprobs and pieces[-1].stop_reason == out.stop_reason
    assert all(piece.prompt_logprobs is None for piece in pieces[1:])


def test_streamed_pieces_joined_are_the_generated_text(llm):
    whole = llm.generate("The eye", HOT)[0]
    pieces = list(llm.stream("The eye", HOT))
    assert not llm.shared.inboxes  # an ended stream leaves no mark
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert [choice for piece in pieces for choice in piece.logprobs] == whole.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 29 + ["length"]


def test_a_stream_is_silent_while_a_long_prompt_is_read(llm):
    pieces = list(llm.stream([1] * 300, GREEDY))  # four steps of prefill
    assert [len(piece.token_ids) for piece in pieces] == [1] * 10


def test_streams_run_side_by_side_and_beside_generate(llm):
    alone = [llm.generate(p, HOT)[0].token_ids for p in ("one", "two")]
    streams = [llm.stream(p, HOT) for p in ("one", "two")]
    found = [[], []]
    for turn in range(10):
        found[turn % 2] += next(streams[turn % 2]).token_ids
    assert llm.generate("three", GREEDY)[0].finish_reason == "length"
    for rest, stream in zip(found, streams, strict=True):
        rest += [t for piece in stream for t in piece.token_ids]
    assert found == alone


def test_only_the_last_piece_names_the_reason_however_late_it_is_read(llm):
    stream = llm.stream("The eye", GREEDY)
    next(stream)
    llm.generate("three", HOT)  # runs the stream's request to its end as well
    assert [piece.finish_reason for piece in stream] == [None] * 8 + ["length"]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_closing_or_dropping_a_stream_cancels_the_request(llm, steps, end):
    stream = llm.stream("The eye", HOT)
    for _ in range(steps):
        next(stream)
    (job,) = llm.engine.jobs.values()
    if end == "close":
        stream.close()
        assert list(stream) == []
    del stream
    gc.collect()
    assert not llm.shared.inboxes
    assert job.finish_reason == "cancelled"  # at once: nobody steps


def test_a_stream_collected_during_a_forward_breaks_no_other(llm, monkeypatch):
    alone = llm.generate("The eye", HOT)[0].token_ids
    doomed, forward = [llm.stream("gone", HOT)], llm.engine.model.forward
    stream = llm.stream("The eye", HOT)
    found = [*next(stream).token_ids, *next(stream).token_ids]

    def collect(*args):
        if doomed:
            doomed.clear()
            gc.collect()
        return forward(*args)

    monkeypatch.setattr(llm.engine.model, "forward", collect)
    assert found + [t for piece in stream for t in piece.token_ids] == alone


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_interrupts_the_queueing_leaves_nothing_queued(llm, monkeypatch, error):
    def encode(text):
        raise error

    monkeypatch.setattr(llm.tokenizer, "encode", encode)
    with pytest.raises(error):
        llm.generate([[1, 2], "text"], GREEDY)
    assert not llm.engine.jobs


@pytest.mark.parametrize("params", [{"max_tokens": 3}, {}, 5, "x", [GREEDY, None], [GREEDY, {}]])
def test_params_of_another_type_are_refused(llm, params):
    with pytest.raises(RequestError, match="params: expected SamplingParams, found"):
        llm.generate(["a", "b"], params)
    with pytest.raises(RequestError, match="params: expected SamplingParams, found"):
        llm.stream("a", params)


def test_any_sequence_of_integers_is_a_prompt(llm):
    expected = llm.generate([0, 1, 2], GREEDY)
    for prompt in (range(3), np.arange(3), np.arange(3, dtype=np.uint8), torch.arange(3), array("i", [0, 1, 2])):
        assert llm.generate(prompt, GREEDY) == llm.generate([prompt], GREEDY) == expected
        assert [t for piece in llm.stream(prompt, GREEDY) for t in piece.token_ids] == expected[0].token_ids
        assert llm.score(prompt) == llm.score([0, 1, 2])
    assert llm.generate(np.array([[0, 1, 2], [0, 1, 2]]), GREEDY) == expected * 2
    for wrong in (np.array(3), np.array([1.0]), torch.tensor(3), {1: 2}, {1}):
        with pytest.raises(RequestError, match="a prompt is text or a list of token ids|is no token id"):
            llm.generate(wrong, GREEDY)


def test_a_number_among_prompts_is_named(llm):
    with pytest.raises(RequestError, match="^prompt 1: a prompt is text or a list of token ids, found int$"):
        llm.generate([[1], 2], GREEDY)


def test_an_empty_list_of_prompts_is_not_called_a_prompt(llm):
    with pytest.raises(RequestError, match="^the list is empty; expected token ids, or prompts"):
        llm.generate([], GREEDY)
    with pytest.raises(RequestError, match="^the prompt is empty"):
        llm.stream([], GREEDY)


def test_text_that_is_no_unicode_is_a_request_error(llm):
    with pytest.raises(RequestError, match="^prompt 1: the prompt cannot be encoded: .*surrogates"):
        llm.generate(["a", "\udcff"], GREEDY)


def test_extreme_options_do_not_reach_the_tensors(llm):
    first = llm.generate("a", SamplingParams(max_tokens=4, temperature=1.0, seed=5, ignore_eos=True))
    for top_k, seed in ((2**63, np.int64(5)), (10**400, 5)):
        params = SamplingParams(np.uint8(4), 1.0, top_k, 1.0, seed, ignore_eos=True)
        assert llm.generate("a", params) == first


@pytest.mark.parametrize("path", [5, b"x", ["x"]])
def test_a_path_of_another_type_is_a_config_error(path):
    with pytest.raises(ConfigError, match="^model: expected a str, a Path or None"):
        LLM(path)


def test_scores_are_log_probabilities_and_one_token_has_none(llm):
    tokens = torch.randint(0, 264, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = expect_logprobs(tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert llm.score(tokens) == pytest.approx(expected.tolist(), abs=1e-4)
    assert llm.score([5]) == []


def test_generated_log_probabilities_are_those_that_score_gives(llm):
    prompt = list(b"The eye jumps")
    found = llm.generate(prompt, HOT)[0]
    scores = llm.score([*prompt, *found.token_ids])[len(prompt) - 1 :]
    assert [choice.logprob for choice in found.logprobs] == pytest.approx(scores, abs=1e-4)


def test_captured_selections_come_per_layer_and_position(llm):
    found, other = llm.generate([list(range(40)), [1]], [HOT, GREEDY], capture_selection=True)
    assert [tuple(s.shape) for s in found.selections] == [(69, CONFIG.index_topk)] * 2
    for seen in found.selections:
        assert seen[3].tolist() == [0, 1, 2, 3] + [-1] * 12  # short contexts are seen whole
        assert (seen[60] >= 0).all()
        assert seen[60].max() <= 60
    assert other.selections[0].shape[0] == 10
    assert llm.generate([1], GREEDY)[0].selections is None


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "the prompt is empty"),
        ([], "is empty"),
        ([5, 264], r"token 264 at place 1 is not in the vocabulary; ids are 0 to 263"),
        ([-1], "token -1 at place 0"),
        ([True], "token True at place 0 is no token id"),
        ([1.0], r"token 1\.0 at place 0 is no token id"),
        ([None], "token None at place 0"),
        (7, "a prompt is text or a list of token ids, found int"),
        (b"abc", "found bytes"),
        ([1] * 512, "512 tokens; the context is 512"),
        ([1] * 505, "make 515; the context is 512"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(llm, prompt, text):
    with pytest.raises(RequestError, match=text):
        llm.generate(prompt, GREEDY)
    with pytest.raises(RequestError, match=text):
        llm.stream(prompt, GREEDY)


@pytest.mark.parametrize("tokens", [[], [264], [1, -1], [True, 1], [0.5, 1], [1] * 513, "text", None])
def test_tokens_that_cannot_be_scored_are_refused(llm, tokens):
    with pytest.raises(RequestError):
        llm.score(tokens)


def test_a_bad_prompt_in_a_list_is_named_and_nothing_runs(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step was run"))
    with pytest.raises(RequestError) as caught:
        llm.generate(["fine", [300], "fine", ""], GREEDY)
    first, second = str(caught.value).splitlines()
    assert first.startswith("prompt 1: token 300")
    assert second.startswith("prompt 3: the prompt is empty")


def test_an_interrupted_generate_leaves_nothing_running(llm, monkeypatch):
    step, calls = llm.engine.step, []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)


def test_a_cache_too_small_for_one_request_is_named_with_both_numbers(root):
    small = LLM(root, device="cpu", cache_tokens=100)
    with pytest.raises(RequestError, match="need 131 cache rows; the cache holds 128"):
        small.generate([1] * 122, GREEDY)
    assert len(small.generate([1] * 119, GREEDY)[0].token_ids) == 10


def test_every_auto_is_resolved_and_can_be_printed(root):
    found = LLM(root, device="cpu", max_requests=3).settings
    assert (found.cache_tokens, found.max_batch_tokens, found.max_requests) == (1536, 512, 3)
    assert (found.device, found.dtype, found.mtp, found.max_length) == ("cpu", "auto", True, 512)
    assert "max_requests      3" in str(found).splitlines() and found.max_mixed_tokens == 512
    small = LLM(root, device="cpu", max_mixed_tokens=40)
    assert small.settings.max_mixed_tokens == small.engine.scheduler.max_mixed_tokens == 40


def test_mtp_false_loads_and_answers_the_same(root, llm):
    without = LLM(root, dtype="float32", mtp=False, **SIZES)
    assert not without.settings.mtp
    assert without.settings.cache_bytes < llm.settings.cache_bytes
    assert without.engine.model.mtp is None
    assert llm.engine.model.mtp is not None
    assert without.generate("abc", GREEDY) == llm.generate("abc", GREEDY)


def test_generation_config_gives_defaults_and_end_tokens(root, tmp_path):
    same = write(tmp_path / "same")
    first = LLM(same, dtype="float32", **SIZES).generate("abc", GREEDY)[0].token_ids[0]
    (same / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, first]}))
    found = LLM(same, dtype="float32", **SIZES).generate("abc")[0]
    (same / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3}))
    assert "ignored: no_repeat_ngram_size=3" in str(LLM(same, dtype="float32", **SIZES).settings)
    assert (found.token_ids, found.text, found.finish_reason) == ([first], "", "stop")


def test_without_a_tokenizer_token_ids_still_work(tmp_path):
    mute = LLM(write(tmp_path / "mute", tokenizer=False), **SIZES)
    found = mute.generate([1, 2], GREEDY)[0]
    assert found.text is None
    assert len(found.token_ids) == 10
    for call in (mute.generate, mute.stream):
        with pytest.raises(RequestError, match=r"a text prompt needs a tokenizer.*tokenizer\.json"):
            call("abc")


def test_trouble_of_a_tokenizer_stops_only_text(tmp_path):
    root = write(tmp_path / "broken")
    (root / "tokenizer.json").write_text('{"version": "2.0"}')
    mute = LLM(root, **SIZES)
    assert mute.generate([1, 2], GREEDY)[0].text is None
    assert any("text is not served: " in note for note in mute.settings.notes)
    for call in (mute.generate, mute.stream):
        with pytest.raises(RequestError, match="a text prompt needs a tokenizer.*Unknown tokenizer version.*token ids"):
            call("abc")
    with pytest.raises(RequestError, match="stop strings.*Unknown tokenizer version"):
        mute.generate([1, 2], SamplingParams(stop="a"))


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        LLM(tmp_path / "nowhere", **SIZES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"/empty: is empty; expected \.safetensors files"):
        LLM(tmp_path / "empty", **SIZES)
    tensors = {name: t for name, t in TENSORS.items() if not name.endswith("1.self_attn.indexer.wk.weight")}
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn\.indexer\.wk"):
        LLM(write(tmp_path / "torn", tensors=tensors), **SIZES)


def test_a_failed_load_leaves_no_tensor_behind(root, monkeypatch):
    gc.collect()

    def count():
        return sum(type(o) is torch.Tensor and o.shape == (264, 64) for o in gc.get_objects())

    before = count()
    monkeypatch.setattr("saccade.api.loading.load.allocate_cache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLM(root, **SIZES)
    gc.collect()
    assert count() == before


def test_a_path_is_never_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr("saccade.checkpoint.hub.fetch.open_repository", lambda *_, **__: pytest.fail("looked up"))
    for path in (tmp_path, "./some/model"):
        with pytest.raises(SaccadeError, match="is empty|no such directory"):
            fetch_checkpoint(path)
    assert fetch_checkpoint(None).name == "bundled"


@pytest.mark.parametrize("path", ["", Path()])
def test_a_name_that_names_nothing_is_not_the_bundled_model(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a Path of nothing is the working directory
    with pytest.raises(SaccadeError, match="found an empty name|is empty"):
        LLM(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "tpu"},
        {"device": "cpu:abc"},
        {"device": 5},
        {"device": "cuda:99"},
        {"dtype": "int3"},
        {"cache_tokens": 0},
        {"max_requests": 1.5},
        {"max_requests": 10**12},
        {"max_batch_tokens": 10**12},
    ],
)
def test_a_senseless_setting_is_a_clear_error(root, changes):
    with pytest.raises(SaccadeError):
        LLM(root, **(SIZES | changes))


def test_one_prompt_and_several_are_told_apart():
    assert as_prompts("ab") == ["ab"]
    assert as_prompts([1, 2]) == [[1, 2]]
    assert as_prompts([[1], "ab", (2,)]) == [[1], "ab", (2,)]
