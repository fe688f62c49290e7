"""Text with drafts against text without, 200 prompts of the bundled model's tasks; `make soak`, log in docs/soak.txt."""

import time

import pytest
from drafted_texts import draw_prompts, find_parted, judge, run_all

PROMPTS, LENGTH, TOKENS = 200, 512, 48


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_200_texts_are_the_same_with_drafts(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Token for token in float32, where only the order of sums differs; in auto but for near ties."""
    prompts = draw_prompts(PROMPTS, LENGTH)
    options = {"dtype": dtype, "device": "cpu", "max_requests": 24, "max_batch_tokens": 384, "cache_tokens": 4096}
    start, failed = time.perf_counter(), []
    for k, llm, plain, found in run_all(prompts, TOKENS, (1, 2, 3, 4, 5, "auto"), **options):
        parted = find_parted(llm, plain, found)
        preempted = llm.engine.scheduler.preemptions
        with capsys.disabled():
            text = f"{len(prompts) - len(parted)} of {len(prompts)} texts are those without drafts"
            print(f"\n{dtype}, {llm.stats}\n  {text}; {preempted} preemptions; {time.perf_counter() - start:.0f} s")
            for d in parted:
                print(f"  {d}")
        if parted if dtype == "float32" else not judge(parted, len(prompts)):
            failed.append(k)
        assert llm.stats.tally.shares[0] >= 0.6
    assert not failed
