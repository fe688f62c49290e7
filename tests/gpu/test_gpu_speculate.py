"""Drafts on a CUDA device: captured steps, the fused kernels of the MTP layer, and the text without drafts."""

import time

import pytest
import torch
from drafted_texts import draw_prompts, find_parted, judge, run_all

from saccade import LLM, SamplingParams
from saccade.engine.graphs import CapturedDrafts


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["fast", "reference"])
@pytest.mark.parametrize("requests", [1, 3, 16])
def test_the_text_is_that_without_drafts(kernels: str, requests: int) -> None:
    """In `auto`, of 50 prompts; with one request at a time of 25. 16 with five drafts are steps of 96 tokens."""
    prompts = draw_prompts(50 if requests > 1 else 25, 512)
    failed = []
    for k, llm, plain, found in run_all(
        prompts, 48, (1, 2, 3, 4, 5), device="cuda", kernels=kernels, max_requests=requests
    ):
        parted = find_parted(llm, plain, found)
        print(f"{kernels}, {requests} at a time, {llm.stats}; parted: {parted}")
        assert llm.stats.tally.shares[0] >= 0.6
        if not judge(parted, max(len(prompts), 50)):
            failed.append(k)
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 4, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replayed_steps_give_the_tokens_of_eager_ones(requests: int, temperature: float) -> None:
    """A graph that read a stale number, or one of another step, would not."""
    prompts = draw_prompts(requests, 256)
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=60, ignore_eos=True) for i in range(requests)]
    answers, seconds, replayed = [], [], 0
    for is_captured in (False, True):
        llm = LLM(device="cuda", kernels="fast", speculate=3, prefix_cache=False)
        run = llm.engine._run_drafts
        assert isinstance(run, CapturedDrafts)
        if is_captured:
            llm.generate(prompts, params)  # captures
        else:
            run._steps._recordings._record = None  # type: ignore[assignment]
            run._steps._recordings.run = lambda held, how, step: step()  # type: ignore[method-assign]
            llm.generate(prompts, params)  # compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        answers.append([c.token_ids for c in llm.generate(prompts, params)])
        seconds.append(time.perf_counter() - start)
        replayed = run.count_recorded()
    print(f"{requests} at a time: eager {seconds[0]:.2f} s, captured {seconds[1]:.2f} s, {replayed} graphs")
    assert answers[0] == answers[1] and replayed > 0
