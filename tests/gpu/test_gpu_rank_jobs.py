"""LLM(tp=2) with two processes on one GPU: the same answers as one rank, and an end when one of them is killed."""

import os

import pytest
from killed_ranks import find_children, is_there, run_harmed

from saccade import LLM, SamplingParams

PROMPTS = [
    "Lucy has 4 boxes with 9 pencils each. Then she buys 12 more pencils. She puts the pencils into 6 bags, the same"
    " number in each. How many pencils are in each of the bags?",
    "Tom has 12 apples.",
]
GREEDY = SamplingParams(max_tokens=60, temperature=0.0)
SHARED = "cuda:0,cuda:0"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"speculate": 2}, {"check_ranks": True}])
def test_two_processes_on_one_gpu(options: dict[str, object]) -> None:
    """With CUDA graphs, with drafts, and with every result compared."""
    options = {"cache_tokens": 4096, "activations": "exact", **options}
    with LLM(tp=2, device=SHARED, **options) as llm:  # type: ignore[arg-type]
        ranks = find_children(os.getpid())
        found = [c.text for c in llm.generate(PROMPTS, GREEDY)]
        again = [c.text for c in llm.generate(PROMPTS, GREEDY)]
        scores = llm.score(range(40))
    assert found == again and ranks and not any(map(is_there, ranks))
    one = LLM(device="cuda:0", cache_tokens=4096, activations="exact")
    for text in (found[0], one.generate(PROMPTS, GREEDY)[0].text or ""):
        assert text.endswith("#### 8"), text
    assert scores == pytest.approx(one.score(range(40)), abs=5e-2)


@pytest.mark.gpu
def test_a_process_has_ranks_again() -> None:
    """The second time it meets a process that counts from the beginning: torch's symmetric memory waits for ever then."""
    for _ in range(2):
        with LLM(tp=2, device=SHARED, cache_tokens=4096) as llm:
            found = llm.generate(PROMPTS[1:], SamplingParams(max_tokens=2, temperature=0.0))
        assert [len(c.token_ids) for c in found] == [2]


@pytest.mark.gpu
def test_a_killed_rank_ends_a_job_on_a_gpu() -> None:
    """Rank 0 may wait in a kernel that never ends: then its process does."""
    harmed = run_harmed(1, "kill", 25.0, 2, "--device", SHARED, "--dtype", "auto")
    assert harmed.came_in, harmed.err
    assert harmed.code == 2 and "rank 1" in harmed.err and "was killed by SIGKILL" in harmed.err, harmed.err
    assert harmed.seconds < 15 and not harmed.left and not harmed.shared, harmed
