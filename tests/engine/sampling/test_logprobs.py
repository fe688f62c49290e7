"""Log-probabilities: each request gets what it asked for, and ends by nothing that another asked for."""

from dataclasses import replace

import pytest
import torch
from drafting_engines import CONFIG, MODEL, Shifted, build, make_prompt, run
from tiny_models import empty_cache, full_batch

from saccade.engine.params import SamplingParams
from saccade.engine.sample import Row, Spec, round_logprobs, sample
from saccade.engine.sampling.choice import NOT_FINITE
from saccade.models.dsa.transformer import Transformer

GREEDY = SamplingParams(max_tokens=2, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, seed=3)


@torch.inference_mode()
def find_logprobs(tokens: list[int]) -> torch.Tensor:
    batch = full_batch([tokens])
    return MODEL.logits(MODEL.forward(batch, empty_cache(CONFIG, batch))).log_softmax(-1)


def test_numbers_of_likeliest_tokens_have_few_sizes() -> None:
    """A CUDA graph holds for one. Each size is enough for who asked."""
    sizes = {asked: round_logprobs(asked) for asked in range(-1, 200)}
    assert sizes[-1] == -1 and sizes[0] == 0
    assert {sizes[asked] for asked in range(1, 6)} == {5} and {sizes[asked] for asked in range(6, 21)} == {20}
    assert {*sizes.values()} == {-1, 0, 5, 20, 100, 128, 256}
    assert all(size >= asked for asked, size in sizes.items())


@pytest.mark.parametrize("speculate", [0, 3])
def test_each_gets_as_many_likeliest_tokens_as_it_asked_for(speculate: int) -> None:
    asked = (3, 7, 0, 150)
    engine = build(speculate, layer=Shifted(40))
    jobs = run(engine, [(make_prompt(12, n), replace(SAMPLED, logprobs=n)) for n in asked])
    for n, job in zip(asked, jobs, strict=True):
        likeliest = find_logprobs(job.request.tokens)[11:]
        assert len(job.logprobs) == len(job.request.generated) > 5
        for choice, row in zip(job.logprobs, likeliest, strict=False):
            assert len(choice.top) == n
            assert [p for _, p in choice.top] == pytest.approx(row.topk(n).values.tolist(), abs=1e-4)
            assert choice.logprob == pytest.approx(row[choice.token].item(), abs=1e-4)


@pytest.mark.parametrize("speculate", [0, 2])
def test_log_probabilities_that_others_asked_for_end_nobody(speculate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side: of the four likeliest tokens the last has none, which is an error of who wanted it alone."""
    spread = torch.tensor([2e38, 0.0, -1e38, *[-2e38] * (CONFIG.vocab_size - 3)])
    monkeypatch.setattr(Transformer, "logits", lambda _, hidden: spread.expand(len(hidden), -1))
    wants = [replace(GREEDY, logprobs=asked) for asked in (None, 0, 3, 4)]
    engine = build(speculate)
    scored = engine.add_scoring([0, 9, 0])
    prompted = [engine.add([0, token, 0], replace(GREEDY, prompt_logprobs=0)) for token in (0, 9)]
    jobs = [*run(engine, [([0, 9, 0], want) for want in wants]), *prompted, scored]
    assert [job.finish_reason == "error" for job in jobs] == [False, False, False, True, False, True, True]
    assert [job.request.generated for job in jobs[:4]] == [[0, 0]] * 3 + [[]]
    assert [len(choice.top) for choice in jobs[2].logprobs] == [3, 3]


@pytest.mark.parametrize(("asked", "is_answered"), [(None, True), (0, True), (3, True), (4, False), (5, False)])
def test_a_row_is_judged_by_what_was_asked_for(asked: int | None, is_answered: bool) -> None:
    logits = torch.tensor([[2e38, 0.0, -1e38, -2e38, -2e38]])
    row = sample(logits, Spec.build([Row()], 1, 5, "cpu")).read()[0].cut(asked)
    assert row.token == (0 if is_answered else NOT_FINITE) and len(row.top) == (asked or 0)
