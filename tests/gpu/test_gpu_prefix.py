"""The prefix cache on a CUDA device: texts behind found pages, in captured steps too, and time to the first token."""

import pytest
from drafted_texts import find_parted, judge

from saccade import LLM, SamplingParams
from saccade.bench.steps.prefix import bench_prefix
from saccade.eval.tasks import draw_test


@pytest.mark.gpu
@pytest.mark.parametrize("cached", ["bf16", "fp8"])  # index keys and latents
@pytest.mark.parametrize("speculate", [0, 3])
def test_texts_behind_found_pages_are_those_without(speculate: int, cached: str) -> None:
    """Found rows were computed in steps of another size, so near ties may part. 50 prompts, each asked twice."""
    prompts = [draw_test(("words", "recall", "story")[i % 3], i, 512).prompt for i in range(50)]
    params = SamplingParams(temperature=0.0, max_tokens=48, logprobs=5)
    options = {"device": "cuda", "kernels": "fast", "index_cache": cached, "latent_cache": cached, "max_requests": 16}
    options["activations"] = "exact"  # what is left of a long prompt behind found pages may be short, and not rounded
    plain = LLM(prefix_cache=False, **options).generate(prompts, params)  # type: ignore[arg-type]
    llm = LLM(speculate=speculate, **options)  # type: ignore[arg-type]
    for turn in range(2):
        found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=48))
        parted = find_parted(llm, plain, found)
        print(f"speculate {speculate}, {cached}, turn {turn}: parted {parted}; {llm.stats.prefix}")
        assert judge(parted, len(prompts))
        if turn:
            assert sum(made.cached_tokens for made in found) > 0.5 * sum(len(llm.encode(p)) for p in prompts)
    pages = llm.engine.scheduler.pages
    assert pages.free == pages.count - 1


@pytest.mark.gpu
def test_the_first_token_comes_sooner_behind_a_known_beginning() -> None:
    found = bench_prefix(device="cuda", shared=2000)
    print(found)
    assert found["cached_tokens"] == 1984
